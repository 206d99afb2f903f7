"""What all ops share: on every case of op_cases.CASES, by the op's public function."""

from functools import partial

import op_cases
import pytest
import torch
from op_cases import (
    CASES,
    Case,
    assert_same_bits,
    every_case,
    gradients,
    random_gradient,
)
from torch import library
from torch.utils.checkpoint import checkpoint

from bert_fast import ops

poison = op_cases.poison
PRODUCTS = ("linear", "linear_gelu", "linear_cross_entropy")  # bits are PyTorch's GEMM's


def test_poison():
    """The fixture does what it is for."""
    assert torch.empty(99).isnan().all()
    assert (torch.empty(99, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def gradient_of(case: Case) -> torch.Tensor:
    return random_gradient(case.call())


@every_case
def test_same_bits_twice(make):
    case = make()
    dy = gradient_of(case)
    assert_same_bits(gradients(case, case.call, dy), gradients(case, case.call, dy))


@every_case
def test_inputs_are_not_written_to(make):
    case = make()
    dy = gradient_of(case)
    given = {**case.inputs, **case.dropout, "dy": dy}
    tensors = {name: t for name, t in given.items() if isinstance(t, torch.Tensor)}
    copies = {name: t.clone() for name, t in tensors.items()}
    gradients(case, case.call, dy)
    assert_same_bits(tensors, copies)


@every_case
def test_gradients_are_made_on_their_own(make):
    """Each input's gradient alone is what it is among all, and without any the output is equal."""
    case = make()
    dy = gradient_of(case)
    whole = gradients(case, case.call, dy)
    assert torch.equal(case.call(), whole["out"])
    assert not case.call().requires_grad
    wanting = {name: case.inputs[name].clone().requires_grad_() for name in case.leaves}
    with torch.no_grad():
        assert not case.call(**wanting).requires_grad
    for name in case.leaves:
        alone = gradients(case, case.call, dy, [name])
        assert_same_bits(alone, {key: whole[key] for key in ("out", f"d_{name}")})


@every_case
def test_inference_mode(make):
    case = make()
    with torch.inference_mode():
        inside = case.call()
    assert torch.equal(inside, case.call())


# --- layouts -------------------------------------------------------------------------------------


def strided(t: torch.Tensor) -> torch.Tensor:
    """Every second element of every dimension of a larger tensor."""
    large = torch.full([2 * s for s in t.shape], torch.nan).to(t.dtype)
    view = large[tuple(slice(None, None, 2) for _ in t.shape)]
    return view.copy_(t)


def transposed(t: torch.Tensor) -> torch.Tensor:
    """The dimensions lie in memory in the opposite order."""
    order = list(range(t.ndim))[::-1]
    return t.permute(order).contiguous().permute(order)


def expanded(t: torch.Tensor) -> torch.Tensor:
    """The first entry of the first dimension, repeated without memory."""
    return t[:1].expand(t.shape)


def offset(t: torch.Tensor, by: int) -> torch.Tensor:
    """Begins `by` elements after an aligned address."""
    return torch.empty(t.numel() + by, dtype=t.dtype)[by:].copy_(t.flatten()).view(t.shape)


LAYOUTS = {"strided": strided, "transposed": transposed, "expanded": expanded}
LAYOUTS |= {f"offset {by}": partial(offset, by=by) for by in range(1, 16)}


def assert_layout_does_not_matter(case: Case, laid: Case, dy: torch.Tensor, laid_dy: torch.Tensor):
    """To the bit, but for a GEMM: PyTorch's sums in another order for another layout."""
    got, expected = gradients(laid, laid.call, laid_dy), gradients(case, case.call, dy)
    if case.name not in PRODUCTS:
        return assert_same_bits(got, expected)
    return torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


@every_case
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(make, layout):
    """Of one input after the other, integers included, and of the gradient."""
    case = make()
    dy = gradient_of(case)
    for name, t in case.inputs.items():
        if t is not None:
            laid = layout(t)
            if name == "cu_seqlens" and layout is expanded:
                continue
            plain = case.with_inputs(**{name: laid.contiguous().clone()})
            assert_layout_does_not_matter(plain, case.with_inputs(**{name: laid}), dy, dy)
    if dy.ndim:
        laid = layout(dy)
        assert_layout_does_not_matter(case, case, laid.contiguous().clone(), laid)


ROWS = {  # inputs that hold a row for each row of the result
    "embed": ("input_ids", "position_ids", "token_type_ids"),
    "embed-rows": ("word", "position_ids", "token_type_ids"),
    "layer_norm": ("x",),
    "add_layer_norm": ("x", "residual"),
    "gelu": ("x",),
    "gelu-tanh": ("x",),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)
def test_a_row_alone(name, dtype):
    """To the bit what it is among any others, in any order, forward and backward."""
    case = CASES[name](T=67, D=100).to(dtype)
    dy = gradient_of(case)
    whole = gradients(case, case.call, dy)
    by_row = ["out", *(f"d_{n}" for n in ROWS[name] if n in case.leaves)]
    for rows in ([0], [66], [5, 3], torch.randperm(67).tolist(), list(range(33)), [7] * 40):
        part = case.with_inputs(**{n: case.inputs[n][rows] for n in ROWS[name]})
        got = gradients(part, part.call, dy[rows])
        assert_same_bits({n: got[n] for n in by_row}, {n: whole[n][rows] for n in by_row})


# --- autograd and compilation --------------------------------------------------------------------


@every_case
def test_gradcheck(make):
    case = make().to(torch.float64)
    case.options.pop("pad_id", None)  # drops a gradient on purpose
    names = case.leaves
    leaves = tuple(case.inputs[name].requires_grad_() for name in names)
    assert torch.autograd.gradcheck(
        lambda *tensors: case.call(**dict(zip(names, tensors, strict=True))), leaves
    )


@every_case
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(make, use_reentrant):
    case = make()
    dy = gradient_of(case)

    def recomputed(**inputs):
        def call(*tensors):
            return case.call(**dict(zip(inputs, tensors, strict=True)))

        return checkpoint(call, *inputs.values(), use_reentrant=use_reentrant)

    assert_same_bits(gradients(case, recomputed, dy), gradients(case, case.call, dy))


@every_case
def test_compile(make):
    """Without a graph break, and the bits of eager, forward and backward."""
    case = make()
    dy = gradient_of(case)
    torch.compiler.reset()
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    assert_same_bits(gradients(case, compiled, dy), gradients(case, case.call, dy))
    assert torch.equal(compiled(), case.call())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile_once_for_all_lengths(dtype):
    """Other numbers of rows and sequences and another max_len run the same graph."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(ops.attention, fullgraph=True, backend=count, dynamic=True)
    for lengths in ((5, 3, 4, 6), (9, 2, 7), (4, 6, 0, 8, 33)):
        case = op_cases.attention_case(lengths).to(dtype)
        assert torch.equal(compiled(**case.inputs, **case.options), case.call())
    assert len(graphs) == 1


def forward_and_backward_ops(dtype: torch.dtype) -> dict[str, tuple]:
    """Arguments for every operator of the namespace, from which no gradient is wanted."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype)

    x, r, dy, w, b = randn(5, 12), randn(5, 12), randn(5, 12), randn(12), randn(12)
    seed, ids = torch.tensor([3]), torch.tensor([0, 2, 2, 1, 0])
    table, m = randn(3, 12), randn(7, 12)
    call = torch.ops.bert_fast
    norm = x, randn(12), r, w, b, 1e-12, 0.1, seed, 4, dtype
    _, z, mean, rstd = call.add_layer_norm(*norm)
    embed = ids, ids, ids, table, table, table, w
    _, *saved = call.embed(*embed, b, 1e-12, 0.1, seed, 4, dtype)
    qkv, cu_seqlens = randn(9, 3, 2, 8), op_cases.borders((4, 0, 3))
    attention = cu_seqlens, 4, 0.1, seed, 4
    o, lse = call.attention(qkv, *attention)
    labels = torch.tensor([1, -100, 6, 0, 3])
    return {
        "add_layer_norm": norm,
        "add_layer_norm_bwd": (dy, z, w, mean, rstd, True, 0.1, seed, 4, dtype),
        "embed": (*embed, b, 1e-12, 0.1, seed, 4, dtype),
        "embed_bwd": (dy, *embed, *saved, 1, 0.1, seed, 4),
        "bias_gelu": (x, b, "gelu"),
        "bias_gelu_bwd": (dy, x, b, "gelu_new"),
        "linear": (x, m, randn(7)),
        "linear_bwd": (randn(5, 7), x, m, [True, False]),
        "column_sums": (x,),
        "linear_gelu": (x, m, None, "relu"),
        "attention": (qkv, *attention),
        "attention_bwd": (randn(9, 2, 8), qkv, o, lse, *attention),
        "linear_cross_entropy": (x, m, randn(7), labels, True),
        "unpad": (torch.tensor([[1, 0, 1], [0, 0, 0]]).bool(),),
        "unpad_work": (torch.tensor([[1, 0, 1], [0, 0, 0]]).bool(), 128, None, None),
        "work_list": (cu_seqlens, 9, 4),
    }


OTHER_FORMS = {  # arguments to replace by index: the branches of an operator that make other shapes
    "add_layer_norm": {1: None, 2: None, 6: 0.0, 7: None},
    "add_layer_norm_bwd": {5: False, 6: 0.0, 7: None},
    "embed": {0: None, 3: torch.ones(5, 12), 9: 0.0, 10: None},
    "bias_gelu": {1: None},
    "bias_gelu_bwd": {2: None},
    "linear": {2: None},
    "linear_bwd": {3: [False, True]},
    "linear_cross_entropy": {2: None, 4: False},
    "work_list": {1: 300, 2: 128},
}


OPTIMIZER = {"adamw_", "grad_norm", "lamb_"}  # over lists: in test_optimizer.py


@pytest.mark.parametrize("name", sorted(ops.implementations().keys() - OPTIMIZER))
@pytest.mark.parametrize("form", ["usual", "other", torch.bfloat16, torch.float64], ids=str)
def test_opcheck(name, form):
    dtype = form if isinstance(form, torch.dtype) else torch.float32
    arguments = list(forward_and_backward_ops(dtype)[name])
    for index, value in OTHER_FORMS.get(name, {}).items() if form == "other" else ():
        arguments[index] = value
    library.opcheck(getattr(torch.ops.bert_fast, name).default, tuple(arguments))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@every_case
def test_fakes_know_the_dtypes(make, dtype):
    """Traced, every case gives the shapes and dtypes that it has."""
    case = make().to(dtype)
    real = gradients(case, case.call)
    fake = case.to(dtype, "meta")
    for name, value in gradients(fake, fake.call).items():
        assert (value.shape, value.dtype) == (real[name].shape, real[name].dtype), name
