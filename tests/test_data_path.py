"""The steps of the data path: compiled against the NumPy reference, and what they refuse."""

import random
import runpy
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_cases import STEPS, arguments, implementation, rows, served_by

from bert_fast import data, extension
from bert_fast.data import reference, steps

__all__ = ["served_by"]


@pytest.fixture(scope="module")
def compiled():
    return implementation("csrc")


def same(got, want):
    return type(got) is type(want) and (
        (got.dtype == want.dtype and got.shape == want.shape and np.array_equal(got, want))
        if isinstance(want, np.ndarray)
        else got == want
    )


def compare_masks(compiled, count):
    chance, chosen = random.Random(count), 0
    for case in range(count):
        asked = arguments(chance)
        results = []
        for by in (reference, compiled):
            ids = asked["ids"].copy()
            results.append((by.mask(*(asked | {"ids": ids}).values()), ids))
        for got, want in zip(results[1], results[0], strict=True):
            assert same(got, want), f"case {case}: {asked}"
        chosen += np.count_nonzero(results[0][0] != -100)
        borders = asked["cu_seqlens"]
        length = int(np.diff(borders).max(initial=0)) + case % 3
        for name, more in (
            ("digests", (asked["ids"], borders)),
            ("positions", (borders,)),
            ("longest", (borders,)),
            ("pad", (asked["ids"], borders, length, -3, case % 2 == 0)),
        ):
            got, want = (getattr(by, name)(*more) for by in (compiled, reference))
            assert same(got, want), f"{name}, case {case}"
    assert chosen > 10 * count  # else there was little to compare


def flattened(by, given, *limits):
    """What comes out, or the error."""
    try:
        return by.flatten(given, "rows", *limits)
    except (TypeError, ValueError) as error:
        return type(error), str(error)


def compare_rows(compiled, count):
    chance, fine, refused = random.Random(count), 0, 0
    for case in range(count):
        low, high = chance.choice([(0, 2), (0, 100), (-100, 100), (0, 2**63 - 1), (-5, 2**40)])
        given = rows(chance, low, high)
        low, high = low + chance.choice([0, 0, 1]), high - chance.choice([0, 0, 1])
        like = chance.choice([None, None, np.cumsum([0, *map(len, given)]).astype(np.int32)])
        limits = low, high, chance.random() < 0.5, like
        got, want = (flattened(by, given, *limits) for by in (compiled, reference))
        if isinstance(want[0], type):
            refused += 1
            assert got == want, f"case {case}: {given}"
        else:
            fine += 1
            assert all(map(same, got, want)), f"case {case}: {given}"
    assert fine > count // 4 and refused > count // 20


def test_compiled_and_reference_are_the_same(compiled):
    compare_masks(compiled, 300)
    compare_rows(compiled, 500)


@pytest.mark.long
def test_compiled_and_reference_are_the_same_in_2000_cases(compiled):
    compare_masks(compiled, 2000)
    compare_rows(compiled, 2000)


def test_says_what_serves(compiled):
    assert data.implementation() == ("csrc", "")
    for name in STEPS:
        assert getattr(steps, name) is getattr(compiled, name)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ((None, "not built"), "not built"),
        ((SimpleNamespace(), ""), "the C++ extension is older than this source: build it again"),
    ],
)
def test_the_reference_serves_where_nothing_is_compiled(found, reason, monkeypatch):
    monkeypatch.setattr(extension, "load", lambda: found)
    made = runpy.run_path(steps.__file__)
    assert made["implementation"]() == ("reference", reason)
    assert all(made[name] is getattr(reference, name) for name in STEPS)


