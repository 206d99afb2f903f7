"""benchmarks/gate.py: right answers pass, and no wrong one that we could think of."""

import json
from dataclasses import replace

import pytest
import torch
from bench_cases import (
    DTYPES,
    SLACK,
    Fake,
    case,
    exact,
    in_blocks,
    once,
    plain,
    summed_in_dtype,
)
from gate import Gate, RefusedError, check


def prepared(answer):
    return Fake("candidate", answer).candidate().prepare()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("answer", [plain, in_blocks, exact])
def test_right_answers_pass(dtype, answer):
    error = Gate(case(dtype)).check(prepared(answer))
    assert error["share"] <= 1 and error["worst"] in ("y", "tiny")
    assert error["baseline_name"] == "fp32, rounded once"
    for key in ("own", "baseline", "allowed"):
        assert set(error[key]) == {"max", "l2"}
    json.dumps(error, allow_nan=False)


def test_the_error_is_that_of_a_hand_count():
    """The worst of both inputs and both tensors, beside that of the baseline in the same place."""
    one = case("bf16")
    error = check(one, prepared(plain))
    expected = []
    for x_TD in one.inputs:
        for name, true in exact(x_TD).items():
            off = plain(x_TD)[name].double() - true
            top, norm = off.abs().max().item(), (off.norm() / true.norm()).item()
            most = 2 * top + 2**-8 * true.abs().max().item()
            share = max(top / most, norm / (2 * norm + 2**-10))
            expected.append((share, name, top, norm))
    share, name, top, norm = max(expected)
    assert (error["worst"], error["share"]) == (name, pytest.approx(share))
    assert (
        error["own"]
        == error["baseline"]
        == {
            "max": pytest.approx(top),
            "l2": pytest.approx(norm),
        }
    )


def bounds(dtype, name="y"):
    """The bounds for the second inputs, by hand: (largest error, norm)."""
    x_TD = case(dtype).inputs[1]
    true, off = exact(x_TD)[name], plain(x_TD)[name].double() - exact(x_TD)[name]
    most = 2 * off.abs().max() + SLACK[dtype] * true.abs().max()
    return most.item(), (2 * off.norm() / true.norm() + SLACK[dtype] / 4).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["one value", "all values"])
def test_just_over_the_bound_is_refused_and_just_under_passes(dtype, kind):
    one = case(dtype)
    most_top, most_norm = bounds(dtype)

    def off_by(share):
        def answer(x_TD):
            found = exact(x_TD)
            if x_TD is not one.inputs[1]:
                return found
            if kind == "one value":
                found["y"][3, 5] += share * most_top
            else:
                found["y"] = found["y"] * (1 + share * most_norm)
            return found

        return answer

    gate = Gate(one)
    assert gate.check(prepared(off_by(0.98)))["share"] == pytest.approx(0.98, abs=1e-3)
    with pytest.raises(RefusedError, match="y: want errors of at most") as refused:
        gate.check(prepared(off_by(1.02)))
    assert refused.value.error["share"] == pytest.approx(1.02, abs=1e-3)
    assert refused.value.error["worst"] == "y"
    json.dumps(refused.value.error, allow_nan=False)


def changed(**tensors):
    """The right answer, with tensors replaced; None: left out."""

    def answer(x_TD):
        found = in_blocks(x_TD) | {name: new(x_TD) for name, new in tensors.items()}
        return {name: t for name, t in found.items() if t is not None}

    return answer


def with_value(value, first=True):
    """The right answer, with one value that is not."""

    def answer(x_TD):
        found = in_blocks(x_TD)
        if first or not torch.equal(x_TD, case().inputs[0]):
            found["y"][-1, -1] = value
        return found

    return answer


