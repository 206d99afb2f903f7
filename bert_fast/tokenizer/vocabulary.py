"""Vocabularies of WordPiece: read from vocab.txt, written to it, learned from texts."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.trainers import WordPieceTrainer

MAX_VOCAB_BYTES = 100_000_000
SURROGATE = re.compile("[\ud800-\udfff]")


def read_vocab(path: str | os.PathLike) -> dict[str, int]:
    """Return token -> id from a file with one token on each line, the first with id 0.

    White space at the end of a line is no part of the token. A token that is there twice keeps the
    last of its ids, and a warning names it.

    Args:
        path: the file, in UTF-8.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no line at all, not UTF-8, or more than 100 MB.
    """
    path = Path(path)
    if (size := path.stat().st_size) > MAX_VOCAB_BYTES:
        raise ValueError(f"{path}: want at most {MAX_VOCAB_BYTES} bytes, got {size}")
    lines = [text.rstrip() for _, text in read_lines(path)]
    if not lines:
        raise ValueError(f"{path}: want one token on each line, got an empty file")
    vocab = {token: i for i, token in enumerate(lines)}
    if len(vocab) < len(lines):
        twice = [token for token, n in Counter(lines).items() if n > 1]
        names = ", ".join(map(repr, twice[:5])) + (", ..." if len(twice) > 5 else "")
        warnings.warn(f"{path}: {len(twice)} tokens stand there twice: {names}", stacklevel=2)
    return vocab


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, text without the line's end) of a file in UTF-8.

    Raises:
        ValueError: a byte that is not UTF-8; the message says where.
    """
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                got = f"the byte 0x{raw[error.start]:02x} at place {error.start}"
                raise ValueError(f"{path}:{number}: want UTF-8, got {got}") from error


def vocab_bytes(vocab: Mapping[str, int]) -> bytes:
    """Return the contents of a vocab.txt.

    Args:
        vocab: token -> id.

    Raises:
        ValueError: it cannot be said in such a file: an id is missing, or a token ends in white
            space or holds a line's end.
    """
    tokens = sorted(vocab, key=vocab.__getitem__)
    for i, token in enumerate(tokens):
        if vocab[token] != i:
            raise ValueError(f"vocab: want every id from 0, got {vocab[token]} in place of {i}")
        if token != token.rstrip() or "\n" in token:
            raise ValueError(f"vocab: want tokens that fit on a line, got {token!r} with id {i}")
    return "".join(f"{token}\n" for token in tokens).encode()


def train_vocab(
    pipeline: Tokenizer,
    texts_or_files: Iterable[str | os.PathLike] | os.PathLike,
    *,
    special_tokens: Sequence[str],
    vocab_size: int,
    min_frequency: int,
    limit_alphabet: int,
) -> dict[str, int]:
    """Learn a vocabulary; the same texts in any order give the same ids on every machine.

    The trainer of the `tokenizers` library orders what is equally frequent by its hash tables,
    which differ from run to run. So the texts are gone through once for the characters, and these
    are given to the trainer in order, as tokens that are there from the start: from then on
    nothing depends on the tables.

    Args:
        pipeline: its normalizer and pre-tokenizer make words of a text.
        texts_or_files: texts (str) and files (Path, one text on each line, UTF-8), gone through
            up to three times; an iterator is put into a list.
        special_tokens: what gets the first ids.
        vocab_size: ids to give; fewer where the texts do not have more.
        min_frequency: how often a pair of pieces must be there to be joined.
        limit_alphabet: characters to keep, the most frequent; words with others become unknown.

    Returns:
        token -> id: the special tokens, characters, characters that continue a word, then what was
        joined, in this order.

    Raises:
        TypeError: something that is neither text nor file.
        ValueError: no word in the texts, a text or file is not valid Unicode, or vocab_size is less
            than the characters take.
    """
    if isinstance(texts_or_files, str):
        raise TypeError("texts: want a list of texts or a Path, got a str")
    if isinstance(texts_or_files, os.PathLike):
        texts_or_files = [texts_or_files]
    if iter(texts_or_files) is texts_or_files:
        texts_or_files = list(texts_or_files)

    def texts() -> Iterator[str]:
        for i, item in enumerate(texts_or_files):
            if isinstance(item, os.PathLike):
                yield from (text for _, text in read_lines(Path(item)))
            elif isinstance(item, str):
                if bad := SURROGATE.search(item):
                    got = f"the lone surrogate U+{ord(bad[0]):04X} at character {bad.start()}"
                    raise ValueError(f"texts[{i}]: want valid Unicode, got {got}")
                yield item
            else:
                raise TypeError(f"texts[{i}]: want a str or a Path, got {type(item).__name__}")

    first = list(dict.fromkeys(special_tokens))
    found = _train(pipeline, texts, vocab_size=0, special_tokens=first).keys() - set(first)
    alphabet = sorted(token for token in found if len(token) == 1)
    if not alphabet:
        raise ValueError("texts: want at least one word, got none")
    if len(alphabet) > limit_alphabet:
        counts = Counter(dict.fromkeys(alphabet, 0))
        for text in texts():
            counts.update(pipeline.normalizer.normalize_str(text) if pipeline.normalizer else text)
        alphabet = sorted(sorted(alphabet, key=lambda c: -counts[c])[:limit_alphabet])
    continuing = [f"##{c}" for c in alphabet if f"##{c}" in found]
    known = [*first, *(c for c in [*alphabet, *continuing] if c not in first)]
    if vocab_size < len(known):
        raise ValueError(
            f"vocab_size: want at least {len(known)} for the special tokens and the characters, "
            f"got {vocab_size}; a smaller limit_alphabet takes less"
        )
    return _train(
        pipeline,
        texts,
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=known,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
    )


def _train(pipeline: Tokenizer, texts: Callable[[], Iterator[str]], **options: object) -> dict:
    """Return the vocabulary that the library's trainer learns with these options."""
    learner = Tokenizer.from_str(pipeline.to_str())
    trainer = WordPieceTrainer(show_progress=False, **options)
    learner.train_from_iterator(texts(), trainer)
    return learner.get_vocab(with_added_tokens=False)
