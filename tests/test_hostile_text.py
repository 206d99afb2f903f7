"""Hostile text in a corpus: no crash, the same twice, no special token, and places in errors."""

import json

import pytest
from corpus_cases import SPECIAL, files_of, read_corpus, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_cases import VOCABULARIES

from bert_fast.data.prepare import prepare
from bert_fast.tokenizer import BertTokenizer

TOKENIZER = tiny_tokenizer()
CURATED = {
    "NUL": b"a\0b c.\n",
    "control characters": bytes(range(1, 32)) + b" the\x7f\x80\x9f\n",
    "Latin-1": "Grüße.\n".encode("latin-1"),
    "UTF-16": "the whale.\n".encode("utf-16"),
    "UTF-32": "the whale.\n".encode("utf-32"),
    "overlong": b"\xc0\xaf\xe0\x80\xaf\n",
    "beyond Unicode": b"\xf4\x90\x80\x80 the\n",
    "half a surrogate": b"\xed\xa0\x80 the\n",
    "CESU-8": b"\xed\xa0\xbd\xed\xb8\x80\n",
    "cut in a character": "the 한".encode()[:-1],
    "a mark in the middle": "the \ufeffwhale.\n".encode(),
    "only marks": b"\xef\xbb\xbf\xef\xbb\xbf",
    "no newline": b"the whale",
    "CR": b"the\rwhale\r",
    "blank lines": b"\n\r\n \n\t\n",
    "nothing": b"",
    "other white space": "the\u3000whale\u2028.\u0085\xa0\u2003sea\n".encode(),
    "zero width": "the\u200b\u200d\u2060\u00adwhale\n".encode(),
    "combining": ("e" + "\u0301" * 5000 + "\n").encode(),
    "right to left": "\u202eelahw\u202c مرحبا\n".encode(),
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈 the\n".encode(),
    "private": "\ue000\U000f0000\U0010ffff\ufffe\uffff the\n".encode(),
    "a long word": b"x" * 100_000 + b"\n",
    "a long line": b"the whale. " * 10_000 + b"\n",
    "stops": b"." * 100_000 + b"\n",
    "stops and spaces": b". " * 5_000 + b"\n",
    "brackets": b"(" * 50_000 + b")" * 50_000 + b"\n",
    "all special": " ".join(SPECIAL * 3).encode() + b"\n",
    "special in words": b"a[MASK]b [ MASK ] [mask] [[MASK]] ##[SEP] [SEP]\n",
    "pieces": b"##a ##b # # ##\n",
    "ligatures": "ﬁ ǆ ß İ ŉ ﷺ\n".encode(),
    "Hangul": "각 각\n".encode(),
}


def check(tmp_path, raw, name="a.txt", **options):
    """Prepare it twice with another document, which must be there as it is."""
    path, made = tmp_path / name, []
    path.write_bytes(raw)
    (tmp_path / "good.txt").write_text("the whale. The sea.\n")
    for target in ("1", "2"):
        done = prepare(
            [path, tmp_path / "good.txt"],
            tmp_path / target,
            TOKENIZER,
            workers=0,
            held_out=0,
            **options,
        )
        made.append(files_of(tmp_path / target))
    assert made[0] == made[1]
    documents = read_corpus(done.path)["train"]
    assert len(documents[-1]) == 2
    special = {*TOKENIZER.all_special_ids} - {TOKENIZER.unk_token_id}
    assert not special & {i for document in documents for ids in document for i in ids}
    for said in done.problems.values():
        assert said["first"] and all(m.startswith((f"{name}:", "good.txt")) for m in said["first"])
    return done


@pytest.mark.filterwarnings("ignore:t.*. want")
@pytest.mark.parametrize("raw", CURATED.values(), ids=CURATED)
def test_curated_texts(tmp_path, raw):
    done = check(tmp_path, raw)
    try:
        raw.decode()
    except UnicodeDecodeError:
        assert done.problems["replaced"]["count"] >= 1
        with pytest.raises(
            ValueError, match=r"a\.txt:\d+: want UTF-8, got byte 0x.. at byte \d+ of"
        ):
            prepare(tmp_path / "a.txt", tmp_path / "3", TOKENIZER, strict=True, workers=0)
    else:
        assert ("replaced" in done.problems) == (b"\0" in raw)


def any_bytes(examples):
    @pytest.mark.filterwarnings("ignore:t.*. want")
    @settings(max_examples=examples, deadline=None)
    @given(
        st.binary(max_size=300)
        | st.text(max_size=200).map(lambda t: t.encode(errors="surrogatepass"))
        | st.lists(st.sampled_from([*SPECIAL, " ", "\n", ". ", "the", "\0", "é", "한"])).map(
            lambda parts: "".join(parts).encode()
        ),
        st.sampled_from(["txt", "jsonl", "csv"]),
    )
    def test(tmp_path_factory, raw, format):
        if format == "jsonl":
            text = raw.decode(errors="surrogateescape")
            raw += b"\n" + json.dumps({"text": text}).encode() + b"\n"
        check(tmp_path_factory.mktemp("any"), b"text\n" * (format == "csv") + raw, f"a.{format}")

    return test


test_any_bytes = any_bytes(40)
test_any_bytes_often = pytest.mark.long(any_bytes(2000))


@pytest.mark.parametrize("name", ["uncased", "cased", "korean"])
def test_special_tokens_in_a_text_are_text(tmp_path, shared, name):
    """5 of them, with 3 real vocabularies."""
    file, small = VOCABULARIES[name]
    tokenizer = BertTokenizer(shared / "data/vocab" / file, do_lower_case=small)
    text = "".join(f"The {token} is here. It{token}was.\n\n" for token in SPECIAL)
    (tmp_path / "a.txt").write_text(text)
    done = prepare(tmp_path / "a.txt", tmp_path / "c", tokenizer, held_out=0, workers=0)
    documents = read_corpus(done.path)["train"]
    assert [len(document) for document in documents] == [2] * 5
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    for document, token in zip(documents, SPECIAL, strict=True):
        ids = [i for sentence in document for i in sentence]
        assert not special & {*ids}
        assert tokenizer.unk_token_id not in ids or name == "korean"
        if name == "uncased":
            assert tokenizer.decode(ids).count(f"[ {token[1:-1].lower()} ]") == 2
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len({*SPECIAL} - {*tokenizer.convert_ids_to_tokens(plain)}) == 0  # as it is by default
