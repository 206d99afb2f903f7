"""The order of a kernel's programs does not show: no atomics, nothing read that another wrote."""

import random

import pytest

pytest.importorskip("triton")

import op_cases
import torch
from interpreter_tools import (
    double,
    draw,
    ends,
    every_function,
    every_kernel_case,
    in_interpreter,
    programs,
    shuffled,
    sum_rows,
)
from op_cases import assert_same_bits, gradients, random_gradient

poison = op_cases.poison
pytestmark = in_interpreter


def assert_order_does_not_show(run, orders):
    """`run` gives equal bits, by name, in each of these program orders."""
    usual = run()
    for seed in orders:
        with programs(shuffled(seed)):
            assert_same_bits(run(), usual)


def of_case(case):
    dy = random_gradient(case.call())
    return lambda: gradients(case, case.call, dy)


@every_kernel_case
def test_program_order(make, kernel_device):
    assert_order_does_not_show(of_case(make()), range(3))


@every_function
def test_program_order_of_many_rows(name, kernel_device):
    """Where sums over rows have partial sums to be added, and attention several tiles."""
    case = many_rows(name)
    assert_order_does_not_show(of_case(case), [7])


def many_rows(name):
    rng = random.Random(f"many {name}")
    case = draw(name, rng, p=0.1)
    while largest(case) < 60:
        case = draw(name, rng, p=0.1)
    return case


def largest(case):
    return case.options.get("max_len") or next(iter(case.inputs.values())).shape[0]


@pytest.mark.long
@every_kernel_case
def test_20_program_orders(make, kernel_device):
    assert_order_does_not_show(of_case(make()), range(20))


@pytest.mark.long
@every_function
@pytest.mark.parametrize("number", range(5))
def test_20_program_orders_of_drawn_calls(name, number, kernel_device):
    case = draw(name, random.Random(f"order {name} {number}"), many=True)
    assert_order_does_not_show(of_case(case), range(20))


# --- the technique sees what it is for -----------------------------------------------------------


@pytest.mark.parametrize("atomic", [False, True], ids=["partial sums", "atomics"])
def test_atomics_show(atomic):
    x = torch.randn(256, 64)

    def run():
        y = torch.zeros(1 if atomic else 16, 64)
        sum_rows[(16,)](x, y, 16, N=64, ATOMIC=atomic)
        return {"y": y}

    if not atomic:
        return assert_order_does_not_show(run, range(10))
    with pytest.raises(AssertionError, match="y: "):
        assert_order_does_not_show(run, range(10))


def test_reading_what_another_program_wrote_shows():
    """In place, and one element on: right in the usual order alone."""
    x = torch.arange(1025.0)

    def run():
        y = x.clone()
        double[(4,)](y[1:], y, 1024, 0, BLOCK=256, MASKED=True)
        return {"y": y}

    with pytest.raises(AssertionError, match="y: "):
        assert_order_does_not_show(run, range(10))


def test_every_program_runs_once():
    ran = []
    x, y = torch.ones(1000), torch.zeros(1000)
    for choose in (shuffled(1), ends(2), lambda grid: []):
        y.zero_()
        with programs(lambda grid, choose=choose: ran.append(choose(grid)) or ran[-1]):
            double[(4,)](x, y, 1000, 0, BLOCK=256, MASKED=True)
        assert int(y.sum()) == 2 * sum(min(256, 1000 - 256 * i) for i, _, _ in ran[-1])
    assert [len(r) for r in ran] == [4, 2, 0]
    assert sorted(ran[0]) == [(i, 0, 0) for i in range(4)] != ran[0]
