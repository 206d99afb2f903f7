"""Texts out of files: what a row is, what is named, what is bounded."""

import csv
import gzip
import io
import json
import lzma
import random
import tracemalloc
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_fast.data import readers
from bert_fast.data.readers import MAX_CHARACTERS, BadLineError, Reader


def read(tmp_path, raw, name="a.txt", **options):
    """The rows as (line, text), the reader, and what it said."""
    path = tmp_path / name
    path.write_bytes(raw)
    notes = []
    reader = Reader(str(path), note=lambda kind, message: notes.append(message), **options)
    rows = [tuple(row) for row in reader]
    assert reader.position == len(raw)
    return rows, reader, [note.removeprefix(f"{tmp_path}/") for note in notes]


def refused(tmp_path, raw, name="a.txt", **options):
    with pytest.raises(BadLineError) as error:
        read(tmp_path, raw, name, **options)
    return str(error.value).removeprefix(f"{tmp_path}/")


# --- what a row is -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "texts"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"a\nb\n", ["a", "b"]),
        (b"a\nb", ["a", "b"]),  # no newline at the end
        (b"a\r\nb\r\n\r\n", ["a", "b", ""]),
        (b"a\rb\n", ["a\rb"]),  # CR alone ends no line
        (b"a\n\n\nb\n", ["a", "", "", "b"]),  # an empty line is a text
        (b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n", ["a", "\ufeffb"]),  # the mark only where it stands
        (b"\xef\xbb\xbf", [""]),
        ("Grüße 한국어 \u2028 \x0b \x85 x\n".encode(), ["Grüße 한국어 \u2028 \x0b \x85 x"]),
        (b"  a \t\n", ["  a \t"]),
    ],
)
def test_lines(tmp_path, raw, texts):
    rows, reader, notes = read(tmp_path, raw)
    assert rows == [*enumerate(texts, 1)]
    assert notes == [] and reader.skipped == reader.cut == reader.replaced == 0


def test_json_lines(tmp_path):
    raw = b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"id": 1, "text": "b\\nc"}\n{"text": ""}'
    assert read(tmp_path, raw, "a.jsonl")[0] == [(1, "a"), (4, "b\nc"), (5, "")]
    assert read(tmp_path, b'{"x": "a"}', "a.ndjson", column="x")[0] == [(1, "a")]


def test_csv(tmp_path):
    """Quoted newlines, commas and quotes; the line of a record is its first."""
    raw = b'\xef\xbb\xbfid,text\r\n1,"a\r\nb, ""c"""\r\n\r\n2,d\r\n3,\r\n4,"e\n\nf"'
    want = [(2, 'a\r\nb, "c"'), (5, "d"), (6, ""), (7, "e\n\nf")]
    assert read(tmp_path, raw, "a.csv")[0] == want
    assert read(tmp_path, b"text\n", "a.csv")[0] == []
    assert read(tmp_path, b"", "a.csv")[0] == []
    long = b"text\n" + b"x" * 500_000 + b"\n"  # the csv module's own limit is 131,072
    assert len(read(tmp_path, long, "a.csv")[0][0][1]) == 500_000


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.text(), st.text(min_size=1)), max_size=5),
    st.sampled_from("\n \r\n".split(" ")),
)
def test_csv_as_the_csv_module_writes_it(tmp_path_factory, records, dos):
    # CR alone is written without quotes, and read as the end of a record
    bad = "\0" if dos else "\0\r"
    allowed = str.maketrans(dict.fromkeys([*bad, *map(chr, range(0xD800, 0xE000))], " "))
    records = [(a.translate(allowed), b.translate(allowed)) for a, b in records]
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\r\n" if dos else "\n").writerows(
        [("other", "text"), *records]
    )
    rows = read(tmp_path_factory.mktemp("csv"), file.getvalue().encode(), "a.csv")[0]
    assert [text for _, text in rows] == [b for _, b in records]


