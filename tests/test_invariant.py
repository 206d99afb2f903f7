"""The batch-invariant mode: how it is turned on, and its products on the CPU and by the kernel."""

import os
import random
import subprocess
import sys
import threading
from unittest import mock

import op_cases
import pytest
import torch
from against_transformers import pair
from interpreter_tools import in_long
from op_cases import check, every_dtype, gradients, kernel_dtype, linear_case

import bert_fast
from bert_fast import batch_invariant, doctor, is_batch_invariant, ops
from bert_fast.ops import invariant, products

poison = op_cases.poison
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.fixture(autouse=True)
def as_it_was():
    before = is_batch_invariant()
    yield
    batch_invariant(before)


# --- on and off ----------------------------------------------------------------------------------


def test_set():
    for on in (True, True, False, True):
        batch_invariant(on)
        assert is_batch_invariant() == on
    batch_invariant(False)
    batch_invariant()
    assert is_batch_invariant()


def test_with_puts_back_what_was():
    """Nested, and when the block raises."""
    batch_invariant(False)
    with batch_invariant(True):
        assert is_batch_invariant()
        with batch_invariant(False):
            assert not is_batch_invariant()
        assert is_batch_invariant()
        with pytest.raises(ZeroDivisionError), batch_invariant(False):
            raise ZeroDivisionError
        assert is_batch_invariant()
    assert not is_batch_invariant()


def test_for_every_thread():
    seen = []
    with batch_invariant():
        thread = threading.Thread(target=lambda: seen.append(is_batch_invariant()))
        thread.start()
        thread.join()
    assert seen == [True]


@pytest.mark.parametrize("on", [1, "1", None])
def test_refused(on):
    with pytest.raises(TypeError, match=f"batch_invariant: want True or False, got {on!r}"):
        batch_invariant(on)


@pytest.mark.parametrize(
    ("value", "on"), [("1", True), ("0", False), pytest.param("", False, marks=pytest.mark.long)]
)
def test_from_the_environment(value, on):
    env = os.environ | {"BERT_FAST_BATCH_INVARIANT": value}
    code = "import bert_fast; print(bert_fast.is_batch_invariant())"
    ran = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == [str(on)]


def test_compiled_code_follows():
    """Compiled once: what runs reads the mode."""
    w, b, x = torch.randn(7, 12), torch.randn(7), torch.randn(3, 12)
    made = []

    def backend(graph, example):
        made.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: ops.linear(x, w, b), fullgraph=True, backend=backend)
    with batch_invariant():
        ops.linear(x, w, b)  # a first time: then nothing has to be tried out
    with mock.patch.object(invariant, "in_calls", wraps=invariant.in_calls) as calls:
        for on in (False, True, False):
            with batch_invariant(on):
                assert torch.equal(compiled(x), ops.linear(x, w, b))
    assert len(made) == 1 and calls.call_count == 2


def test_is_told():
    """By report, with and without a model, and by doctor."""
    model = pair()[1]
    for on in (True, False):
        with batch_invariant(on):
            told = [*bert_fast.report().notes, *bert_fast.report(model).notes]
            assert sum(note.startswith("batch-invariant: products") for note in told) == 2 * on
            assert ("batch-invariant" in doctor._products()) == on


# --- products on the CPU -------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    """Of tests that run at once none waits for the others' threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def blas(one_thread, monkeypatch):
    """PyTorch's own linear in every dtype."""
    monkeypatch.setattr(products, "_has_bf16", lambda: False)
    with products.fixed_cpu_library("blas"):
        yield


@pytest.fixture
def onednn(one_thread):
    if not products._has_onednn():
        pytest.skip("this PyTorch has no oneDNN")
    with products.fixed_cpu_library("onednn"):
        yield


@pytest.fixture
def library(request):
    return request.getfixturevalue(request.param)


each_library = pytest.mark.parametrize("library", ["blas", "onednn"], indirect=True)
SIZES = (1, 2, 3, 5, 7, 9, 10, 16, 33, 100)