def test_loading_says_why_there_is_no_extension(monkeypatch):
    load = extension.load.__wrapped__
    monkeypatch.setattr(extension.importlib.util, "find_spec", lambda name: None)
    assert load() == (None, "the C++ extension is not built")

    def fails(name):
        raise ImportError("undefined symbol: _ZN")

    monkeypatch.setattr(extension.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(extension.importlib, "import_module", fails)
    with pytest.warns(UserWarning, match="does not load: undefined symbol: _ZN; build it again"):
        assert load() == (None, "the C++ extension does not load: undefined symbol: _ZN")


class Raises:
    def __index__(self):
        raise RuntimeError("not now")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([[1, 2], [3, 1.5]], TypeError, "rows: want integers, got float in example 1"),
        ([[1], ["1"]], TypeError, "rows: want integers, got str in example 1"),
        ([[1], [[1]]], TypeError, "rows: want integers, got list in example 1"),
        ([[1], [None]], TypeError, "rows: want integers, got NoneType in example 1"),
        ([[True]], TypeError, "rows: want integers, got bool in example 0"),
        ([[0], torch.tensor([True])], TypeError, "rows: want integers, got bool in example 1"),
        ([np.array([0.0])], TypeError, "rows: want integers, got float64 in example 0"),
        ([torch.tensor([1.0])], TypeError, "rows: want integers, got float32 in example 0"),
        (["12"], ValueError, "rows: want 1-D, got 0-D in example 0"),
        ([5], ValueError, "rows: want 1-D, got 0-D in example 0"),
        ([(i for i in [1])], ValueError, "rows: want 1-D, got 0-D in example 0"),
        ([[1], torch.ones(1, 2).long()], ValueError, "rows: want 1-D, got 2-D in example 1"),
        ([[1], [2, 7]], ValueError, "rows: want 0 to 6, got 7 in example 1, token 1"),
        ([[], [-1, 9]], ValueError, "rows: want 0 to 6, got -1 in example 1, token 0"),
        ([np.array([3, -4], np.int8)], ValueError, "got -4 in example 0, token 1"),
        ([np.array([2**64 - 1], np.uint64)], ValueError, "got 18446744073709551615 in example 0"),
        ([[1, 10**30]], ValueError, f"got {10**30} in example 0, token 1"),
        ([[-(10**30)]], ValueError, f"got {-(10**30)} in example 0, token 0"),
        ([[9, "a"]], TypeError, "rows: want integers, got str in example 0"),
        ([[Raises()]], RuntimeError, "not now"),
    ],
)
@pytest.mark.usefixtures("served_by")
def test_flatten_refuses(given, error, message):
    with pytest.raises(error) as caught:
        steps.flatten(given, "rows", 0, 7, False, None)
    assert message in str(caught.value)


@pytest.mark.usefixtures("served_by")
def test_flatten_takes_no_large_number_for_a_negative_one():
    for given in (np.array([2**64 - 1], np.uint64), [2**64 - 1]):
        with pytest.raises(ValueError, match="want -100 to 6, got 18446744073709551615"):
            steps.flatten([given], "labels", -100, 7, False, None)


@pytest.mark.usefixtures("served_by")
def test_flatten_wants_rows_as_long_as_those_before():
    like = np.array([0, 2, 2, 5], np.int32)
    given = [[1, 2], [], [3, 4, 5]]
    assert steps.flatten(given, "rows", 0, 7, False, like)[0].tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="rows: want 3 rows, got 2"):
        steps.flatten(given[:2], "rows", 0, 7, False, like)
    with pytest.raises(ValueError, match="rows: want 0 values, got 1 in example 1"):
        steps.flatten([[1, 2], [3], [4, 5]], "rows", 0, 7, False, like)


@pytest.mark.usefixtures("served_by")
def test_flatten_takes_bools_where_they_mean_something():
    given = [[True, 0, False], np.array([True]), torch.tensor([False, True]), np.zeros(0)]
    values, borders = steps.flatten(given, "rows", 0, 2, True, None)
    assert values.tolist() == [1, 0, 0, 1, 0, 1] and values.dtype == np.int64
    assert borders.tolist() == [0, 3, 4, 6, 6] and borders.dtype == np.int32


@pytest.mark.usefixtures("served_by")
def test_flatten_refuses_what_int32_does_not_count():
    long = np.broadcast_to(np.uint8(1), 2**30)  # one byte of memory
    with pytest.raises(ValueError, match=r"less than 2\*\*31 tokens in a batch, got 2147483648"):
        steps.flatten([long, long], "rows", 0, 7, False, None)


class Shrinks:
    """Empties its list as it is read."""

    def __init__(self, row):
        self.row = row

    def __index__(self):
        self.row.clear()
        return 1