def test_stdin(monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"a\nb")))
    assert [*Reader("-")] == [(1, "a"), (2, "b")]
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"a\n\xff\n")))
    with pytest.raises(BadLineError, match=r"^<stdin>:2: want UTF-8, got byte 0xff at byte 0 "):
        list(Reader("-"))


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed(tmp_path, suffix, compress):
    """The same rows, and a damaged file is named with the line that is lost."""
    raw = b"".join(b'{"text": "%d %d"}\n' % (i, i * i) for i in range(5000))
    rows, _, _ = read(tmp_path, raw, "a.jsonl")
    assert read(tmp_path, compress(raw), f"a.jsonl{suffix}")[0] == rows
    name = f"b.jsonl{suffix.upper()}"
    assert read(tmp_path, compress(raw) + compress(raw), name)[0][5000:] == [
        (5000 + line, text) for line, text in rows
    ]
    said = refused(tmp_path, compress(raw)[:-40], f"c.jsonl{suffix}")
    assert said.startswith(f"c.jsonl{suffix}:") and "want whole compressed data" in said
    assert "d.txt" in refused(tmp_path, b"no archive", f"d.txt{suffix}")


def test_formats():
    formats = {"-": "txt", "a/b": "txt", "a.TXT": "txt", "a.jsonl": "jsonl", "x.csv": "csv"}
    formats |= {"a.csv.GZ": "csv", "a.txt.xz": "txt", "a.gz": "txt"}
    assert {name: readers.format_of(name) for name in formats} == formats
    assert readers.format_of("a.gz", "csv") == "csv"
    with pytest.raises(ValueError, match=r"a\.zip: want a format \(txt, jsonl, csv, parquet\)"):
        readers.format_of("a.zip")
    with pytest.raises(ValueError, match="format: want txt, jsonl, csv, parquet, got 'tsv'"):
        readers.format_of("a.txt", "tsv")
    with pytest.raises(ValueError, match="errors: want strict, skip, replace, repair, got 'x'"):
        Reader("a.txt", errors="x")
    with pytest.raises(ValueError, match="long: want cut, split, got 'drop'"):
        Reader("a.txt", long="drop")
    for source in ("-", "a.parquet.gz"):
        with pytest.raises(ValueError, match="want a file of Parquet that is not compressed again"):
            Reader(source, format="parquet")


# --- Parquet -------------------------------------------------------------------------------------


def parquet(columns, **options):
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_parquet(tmp_path, kind):
    """The records in order, also of several row groups, whatever the strings are stored as."""
    texts = [f"text {i} Grüße" * (i % 7) for i in range(1000)]
    raw = parquet({"id": [*range(1000)], "text": pa.array(texts, kind)}, row_group_size=300)
    assert read(tmp_path, raw, "a.parquet")[0] == [*enumerate(texts, 1)]
    assert read(tmp_path, parquet({"text": pa.array([], kind)}), "a.parquet")[0] == []


def test_bad_parquet(tmp_path):
    texts = pa.array([b"ok", b"a\xff", None, b"a\0b"], pa.binary())
    raw = parquet({"text": texts})
    got = refused(tmp_path, raw, "a.parquet")
    assert got == "a.parquet:2: want UTF-8, got byte 0xff at byte 1"
    rows, reader, notes = read(tmp_path, raw, "a.parquet", errors="repair")
    assert rows == [(1, "ok"), (2, "a\ufffd"), (3, None), (4, "a\ufffdb")]
    assert (reader.skipped, reader.replaced) == (1, 2) and len(notes) == 3
    assert notes[1] == "a.parquet:3: skipped: text: want a string, got null"
    for columns, problem in [
        ({"body": ["x"]}, "want a column 'text', got 'body'"),
        ({"text": [1]}, "text: want a column of strings, got int64"),
    ]:
        got = refused(tmp_path, parquet(columns), "a.parquet", errors="repair")
        assert got == f"a.parquet:1: {problem}"
    for broken in (b"", b"PAR1", raw[:-10], raw[:20] + b"\xff" * 20 + raw[40:]):
        got = refused(tmp_path, broken, "a.parquet", errors="repair")
        assert got.startswith("a.parquet:1: want a Parquet file, got: ")


def test_parquet_is_read_in_pieces(tmp_path):
    """100 MB of texts in one row group, a page of which is the least that is held."""
    path, table = tmp_path / "a.parquet", pa.table({"text": ["x" * 100_000] * 1000})
    pq.write_table(table, path, use_dictionary=False, write_batch_size=10)
    before = pa.total_allocated_bytes()
    most = count = 0
    for row in Reader(str(path)):
        most, count = max(most, pa.total_allocated_bytes() - before), count + 1
        assert len(row.text) == 100_000
    assert count == 1000 and most < 30e6