def assert_rows_stand_alone(F, D, dtype, bias, rng):
    """Forward and the gradient of x, by the product; alone is a batch of one."""
    x, dy = (torch.randn(80, n, dtype=FP64).to(dtype) for n in (D, F))
    w, b = torch.randn(F, D).to(dtype), torch.randn(F).to(dtype) if bias else None

    def both(rows):
        y = torch.ops.bert_fast.linear(x[rows], w, b, rng.random() < 0.5)
        return y, torch.ops.bert_fast.linear_bwd(dy[rows], x[rows], w, [True, False])[0]

    alone = [torch.cat(found) for found in zip(*(both([i]) for i in range(80)), strict=True)]
    exact = torch.nn.functional.linear(x.double(), w.double(), None if b is None else b.double())
    for got, truth in zip(alone, (exact, dy.double() @ w.double()), strict=True):
        largest = truth.abs().max().clamp(min=1)
        assert (got.double() - truth).abs().max() <= 32 * torch.finfo(dtype).eps * largest
    for T in (2, 31, 32, 33, 70):
        rows = rng.choices(range(80), k=T)
        for got, one in zip(both(rows), alone, strict=True):
            assert torch.equal(got, one[rows]), (F, D, dtype, bias, T)


@each_library
@every_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "alone"])
@pytest.mark.parametrize("number", [0, 1, *in_long(*range(2, 40))])
def test_rows_stand_alone(library, number, bias, dtype):
    rng = random.Random(f"{number} {bias} {dtype}")
    torch.manual_seed(number)
    with batch_invariant():
        for _ in range(6):
            assert_rows_stand_alone(rng.choice(SIZES), rng.choice(SIZES), dtype, bias, rng)


@each_library
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_of_real_sizes(library, dtype):
    rng = random.Random(0)
    with batch_invariant():
        for F, D in ((768, 768), (3, 768), (312, 1200)):
            assert_rows_stand_alone(F, D, dtype, True, rng)


