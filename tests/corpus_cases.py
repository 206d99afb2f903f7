"""What tests of corpora share: a small tokenizer, texts, and a corpus as lists."""

from itertools import pairwise
from pathlib import Path

import numpy as np

from bert_fast.data.shards import Corpus
from bert_fast.tokenizer import BertTokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?[]'"
BOOK = "".join(
    f"The whale number {i} dived. It came up again! Who saw it?\n{'The sea was calm. ' * 3}\n\n"
    for i in range(12)
)


def tiny_tokenizer() -> BertTokenizer:
    """Of letters, so that every English word has tokens."""
    return BertTokenizer([*SPECIAL, "the", "whale", *LETTERS, *(f"##{c}" for c in LETTERS)])


def read_corpus(path: Path) -> dict[str, list[list[list[int]]]]:
    """Split -> documents -> sentences -> ids, by the arrays alone."""
    found: dict[str, list[list[list[int]]]] = {}
    for name, split in Corpus(path)._splits.items():
        found[name] = []
        for shard in split.shards:
            tokens, sentences, documents = map(
                np.asarray, (shard.tokens, shard.sentences, shard.documents)
            )
            for i in range(len(documents) - 1):
                ends = sentences[documents[i] : documents[i + 1] + 1]
                found[name].append([tokens[a:b].tolist() for a, b in pairwise(ends)])
    return found


def files_of(path: Path) -> dict[str, bytes]:
    """Name -> bytes of the files in a directory."""
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}
