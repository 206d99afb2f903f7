"""The ids of transformers' fast tokenizer on every text we have, and on hostile ones."""

import random
import subprocess
import sys
import threading
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_cases import EVERYTHING, VOCABULARIES, both, difference, texts

from bert_fast.tokenizer import BertTokenizer

WORDS = [*"ab", "the", "un", "##want", "##ed", "runn", "##ing", "##b", *"eé[].中"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SETTINGS = (  # taken in turn, chunk by chunk, beside the whole texts
    {"truncation": True, "max_length": 24, "padding": True, "return_tensors": "pt"},
    {"truncation": "only_first", "max_length": 300, "padding": "max_length"},
    {"truncation": True, "max_length": 60, "stride": 7, "return_overflowing_tokens": True},
    {"truncation": True, "max_length": 128, "return_tensors": "np", "padding_side": "left"},
    {"truncation": "longest_first", "max_length": 17, "padding": True, "pad_to_multiple_of": None},
    {"split_special_tokens": True, "add_special_tokens": False},
)


@pytest.fixture(scope="module")
def small() -> BertTokenizer:
    return BertTokenizer([*SPECIAL, *WORDS])


def compare(ours, theirs, chunk, number):
    """A chunk of texts whole, and each third chunk under one of the settings."""
    split = isinstance(chunk[0], list)
    inputs = list(zip(*chunk, strict=True)) if isinstance(chunk[0], tuple) else [chunk]
    inputs = [list(i) for i in inputs]
    turn, third = divmod(number, 3)
    turns = [] if third else [(SETTINGS[turn % len(SETTINGS)], ())]
    for options, attributes in ((EVERYTHING, ("word_ids",)), *turns):
        options = options | {"is_split_into_words": split}
        with_pair = [*inputs, chunk[::-1]] if turn % 3 == 1 and len(inputs) == 1 else inputs
        for side in (ours, theirs):
            side.truncation_side = "left" if turn % 4 == 3 else "right"
        results = []
        for tokenizer in (ours, theirs):
            try:
                results.append(tokenizer(*with_pair, **options))
            except Exception as error:  # of a class of its own in either
                results.append(error)
        failed = [isinstance(result, Exception) for result in results]
        assert failed[0] == failed[1], (options, results)
        if not any(failed):
            assert not (found := difference(*results, attributes)), (options, found)


def sweep(shared, name, each):
    """Compare; `each` picks from the texts of a file. Returns how many texts there were."""
    ours, theirs = both(shared, name)
    count, number = 0, 0
    for file, found in texts(shared):
        picked = each(found)
        for start in range(0, len(picked), 50):
            try:
                compare(ours, theirs, picked[start : start + 50], number)
            except AssertionError as error:
                raise AssertionError(f"{file}, texts from {start}: {error}") from error
            number += 1
        count += len(picked)
    return count


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_sample_of_every_set(shared, name):
    generator = random.Random(name)
    assert sweep(shared, name, lambda found: generator.sample(found, min(len(found), 20))) > 500


@pytest.mark.long
@pytest.mark.parametrize("name", VOCABULARIES)
def test_every_text(shared, name):
    assert sweep(shared, name, lambda found: found) > 240_000


# --- hostile texts -------------------------------------------------------------------------------

HOSTILE = (
    "",
    " ",
    "\t\n\r\v\f \x85\xa0\u2028\u2029\u3000",
    "\0",
    "hello\0world",
    "\x01\x02\x1b[31mred\x1b[0m\x7f\x80\x9f",
    "\u200b\u200c\u200d\u200e\u2060\ufeff",
    "\ufeffBOM in front",
    "\ufffd\ufffe\uffff",
    "\U0010ffff\U000e0001\U000f0000",
    "\ue000\uf8ff private",
    "e\u0301 e\u0301\u0302\u0303 \u0301alone",
    "Z̸̡̢̛̗̘̙̜̝̞̟̠͇̊̋̌̍̎̏̐̑a̴l̵g̶o̷",
    "a" + "\u0300" * 5000,
    "İstanbul \u0131I ǅ ŉ ß ẞ ﬁ",
    "ΑΣ ΣΑΣ ς",
    "\u1e9b\u0323 \u212b \u2126 \ufb1d",
    "한글 \u1112\u1161\u11ab",
    "漢字かな交じり文\uff0c。\uff01\uff1f",
    "\U00020000\U0002a6d6\uf900",
    "مرحبا \u202eabc\u202c \u2067x\u2069",
    "👩‍👩‍👧‍👦🏳️‍🌈🇰🇷",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "¡¿§¶†‡•…‰\u2032″\u2039\u203a※‼⁇⁈",
    "##ing ##",
    "[MASK",
    "[ MASK ] [mask] [Mask] [[MASK]] [MASK][SEP]x[CLS]",
    "x" * 100 + " " + "x" * 101,
    "a" * 1_000_000,
    "." * 20_000,
    "a " * 20_000,
    " " * 100_000,
    "中" * 20_000,
    '<script>alert("x")</script>; DROP TABLE users; --',
    "\x00\x01" * 5000 + "b",
)


@pytest.fixture(scope="module")
def three(shared):
    return [both(shared, name) for name in ("uncased", "cased", "korean")]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_curated_hostile_texts(three, number):
    for ours, theirs in three:
        for options in (EVERYTHING, EVERYTHING | {"split_special_tokens": True}):
            want = theirs(HOSTILE[number], **options)
            assert not difference(ours(HOSTILE[number], **options), want)


def is_plain(character):
    return unicodedata.category(character) != "Cs"


PIECES = st.one_of(
    st.text(st.characters().filter(is_plain), max_size=20),
    st.binary(max_size=20).map(lambda raw: raw.decode("utf-8", "replace")),
    st.binary(max_size=20).map(lambda raw: raw.decode("latin-1")),
    st.sampled_from([*SPECIAL, *HOSTILE[:27], " ", "unwanted running"]),
)


def check_hostile(ours, theirs, parts):
    """Nothing but what transformers gives, twice the same, no special id from a text."""
    text = "".join(parts)
    got = ours(text, **EVERYTHING)
    assert not difference(got, theirs(text, **EVERYTHING))
    assert got.data == ours(text, **EVERYTHING).data
    plain = ours(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert not {*plain} & {*ours.all_special_ids} - {ours.unk_token_id}
    assert ours.decode(got["input_ids"]) == theirs.decode(got["input_ids"])


@pytest.mark.parametrize(
    "count", [200, pytest.param(2000, marks=pytest.mark.long)], ids="{}-texts".format
)
def test_generated_hostile_texts(three, count):
    @settings(max_examples=count, deadline=None, derandomize=True, database=None)
    @given(st.lists(PIECES, max_size=6), st.sampled_from(three))
    def check(parts, pair):
        check_hostile(*pair, parts)

    check()


@pytest.mark.parametrize("name", ["uncased", "cased", "korean"])
@pytest.mark.parametrize("literal", SPECIAL)
def test_special_tokens_in_a_text(shared, name, literal):
    """Recognised as in transformers, unless texts are to be texts."""
    ours, theirs = both(shared, name)
    text, words = f"say {literal}, not{literal}it", [literal, "it"]
    special = ours.convert_tokens_to_ids(literal)
    assert not difference(ours(text), theirs(text))
    assert ours(text, add_special_tokens=False)["input_ids"].count(special) == 2
    for by_default in (False, True):
        ours.split_special_tokens = by_default
        options = {} if by_default else {"split_special_tokens": True}
        got = ours(text, **options)
        assert not difference(got, theirs(text, split_special_tokens=True))
        assert special not in ours(text, add_special_tokens=False, **options)["input_ids"]
        options |= {"add_special_tokens": False, "is_split_into_words": True}
        assert special not in ours(words, **options)["input_ids"]


def test_no_special_id_even_where_it_is_a_word():
    """A vocabulary whose special tokens look like words gives them away only to who asks."""
    names = {"pad_token": "pad", "unk_token": "unk", "cls_token": "cls", "mask_token": "##mask"}
    tokenizer = BertTokenizer(["pad", "unk", "cls", "[SEP]", "##mask", "x"], **names)
    tokenizer.add_tokens("added")
    ids = tokenizer("pad cls xmask added unk", add_special_tokens=False)["input_ids"]
    assert {0, 2, 6} <= {*ids}
    options = {"add_special_tokens": False, "split_special_tokens": True}
    assert {*tokenizer("pad cls xmask added unk x", **options)["input_ids"]} == {1, 5}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("ab\ud800c", ValueError, r"text\[0\]: .*surrogate U\+D800 at character 2"),
        (["ok", "x\udfff"], ValueError, r"text\[1\]: .*U\+DFFF at character 1"),
        ([("ok", "\ud83d")], ValueError, r"text_pair\[0\]: .*at character 0"),
        (["ok", b"raw"], TypeError, r"text\[1\]: want a str, .*got bytes"),
        (b"raw", TypeError, "text: want a str or a list, got bytes"),
        (None, TypeError, "text: want a str or a list, got NoneType"),
        ([None], TypeError, r"text\[0\]: .*NoneType"),
        ([("a", 3)], TypeError, r"text_pair\[0\]: want a str, got int"),
        (["ok", ["a", "b", "c"]], TypeError, r"text\[1\]: .*list"),
    ],
)
def test_what_is_no_text_is_refused_by_place(small, text, error, message):
    with pytest.raises(error, match=message):
        small(text)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ([["ok"], ["a", "b\ud800"]], ValueError, r"text\[1\]\[1\]: .*at character 1"),
        ([["ok", b"raw"]], TypeError, r"text\[0\]\[1\]: want a str, got bytes"),
        (["a", 3], TypeError, r"text\[0\]\[1\]: want a str, got int"),
        ("a text", TypeError, "want a list of words"),
    ],
)
def test_what_is_no_word_is_refused_by_place(small, text, error, message):
    with pytest.raises(error, match=message):
        small(text, is_split_into_words=True)


