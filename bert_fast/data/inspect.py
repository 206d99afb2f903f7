"""What a corpus holds, for people: counts, lengths, problems of its sources, a few texts."""

import os
from itertools import pairwise
from typing import Any

import numpy as np

from bert_fast.data.shards import Corpus, Shard, Split

_SHARES = (0.05, 0.5, 0.95)


def inspect_corpus(path: str | os.PathLike, *, verify: bool = False) -> dict[str, Any]:
    """Return what stands in a corpus's manifest, and lengths.

    Args:
        path: the directory.
        verify: compare the SHA-256 of every file with the manifest.

    Returns:
        "path", "digest", "vocab_size", "unigram_entropy" in nats, "unknown", "sources", "options",
        "problems", and "splits": name -> documents, sentences, tokens, bytes of its files, and
        "sentence_tokens" and "document_tokens": mean, the shares 5, 50 and 95 %, and most.

    Raises:
        FileNotFoundError: no such directory, or no corpus in it.
        ValueError: it is damaged.
    """
    corpus = Corpus(path, verify=verify)
    manifest = corpus.manifest
    kept = ("unigram_entropy", "unknown", "sources", "options", "problems")
    found = {"path": str(path), "digest": corpus.digest, "vocab_size": corpus.vocab_size}
    found |= {name: manifest[name] for name in kept if name in manifest}
    found["splits"] = {}
    for name, said in manifest["splits"].items():
        if said["documents"]:
            for number, shard in enumerate(corpus.split(name).shards):
                _check(shard, f"{path}: {name} {number}")
            found["splits"][name] = _lengths(corpus.split(name), said)
    return found


def first_documents(
    path: str | os.PathLike,
    tokenizer: Any,
    count: int,
    *,
    split: str = "train",
    sentences: int = 5,
) -> list[list[str]]:
    """Return how the first documents of a split begin, from tokens back to text.

    Args:
        path: of the corpus.
        tokenizer: the one in it.
        count: of documents.
        split: "train" or "held_out".
        sentences: of each document, at most.
    """
    found: list[list[str]] = []
    for shard in Corpus(path, verify=False).split(split).shards:
        for i in range(min(count - len(found), shard.num_documents)):
            first, last = shard.documents[i : i + 2]
            places = shard.sentences[first : min(last, first + sentences) + 1]
            found.append([tokenizer.decode(shard.tokens[a:b]) for a, b in pairwise(places)])
    return found


def _check(shard: Shard, what: str) -> None:
    """Raise a ValueError where borders are not in order: without sums nobody has looked yet."""
    for kind in ("documents", "sentences"):
        if (np.diff(getattr(shard, kind)) < 1).any():
            raise ValueError(f"{what}: {kind}: want borders that rise, got others")


def _lengths(split: Split, said: dict[str, Any]) -> dict[str, Any]:
    sentences = [np.diff(shard.sentences) for shard in split.shards]
    documents = [np.diff(shard.sentences[shard.documents]) for shard in split.shards]
    files = [file for shard in said["shards"] for file in shard["files"].values()]
    return {
        **{name: said[name] for name in ("documents", "sentences", "tokens")},
        "bytes": sum(file["bytes"] for file in files),
        "sentence_tokens": _described(np.concatenate(sentences)),
        "document_tokens": _described(np.concatenate(documents)),
    }


def _described(lengths: np.ndarray) -> dict[str, float]:
    shares = {f"{share:.0%}": int(np.quantile(lengths, share)) for share in _SHARES}
    return {"mean": round(float(lengths.mean()), 1), **shares, "most": int(lengths.max())}
