"""Files of text -> documents, streamed, and what was wrong with them, counted and named.

In a text file a blank line stands between documents and each other line is a paragraph, or, with
`lines="sentences"`, a sentence; with `documents="line"` each line is a document. In JSON lines, CSV
and Parquet each record is a document, and its newlines end paragraphs or sentences. The end of a
file ends a document.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from bert_fast.data.readers import STDIN, BadLineError, Reader, Row

LINES = ("paragraphs", "sentences")
DOCUMENTS = ("blank", "line")
MAX_DOCUMENT = 4_000_000  # characters; of a longer document several are made
NAMED = 20  # problems of a kind of which the place is told


class Document(NamedTuple):
    """One document, or a part of a very long one.

    Attributes:
        number: how many came before it, in all sources; parts of one document share it.
        source: the index of its file.
        line: where it begins there.
        paragraphs: its lines that are not blank, or its sentences.
    """

    number: int
    source: int
    line: int
    paragraphs: list[str]


class Problems:
    """What was wrong, by kind: how often, and where first.

    Attributes:
        counts: kind -> how often.
        first: kind -> the first of them, with the name of the file but not of its folder.
    """

    def __init__(self, note: Callable[[str], None] = lambda message: None) -> None:
        """Start with nothing; `note` is called with a line of text for the first of each kind."""
        self._note = note
        self.counts: dict[str, int] = {}
        self.first: dict[str, list[str]] = {}

    def add(self, kind: str, message: str, source: str, count: int = 1) -> None:
        """Count a problem.

        Args:
            kind: one word.
            message: begins with the name of the source.
            source: the path of the file.
            count: how often it is there.
        """
        self.counts[kind] = self.counts.get(kind, 0) + count
        first = self.first.setdefault(kind, [])
        if len(first) < NAMED:
            first.append(message[len(source) - len(os.path.basename(source)) :][:500])
            self._note(message)
            if len(first) == NAMED:
                self._note(f"further ones of this kind ({kind}) are only counted")

    def facts(self) -> dict[str, Any]:
        """Return them for a manifest."""
        kinds = sorted(self.counts)
        return {kind: {"count": self.counts[kind], "first": self.first[kind]} for kind in kinds}


class Documents:
    """The documents of files, which can be gone through several times.

    What is damaged is repaired where that is possible, and counted in `problems`:

        replaced   texts in which U+FFFD stands for bytes that are not UTF-8, NUL or half a
                   surrogate pair
        skipped    records without a text
        split      lines and texts of more than 1,000,000 characters, read as several
        divided    documents of more than 4,000,000 characters, of which several were made
        damaged    files that could not be read, or not to their end
        empty      files without a document

    Attributes:
        sources: as given.
        position: bytes of the files, as they lie on the disk, that were read.
        counts: how many documents each of them has.
        problems: those of the last time.
    """

    def __init__(
        self,
        sources: Sequence[str],
        *,
        format: str | None = None,
        column: str = "text",
        lines: str = "paragraphs",
        documents: str = "blank",
        strict: bool = False,
        note: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Look whether the files are there; nothing is read yet.

        Args:
            sources: paths, or "-" for the standard input.
            format: "txt", "jsonl", "csv" or "parquet"; None: by the suffix of each file.
            column: field of a JSON line, column of a CSV or Parquet file.
            lines: what a line is, "paragraphs" or "sentences".
            documents: where documents end in text files, "blank" or "line".
            strict: raise for what is replaced, skipped, damaged or empty.
            note: called with a line of text for the first problems of each kind, the first time.

        Raises:
            ValueError: an argument, or a file whose format is not known.
            OSError: a file is not there.
            ImportError: a Parquet file, and pyarrow is not installed.
        """
        for name, wanted, got in (("lines", LINES, lines), ("documents", DOCUMENTS, documents)):
            if got not in wanted:
                raise ValueError(f"{name}: want {' or '.join(wanted)}, got {got!r}")
        if not sources:
            raise ValueError("sources: want a file at least, got none")
        self.sources, self.lines, self.documents, self.strict = [*sources], lines, documents, strict
        self._options = {
            "format": format,
            "column": column,
            "errors": "strict" if strict else "repair",
            "long": "split",
        }
        for source in self.sources:
            if source != STDIN and os.path.isdir(source):
                raise IsADirectoryError(f"{source}: want a file, got a directory")
            if source != STDIN and not os.path.exists(source):
                raise FileNotFoundError(f"{source}: want a file, got nothing")
            Reader(source, **self._options)
        self._note = note
        self.position, self.counts, self.problems = 0, [0] * len(self.sources), Problems()

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents in order; none is without a paragraph.

        Raises:
            ValueError: for what is wrong with a file, where `strict` is set.
            OSError: a file cannot be read, likewise.
        """
        note, self._note = self._note, lambda message: None
        self.position, self.counts, self.problems = 0, [0] * len(self.sources), Problems(note)
        number = passed = 0
        for i, source in enumerate(self.sources):

            def count(kind: str, message: str, source: str = source) -> None:
                self.problems.add(kind, message, source)

            reader = Reader(source, note=count, **self._options)
            first = number
            for document in self._divided(self._whole(reader), i, number, reader.name):
                number = document.number + 1
                self.position, self.counts[i] = passed + reader.position, number - first
                yield document
            passed += reader.position if source == STDIN else os.stat(source).st_size
            if number == first:
                message = f"{reader.name}: want a document, got none"
                if self.strict:
                    raise ValueError(message)
                count("empty", message)
        self.position = passed

    def paragraphs(
        self, progress: Callable[[int, int, int], None] = lambda time, position, paragraphs: None
    ) -> Iterable[str]:
        """Return what gives the paragraphs alone, each time it is gone through.

        Args:
            progress: called now and then with which time it is, from 1, bytes read this time, and
                paragraphs at all times together.
        """
        return _Paragraphs(self, progress)

    def _rows(self, reader: Reader) -> Iterator[Row]:
        try:
            yield from reader
        except BadLineError as error:
            if self.strict:
                raise
            self.problems.add("damaged", str(error), reader.source)
        except OSError as error:
            reason = error.strerror or str(error)
            if self.strict:
                raise OSError(error.errno, reason, reader.name) from error
            self.problems.add("damaged", f"{reader.name}: {reason}", reader.source)

    def _whole(self, reader: Reader) -> Iterator[tuple[bool, int, str]]:
        """Yield (whether a document begins, line, paragraph) for what is not blank."""
        lines = reader.format == "txt" and self.documents == "blank"
        begins, last = True, 0
        for line, text in self._rows(reader):
            again, last = line == last, line  # a further part of a long line
            blank = not text or text.isspace()
            if lines:
                if not blank:
                    yield begins, line, text
                begins = begins or not again if blank else False
                continue
            if blank:
                if text is not None and reader.format != "txt":
                    what = "want a text, got an empty one"
                    if self.strict:
                        raise BadLineError(f"{reader.name}:{line}: {what}")
                    what = f"{reader.name}:{line}: skipped: {what}"
                    self.problems.add("skipped", what, reader.source)
                continue
            begins = not again
            for paragraph in text.split("\n"):
                if paragraph and not paragraph.isspace():
                    yield begins, line, paragraph
                    begins = False

    def _divided(
        self, paragraphs: Iterator[tuple[bool, int, str]], source: int, number: int, name: str
    ) -> Iterator[Document]:
        """Yield documents of not much more than MAX_DOCUMENT, the first with this number."""
        held, size, start, parts = [], 0, 0, 0
        for begins, line, paragraph in paragraphs:
            if held and (begins or size + len(paragraph) > MAX_DOCUMENT):
                yield Document(number, source, start, held)
                if not begins:
                    self._count_divided(parts == 0, name, start, source)
                number, parts = (number + 1, 0) if begins else (number, parts + 1)
                held, size = [], 0
            if not held:
                start = line
            held.append(paragraph)
            size += len(paragraph)
        if held:
            yield Document(number, source, start, held)

    def _count_divided(self, first: bool, name: str, line: int, source: int) -> None:
        if first:
            message = f"{name}:{line}: divided: a document of more than {MAX_DOCUMENT:,} characters"
            self.problems.add("divided", message, self.sources[source])


class _Paragraphs:
    """The paragraphs of documents, as often as they are asked for."""

    def __init__(self, documents: Documents, progress: Callable[[int, int, int], None]) -> None:
        self._documents, self._progress = documents, progress
        self._times = self._done = 0

    def __iter__(self) -> Iterator[str]:
        self._times += 1
        for document in self._documents:
            yield from document.paragraphs
            self._done += len(document.paragraphs)
            self._progress(self._times, self._documents.position, self._done)
