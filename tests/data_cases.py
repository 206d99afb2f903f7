"""What the tests of masking and of collating share: both implementations, a vocabulary, batches."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bert_fast import extension
from bert_fast.data import reference, steps

STEPS = ("flatten", "longest", "positions", "pad", "digests", "mask")
IMPLEMENTATIONS = ("reference", "csrc")
# how likely an id is plain, special, goes on with a word, both
KINDS = ((0.5, 0.1, 0.4, 0), (0.1, 0.05, 0.8, 0.05), (1, 0, 0, 0), (0, 0.5, 0, 0.5))


def implementation(name):
    """The steps by name, as a module."""
    if name == "reference":
        return reference
    compiled, why = extension.load()
    if compiled is None:
        pytest.skip(why)
    return compiled.data_path


@pytest.fixture(params=IMPLEMENTATIONS)
def served_by(request, monkeypatch):
    """The public functions by each implementation."""
    for step in STEPS:
        monkeypatch.setattr(steps, step, getattr(implementation(request.param), step))
    return request.param


def tokenizer(vocabulary=40, special=(0, 1, 2, 3, 4), continues=range(30, 40), **changes):
    """Something with the attributes that are read of a tokenizer."""
    names = {i: f"##{i}" if i in continues else f"t{i}" for i in range(vocabulary)}
    made = {
        "mask_token_id": 4,
        "pad_token_id": 0,
        "padding_side": "right",
        "all_special_ids": list(special),
        "get_vocab": lambda: {token: i for i, token in names.items()},
    }
    kind = type("Tokenizer", (SimpleNamespace,), {"__len__": lambda self: vocabulary})
    return kind(**{**made, **changes})


def arguments(chance: random.Random) -> dict:
    """Drawn arguments of `mask`, edges included."""
    V = chance.choice([1, 2, 3, 40, 40, 1000])
    B = chance.choice([0, 1, 1, 2, 5, 9])
    longest = chance.choice([1, 2, 9, 40, 150, 300])
    lengths = [chance.choice([0, 1, *[chance.randint(0, longest)] * 6]) for _ in range(B)]
    T = sum(lengths)
    draw = np.random.default_rng(chance.getrandbits(64))
    table = draw.choice([0, 1, 2, 3], V, p=chance.choice(KINDS))
    special = draw.choice([0, 0, 0, 1, -7], T).astype(np.int64)
    share = chance.choice([0.0, 1.0, 0.15, 0.5, 1e-9, chance.random()])
    edges = sorted(chance.choice([0, 2**32, chance.randint(0, 2**32)]) for _ in range(2))
    return {
        "ids": draw.integers(0, V, T),
        "cu_seqlens": np.cumsum([0, *lengths]).astype(np.int32),
        "special": chance.choice([None, None, special]),
        "index": draw.integers(0, 2**64, B, dtype=np.uint64),
        "seed": chance.choice([0, 2**63, 2**64 - 1, chance.getrandbits(64)]),
        "epoch": chance.choice([0, 1, 2**31 - 1, chance.getrandbits(31)]),
        "table": table.astype(np.uint8),
        "share": share,
        "most": chance.choice([2**31, 1, 2, 5]),
        "exact": chance.random() < 0.6,
        "words": chance.random() < 0.6,
        "mask_id": chance.randrange(V),
        "mask_below": edges[0],
        "random_below": edges[1],
        "num_random": chance.randint(1, V),
    }


def rows(chance: random.Random, low: int, high: int) -> list:
    """Drawn rows of every kind: lists, tuples, arrays of all dtypes and strides, tensors."""
    made = []
    for _ in range(chance.choice([0, 1, 3, 8])):
        values = [chance.randrange(low, high) for _ in range(chance.choice([0, 1, 5, 30]))]
        kinds = [list, tuple, lambda v: [np.int64(i) for i in v], lambda v: torch.tensor(v).long()]
        kinds += [lambda v: np.array([v, v], ">i8")[1], lambda v: range(len(v)), torch.LongTensor]
        kinds += [lambda v: np.array([v, v], np.int64).T[:, 1], lambda v: np.array(v, int)[::-1]]
        for dtype in (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.uint64):
            if low >= np.iinfo(dtype).min and high <= np.iinfo(dtype).max:
                kinds.append(lambda v, dtype=dtype: np.array(v, dtype))
        made.append(chance.choice(kinds)(values))
    return made