# --- bad lines -----------------------------------------------------------------------------------

BAD = [  # name, the bytes, the line that is bad, how it is named
    ("a.txt", b"ok\n\xffx\nok\n", 2, "want UTF-8, got byte 0xff at byte 0 of the line, 3 of the"),
    ("a.txt", b"\xef\xbb\xbfab\xe4\xf6\n", 1, "got byte 0xe4 at byte 2 of the line, 5 of the file"),
    ("a.txt", b"ok\nok\n\xed\xa0\x80\n", 3, "got byte 0xed at byte 0 of the line, 6 of the file"),
    ("a.txt", b"ok\n\xe2\x82", 2, "got byte 0xe2 at byte 0"),
    ("a.txt", b"ok\n\nab\0c\n", 3, "want text, got NUL at character 2"),
    ("a.txt", "ok".encode("utf-16"), 1, "want UTF-8, got byte 0xff at byte 0"),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', 2, "want a JSON object, got Expecting value"),
    ("a.jsonl", b'{"text": "a"}\n["text"]\n', 2, "want a JSON object, got list"),
    ("a.jsonl", b"\n" + b"[" * 100_000 + b"\n", 2, "want a JSON object, got "),
    ("a.jsonl", b'{"text": "a"}\n\n{"txt": "", "b": 1}\n', 3, "a field 'text', got 'txt', 'b'"),
    ("a.jsonl", b"{}", 1, "want a field 'text', got none"),
    ("a.jsonl", b'{"text": null}', 1, "text: want a string, got NoneType"),
    ("a.jsonl", b'{"text": "a\xff"}', 1, "want UTF-8, got byte 0xff at byte 11 of the line"),
    ("a.jsonl", b'{"text": "a\\u0000"}', 1, "want text, got NUL at character 1"),
    ("a.jsonl", b'{"text": "ab\\ud83d"}', 1, "half a surrogate pair, U+D83D, at 2"),
    ("a.csv", b'a,text\n1,"x\ny"\n2\n', 4, "want 2 fields as in the first line, got 1"),
    ("a.csv", b"a,text\n1,Hello, world\n", 2, "want 2 fields as in the first line, got 3"),
    ("a.csv", b'a,text\n1,"x"y\n2,z\n', 2, "want a CSV record, got "),
    ("a.csv", b'a,text\n1,x\n2,"y\nz', 3, "want a CSV record, got unexpected end of data"),
    (
        "a.csv",
        b'a,text\n1,"x\n\xff"\n2,z\n',
        2,
        "want UTF-8, got byte 0xff at byte 0 of the line, 12",
    ),
    ("a.csv", b"a,text\n1,x\0\n", 2, "want "),
    ("a.csv", b"a,text\n1,x\ry\n", 2, "want a CSV record, got new-line character"),
]


@pytest.mark.parametrize(("name", "raw", "line", "problem"), BAD)
def test_bad_lines(tmp_path, name, raw, line, problem):
    """Named by file and line; the others are read, where they are to be skipped."""
    got = refused(tmp_path, raw, name)
    assert got.startswith(f"{name}:{line}: ") and problem in got
    rows, reader, notes = read(tmp_path, raw, name, errors="skip")
    assert (line, None) in rows and reader.skipped == 1 == len(notes)
    assert notes[0].startswith(f"{name}:{line}: skipped: ") and problem in notes[0]
    assert all(text is not None for number, text in rows if number != line)
    assert [number for number, _ in rows] == sorted({number for number, _ in rows})


@pytest.mark.parametrize(
    ("name", "raw", "text"),
    [
        ("a.txt", b"a\xff b\0", "a\ufffd b\ufffd"),
        ("a.txt", b"\xe2\x82", "\ufffd"),
        ("a.jsonl", b'{"text": "a\xff\\ud83d\\u0000"}', "a\ufffd\ufffd\ufffd"),
        ("a.csv", b'text\n"\xe4\n\xf6"\n', "\ufffd\n\ufffd"),
    ],
)
def test_replaced(tmp_path, name, raw, text):
    rows, reader, notes = read(tmp_path, raw, name, errors="replace")
    assert [t for _, t in rows] == [text] and reader.replaced == 1 == len(notes)
    assert ": replaced: want UTF-8, got byte 0x" in notes[0]