WRONG = {
    "stale on the second inputs": once(in_blocks(case().inputs[0])),
    "one value, on the second inputs": with_value(0.0, first=False),
    "NaN": with_value(float("nan")),
    "NaN on the second inputs": with_value(float("nan"), first=False),
    "infinite": with_value(float("inf")),
    "all NaN": changed(y=lambda x: in_blocks(x)["y"] * float("nan")),
    "zeros": changed(y=lambda x: in_blocks(x)["y"] * 0),
    "a row off": changed(y=lambda x: in_blocks(x)["y"].roll(1, 0)),
    "negative": changed(y=lambda x: -in_blocks(x)["y"]),
    "another shape": changed(y=lambda x: in_blocks(x)["y"].T),
    "one dimension more": changed(y=lambda x: in_blocks(x)["y"][None]),
    "a shape that broadcasts": changed(tiny=lambda x: in_blocks(x)["tiny"][:1]),
    "no values": changed(y=lambda x: in_blocks(x)["y"][:0]),
    "a name is missing": changed(tiny=lambda x: None),
    "a name too many": changed(more=lambda x: x),
    "no answer": lambda x: {},
    "small tensor, small error": changed(tiny=lambda x: in_blocks(x)["tiny"] + 1e-5),
    "small tensor of zeros": changed(tiny=lambda x: torch.zeros(3)),
    "products in bfloat16": changed(y=lambda x: plain(x.bfloat16())["y"].float()),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_answers_are_refused(what):
    with pytest.raises(RefusedError):
        Gate(case()).check(prepared(WRONG[what]))


def test_the_small_error_in_the_small_tensor_would_be_nothing_in_the_large_one():
    """So it is the bound of each tensor of its own that catches it."""
    fine = changed(y=lambda x: in_blocks(x)["y"] + 1e-5)
    assert Gate(case()).check(prepared(fine))["share"] < 1


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_sum_in_16_bits_is_refused(dtype):
    with pytest.raises(RefusedError, match="y: want errors") as refused:
        Gate(case(dtype)).check(prepared(summed_in_dtype))
    error = refused.value.error
    assert error["own"]["l2"] > 2 * error["baseline"]["l2"]


def test_zeros_that_are_known_exactly_allow_no_error():
    def with_zeros(x_TD):
        return exact(x_TD) | {"zeros": torch.zeros(4, dtype=torch.float64)}

    gate = Gate(case(truth=with_zeros, baseline=with_zeros))
    assert gate.check(prepared(with_zeros))["share"] == 0
    with pytest.raises(RefusedError, match="zeros"):
        gate.check(prepared(lambda x: with_zeros(x) | {"zeros": torch.full((4,), 1e-9)}))


def test_what_has_no_values_is_compared_by_shape():
    def with_empty(x_TD):
        return exact(x_TD) | {"empty": torch.zeros(0, 3)}

    gate = Gate(case(truth=with_empty, baseline=with_empty))
    gate.check(prepared(with_empty))
    with pytest.raises(RefusedError, match="empty"):
        gate.check(prepared(lambda x: with_empty(x) | {"empty": torch.zeros(0, 4)}))


def nudged(x_TD):
    """The answer for the first inputs, whatever is asked, and a little that depends on them."""
    answer, own = exact(case().inputs[0]), x_TD.double().mean()
    return {name: t * (1 + 1e-7 * own) for name, t in answer.items()}


BROKEN = {
    "a true value is NaN": dict(truth=with_value(float("nan"))),
    "a true value is infinite": dict(truth=with_value(float("inf"))),
    "the baseline is NaN": dict(baseline=with_value(float("nan"))),
    "one set of inputs": dict(inputs=case().inputs[:1]),
    "no inputs": dict(inputs=[]),
    "the same inputs twice": dict(inputs=[case().inputs[0]] * 2),
    "the same answers for both inputs": dict(truth=once(exact(case().inputs[0]))),
    "answers no gate could tell apart": dict(truth=nudged, baseline=nudged),
    "a baseline of another shape": dict(
        baseline=changed(tiny=lambda x: in_blocks(x)["tiny"][None])
    ),
    "a baseline by which zeros would pass": dict(
        baseline=changed(y=lambda x: in_blocks(x)["y"] / 3)
    ),
    "no values at all": dict(truth=lambda x: {}, baseline=lambda x: {}),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_case_is_told(what):
    with pytest.raises(ValueError, match=r"case x: .*want"):
        Gate(replace(case(), **BROKEN[what]))


@pytest.mark.parametrize("then", ["answers", "raises"])
def test_inputs_that_were_changed_are_put_back(then):
    one = case("fp32")
    originals = [x_TD.clone() for x_TD in one.inputs]

    def spoil(x_TD):
        answer = plain(x_TD)
        x_TD.mul_(2)
        if then == "raises":
            raise RuntimeError("spoilt")
        return answer

    gate = Gate(one)
    with pytest.raises(
        RefusedError if then == "answers" else RuntimeError, match=r"changed|spoilt"
    ):
        gate.check(prepared(spoil))
    for x_TD, original in zip(one.inputs, originals, strict=True):
        assert torch.equal(x_TD, original)
    assert gate.check(prepared(plain))["share"] <= 1
