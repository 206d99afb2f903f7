"""Files of text -> a corpus: documents are read, split, tokenized and written as shards."""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bert_fast.data.documents import Document, Documents, Problems
from bert_fast.data.shards import SPLITS, CorpusWriter
from bert_fast.data.tokenizing import Tokenize, Tokens, Workers, default_workers

CHUNK = 1_000_000  # characters that are tokenized together, about
MOST_UNKNOWN = 0.05  # share of unknown tokens above which a warning is given
_SPECIAL = ("unk_token", "cls_token", "sep_token", "pad_token", "mask_token")


@dataclass(frozen=True)
class Prepared:
    """What a preparation made.

    Attributes:
        path: the directory.
        documents: "train" and "held_out" -> how many; parts of a divided document count.
        sentences: the same.
        tokens: the same.
        unknown: share of the tokens that are the unknown one.
        unigram_entropy: of the tokens for training, in nats: the loss of a model that knows only
            how frequent each token is.
        problems: kind -> {"count", "first"}; see `Documents` and `prepare`.
    """

    path: Path
    documents: dict[str, int]
    sentences: dict[str, int]
    tokens: dict[str, int]
    unknown: float
    unigram_entropy: float
    problems: dict[str, Any]


def prepare(
    sources: str | os.PathLike | Sequence[str | os.PathLike],
    target: str | os.PathLike,
    tokenizer: Any,
    *,
    format: str | None = None,
    column: str = "text",
    lines: str = "paragraphs",
    documents: str = "blank",
    held_out: float = 0.01,
    seed: int = 0,
    workers: int | None = None,
    strict: bool = False,
    note: Callable[[str], None] = lambda message: None,
    progress: Callable[[int, int, int], None] = lambda position, documents, tokens: None,
) -> Prepared:
    """Make a corpus of files; the same files and arguments give the same bytes.

    A literal "[MASK]" or "[SEP]" in a text stays text. Beside what `Documents` counts, problems are

        wordless   sentences without a token; they are left out
        tokenless  documents of which nothing else is left; they are left out too
        single     documents of one sentence, which cannot give a pair of sentences

    Args:
        sources: paths, or "-" for the standard input; see documents.py for what they hold.
        target: a new or empty directory.
        tokenizer: a `BertTokenizer`; it is written into the corpus.
        format: "txt", "jsonl", "csv" or "parquet"; None: by the suffix of each file.
        column: field of a JSON line, column of a CSV or Parquet file.
        lines: what a line is, "paragraphs", which are split into sentences, or "sentences".
        documents: where documents end in text files: at "blank" lines, or with each "line".
        held_out: share of the documents that are kept for evaluation; a hash of the seed and a
            document's number chooses them.
        seed: of that choice.
        workers: processes that tokenize; 0: this one; None: one for each processor, at most 16.
        strict: raise for texts that cannot be read, and for files without a document.
        note: called with a line of text for the first problems of each kind.
        progress: called with bytes read, documents and tokens written.

    Raises:
        ValueError: an argument; no documents at all; with `strict` whatever is wrong with a file.
        OSError: a file is not there, the target holds files, or the disk is full; nothing is left.
        RuntimeError: a worker died.
    """
    if isinstance(sources, str | os.PathLike):
        sources = [sources]
    names, target = [os.fspath(source) for source in sources], Path(target)
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out: want a share from 0 to less than 1, got {held_out}")
    workers = default_workers() if workers is None else workers
    if workers < 0:
        raise ValueError(f"workers: want 0 or more, got {workers}")
    if missing := [name for name in _SPECIAL if getattr(tokenizer, f"{name}_id") is None]:
        raise ValueError(f"tokenizer: want {', '.join(_SPECIAL)}, got no {', '.join(missing)}")
    options = {"format": format, "column": column, "lines": lines, "documents": documents}
    options["strict"] = strict
    stream = Documents(names, note=note, **options)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    tokenize = Tokenize(tokenizer, lines == "sentences", dtype)
    with (
        CorpusWriter(target, vocab_size=vocab_size) as writer,
        Workers(workers, tokenize) as pool,
    ):
        corpus = _Counting(writer, vocab_size, lambda number: _is_held_out(seed, number, held_out))
        for (chunk, position), tokens in pool.map(_chunks(stream)):
            corpus.add(chunk, tokens, names, stream.problems)
            progress(position, sum(corpus.documents.values()), sum(corpus.tokens.values()))
        if not sum(corpus.documents.values()):
            raise ValueError(f"0 usable documents in {', '.join(names)}")
        corpus.warn(held_out)
        facts = {
            "sources": [
                _source(name) | {"documents": count}
                for name, count in zip(names, stream.counts, strict=True)
            ],
            "options": options | {"held_out": held_out, "seed": seed},
            "problems": stream.problems.facts(),
            "unknown": corpus.unknown_share,
            "unigram_entropy": corpus.unigram_entropy,
        }
        writer.finish(facts, tokenizer.save_pretrained)
    return Prepared(
        path=target,
        documents=corpus.documents,
        sentences=corpus.sentences,
        tokens=corpus.tokens,
        unknown=corpus.unknown_share,
        unigram_entropy=corpus.unigram_entropy,
        problems=stream.problems.facts(),
    )