@pytest.mark.parametrize("raw", [b'{"text": \n', b"{}\n", b'{"text": 3}\n'])
def test_what_has_no_text_cannot_be_replaced(tmp_path, raw):
    assert refused(tmp_path, raw, "a.jsonl", errors="replace").startswith("a.jsonl:1: ")


@pytest.mark.parametrize("errors", readers.ERRORS)
@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"a,b\n1,2\n", "want a column 'text' in the first line, got 'a', 'b'"),
        (b"text,text\n1,2\n", "want a column 'text' in the first line, got 2 of them"),
        (b"\ntext\xff\nx\n", "want UTF-8, got byte 0xff"),
    ],
)
def test_csv_without_the_column(tmp_path, raw, problem, errors):
    assert problem in refused(tmp_path, raw, "a.csv", errors=errors)


def test_the_number_of_a_bad_line_far_down(tmp_path):
    rng = random.Random(0)
    lines = [b"x" * rng.randrange(200) for _ in range(5000)]
    lines[4321] = b"\xc3("
    start = sum(len(line) + 1 for line in lines[:4321])
    got = refused(tmp_path, b"\n".join(lines))
    assert got.startswith("a.txt:4322: ") and f" {start} of the file" in got


# --- what is too long ----------------------------------------------------------------------------


@pytest.mark.parametrize("letter", ["x", "ü", "한", "😀"])
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_long_lines_are_cut(tmp_path, monkeypatch, letter, end):
    """At the last whitespace within the limit, else at the limit; what fits stays whole."""
    monkeypatch.setattr(readers, "MAX_CHARACTERS", 100)
    monkeypatch.setattr(readers, "_BUFFER", 64)
    word = letter * 9
    for text, kept in [
        (letter * 100, letter * 100),
        (letter * 101, letter * 100),
        (letter * 10_000, letter * 100),
        (letter * 100 + " x", letter * 100),  # whitespace just behind the limit
        (f"{letter} {letter * 98} x", f"{letter} {letter * 98}"),
        (f"{word} " * 200, (f"{word} " * 10)[:-1]),
        (" " + letter * 200, (" " + letter * 200)[:100]),
        (word + "\u3000" + letter * 200, word),
    ]:
        raw = f"a\n{text}{end}" + ("b" if end else "")
        rows, reader, notes = read(tmp_path, raw.encode())
        assert rows == [(1, "a"), (2, kept), *([(3, "b")] if end else [])], text
        assert reader.cut == (text != kept) == len(notes)
        assert all(note == f"a.txt:2: cut after {len(kept)} characters" for note in notes)


@pytest.mark.parametrize("letter", ["x", "ü", "한", "😀"])
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_long_lines_become_several_texts(tmp_path, monkeypatch, letter, end):
    """Nothing but white space is lost, none is longer than the limit, words stay whole."""
    monkeypatch.setattr(readers, "MAX_CHARACTERS", 100)
    monkeypatch.setattr(readers, "_BUFFER", 64)
    word = letter * 9
    for text, count in [
        (letter * 100, 1),
        (letter * 101, 2),
        (letter * 64, 1),
        (letter * 6400, 64),
        (f"{word} " * 200, None),
        (f"{word} " * 9 + letter * 11, 2),
        (" " * 1000, None),
        (f"{letter} " + letter * 250, None),
    ]:
        for name in ("a.txt", "a.jsonl"):
            raw = f"a\n{text}{end}" + ("b" if end else "")
            if name == "a.jsonl":
                raw = "".join(json.dumps({"text": t}) + "\n" for t in ("a", text, "b"))
            rows, reader, notes = read(tmp_path, raw.encode(), name, long="split")
            pieces = [t for line, t in rows if line == 2]
            last = [(3, "b")] if end or name == "a.jsonl" else []
            assert rows == [(1, "a"), *((2, piece) for piece in pieces), *last], (text, name)
            assert "".join(pieces) == text and max(map(len, pieces)) <= 100
            assert count is None or len(pieces) == count
            if text == f"{word} " * 200:
                assert all(p.startswith(" ") or p == pieces[0] for p in pieces)
            assert reader.split == (len(text) > 100) == len(notes) and not reader.cut
            said = f"{name}:2: split into {len(pieces)} texts"
            assert all(note == said for note in notes)


