"""The steps from lists of ids to a masked batch, in plain NumPy: what csrc/data_path computes.

The T tokens of B examples stand behind one another in one array; `cu_seqlens` (B + 1,) int32 says
where: example b is tokens cu_seqlens[b] up to, not including, cu_seqlens[b + 1].

Random words come from counters, so that a token's word depends on the seed, the epoch, the index
of its example and its place in it, and on nothing else: with i its place,

    Philox4x32-10, key seed, counters (2 epoch,     i // 4, index % 2**32, index // 2**32): word
        i % 4 says in which order the example's tokens, or words by their first, are taken
    the same with counters (2 epoch + 1, i // 2, ...): word 2 (i % 2) says what replaces the token,
        the next one which random id
"""

import operator
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from bert_fast.reference_dropout import philox

SPECIAL, CONTINUES = 1, 2  # of an id, in a rule's table: never masked; goes on with a word
IGNORE = -100  # label of a token that nothing is to be predicted for
_WORD = 2**32


def flatten(
    rows: Sequence[Any], name: str, low: int, high: int, booleans: bool, like: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of all rows behind one another.

    Args:
        rows: B lists or tuples of integers, 1-D arrays or tensors on the CPU; an empty array may
            have any dtype.
        name: of the argument, for errors.
        low: the smallest value there may be.
        high: one more than the largest, less than 2**63.
        booleans: whether bool counts as integers.
        like: the cu_seqlens there must be; None: any.

    Returns:
        Values (T,) int64 and cu_seqlens (B + 1,) int32.

    Raises:
        TypeError: a row that is no list, or values that are no integers.
        ValueError: a value out of range, a row that is not 1-D or not as long as it must be,
            2**31 values or more.
    """
    rows = [row if isinstance(row, list | tuple) else np.asarray(row) for row in rows]
    if like is not None and len(rows) != len(like) - 1:
        raise ValueError(f"{name}: want {len(like) - 1} rows, got {len(rows)}")
    total = 0
    for b, row in enumerate(rows):
        if isinstance(row, np.ndarray) and row.ndim != 1:
            raise ValueError(f"{name}: want 1-D, got {row.ndim}-D in example {b}")
        if like is not None and len(row) != like[b + 1] - like[b]:
            want = like[b + 1] - like[b]
            raise ValueError(f"{name}: want {want} values, got {len(row)} in example {b}")
        total += len(row)
    if total >= 2**31:
        raise ValueError(f"{name}: want less than 2**31 tokens in a batch, got {total}")
    values = np.empty(total, np.int64)
    ends = np.cumsum([0, *map(len, rows)])
    for b, row in enumerate(rows):
        if isinstance(row, np.ndarray):
            if len(row) and row.dtype.kind not in ("iub" if booleans else "iu"):
                raise TypeError(f"{name}: want integers, got {row.dtype} in example {b}")
        else:
            if not set(map(type, row)) <= {int}:
                row = [_integer(value, name, b, booleans) for value in row]
            row = np.array(row, object)
        if len(row) and (row.min() < low or row.max() >= high):
            i, value = next((i, v) for i, v in enumerate(row) if not low <= v < high)
            place = f"in example {b}, token {i}"
            raise ValueError(f"{name}: want {low} to {high - 1}, got {value} {place}")
        values[ends[b] : ends[b + 1]] = row
    return values, ends.astype(np.int32)


def _integer(value: Any, name: str, example: int, booleans: bool) -> int:
    """Return a value of a list as int."""
    try:
        if isinstance(value, bool) and not booleans:
            raise TypeError
        return operator.index(value)
    except TypeError:
        got = f"{type(value).__name__} in example {example}"
        raise TypeError(f"{name}: want integers, got {got}") from None


def longest(cu_seqlens: np.ndarray) -> int:
    """Return how many tokens the longest example has; 0 without one."""
    return int(np.diff(cu_seqlens).max(initial=0))


def positions(cu_seqlens: np.ndarray) -> np.ndarray:
    """Return (T,) int64: each token's place in its example."""
    start = np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
    return np.arange(cu_seqlens[-1], dtype=np.int64) - start


def pad(
    values: np.ndarray, cu_seqlens: np.ndarray, length: int, fill: int, left: bool
) -> np.ndarray:
    """Return values (T,) as rows (B, length) int64, with `fill` on the left or on the right."""
    lengths = np.diff(cu_seqlens)[:, None]
    columns = np.arange(length)
    padded = np.full((len(lengths), length), fill, np.int64)
    padded[columns >= length - lengths if left else columns < lengths] = values
    return padded


def digests(ids: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
    """Return (B,) uint64: a number of 64 bits for each example, made of its ids (T,) int64."""
    place = positions(cu_seqlens).astype(np.uint64) + np.uint64(1)
    mixed = mix(ids.astype(np.uint64) + place * np.uint64(0x9E3779B97F4A7C15))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    return mix(sums[cu_seqlens[1:]] - sums[cu_seqlens[:-1]])


def mix(x: np.ndarray) -> np.ndarray:
    """Return x (uint64) with each bit depending on every one: the last steps of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mask(
    ids: np.ndarray,
    cu_seqlens: np.ndarray,
    special: np.ndarray | None,
    index: np.ndarray,
    seed: int,
    epoch: int,
    table: np.ndarray,
    share: float,
    most: int,
    exact: bool,
    words: bool,
    mask_id: int,
    mask_below: int,
    random_below: int,
    num_random: int,
) -> np.ndarray:
    """Choose tokens to be predicted, replace them in place and return the labels.

    Args:
        ids: (T,) int64, 0 to V - 1; changed in place.
        cu_seqlens: (B + 1,) int32.
        special: (T,) int64, not 0 where a token is not to be chosen; None: nowhere.
        index: (B,) uint64, the number of each example.
        seed: 0 to 2**64 - 1.
        epoch: 0 to 2**31 - 1.
        table: (V,) uint8, for each id the sum of SPECIAL and CONTINUES.
        share: of the tokens, or words, that is chosen.
        most: how many tokens are chosen in an example at most, if exact.
        exact: choose round(share * tokens) of each example; else each token by itself.
        words: choose whole words: tokens that continue go with the one in front of them.
        mask_id: what a chosen token is replaced by if its 32-bit word is below mask_below,
        mask_below: 0 to 2**32;
        random_below: else by a random id if it is below this,
        num_random: from 0 up to, not including, this one.

    Returns:
        (T,) int64: what stood there where a token was chosen, IGNORE elsewhere.

    Raises:
        ValueError: an id out of range.
    """
    if len(ids) and (ids.min() < 0 or ids.max() >= len(table)):
        t = np.flatnonzero((ids < 0) | (ids >= len(table)))[0]
        b = np.searchsorted(cu_seqlens, t, side="right") - 1
        place = f"in example {b}, token {t - cu_seqlens[b]}"
        raise ValueError(f"input_ids: want 0 to {len(table) - 1}, got {ids[t]} {place}")
    place, number = positions(cu_seqlens), np.repeat(index, np.diff(cu_seqlens))
    order = draw(seed, 2 * epoch, place // 4, number)[np.arange(len(ids)), place % 4]
    pairs = draw(seed, 2 * epoch + 1, place // 2, number).reshape(-1, 2, 2)
    action, drawn = pairs[np.arange(len(ids)), place % 2].T

    candidate = table[ids] & SPECIAL == 0
    if special is not None:
        candidate &= special == 0
    first = candidate.copy()  # of a word
    if words:
        behind = np.concatenate([[False], candidate[:-1]]) & (place > 0)
        first &= ~(behind & (table[ids] & CONTINUES != 0))
    chosen = np.zeros(len(ids), bool)
    for a, z in pairwise(cu_seqlens):
        for start, end in _choose(candidate[a:z], first[a:z], order[a:z], share, most, exact):
            chosen[a + start : a + end] = True

    labels = np.where(chosen, ids, IGNORE)
    masked = chosen & (action < mask_below)
    random = chosen & ~masked & (action < random_below)
    ids[masked] = mask_id
    ids[random] = drawn[random] * num_random // _WORD
    return labels


def _choose(
    candidate: np.ndarray,
    first: np.ndarray,
    order: np.ndarray,
    share: float,
    most: int,
    exact: bool,
) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each word that is chosen in an example."""
    starts = np.flatnonzero(first)
    # a word ends where the next one starts or a token stands that is no candidate
    border = np.flatnonzero(np.append(first | ~candidate, True))
    ends = border[np.searchsorted(border, starts, side="right")]
    if not exact:
        for w in np.flatnonzero(order[starts] < round(share * _WORD)):
            yield starts[w], ends[w]
        return
    tokens = np.count_nonzero(candidate)
    left = min(most, max(1, round(share * tokens))) if share > 0 and tokens else 0
    for w in np.argsort(order[starts], kind="stable"):
        if left == 0:
            break
        if ends[w] - starts[w] <= left:  # a longer word is passed over
            left -= ends[w] - starts[w]
            yield starts[w], ends[w]


def draw(seed: int, c0: int, c1: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return (T, 4) int64: four random 32-bit words for each counter."""
    key = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    low, high = index & np.uint64(_WORD - 1), index >> np.uint64(32)
    counters = np.full_like(c1, c0), c1, low.astype(np.int64), high.astype(np.int64)
    return torch.stack(philox(key, *map(torch.from_numpy, counters)), dim=1).numpy()
