"""Which dtypes the ops give, and what they refuse: on every case of op_cases.CASES."""

from functools import partial

import op_cases
import pytest
import torch
from op_cases import (
    CASES,
    Case,
    assert_refused,
    assert_same_bits,
    every_case,
    gradients,
    random_gradient,
)

from bert_fast import ops

poison = op_cases.poison

# --- dtypes --------------------------------------------------------------------------------------

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
AUTOCAST = (None, torch.bfloat16, torch.float16)
WEIGHTS = ("w", "b")


def eager(case: Case):
    """The formula as a caller of PyTorch would have it: the bias of gelu in the dtype of x."""
    if case.op is ops.gelu:
        return case.with_inputs(b=case.inputs["b"].to(case.inputs["x"].dtype)).by_formula()
    if case.op is ops.linear_cross_entropy:
        logits = torch.nn.functional.linear(*(case.inputs[name] for name in ("x", "w", "b")))
        return torch.nn.functional.cross_entropy(logits.float(), case.inputs["labels"])
    return case.by_formula()


@pytest.mark.parametrize("name", sorted({name.partition("-")[0] for name in CASES}))
@pytest.mark.parametrize("autocast", AUTOCAST, ids=str)
@pytest.mark.parametrize("weight", FLOATS, ids=str)
@pytest.mark.parametrize("x", FLOATS, ids=str)
def test_dtypes_are_those_of_eager(x, weight, autocast, name):
    """Of the output, and of every gradient its input's; what eager refuses may be refused."""
    case = CASES[name]().to(x)
    case = case.with_inputs(**{n: case.inputs[n].to(weight) for n in WEIGHTS if n in case.inputs})
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        try:
            expected = eager(case).dtype
        except RuntimeError:
            expected = None
        try:
            found = gradients(case, case.call)
        except TypeError as error:
            assert expected is None and "want one dtype" in str(error)
            return
    assert expected is None or found["out"].dtype == expected
    for leaf in case.leaves:
        assert found[f"d_{leaf}"].dtype == case.inputs[leaf].dtype, leaf
        assert found[f"d_{leaf}"].isfinite().all(), leaf


@every_case
@pytest.mark.parametrize("autocast", AUTOCAST[1:], ids=str)
def test_float64_stays_float64_under_autocast(make, autocast):
    case = make().to(torch.float64)
    dy = random_gradient(case.call())
    with torch.autocast("cpu", dtype=autocast):
        found = gradients(case, case.call, dy)
    assert_same_bits(found, gradients(case, case.call, dy))


@every_case
def test_backward_inside_autocast_is_backward_outside(make):
    case = make()
    leaves = {name: case.inputs[name].clone().requires_grad_() for name in case.leaves}
    dy, found = None, []
    for inside in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = case.call(**leaves)
        dy = random_gradient(out) if dy is None else dy
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            grads = torch.autograd.grad(out, list(leaves.values()), dy)
        found.append(dict(zip(leaves, grads, strict=True)))
    assert_same_bits(*found)


# --- refusals ------------------------------------------------------------------------------------

TYPES = (torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)


@every_case
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_refused_dtypes(make, dtype):
    case = make()
    for name in case.leaves:
        wrong = case.inputs[name].to(dtype)
        got = f"{name}: want fp32, fp16, bf16 or fp64, got {dtype}"
        assert_refused(TypeError, case.name, got, partial(case.call, **{name: wrong}))


@every_case
def test_refused_ranks(make):
    """One dimension too many, and one too few."""
    case = make()
    for name, t in case.inputs.items():
        if t is not None:
            for wrong in (t[None], t[0]):
                got = f"{name}: want ("
                assert_refused(ValueError, case.name, got, partial(case.call, **{name: wrong}))


@every_case
def test_refused_devices(make):
    case = make()
    tensors = {name: t for name, t in case.inputs.items() if t is not None}
    for name, t in tensors.items() if len(tensors) > 1 else ():
        call = partial(case.call, **{name: t.to("meta")})
        assert_refused(ValueError, case.name, f"{name} meta", call)


def in_vmap(case: Case, name: str):
    t = case.inputs[name]
    return torch.vmap(lambda t: case.call(**{name: t}))(torch.stack([t, t]))


def in_jvp(case: Case, name: str):
    t = case.inputs[name]
    return torch.func.jvp(lambda t: case.call(**{name: t}), (t,), (torch.ones_like(t),))


def in_func_grad(case: Case, name: str):
    return torch.func.grad(lambda t: case.call(**{name: t}).sum())(case.inputs[name])


def in_forward_mode(case: Case, name: str):
    t = case.inputs[name]
    with torch.autograd.forward_ad.dual_level():
        return case.call(**{name: torch.autograd.forward_ad.make_dual(t, torch.ones_like(t))})


@every_case
@pytest.mark.parametrize("transform", [in_vmap, in_jvp, in_func_grad, in_forward_mode])
def test_refused_transforms(make, transform):
    """An implementation outside PyTorch has no rule for them; a wrong zero would be worse."""
    case = make()
    for name in case.leaves:
        with pytest.raises(NotImplementedError, match=rf"^{case.name}: want .*, got "):
            transform(case, name)


@every_case
def test_refused_second_derivatives(make):
    case = make()
    for name in case.leaves:
        leaf = case.inputs[name].requires_grad_()
        out = case.call(**{name: leaf})
        dy, got = torch.ones_like(out), rf"^{case.name}: want .*, got create_graph=True"
        with pytest.raises(NotImplementedError, match=got):
            torch.autograd.grad(out, leaf, dy, create_graph=True)
        leaf.requires_grad_(False)
