"""Files -> documents: where they end, and what becomes of bad input."""

import errno
import gzip
import json
import lzma
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_fast.data import documents as module
from bert_fast.data import readers
from bert_fast.data.documents import NAMED, Documents


def write(tmp_path, raw, name="a.txt"):
    path = tmp_path / name
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    return str(path)


def read(*sources, **options):
    """The documents' paragraphs, the stream, and what it said."""
    notes = []
    stream = Documents(sources, note=notes.append, **options)
    found = [document.paragraphs for document in stream]
    assert len(found) >= sum(stream.counts) and stream.position == readers.total_size(sources)
    return found, stream, notes


# --- where documents end -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "want"),
    [
        ("a\nb\n\nc\n", [["a", "b"], ["c"]]),
        ("\n\n a\r\n\r\n\t\n\nb", [[" a"], ["b"]]),  # any blank lines, also of white space
        ("a\n \u3000\nb\n\n\n", [["a"], ["b"]]),
        ("a", [["a"]]),
        ("", []),
        ("\n \n\n", []),
    ],
)
def test_text_files(tmp_path, raw, want):
    path = write(tmp_path, raw)
    found, stream, notes = read(path)
    assert found == want and stream.counts == [len(want)]
    assert stream.problems.counts == ({} if want else {"empty": 1})
    assert notes == ([] if want else [f"{path}: want a document, got none"])


def test_a_document_a_line(tmp_path):
    path = write(tmp_path, "a\n\n b. c\n")
    assert read(path, documents="line")[0] == [["a"], [" b. c"]]


def test_records(tmp_path):
    """Each is a document, and its newlines end paragraphs."""
    rows = ["a\nb\n\nc", "d", "", " \n"]
    raw = "".join(json.dumps({"body": row}) + "\n" for row in rows)
    path = write(tmp_path, raw, "a.jsonl")
    found, stream, notes = read(path, column="body")
    assert found == [["a", "b", "c"], ["d"]]
    assert stream.problems.counts == {"skipped": 2}
    assert notes[0] == f"{path}:3: skipped: want a text, got an empty one"
    path = write(tmp_path, 'id,body\n1,"a\nb"\n2,c\n', "a.csv")
    assert read(path, column="body")[0] == [["a", "b"], ["c"]]


def test_many_files(tmp_path):
    """The end of a file ends a document; numbers go on; compressed ones too."""
    paths = [
        write(tmp_path, "a\n\nb\n"),
        write(tmp_path, gzip.compress(b"c\nd", mtime=0), "b.txt.gz"),
        write(tmp_path, lzma.compress(b"e\n\nf"), "c.xz"),
        write(tmp_path, '{"text": "g"}\n', "d.jsonl"),
    ]
    stream = Documents(paths)
    found = [*stream]
    assert [d.paragraphs for d in found] == [["a"], ["b"], ["c", "d"], ["e"], ["f"], ["g"]]
    assert [d.number for d in found] == [0, 1, 2, 3, 4, 5]
    assert [(d.source, d.line) for d in found] == [(0, 1), (0, 3), (1, 1), (2, 1), (2, 3), (3, 1)]
    assert stream.counts == [2, 1, 2, 1]
    assert [*stream] == found  # and once more
    seen = []
    texts = stream.paragraphs(lambda *facts: seen.append(facts))
    assert [*texts] == [*texts] == ["a", "b", "c", "d", "e", "f", "g"]
    assert seen[-1] == (2, readers.total_size(paths), 14)


def test_long_documents_are_divided(tmp_path, monkeypatch):
    """Between paragraphs; the parts share the number, and are counted once."""
    monkeypatch.setattr(module, "MAX_DOCUMENT", 10)
    path = write(tmp_path, "aaaa\nbbbb\ncccc\ndddddddddddddd\ne\n\nf\n\ngggg\nhhhhhhh\n")
    found = [*Documents([path])]
    assert [(d.number, d.line, d.paragraphs) for d in found] == [
        (0, 1, ["aaaa", "bbbb"]),
        (0, 3, ["cccc"]),
        (0, 4, ["d" * 14]),
        (0, 5, ["e"]),
        (1, 7, ["f"]),
        (2, 9, ["gggg"]),
        (2, 10, ["hhhhhhh"]),
    ]
    found, stream, notes = read(path)
    assert stream.counts == [3] and stream.problems.counts == {"divided": 2}
    assert notes[0] == f"{path}:1: divided: a document of more than 10 characters"


