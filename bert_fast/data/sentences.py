"""Paragraphs -> sentences, by one rule for the languages whose sentences end in a stop.

A sentence ends behind one or more stops (. ! ? … and those of Arabic and Indic scripts) and the
quotes and brackets that close there, if white space follows and the next word does not begin with
a small letter. Behind the stops of Chinese and Japanese (。 and the wide forms of ! and ?) no
white space is needed; where a bracket closes behind them and Hiragana follows, the sentence goes
on (「はい。」と言った).

Behind a single full stop it does not end

- after an abbreviation that stands before a name or a number (Mr., St., vol., e.g.);
- after one that may end a sentence (Inc., p.m., U.S.), an initial (J. S. Bach) or a month, unless
  the next word is one with which sentences often begin (The, He, In ...);
- between two numbers (1924. 10. 1), and after the number that begins a paragraph or sentence.

Only white space between sentences is lost.
"""

import re

_STOPS, _WIDE = ".!?…‽؟۔।॥", "。！？｡"  # noqa: RUF001
_CLOSING = "\"'”’»›)\\]}」』）】》〉"  # noqa: RUF001
_WIDE_CLOSING = "」』）】》〉”"  # noqa: RUF001
_OPENING = "\"'“‘„«‹([{「『（【《〈¿¡"  # noqa: RUF001
_ANY = _STOPS + _WIDE

# A stop that follows no stop: nowhere is the same text looked at again and again.
_END = re.compile(
    rf"[{_ANY}](?<![{_ANY}][{_ANY}])[{_ANY}]*[{_CLOSING}]*"
    rf"(?:\s+"
    rf"|(?<=[{_WIDE}])(?![{_ANY}{_CLOSING}])"
    rf"|(?<=[{_WIDE}][{_WIDE_CLOSING}])(?![{_ANY}{_CLOSING}ぁ-ゖ]))"
    rf"(?=[{re.escape(_OPENING)}]*(\S))"
)
_LAST = re.compile(r"(?:[^\W\d_]+\.)*[^\W\d_]+\Z")
_NEXT = re.compile(rf"[{re.escape(_OPENING)}]*(\w+)(?!\.)")
_LONGEST = 16  # characters that are looked at in front of a full stop

_BEFORE_NAMES = frozenset(
    "mr mrs ms messrs mme mlle dr prof st ste mt ft rev fr hon pres gov sen rep gen lt col maj capt"
    " cmdr sgt cpl pvt adm brig supt insp det amb sec treas gens sens reps drs profs"
    " vs v cf ca c al viz e.g i.e eg ie esp approx est aka op cit"
    " fig figs vol vols pp chap ch sect eq eqs nos art arts ed eds trans".split()
)
_BEFORE_NUMBERS = frozenset(("no", "p"))
_MAY_END = frozenset(
    "inc ltd co corp bros jr sr etc a.m p.m a.d b.c dept univ assn ave blvd rd dist"
    " jan feb mar apr jun jul aug sep sept oct nov dec ph.d".split()
)
_STARTERS = frozenset(
    "The This That These Those There A An It Its He She They We You His Her Their Our My In On At"
    " By For From With Without After Before During Since Until While When Where As If Although"
    " Though Because But And Or So However Some Many Most Other Another One Two Both Each All"
    " No Not What Who Why How Then Later Also".split()
)


def split_sentences(paragraph: str) -> list[str]:
    """Return the sentences of a paragraph, without white space around them; none is empty."""
    sentences, start = [], 0
    for end in _END.finditer(paragraph):
        follows = end[1]
        if follows.islower() or (
            paragraph[end.start()] == "." and _goes_on(paragraph, start, end.start(), end)
        ):
            continue
        sentences.append(paragraph[start : end.end()].strip())
        start = end.end()
    if last := paragraph[start:].strip():
        sentences.append(last)
    return [*filter(None, sentences)] if sentences and not sentences[0] else sentences


def _goes_on(paragraph: str, start: int, stop: int, end: re.Match[str]) -> bool:
    """Return whether the full stop at `stop`, where `end` was found, ends no sentence."""
    if paragraph[stop + 1] in _ANY:
        return False
    before = paragraph[max(start, stop - _LONGEST) : stop]
    if before[-1:].isdecimal():
        number = before.lstrip().isdecimal() and stop - start < _LONGEST
        return number or end[1].isdecimal()
    if (found := _LAST.search(before)) is None:
        return False
    word = found[0]
    small = word.lower()
    initial = len(word) == 1 and word.isupper()
    if small in _BEFORE_NAMES and not initial:
        return True
    if small in _BEFORE_NUMBERS and end[1].isdecimal():
        return True
    if not initial and "." not in word and small not in _MAY_END:
        return False
    starter = _NEXT.match(paragraph, end.end())
    return starter is None or starter[1] not in _STARTERS