@pytest.mark.parametrize("shape", [(0, 24, 7), (5, 24, 0), (5, 0, 7), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_of_nothing(shape, activation, compiled):
    check(linear_case(*shape, activation=activation, invariant=True))


@each_library
@pytest.mark.parametrize("offset", range(1, 17, 5))
def test_rows_that_begin_anywhere(library, offset):
    """A library may sum by the address: what does not lie at a multiple of 64 bytes is copied."""
    x, w = torch.randn(64 * 33 + offset), torch.randn(40, 33)
    rows = x[offset:].view(64, 33)
    with batch_invariant():
        assert torch.equal(ops.linear(rows, w), ops.linear(rows.clone(), w))


def test_every_call_has_as_many_rows(onednn, monkeypatch):
    """Each of the library's, forward and backward, whatever the batch."""
    heights, multiply = [], products._onednn

    def noted(x, w, b):
        heights.append(len(x))
        return multiply(x, w, b)

    with batch_invariant():
        monkeypatch.setattr(products, "_onednn", noted)
        for T in (1, 31, 32, 33, 100):
            case = linear_case(T, 24, 40, invariant=True)
            gradients(case, case.call)
            heights.clear()
            gradients(case, case.call)
            assert heights == [invariant.ROWS] * (2 * -(-T // invariant.ROWS))


def test_packed_weights_change_no_bit(onednn, monkeypatch):
    """Met again a weight is packed, also in the mode."""
    monkeypatch.setattr(products, "packs_weights", lambda dtype: True)
    w, x = torch.nn.Parameter(torch.randn(96, 64)), torch.randn(50, 64)
    with batch_invariant(), torch.no_grad():
        first, *others = (ops.linear(x, w) for _ in range(3))
        alone = torch.cat([ops.linear(row[None], w) for row in x])
    assert products._packed[w].packed is not None
    assert all(torch.equal(first, other) for other in (*others, alone))


def test_packed_weights_that_change_bits_are_not_used(onednn, monkeypatch):
    """Though BERT_FAST_CPU_PACK=1 asks for them."""
    plain = products._onednn

    def careless(x, w, b):
        return plain(x, w, b) * (1 + 1e-6 * (w.layout != torch.strided))

    monkeypatch.setattr(products, "packs_weights", lambda dtype: True)
    monkeypatch.setattr(products, "_onednn", careless)
    w, x = torch.nn.Parameter(torch.randn(96, 64)), torch.randn(50, 64)
    with batch_invariant(), torch.no_grad():
        first, *others = (ops.linear(x, w) for _ in range(3))
    assert all(torch.equal(first, other) for other in others)


# --- what is tried out ---------------------------------------------------------------------------


def summed(x, w, backwards):
    """X w^T, one column after the other, in one order or the opposite."""
    x_wide, w_wide = (t.to(torch.promote_types(t.dtype, FP32)) for t in (x, w))
    columns = range(x.shape[1])
    total = torch.zeros((), dtype=x_wide.dtype)
    for j in reversed(columns) if backwards else columns:
        total = total + x_wide[:, j, None] * w_wide[:, j]
    return total.to(x.dtype)


def fixed(x, w, b):
    return summed(x, w, False)


def by_place(x, w, b):
    half = len(x) // 2
    return torch.cat((summed(x[:half], w, False), summed(x[half:], w, True)))


def by_company(x, w, b):
    return summed(x, w, bool((x == x[0]).all()))


def by_chance(x, w, b):
    return summed(x, w, False) * (1 + torch.rand(()) / 100)


@pytest.fixture
def nothing_told(monkeypatch):
    """Of what is tried out here nothing is told later."""
    monkeypatch.setattr(invariant, "_one_by_one", set())


def scheduled(multiply, dtype, pack=None, shape=(7, 40)):
    return invariant.schedule(multiply, torch.ones(shape, dtype=dtype), None, pack)


every_cpu_dtype = pytest.mark.parametrize("dtype", [FP64, FP32, FP16, BF16], ids=str)


@every_cpu_dtype
@pytest.mark.parametrize("shape", [(7, 40), (1, 41), (33, 5), (5, 1)], ids=str)
def test_many_rows_where_no_row_sees_another(dtype, shape, nothing_told):
    assert scheduled(fixed, dtype, lambda w: w, shape) == (invariant.ROWS, True)
    assert scheduled(fixed, dtype, lambda w: w + 1, shape) == (invariant.ROWS, False)
    assert scheduled(fixed, dtype, None, shape) == (invariant.ROWS, False)
    assert not invariant._one_by_one


@every_cpu_dtype
@pytest.mark.parametrize("multiply", [by_place, by_company])
def test_one_row_where_it_does(multiply, dtype, nothing_told):
    """And it is told."""
    assert scheduled(multiply, dtype, lambda w: w) == (1, False)
    with batch_invariant():
        (note,) = [note for note in bert_fast.report().notes if "one at a time" in note]
    assert f"(7, 40) {str(dtype)[6:]}" in note


@pytest.mark.parametrize("rows", [1, 4, 32])
def test_calls_are_full_and_aligned(rows):
    """Each has as many rows, the last one zeros besides, and none begins where a row happens to."""
    given, x = [], torch.randn(33 * 7 + 1)[1:].view(33, 7)

    def multiply(part, w, b):
        assert part.is_contiguous() and part.data_ptr() % 64 == 0
        given.append(part.clone())
        return part @ w.T + b

    w, b = torch.randn(5, 7), torch.randn(5)
    y = invariant.in_calls(rows, multiply, x, w, b)
    torch.testing.assert_close(y, x @ w.T + b)
    assert {len(part) for part in given} == {rows}
    assert torch.equal(torch.cat(given)[:33], x) and not torch.cat(given)[33:].any()


def test_what_cannot_be_kept_is_refused(nothing_told):
    with pytest.raises(RuntimeError, match=r"batch-invariant: want .*\(7, 40\).*this machine"):
        scheduled(by_chance, FP32)


WITHOUT_EXTENSION = """
import torch
from bert_fast import batch_invariant, ops

x, qkv, borders = torch.ones(3, 4), torch.ones(3, 3, 1, 8), torch.tensor([0, 3], dtype=torch.int32)
calls = {
    "attention": lambda: ops.attention(qkv, borders, 3),
    "bias_gelu": lambda: ops.gelu(x),
    "linear_gelu": lambda: ops.linear_gelu(x, torch.ones(5, 4)),
}
for name, call in calls.items():
    call()
    try:
        with batch_invariant():
            call()
    except RuntimeError as error:
        print(name, error)
with batch_invariant():
    ops.linear(x, torch.ones(5, 4))
"""


def test_without_the_extension_ops_that_see_their_batch_refuse():
    """The products themselves are served."""
    env = os.environ | {"BERT_FAST_EXT": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTENSION], env=env, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    said = ran.stdout.splitlines()
    assert [line.split()[0] for line in said] == ["attention", "bias_gelu", "linear_gelu"]
    for line in said:
        assert "want the compiled extension in the batch-invariant mode, got" in line


# --- the kernel ----------------------------------------------------------------------------------

KERNEL_SHAPES = [
    (0, 24, 7),  # no rows
    (5, 24, 0),  # no outputs
    (5, 0, 7),  # a sum of nothing: the bias
    (1, 1, 1),
    (64, 64, 128),  # a full tile, by full steps
    (65, 65, 129),  # one more of each
    (63, 15, 127),  # one fewer
    (130, 33, 9),  # several tiles of rows
    (3, 100, 300),  # several of columns
]


@pytest.fixture
def kernels():
    pytest.importorskip("triton")
    from bert_fast.kernels import common, linear

    return linear, common


@kernel_dtype
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "alone"])
@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
def test_kernel_shapes(shape, bias, activation, dtype, kernel_device):
    case = linear_case(*shape, bias=bias, activation=activation, invariant=True)
    check(case.to(dtype, kernel_device))


@kernel_dtype
def test_kernel_sums_of_what_cancels(dtype, kernel_device):
    """Large numbers first and last: in 16 bits those between would lose their digits."""
    case = linear_case(5, 200, 9, invariant=True)
    case.inputs["x"][:, 0], case.inputs["x"][:, -1] = 2048, -2048
    case.inputs["w"][:, 0] = case.inputs["w"][:, -1] = 0.5
    check(case.to(dtype, kernel_device))


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_kernel_is_what_runs(on, activation, kernels, kernel_device):
    """Forward and for the gradient of x; not without the mode, and not for what nobody wants."""
    case = linear_case(activation=activation, invariant=on).to(FP32, kernel_device)
    with mock.patch.object(kernels[0], "linear", wraps=kernels[0].linear) as linear:
        gradients(case, case.call)
        assert linear.call_count == 2 * on
        gradients(case, case.call, wanted=["w"])
        assert linear.call_count == 3 * on


def test_kernel_knows_no_batch(kernels, kernel_device):
    """The same tile and options however many rows there are."""
    linear, common = kernels
    w = torch.randn(130, 40, device=kernel_device)
    with mock.patch.object(common, "launch", wraps=common.launch) as launch:
        for T in (1, 2, 63, 64, 65, 200):
            linear.linear(torch.randn(T, 40, device=kernel_device), w, None)
    calls = [(call.args[1][1], call.args[7:], call.kwargs) for call in launch.call_args_list]
    assert len(calls) == 6 and all(call == calls[0] for call in calls)


def test_kernel_refused(kernel_device):
    """float64, for which PyTorch's product is not taken instead."""
    case = linear_case(invariant=True).to(FP64, kernel_device)
    with pytest.raises(NotImplementedError, match=r"linear: x: want .*; w: .*; b: .*float64"):
        case.call()


def test_without_triton_nothing_else_is_taken():
    linear = sys.modules["bert_fast.ops.linear"]  # ops.linear is its function
    args = torch.ones(2, 3), torch.ones(4, 3), None, "gelu"
    assert len(linear._gelu_without_triton(*args)) == 2
    with batch_invariant(), pytest.raises(NotImplementedError, match="want Triton"):
        linear._gelu_without_triton(*args)