# --- only a part of a long text is encoded -------------------------------------------------------


def long_text(generator, size):
    """Words, punctuation, marks, control characters, Chinese and special tokens in any order."""
    parts = ["the ", "unwanted", "  ", *" \n.,é中", "\u0301", "\0", "\uff0c", "\u200b", "x" * 101]
    parts += ["[MASK]", "[MA", "SK]", "ADD", "ad.d", "ad.d"]
    return "".join(generator.choices(parts, k=size))


@pytest.mark.parametrize("count", [40, pytest.param(600, marks=pytest.mark.long)])
def test_a_long_text_is_encoded_as_if_it_were_whole(shared, monkeypatch, count):
    ours, theirs = both(shared, "uncased")
    for tokenizer in (ours, theirs):
        tokenizer.add_tokens(["ADD", "ad.d", ".\u0301,"], special_tokens=True)
    seen, cut = [], ours._engine._cut

    def watched(i, pair, *rest):
        seen.append((pair, cut(i, pair, *rest)))
        return seen[-1][1]

    monkeypatch.setattr(ours._engine, "_cut", watched)
    generator = random.Random(0)
    for _ in range(count):
        pair = generator.random() < 0.6
        sizes = [3, 40, 300, 3000] if pair else [300, 4000, 9000]
        texts = [long_text(generator, generator.choice(sizes)) for _ in "ab"]
        options = {
            "truncation": generator.choice(["longest_first", "only_first", "only_second"]),
            "max_length": generator.choice([64, 65, 130] if pair else [2, 3, 64]),
            "split_special_tokens": generator.random() < 0.3,
            **EVERYTHING,
        }
        results = []
        for tokenizer in (ours, theirs):
            try:
                results.append(tokenizer(*texts[: 1 + pair], **options))
            except Exception as error:
                results.append(error)
        if isinstance(results[1], Exception):
            assert isinstance(results[0], ValueError)
            continue
        for name in results[0]:
            assert results[0][name] == results[1][name], (name, options)
        assert results[0].word_ids() == results[1].word_ids()
    shortened = [sum(map(len, after)) < sum(map(len, before)) / 2 for before, after in seen]
    assert sum(shortened) > count / 4


