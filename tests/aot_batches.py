"""Random batches through the launchers of every op, to see which variants they ask for."""

import random
from typing import Any

import aot_calls
import op_cases
import torch
from op_cases import Case

# Every length's class, sizes that are 1, odd, a multiple of 16: whatever a variant may come from.
FIRST = (
    (1,),
    (16,),
    (3, 0, 5, 1),
    (40, 64),
    (100, 128),
    (129, 200),
    (256, 300),
    (512, 7),
    (513, 700),
    (16,) * 16,
    (1,) * 31,
    (700, 512, 256, 128, 64, 32, 16, 1, 0),
    (0,),
)
DTYPE = torch.float16


def random_lengths() -> list[int]:
    """1 to 40 sequences, of which few, or all, are long."""
    longest = random.choice((8, 32, 64, 128, 300, 512, 700))
    B = random.randint(1, 40 if longest < 100 else 4)
    return [random.randint(0, longest) for _ in range(B)]


def cases(lengths: list[int]) -> list[Case]:
    """A call of every op with that many rows; the last has any number of labelled rows."""
    T, D, K = sum(lengths), 64, 32
    p = random.choice((0.0, 0.1))
    made = [
        op_cases.embed_case(T, D, p=p),
        op_cases.layer_norm_case(T, D, p=p),
        op_cases.layer_norm_case(T, D, residual=False),
        op_cases.gelu_case(T, 2 * D),
        op_cases.linear_case(T, D, 2 * D),
        op_cases.linear_case(T, D, 2 * D, activation="gelu"),
        op_cases.linear_case(T, D, 2 * D, invariant=True),
        op_cases.attention_case(lengths, D // K, K, p=p),
    ]
    made.append(op_cases.cross_entropy_case(random.randint(0, T), D, 300))
    return [case.to(DTYPE) for case in made]


def record(recorder: Any, count: int) -> dict[str, Any]:
    """Return the variants of the first batches, and those that `count` random ones add.

    A random batch has dropout or not: so the first ones are gone through several times.
    """
    random.seed(0)
    torch.manual_seed(0)
    for lengths in FIRST * 6:
        for case in cases(list(lengths)):
            aot_calls.both(case)
    known = set(recorder.variants)
    added = []
    for _ in range(count):
        lengths = random_lengths()
        for case in cases(lengths):
            recorder.label = f"{case.name} {lengths}"
            aot_calls.both(case)
        new = [v for key, v in recorder.variants.items() if key not in known]
        added += [f"{v['kernel']}: {v['text']} by {v['call']}" for v in new]
        known |= set(recorder.variants)
    return {"added": added, "known": len(known) - len(added)}
