"""Texts out of files: plain lines, JSON lines and CSV, a bounded piece of a file at a time.

A text that cannot be had is named by file and line. What counts as a line, and so gets a row in
the output: in a text file every line, also an empty one; in JSON lines and CSV every record, while
lines with nothing on them are passed over. LF and CRLF end a line; a byte order mark is dropped.
Files whose names end in .gz or .xz are decompressed on the way.
"""

import codecs
import csv
import gzip
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

FORMATS = ("txt", "jsonl", "csv")
ERRORS = ("strict", "skip", "replace")
STDIN = "-"
MAX_CHARACTERS = 1_000_000  # of a text; the rest of it is dropped
MAX_RECORD = 16_000_000  # bytes of a JSON line or a CSV record, which have no sense in part
_BUFFER = 1 << 20
_FORMAT_OF = {"": "txt", ".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}
_COMPRESSED = {".gz": gzip.open, ".xz": lzma.open}
_LAST_WORD = re.compile(r"\s\S*\Z")
_SURROGATE = re.compile("[\ud800-\udfff]")


class BadLineError(ValueError):
    """A line that no text can be read from; its message begins with FILE:LINE."""


class Row(NamedTuple):
    """One text.

    Attributes:
        line: number of its line, or of the first of its record's lines; the first line is 1.
        text: None if the line was skipped.
    """

    line: int
    text: str | None


def format_of(source: str, wanted: str | None = None) -> str:
    """Return the format of an input: the wanted one, else what the suffix of its name says.

    Raises:
        ValueError: there is no such format, or the suffix says nothing.
    """
    if wanted is not None:
        if wanted not in FORMATS:
            raise ValueError(f"format: want {', '.join(FORMATS)}, got {wanted!r}")
        return wanted
    path = Path("" if source == STDIN else source)
    if path.suffix.lower() in _COMPRESSED:
        path = path.with_suffix("")
    suffix = path.suffix.lower()
    if suffix not in _FORMAT_OF:
        want = f"a format ({', '.join(FORMATS)})"
        raise ValueError(f"{source}: want {want}: the suffix {suffix} does not tell it")
    return _FORMAT_OF[suffix]


class Reader:
    """The texts of one file.

    Attributes:
        position: bytes of the file, as it lies on the disk, that were read.
        skipped: lines without a text.
        replaced: lines in which something became U+FFFD.
        cut: texts longer than MAX_CHARACTERS.
    """

    def __init__(
        self,
        source: str,
        *,
        format: str | None = None,
        column: str = "text",
        errors: str = "strict",
        note: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Prepare to read; nothing is opened yet.

        Args:
            source: a path, or "-" for the standard input.
            format: "txt", "jsonl" or "csv"; None: by the suffix.
            column: field of a JSON line, column of a CSV file.
            errors: what a line is answered with that is not UTF-8, holds NUL or half a surrogate
                pair: "strict" raises, "skip" gives a row without text, "replace" puts U+FFFD, which
                a tokenizer drops, where the damage is. A line without a text of its own (broken
                JSON, no such field, a CSV record with other fields than the header) is raised for,
                or with "skip" skipped.
            note: called with a line of text for each line that was skipped, changed or cut.

        Raises:
            ValueError: format or errors is none of these.
        """
        if errors not in ERRORS:
            raise ValueError(f"errors: want {', '.join(ERRORS)}, got {errors!r}")
        self.source, self.format = source, format_of(source, format)
        self.name = "<stdin>" if source == STDIN else source
        self.column, self.errors, self._note = column, errors, note
        self.position = self.skipped = self.replaced = self.cut = 0
        self._offset = self._number = 0  # bytes and lines of text that were read

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows in order.

        Raises:
            BadLineError: for a line, as `errors` has it; always for a CSV file without the column
                and where compressed data are damaged.
            OSError: the file cannot be read.
        """
        read = {"txt": self._plain, "jsonl": self._json, "csv": self._csv}[self.format]
        with _opened(self.source) as (file, on_disk):
            try:
                for row in read(file):
                    self.position = self._offset if on_disk is None else on_disk.tell()
                    yield row
                self.position = self._offset if on_disk is None else on_disk.tell()
            except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
                where = f"{self.name}:{self._number + 1}"
                raise BadLineError(f"{where}: want whole compressed data, got: {error}") from error

    def _lines(self, file: BinaryIO, limit: int) -> Iterator[tuple[int, int, bytes, bool]]:
        """Yield (number, where it begins in the file, the line with its end, whether all of it).

        What lies behind the first `limit` bytes of a line is passed over in small pieces.
        """
        while raw := file.readline(limit):
            start, size = self._offset, len(raw)
            if size == limit and raw[-1:] != b"\n":
                while rest := file.readline(_BUFFER):
                    size += len(rest)
                    if rest[-1:] == b"\n":
                        break
            self._offset += size
            whole = size == len(raw)
            self._number += 1
            if self._number == 1 and raw.startswith(codecs.BOM_UTF8):
                raw, start = raw[3:], start + 3
            yield self._number, start, raw, whole

    def _plain(self, file: BinaryIO) -> Iterator[Row]:
        # a line that is longer has more characters than are kept, each at most 4 bytes
        for number, start, raw, whole in self._lines(file, 4 * MAX_CHARACTERS + 8):
            line = raw.removesuffix(b"\n").removesuffix(b"\r") if whole else raw
            text, problem = _decoded(line, start, whole)
            yield self._row(number, text, problem)

    def _json(self, file: BinaryIO) -> Iterator[Row]:
        for number, start, raw, whole in self._lines(file, MAX_RECORD):
            if not whole:
                yield self._without(number, f"want at most {MAX_RECORD:,} bytes of JSON, got more")
                continue
            line, problem = _decoded(raw, start, True)
            if not line.strip():
                continue
            if problem and self.errors != "replace":
                yield self._row(number, "", problem)
                continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield self._without(number, f"want a JSON object, got {str(error)[:200]}")
                continue
            if not isinstance(fields, dict):
                yield self._without(number, f"want a JSON object, got {type(fields).__name__}")
            elif self.column not in fields:
                names = _names(fields)
                yield self._without(number, f"want a field {self.column!r}, got {names}")
            elif not isinstance(text := fields[self.column], str):
                got = type(text).__name__
                yield self._without(number, f"{self.column}: want a string, got {got}")
            else:
                yield self._row(number, text, problem)

    def _csv(self, file: BinaryIO) -> Iterator[Row]:
        if csv.field_size_limit() < MAX_RECORD:
            csv.field_size_limit(MAX_RECORD)  # one for the whole process, 131,072 at first
        records = _Records(self._lines(file, MAX_RECORD))
        header: list[str] | None = None
        for line, fields, problem in records:
            if header is None:
                header = fields
                where = f"{self.name}:{line}: "
                if problem:
                    raise BadLineError(where + problem)
                if (count := header.count(self.column)) != 1:
                    got = f"{count} of them" if count else _names(header)
                    want = f"want a column {self.column!r} in the first line"
                    raise BadLineError(f"{where}{want}, got {got}")
                continue
            undecoded = problem.startswith(_NOT_UTF8)
            if problem and not undecoded:
                yield self._without(line, problem)
            elif len(fields) != len(header):
                want = f"want {len(header)} fields as in the first line"
                yield self._without(line, f"{want}, got {len(fields)}")
            else:
                yield self._row(line, fields[header.index(self.column)], problem)

    def _row(self, line: int, text: str, problem: str) -> Row:
        """A text, cut and looked through; `problem`: what decoding it had to replace."""
        if len(text) > MAX_CHARACTERS:
            word = _LAST_WORD.search(text, 0, MAX_CHARACTERS + 1)
            text = text[: word.start() if word and word.start() else MAX_CHARACTERS]
            self.cut += 1
            self._note(f"{self.name}:{line}: cut after {len(text):,} characters")
        if not problem and (at := text.find("\0")) >= 0:
            problem = f"want text, got NUL at character {at}"
        if not problem and not text.isascii() and (half := _SURROGATE.search(text)):
            code = ord(half.group())
            problem = f"want text, got half a surrogate pair, U+{code:04X}, at {half.start()}"
        if not problem:
            return Row(line, text)
        if self.errors != "replace":
            return self._without(line, problem)
        self.replaced += 1
        self._note(f"{self.name}:{line}: replaced: {problem}")
        return Row(line, _SURROGATE.sub("\ufffd", text.replace("\0", "\ufffd")))

    def _without(self, line: int, problem: str) -> Row:
        """The row of a line that has no text; an error unless such lines are skipped."""
        if self.errors != "skip":
            raise BadLineError(f"{self.name}:{line}: {problem}")
        self.skipped += 1
        self._note(f"{self.name}:{line}: skipped: {problem}")
        return Row(line, None)


class _Records:
    """The records of a CSV file: (first line, fields, what is wrong with it)."""

    def __init__(self, lines: Iterator[tuple[int, int, bytes, bool]]) -> None:
        self._lines, self._reader = lines, csv.reader(_Physical(self), strict=True)
        self._number, self._size, self.problem, self._ended = 0, 0, "", False

    def __iter__(self) -> Iterator[tuple[int, list[str], str]]:
        while not self._ended:
            first, self._size, self.problem = self._number + 1, 0, ""
            fields: list[str] = []
            try:
                fields = next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                self.problem = f"want a CSV record, got {error}"
            except _TooLongError:
                self.problem = f"want at most {MAX_RECORD:,} bytes in a record, got more"
                self.problem += " (a quote that is not closed?)"
            if fields or self.problem:
                yield first, fields, self.problem

    def next_line(self) -> str:
        """Return the next line for the csv module; a record beyond the limit ends here."""
        try:
            self._number, start, raw, whole = next(self._lines)
        except StopIteration:
            self._ended = True
            raise
        self._size += len(raw)
        if not whole or self._size > MAX_RECORD:
            raise _TooLongError
        text, problem = _decoded(raw, start, True)
        self.problem = self.problem or problem
        return text


class _TooLongError(Exception):
    """A record goes on for too long."""


class _Physical:
    """An iterator that, unlike a generator, goes on after it has raised."""

    def __init__(self, records: _Records) -> None:
        self._records = records

    def __iter__(self) -> "_Physical":
        return self

    def __next__(self) -> str:
        return self._records.next_line()


_NOT_UTF8 = "want UTF-8"


def _decoded(raw: bytes, start: int, whole: bool) -> tuple[str, str]:
    """Return the text of bytes that begin at `start`, and what is wrong with them.

    Without `whole` the last character may be cut in two: it is left out.
    """
    try:
        return codecs.utf_8_decode(raw, "strict", whole)[0], ""
    except UnicodeDecodeError as error:
        at = error.start
    got = f"byte 0x{raw[at]:02x} at byte {at} of the line, {start + at} of the file"
    return codecs.utf_8_decode(raw, "replace", whole)[0], f"{_NOT_UTF8}, got {got}"


def _names(fields: "list[str] | dict[str, object]") -> str:
    return ", ".join(repr(name)[:50] for name in [*fields][:10]) or "none"


@contextmanager
def _opened(source: str) -> Iterator[tuple[BinaryIO, BinaryIO | None]]:
    """Yield a file of text, and where that is compressed the file that it comes from."""
    if source == STDIN:
        yield sys.stdin.buffer, None
        return
    with open(source, "rb", buffering=_BUFFER) as file:
        decompress = _COMPRESSED.get(Path(source).suffix.lower())
        if decompress is None:
            yield file, None
        else:
            with decompress(file, "rb") as text:
                yield text, file