def test_a_list_that_changes_while_it_is_read_is_refused(compiled):
    row = [1, 2, 3]
    row.insert(1, Shrinks(row))
    with pytest.raises(ValueError, match="rows: example 0 changed while it was read"):
        compiled.flatten([row], "rows", 0, 7, False, None)


def mask_arguments(**changes):
    asked = {
        "ids": np.arange(5, 15),
        "cu_seqlens": np.array([0, 4, 10], np.int32),
        "special": None,
        "index": np.arange(2, dtype=np.uint64),
        "seed": 0,
        "epoch": 0,
        "table": np.zeros(15, np.uint8),
        **{"share": 0.5, "most": 99, "exact": True, "words": False, "mask_id": 4},
        **{"mask_below": 2**31, "random_below": 2**32, "num_random": 15},
    }
    return (asked | changes).values()


@pytest.mark.parametrize(
    "changes",
    [
        {"cu_seqlens": np.array([0, 4, 11], np.int32)},
        {"cu_seqlens": np.array([0, 4, 9], np.int32)},
        {"cu_seqlens": np.array([0, 11, 10], np.int32)},
        {"cu_seqlens": np.array([0, -1, 10], np.int32)},
        {"cu_seqlens": np.array([1, 4, 10], np.int32)},
        {"cu_seqlens": np.zeros(0, np.int32)},
        {"cu_seqlens": np.zeros((1, 11), np.int32)},
        {"index": np.arange(1, dtype=np.uint64)},
        {"index": np.zeros((2, 1), np.uint64)},
        {"special": np.zeros(9, np.int64)},
        {"table": np.zeros(14, np.uint8)},
        {"table": np.zeros(0, np.uint8)},
        {"ids": np.arange(5, 15).reshape(2, 5)},
        {"ids": np.arange(-1, 9)},
    ],
)
def test_compiled_mask_refuses_what_would_leave_its_memory(compiled, changes):
    with pytest.raises(ValueError, match="want"):
        compiled.mask(*mask_arguments(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"ids": np.arange(5, 15, dtype=np.int32)},
        {"ids": np.arange(5, 25)[::2]},
        {"ids": list(range(5, 15))},
        {"cu_seqlens": np.array([0, 4, 10])},
        {"index": np.arange(2)},
        {"seed": -1},
        {"seed": 2**64},
        {"epoch": 2**32},
    ],
)
def test_compiled_mask_converts_nothing(compiled, changes):
    with pytest.raises(TypeError):
        compiled.mask(*mask_arguments(**changes))


def test_compiled_mask_leaves_ids_that_it_refuses(compiled):
    ids = np.array([5, 6, 7, 8, 9, 10, 11, 12, 13, 99])
    before = ids.copy()
    with pytest.raises(ValueError, match="want 0 to 14, got 99 in example 1, token 5"):
        compiled.mask(*mask_arguments(ids=ids))
    assert np.array_equal(ids, before)
    compiled.mask(*mask_arguments(ids=before[:-1], cu_seqlens=np.array([0, 4, 9], np.int32)))
    assert not np.array_equal(ids[:-1], before[:-1])


def test_compiled_mask_refuses_ids_that_cannot_be_written(compiled):
    ids = np.arange(5, 15)
    ids.flags.writeable = False
    with pytest.raises(ValueError):
        compiled.mask(*mask_arguments(ids=ids))


def test_compiled_pad_refuses_what_is_too_short(compiled):
    borders = np.array([0, 4, 10], np.int32)
    with pytest.raises(ValueError, match="length: want at least 6, got 5"):
        compiled.pad(np.arange(10), borders, 5, 0, False)


def test_compiled_steps_keep_nothing(compiled):
    """Memory of arrays and rows goes back."""
    given = [list(range(1000, 1400)) for _ in range(50)]

    def once():
        ids, borders = compiled.flatten(given, "rows", 0, 2000, False, None)
        table = np.zeros(2000, np.uint8)
        index = compiled.digests(ids, borders)
        asked = mask_arguments(ids=ids, cu_seqlens=borders, index=index, table=table)
        compiled.mask(*asked)
        flattened(compiled, [[1, "a"]], 0, 7, False, None)

    once()
    tracemalloc.start()
    try:
        once()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(20):
            once()
        assert tracemalloc.get_traced_memory()[0] - before < 20_000
    finally:
        tracemalloc.stop()