@pytest.mark.parametrize("documents", ["blank", "line"])
def test_parts_of_a_long_line_are_one_document(tmp_path, monkeypatch, documents):
    monkeypatch.setattr(readers, "MAX_CHARACTERS", 10)
    monkeypatch.setattr(readers, "_BUFFER", 16)
    path = write(tmp_path, "word " * 9 + " " * 30 + "end\n\nb\n")
    found, stream, _ = read(path, documents=documents)
    assert len(found) == 2 and found[1] == ["b"]
    assert "".join(found[0]).split() == ["word"] * 9 + ["end"]
    assert stream.problems.counts == {"split": 1}


# --- bad input -----------------------------------------------------------------------------------

DAMAGED = gzip.compress(b"a\n\nb\nc\n", mtime=0)[:-9]
BAD = [  # name, bytes, documents that are left, problems, what is said of the first, by strict too
    (
        "a.txt",
        b"ok\n\na\xffb\n",
        [["ok"], ["a\ufffdb"]],
        "replaced",
        "3: ",
        "got byte 0xff at byte 1",
    ),
    ("a.txt", b"a\0b\n", [["a\ufffdb"]], "replaced", "1: ", "got NUL at character 1"),
    ("a.txt", b"\xed\xa0\x80b\n", [["\ufffd\ufffd\ufffdb"]], "replaced", "1: ", "got byte 0xed"),
    ("a.txt", b"", [], "empty", " want a document", "got none"),
    ("a.txt", b"\n\n \n", [], "empty", " want a document", "got none"),
    ("a.jsonl", b'{"text": "a"}\n{"text"\n', [["a"]], "skipped", "2: ", "want a JSON object"),
    ("a.jsonl", b'{"text": "a"}\n{"x": 1}\n', [["a"]], "skipped", "2: ", "want a field 'text'"),
    ("a.jsonl", b'{"text": "a\\ud800"}\n', [["a\ufffd"]], "replaced", "1: ", "half a surrogate"),
    ("a.csv", b"a,text\n1,x\n2\n", [["x"]], "skipped", "3: ", "want 2 fields"),
    ("a.csv", b"a,b\n1,x\n", [], "damaged", "1: ", "want a column 'text'"),
    ("a.parquet", b"PAR1", [], "damaged", "1: ", "want a Parquet file"),
    ("a.gz", DAMAGED, [["a"], ["b", "c"]], "damaged", "", "whole comp"),
    ("a.xz", b"a\n", [], "damaged", "1: ", "want whole compressed data"),
]


@pytest.mark.parametrize(("name", "raw", "left", "kind", "where", "what"), BAD)
def test_bad_input_is_counted_and_named(tmp_path, name, raw, left, kind, where, what):
    path = write(tmp_path, raw, name)
    notes = []
    stream = Documents([path], note=notes.append)
    assert [document.paragraphs for document in stream] == left
    wanted = {kind: 1} if left or kind == "empty" else {kind: 1, "empty": 1}
    assert stream.problems.counts == wanted
    assert notes[0].startswith(f"{path}:{where}") and what in notes[0] and "\n" not in notes[0]
    first = stream.problems.facts()[kind]
    assert first == {"count": 1, "first": [notes[0].removeprefix(f"{tmp_path}/")]}
    with pytest.raises(ValueError) as error:
        [*Documents([path], strict=True)]
    assert str(error.value).startswith(f"{path}:") and what in str(error.value)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/mem is Linux's")