def test_long_lines_with_bad_bytes(tmp_path, monkeypatch):
    """Replaced in the text they are in, and named by where they are in the file."""
    monkeypatch.setattr(readers, "MAX_CHARACTERS", 100)
    monkeypatch.setattr(readers, "_BUFFER", 64)
    raw = b"ok\n" + b"word " * 50 + b"a\xffb " + b"word " * 50 + b"\nok\n"
    rows, reader, _ = read(tmp_path, raw, long="split", errors="repair")
    assert "".join(t for _, t in rows) == f"ok{raw[3:-4].decode(errors='replace')}ok"
    assert (reader.replaced, reader.split) == (1, 1)
    got = refused(tmp_path, raw, long="split")
    assert got == "a.txt:2: want UTF-8, got byte 0xff at byte 251 of the line, 254 of the file"


def test_long_lines_are_never_held(tmp_path):
    """100 MB in a line, without a space and with bad bytes behind the limit."""
    path = tmp_path / "a.txt"
    with open(path, "wb") as file:
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b"\xff\nlast\n")
    tracemalloc.start()
    rows = [*Reader(str(path))]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [len(text) for _, text in rows] == [MAX_CHARACTERS, 4]
    assert peak < 20e6
    tracemalloc.start()
    count = sum(len(row.text) for row in Reader(str(path), long="split", errors="repair"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 100_000_005 and peak < 20e6


@pytest.mark.parametrize(
    ("name", "start", "end"),
    [("a.jsonl", b'{"text": "', b'"}\n'), ("a.csv", b'"', b'"\n'), ("a.csv", b'"', b"")],
)
def test_long_records_are_refused(tmp_path, monkeypatch, name, start, end):
    monkeypatch.setattr(readers, "MAX_RECORD", 1000)
    first = json.dumps({"text": "a"}).encode() + b"\n" if name == "a.jsonl" else b"text\n"
    for body in (b"x" * 2000, b"x\n" * 1000 if name == "a.csv" else b"x" * 5000):
        raw = first + start + body + end
        got = refused(tmp_path, raw, name)
        assert got.startswith(f"{name}:2: want at most 1,000 bytes")
    raw = first + start + b"x" * 2000 + b'"}\n' + first.replace(b"text\n", b"y\n")
    rows, reader, _ = read(tmp_path, raw, name, errors="skip")
    assert rows[-2:] == [(2, None), (3, "a" if name == "a.jsonl" else "y")] and reader.skipped == 1


def test_long_texts_in_records_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_CHARACTERS", 100)
    raw = json.dumps({"text": "word " * 50}).encode()
    rows, reader, _ = read(tmp_path, raw, "a.jsonl")
    assert len(rows[0][1]) == 99 and reader.cut == 1


# --- anything ------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(readers.FORMATS), st.sampled_from(readers.ERRORS))
def test_any_bytes(tmp_path_factory, raw, format, errors):
    """Rows or a named line; nothing else, and of a text file a row for each line."""
    path = tmp_path_factory.mktemp("any") / "a"
    raw = b"text\n" * (format == "csv") + raw
    path.write_bytes(raw)
    reader = Reader(str(path), format=format, errors=errors)
    try:
        rows = [*reader]
    except BadLineError as error:
        assert str(error).startswith(f"{path}:") and "\n" not in str(error)
        whole = format in ("csv", "parquet")  # without a header there is nothing to read
        assert errors == "strict" or whole or (errors == "replace" and format == "jsonl")
        return
    assert all(text is None or text.encode() is not None for _, text in rows)
    assert [line for line, _ in rows] == sorted({line for line, _ in rows})
    if format == "txt":
        assert len(rows) == raw.count(b"\n") + (raw[-1:] not in (b"", b"\n"))
        assert reader.skipped == sum(text is None for _, text in rows)