def test_which_of_two_texts_is_longer_is_kept(shared):
    """The longer one keeps one token more; in characters it may be the shorter."""
    ours, theirs = both(shared, "uncased")
    options = {"truncation": True, "max_length": 64, **EVERYTHING}
    sparse = ("x" * 101 + " ") * 1000  # a token for each 102 characters
    for dense in ("a." * 290, "a." * 400, "a." * 600):  # the first is too short to be cut
        for pair in ((dense, sparse), (sparse, dense), (dense, dense), (sparse, sparse)):
            got, want = ours(*pair, **options), theirs(*pair, **options)
            assert not difference(got, want)


def test_words_are_cut_as_well(small):
    words = ["unwanted", "[MASK]"] * 50_000
    got = small(words, is_split_into_words=True, truncation=True, max_length=12, **EVERYTHING)
    want = small(words[:20], is_split_into_words=True, truncation=True, max_length=12, **EVERYTHING)
    assert not any(got[name] != want[name] for name in want) and got.word_ids() == want.word_ids()


@pytest.mark.parametrize("tokens", ["new york", " x"])
def test_an_added_token_that_holds_a_space_is_not_cut(small, tokens):
    tokenizer = BertTokenizer([*SPECIAL, *WORDS])
    tokenizer.add_tokens(tokens)
    assert tokenizer._engine._breaks(False) is None and tokenizer._engine._breaks(True)
    tokenizer = BertTokenizer([*SPECIAL, *WORDS])
    tokenizer.add_tokens("a.b\u4e2d")
    found = [tokenizer._engine._breaks(plain).findall("a.b, \u4e2d") for plain in (False, True)]
    assert found == [[",", " "], [".", ",", " ", "\u4e2d"]]