def test_a_file_that_the_system_does_not_read(tmp_path):
    """As one with a broken block; reading the memory's first byte is an error, too."""
    good, bad = write(tmp_path, "a\n"), "/proc/self/mem"
    stream = Documents([bad, good], format="txt")
    assert [document.paragraphs for document in stream] == [["a"]]
    assert stream.problems.counts == {"damaged": 1, "empty": 1}
    assert stream.problems.first["damaged"] == ["mem: Input/output error"]
    with pytest.raises(OSError) as caught:
        [*Documents([bad, good], format="txt", strict=True)]
    assert (caught.value.filename, caught.value.errno) == (bad, errno.EIO)


@pytest.mark.parametrize("text", ['""', '" \\n"', "null"])
def test_strict_stops_at_a_record_without_a_text(tmp_path, text):
    path = write(tmp_path, f'{{"text": "a"}}\n{{"text": {text}}}\n', "a.jsonl")
    assert len([*Documents([path])]) == 1
    with pytest.raises(ValueError, match=r"a\.jsonl:2: .*want a (text|string), got"):
        [*Documents([path], strict=True)]


def test_the_others_are_read_all_the_same(tmp_path):
    paths = [write(tmp_path, raw, f"{i}{name}") for i, (name, raw, *_) in enumerate(BAD)]
    paths.append(write(tmp_path, "last\n", "last.txt"))
    found, stream, _ = read(*paths)
    assert found == [*(d for _, _, left, *_ in BAD for d in left), ["last"]]
    kinds = [kind for _, _, _, kind, _, _ in BAD]
    left = {kind: kinds.count(kind) for kind in kinds}
    left["empty"] += sum(not left for _, _, left, kind, *_ in BAD if kind == "damaged")
    assert stream.problems.counts == left


def test_what_is_said_is_bounded(tmp_path):
    path = write(tmp_path, b"a\xff\n" * 1000)
    _, stream, notes = read(path)
    assert stream.problems.counts == {"replaced": 1000}
    assert len(stream.problems.first["replaced"]) == NAMED and len(notes) == NAMED + 1
    assert notes[-1] == "further ones of this kind (replaced) are only counted"
    assert len([*stream]) == 1
    assert len(notes) == NAMED + 1 and stream.problems.counts == {"replaced": 1000}


def test_refused_before_anything_is_read(tmp_path):
    path = write(tmp_path, "a")
    for sources, options, error, said in [
        ([path, f"{path}no"], {}, FileNotFoundError, "no: want a file, got nothing"),
        ([str(tmp_path)], {}, IsADirectoryError, "want a file, got a directory"),
        ([write(tmp_path, "a", "a.zip")], {}, ValueError, "the suffix .zip does not tell it"),
        ([], {}, ValueError, "sources: want a file at least, got none"),
        (
            [path],
            {"lines": "words"},
            ValueError,
            "lines: want paragraphs or sentences, got ",
        ),
        ([path], {"documents": "x"}, ValueError, "documents: want blank or line, got 'x'"),
    ]:
        with pytest.raises(error, match=said):
            Documents(sources, **options)


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=200)
    | st.text("ab \n\r\0\ud800.").map(lambda t: t.encode(errors="surrogatepass")),
    st.sampled_from(["txt", "jsonl", "csv", "parquet"]),
    st.sampled_from(module.DOCUMENTS),
)
def test_any_bytes(tmp_path_factory, raw, format, documents):
    """Documents of valid text, the same twice; of a text file everything but white space."""
    path = write(tmp_path_factory.mktemp("any"), raw, "a")
    stream = Documents([path], format=format, documents=documents)
    found = [*stream]
    assert [*stream] == found and sum(stream.counts) == len(found)
    texts = [text for document in found for text in document.paragraphs]
    assert all(text.encode() and not text.isspace() and "\0" not in text for text in texts)
    if format == "txt":
        whole = raw.removeprefix(b"\xef\xbb\xbf").decode(errors="replace").replace("\0", "\ufffd")
        assert "".join("".join(texts).split()) == "".join(whole.split())
