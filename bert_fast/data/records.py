"""Records of CSV and Parquet files, and bytes -> text: what the readers of texts are made of."""

import codecs
import csv
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

NOT_UTF8 = "want UTF-8"
_GROUP_BYTES = 4 << 20  # of a Parquet file that become records at a time, about
_MOST_RECORDS = 4096  # and not more than so many


def decoded(raw: bytes, start: int, whole: bool = True, before: int = 0) -> tuple[str, str, int]:
    """Return the text of bytes, what is wrong with them, and how many of them that was.

    Args:
        raw: the bytes; U+FFFD is put for those that are not UTF-8.
        start: where they begin in their file.
        whole: False: the last character may be cut in two, and is left out then.
        before: bytes of their line that stand in front of them.
    """
    try:
        text, size = codecs.utf_8_decode(raw, "strict", whole)
        return text, "", size
    except UnicodeDecodeError as error:
        at = error.start
    got = f"byte 0x{raw[at]:02x} at byte {before + at} of the line, {start + at} of the file"
    text, size = codecs.utf_8_decode(raw, "replace", whole)
    return text, f"{NOT_UTF8}, got {got}", size


def names(fields: Iterable[str]) -> str:
    """Return the first ten of them for an error's message."""
    return ", ".join(repr(name)[:50] for name in [*fields][:10]) or "none"


class CsvRecords:
    """The records of a CSV file: (first line, fields, what is wrong with it).

    Args:
        lines: (number, where it begins in the file, the line with its end, whether all of it).
        limit: bytes of a record.
    """

    def __init__(self, lines: Iterator[tuple[int, int, bytes, bool]], limit: int) -> None:
        if csv.field_size_limit() < limit:
            csv.field_size_limit(limit)  # one for the whole process, 131,072 at first
        self._lines, self._limit = lines, limit
        self._reader = csv.reader(_Physical(self), strict=True)
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
                self.problem = f"want at most {self._limit:,} bytes in a record, got more"
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
        if not whole or self._size > self._limit:
            raise _TooLongError
        text, problem, _ = decoded(raw, start)
        self.problem = self.problem or problem
        return text


class _TooLongError(Exception):
    """A record goes on for too long."""


class _Physical:
    """An iterator that, unlike a generator, goes on after it has raised."""

    def __init__(self, records: CsvRecords) -> None:
        self._records = records

    def __iter__(self) -> "_Physical":
        return self

    def __next__(self) -> str:
        return self._records.next_line()


class ParquetError(ValueError):
    """A Parquet file is damaged, or has no such column of texts."""


def parquet_texts(file: BinaryIO, column: str) -> Iterator[tuple[float, bytes | None]]:
    """Yield (share of the file that is read, a record's text in UTF-8 or None) for each record.

    Args:
        file: must be one in which can be sought.
        column: of strings, or of bytes.

    Raises:
        ParquetError: there is no such column, or the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file, buffer_size=1 << 20) as source:
            found = source.schema_arrow
            if (count := found.names.count(column)) != 1:
                got = f"{count} of them" if count else names(found.names)
                raise ParquetError(f"want a column {column!r}, got {got}")
            kind = found.field(column).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not _is_text(pa.types, kind):
                raise ParquetError(f"{column}: want a column of strings, got {kind}")
            done, records = 0, source.metadata.num_rows
            size = sum(_size(source.metadata.row_group(i)) for i in range(source.num_row_groups))
            most = max(1, min(_MOST_RECORDS, _GROUP_BYTES * records // max(size, 1)))
            for batch in source.iter_batches(most, columns=[column], use_threads=False):
                texts = batch.column(0)
                if isinstance(texts, pa.DictionaryArray):
                    texts = texts.dictionary_decode()
                for value in texts.cast(pa.large_binary()):
                    done += 1
                    yield done / records, value.as_py()
    except (pa.ArrowException, OSError) as error:
        message = " ".join(str(error).split())[:200]
        raise ParquetError(f"want a Parquet file, got: {message}") from error


def _is_text(types: Any, kind: Any) -> bool:
    return any(
        is_kind(kind)
        for is_kind in (
            *(types.is_string, types.is_large_string, types.is_string_view),
            *(types.is_binary, types.is_large_binary, types.is_binary_view),
        )
    )


def _size(group: Any) -> int:
    """Bytes of a row group without compression."""
    return sum(group.column(i).total_uncompressed_size for i in range(group.num_columns))