def test_a_text_that_is_too_long_is_refused(small):
    text = "a" * 5_000_001
    for options in ({}, {"truncation": True, "max_length": 8}):
        with pytest.raises(ValueError, match=r"text\[1\]: want at most 5000000 characters"):
            small(["ok", text], **options)
    with pytest.raises(ValueError, match="characters"):
        small("a " * 5_000_001, truncation=True, max_length=8, return_overflowing_tokens=True)
    with pytest.raises(ValueError, match=r"surrogate .* at character 10000002"):
        small("a " * 5_000_001 + "\ud800", truncation=True, max_length=8)


PEAK = """
import sys, time
from bert_fast.tokenizer import BertTokenizer
tokenizer = BertTokenizer(sys.argv[1])
text = "The quick brown fox, again. " * 3_600_000
for text in (text, "漢字かな" * 25_000_000):
    ids = tokenizer(text, truncation=True, max_length=512)["input_ids"]
    assert len(ids) == 512 and len(text) >= 100_000_000
print(int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) // 1024)
"""


def test_a_text_of_100_megabytes(shared):
    vocabulary = shared / "data/vocab/bert-base-uncased-vocab.txt"
    command = [sys.executable, "-c", PEAK, vocabulary]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert int(done.stdout) < 1500


# --- threads and processes -----------------------------------------------------------------------


def test_threads_do_not_disturb_each_other(shared):
    """Each thread asks for another length, side and padding, all at once."""
    ours, theirs = both(shared, "uncased")
    text = ["the quick brown fox jumps over the lazy dog " * 4, "unwanted running [MASK]"]
    options = [
        {"truncation": True, "max_length": n, "padding": n % 2 == 0, "split_special_tokens": n > 9}
        for n in range(3, 19)
    ]
    want = [theirs(text, **o).data for o in options]
    wrong = []

    def ask(i):
        for _ in range(60):
            if ours(text, **options[i]).data != want[i]:
                wrong.append(i)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(options))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FORK = """
import os, sys, threading
from bert_fast.tokenizer import BertTokenizer
tokenizer = BertTokenizer(sys.argv[1])
stop = threading.Event()
def work():
    while not stop.is_set():
        tokenizer(["the quick brown fox"] * 8, truncation=True, max_length=4, padding=True)
threads = [threading.Thread(target=work) for _ in range(3)]
[t.start() for t in threads]
for n in range(20):
    child = os.fork()
    if not child:
        ids = tokenizer("the fox", truncation=True, max_length=3 + n)["input_ids"]
        os._exit(0 if len(ids) == min(4, 3 + n) else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
[t.join() for t in threads]
"""


def test_a_forked_process_encodes(shared):
    """While threads of its parent were encoding."""
    vocabulary = shared / "data/vocab/bert-base-uncased-vocab.txt"
    command = [sys.executable, "-W", "ignore", "-c", FORK, vocabulary]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
