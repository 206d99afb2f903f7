"""What the tests of micro-batches share: a corpus, micro-batches of it, and their rows."""

import random
from itertools import pairwise

import corpora
import pytest
import torch
from data_cases import tokenizer

from bert_fast.data.batches import Batches
from bert_fast.data.masking import MaskingRule

CLS, SEP, MASK = 2, 3, 4
V = 1000


def rule(vocabulary=V, **options):
    return MaskingRule(tokenizer(vocabulary), **options)


def batches_of(split, masking=None, **options):
    options = {"cls_id": CLS, "sep_id": SEP, "max_length": 64, "seed": 1} | options
    if "tokens" not in options:
        options.setdefault("sequences", 4)
    return Batches(split, masking or rule(), **options)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """25 documents of 1 to 14 sentences, in several shards, and 6 that are held out."""
    chance = random.Random(0)
    train = corpora.drawn(chance, corpora.lengths(chance, 25, (1, 14), (1, 40)), V)
    held_out = corpora.drawn(chance, corpora.lengths(chance, 6, (2, 9), (1, 40)), V)
    path = tmp_path_factory.mktemp("batches") / "corpus"
    return corpora.build(path, train, held_out, vocab_size=V, shard_tokens=1500)


@pytest.fixture(scope="module")
def split(corpus):
    found = corpus.split("train")
    assert len(found.shards) > 1
    return found


def plain(batch):
    """A micro-batch as lists and numbers."""
    return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def rows(batch):
    """Of each pair: ids with the masked ones put back, what the model sees, types, positions."""
    seen, types = batch["input_ids"][0], batch["token_type_ids"][0]
    whole = seen.clone()
    whole[batch["masked_positions"]] = batch["masked_labels"]
    columns = whole, seen, types, batch["position_ids"][0]
    borders = batch["cu_seq_lens_q"].tolist()
    return [tuple(c[a:b].tolist() for c in columns) for a, b in pairwise(borders)]


def epoch_of(batches, epoch=0):
    return [batches[epoch, number] for number in range(batches.count(epoch))]