class _Counting:
    """Puts documents into the corpus and counts what goes in."""

    def __init__(
        self, writer: CorpusWriter, vocab_size: int, is_held_out: Callable[[int], bool]
    ) -> None:
        self._writer, self._is_held_out = writer, is_held_out
        self._frequencies = np.zeros(vocab_size, np.int64)  # of the tokens for training
        self._unknown = 0
        self.documents = dict.fromkeys(SPLITS, 0)
        self.sentences = dict.fromkeys(SPLITS, 0)
        self.tokens = dict.fromkeys(SPLITS, 0)

    def add(
        self, chunk: Sequence[Document], tokens: Tokens, names: Sequence[str], problems: Problems
    ) -> None:
        """Add the documents of a chunk, of which the paragraphs are not needed any more."""
        self._unknown += tokens.unknown
        places = np.concatenate([[0], np.cumsum(tokens.lengths)])
        ends = np.cumsum(tokens.sentences)
        train = []
        for document, last, count, dropped in zip(
            chunk, ends, tokens.sentences, tokens.dropped, strict=True
        ):
            name = names[document.source]
            where = f"{name}:{document.line}"
            if dropped:
                what = f"{where}: sentences without a token: {dropped}"
                problems.add("wordless", what, name, int(dropped))
            if not count:
                problems.add("tokenless", f"{where}: a document without a token", name)
                continue
            if count == 1:
                problems.add("single", f"{where}: a document of one sentence", name)
            lengths = tokens.lengths[last - count : last]
            ids = tokens.ids[places[last - count] : places[last]]
            split = "held_out" if self._is_held_out(document.number) else "train"
            self._writer.add(split, ids, lengths)
            self.documents[split] += 1
            self.sentences[split] += int(count)
            self.tokens[split] += len(ids)
            if split == "train":
                train.append(ids)
        if train:
            counts = np.bincount(np.concatenate(train), minlength=len(self._frequencies))
            self._frequencies += counts

    @property
    def unknown_share(self) -> float:
        """Share of the tokens that are unknown."""
        return self._unknown / max(1, sum(self.tokens.values()))

    @property
    def unigram_entropy(self) -> float:
        """Of the tokens for training, in nats."""
        share = self._frequencies[self._frequencies > 0] / max(1, self._frequencies.sum())
        return float(-(share * np.log(share)).sum())

    def warn(self, held_out: float) -> None:
        """Warn of what will spoil a training."""
        for split in ("train", "held_out")[: 2 if held_out else 1]:
            if (got := self.documents[split]) < 2:
                want = f"{split}: want 2 documents or more, which next-sentence pairs need"
                warnings.warn(f"{want}, got {got} of {sum(self.documents.values())}", stacklevel=3)
        if (share := self.unknown_share) > MOST_UNKNOWN:
            want = f"tokenizer: want at most {MOST_UNKNOWN:.0%} unknown tokens"
            warnings.warn(f"{want}, got {share:.1%}: is it one for these texts?", stacklevel=3)


Chunk = tuple[list[Document], int]


def _chunks(stream: Documents) -> Iterator[tuple[Chunk, list[list[str]]]]:
    """Yield ((documents without paragraphs, bytes read), their paragraphs)."""
    chunk: list[Document] = []
    texts: list[list[str]] = []
    size = 0
    for document in stream:
        chunk.append(document._replace(paragraphs=[]))
        texts.append(document.paragraphs)
        size += sum(map(len, document.paragraphs))
        if size >= CHUNK:
            yield (chunk, stream.position), texts
            chunk, texts, size = [], [], 0
    if chunk:
        yield (chunk, stream.position), texts


def _is_held_out(seed: int, number: int, share: float) -> bool:
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _source(name: str) -> dict[str, Any]:
    """Return what the manifest says of a file: not where it lies."""
    if not os.path.isfile(name):
        return {"name": os.path.basename(name)}
    digest = hashlib.sha256()
    with open(name, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    size = os.stat(name).st_size
    return {"name": os.path.basename(name), "bytes": size, "sha256": digest.hexdigest()}
