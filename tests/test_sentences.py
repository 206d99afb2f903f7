"""Paragraphs -> sentences: where they end, where they do not, and that nothing is lost."""

import gzip
import time
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_fast.data import sentences
from bert_fast.data.sentences import split_sentences

# A bar stands where a sentence ends, two where no white space is there.
ENDS = """
The whale dived.|It came up again!|Did it?|Yes...|Then nothing…|The end
“Call me,” he said.|“What?”|“Call me Ishmael.”|He left.
(He left.)|[So did she.]|"Why?" he asked.|'Go.'|Then: none.
What?!|No way!!!|Ok.
one. two. three?|(Four) «Five.»|«Six.»
El fin.|¿Qué?|¡No!|Sí.
Он ушёл. и вернулся.|Конец.
وقف.|هل ذهب؟|نعم۔|ثم
एक वाक्य।|दूसरा वाक्य॥|तीसरा
제임스는 갔다.|그 후 왔다!|"왜?"|그랬다.
안녕……|그래…|응
彼は来た。||見た！||「勝った？」||終わり。|次
「はい。」と言った。||次の文です。||（終わり。）||次。
他说：“你好。”||然后走了。||再见！！||真的？||是
これは１．５倍です。||次
第一句。||Second one.|Third。||四
"""  # noqa: RUF001
GOES_ON = """
Mr. Smith met Mrs. Jones, Dr. Who and Prof. X on St. Mary's Rd. in May.
J. S. Bach, M. V. P. Peries and George W. Bush.
See fig. 3, vol. 2, pp. 4-5, No. 6, p. 7 and e.g. Smith et al. i.e. Them.
It cost 3.14 dollars at 9:30 p.m. EST in the U.S. Senate.
Apple Inc. Bought Google Ltd. Shares in Jan. 2020, on Feb. 3.
Gen. Lee vs. Lt. Col. Grant, Ph.D. Student, at example.com. or else
1924. 10. 1. 5
1. First item
Well... maybe not. yes! and so on? ok
“What?” he said, “No!” she cried.
U.S.’s and v2.0.
"""  # noqa: RUF001
MAY_END = """
He lives in the U.S.|The cat does not.
It works for Acme Inc.|He said so.
They came at 5 p.m.|We left.
Vitamin C.|It is good.
It began in Dec.|This was late.
He said no.|Then he left.
In 1985.|People came.|1. Item
"""


@pytest.mark.parametrize("line", [*ENDS.split("\n"), *GOES_ON.split("\n"), *MAY_END.split("\n")])
def test_where_sentences_end(line):
    want = [part.strip() for part in line.split("|") if part.strip()]
    assert split_sentences(line.replace("||", "").replace("|", " ")) == want


def test_white_space():
    assert split_sentences("") == split_sentences(" \n\t\u3000 ") == []
    assert split_sentences("  Ab.  \n Cd. ") == ["Ab.", "Cd."]
    assert split_sentences("Aa.\tB?\u00a0C!\u2028D") == ["Aa.", "B?", "C!", "D"]


WORDS = "Mr. U.S. 3. The a 。 」 と The. ' \" ... é É ?! \x1c".split(" ")


@settings(max_examples=300, deadline=None)
@given(
    st.text()
    | st.text("aB1 .。」と\"'!?…\n(\u00a0", max_size=60)
    | st.lists(st.sampled_from(WORDS)).map(" ".join)
)
def test_nothing_is_lost(text):
    """No character but white space, and none is empty or has white space around it."""
    found = split_sentences(text)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(sentence and sentence == sentence.strip() for sentence in found)
    place = 0
    for sentence in found:  # as they stand in the text, one behind the other
        place = text.index(sentence, place) + len(sentence)


@pytest.mark.parametrize(
    "piece",
    [
        ".",
        ".)",
        ". ",
        "a.\ta",
        "。",
        "Mr. ",
        "1. ",
        "P. ",
        ".'",
        "」。",
        "?! ",
        "x",
        "\u3000",
        "U.S.",
    ],
)
@pytest.mark.parametrize("start", ["", ".", "Mr. ", "。"])
def test_time_grows_with_the_text_only(piece, start):
    """A million characters of anything: a rule that looks back would take hours."""
    text = (start + piece * 250_000)[:250_000]
    began = time.process_time()
    split_sentences(text)
    assert time.process_time() - began < 3  # 0.2, mostly


def test_the_languages_of_the_corpora(shared):
    """Nothing lost in real text, and sentences of the usual length."""
    for name, least, most in (("wiki_en_core2016", 100, 170), ("wiki_ko", 50, 80)):
        path = shared / "data" / "pretrain" / f"{name}.txt.gz"
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = [*islice(file, 2000)]
        found = [split_sentences(line) for line in lines]
        for line, parts in zip(lines, found, strict=True):
            assert "".join("".join(parts).split()) == "".join(line.split())
        assert least < sum(map(len, lines)) / sum(map(len, found)) < most


@pytest.mark.parametrize(
    ("name", "broken", "text"),
    [
        ("_BEFORE_NAMES", frozenset(), "Mr. Smith"),
        ("_MAY_END", frozenset(), "Acme Inc. Bought"),
        ("_STARTERS", frozenset(), "in the U.S. The cat"),
    ],
)
def test_each_list_has_a_say(monkeypatch, name, broken, text):
    """The tests above can fail."""
    right = split_sentences(text)
    monkeypatch.setattr(sentences, name, broken)
    assert split_sentences(text) != right
