"""Offsets beyond 2^31 elements: no sum or product of 32-bit integers wraps, and the bits are right.

The large tensors take no memory where nobody writes; of each grid only the last programs run, and
what they give is compared with a call on the last rows alone.
"""

from unittest import mock

import numpy as np
import op_cases
import pytest
import torch

pytest.importorskip("triton")

import triton.runtime.interpreter as interpreter
from interpreter_tools import (
    FUNCTIONS,
    ends,
    in_interpreter,
    in_long,
    lazy,
    lazy_allocations,
    overflow_is_an_error,
    programs,
    raw,
    read_row,
)
from op_formulas import SEED, dropout_factors

from bert_fast import batch_invariant
from bert_fast.kernels import common

pytestmark = in_interpreter
LIMIT = 2**31
ROWS = 8  # the last, which hold numbers
DTYPE = torch.float16


def needs(name):
    return pytest.mark.skipif(name not in FUNCTIONS, reason=f"no kernel of {name}")


with_dropout_in_long = pytest.mark.parametrize("p", [0.0, *in_long(0.1)])


def tall(D, dtype=DTYPE, fill=True):
    """(T, D) of more than 2^31 elements: zeros, but for the last rows."""
    x = lazy((LIMIT // D + ROWS, D), dtype)
    if fill:
        x[-ROWS:] = torch.randn(ROWS, D)
    return x


def last_programs(count, call, first=0):
    """With so many partial sums that a program sums few rows."""
    with (
        lazy_allocations(),
        overflow_is_an_error(),
        programs(ends(count, first)),
        mock.patch.object(common, "NUM_PARTIALS", 2**12),
    ):
        return call()


def assert_last_rows(found, expected, rows=4):
    """The very last rows: surely the last program's."""
    for large, small in zip(found, expected, strict=True):
        assert torch.equal(large[-rows:], small[-rows:])


# --- the technique sees what it is for -----------------------------------------------------------


@pytest.mark.parametrize("loop", [False, True], ids=["program", "loop"])
@pytest.mark.parametrize("wide", [True, False], ids=["int64", "int32"])
def test_a_narrow_offset_shows(wide, loop):
    """Of a program's number, and of a loop's counter, which the interpreter alone has no end of."""
    x, y = tall(2**15), torch.zeros(16, dtype=DTYPE)
    first = x.shape[0] - 1

    def call():
        read_row[(1,)](x, y, first, 2**15, N=16, WIDE=wide, LOOP=loop)

    with overflow_is_an_error():
        if wide:
            call()
            assert torch.equal(y, x[-1, :16])
        else:
            with pytest.raises(interpreter.InterpreterError, match="int32 overflow"):
                call()


def test_large_tensors_take_no_memory():
    """Neither ours nor those that launchers make: 40 GiB of them here."""
    with lazy_allocations():
        kept = [torch.empty(5, LIMIT, dtype=DTYPE), torch.zeros((LIMIT,), dtype=torch.float32)]
        kept.append(kept[1].new_empty(LIMIT // 2, 2))
        kept.append(torch.empty_like(kept[2], dtype=torch.int32))
    assert kept[3].shape == (LIMIT // 2, 2) and kept[3].dtype == torch.int32
    assert not kept[2][-1].any()


# --- rows ----------------------------------------------------------------------------------------


@needs("add_layer_norm")
@with_dropout_in_long
def test_add_layer_norm(p, kernel_device):
    """Forward and backward; with dropout nothing wraps, and rows are where they belong."""
    D = 8192
    x, residual, dy = (tall(D) for _ in range(3))
    bias, w, b = (torch.randn(D).to(DTYPE) for _ in range(3))
    seed = torch.tensor([SEED]) if p else None
    dropout = {"p": p, "seed": seed, "site": 3}

    def forward(x, residual):
        return raw(
            "add_layer_norm", x=x, bias=bias, residual=residual, w=w, b=b, eps=1e-12,
            out_dtype=DTYPE, **dropout,
        )  # fmt: skip

    def backward(dy, z, mean, rstd):
        return raw(
            "add_layer_norm_bwd", dy=dy, z=z, w=w, mean=mean, rstd=rstd, with_bias=True,
            x_dtype=DTYPE, **dropout,
        )  # fmt: skip

    large = last_programs(ROWS, lambda: forward(x, residual))
    small = last_programs(ROWS, lambda: forward(x[-ROWS:], residual[-ROWS:]))
    if p == 0:
        assert_last_rows(large, small)
    z = lazy(x.shape, DTYPE)
    z[-ROWS:] = small[1]
    stats = []
    for part in small[2:]:
        stats.append(torch.ones(x.shape[0]))
        stats[-1][-ROWS:] = part
    grads = last_programs(1, lambda: backward(dy, z, *stats))
    expected = last_programs(ROWS, lambda: backward(dy[-ROWS:], *small[1:]))
    assert torch.equal(grads[1][-4:], expected[1][-4:])
    if p:
        T = x.shape[0]
        dropped = dropout_factors(p, SEED, 3, np.arange(T - 4, T), D, 0, 0) == 0
        assert torch.equal(large[1][-4:][dropped], residual[-4:][dropped])
        assert not grads[0][-4:][dropped].any()
        assert (grads[0][-4:][~dropped] != 0).double().mean() > 0.99


@needs("gelu")
def test_gelu(kernel_device):
    D = 4096
    x, dy, b = tall(D), tall(D), torch.randn(D).to(DTYPE)
    y = last_programs(ROWS, lambda: raw("bias_gelu", x=x, b=b, activation="gelu"))
    expected = raw("bias_gelu", x=x[-ROWS:], b=b, activation="gelu")
    assert torch.equal(y[-1, -16:], expected[-1, -16:])
    dx, _ = last_programs(1, lambda: raw("bias_gelu_bwd", dy=dy, x=x, b=b, activation="gelu"))
    expected = raw("bias_gelu_bwd", dy=dy[-ROWS:], x=x[-ROWS:], b=b, activation="gelu")
    assert torch.equal(dx[-1, -16:], expected[0][-1, -16:])


@needs("linear")
def test_linear_bias_gradient(kernel_device):
    dy = tall(8192)
    db = last_programs(1, lambda: raw("column_sums", dy=dy))
    assert db.shape == (8192,)


def products(x, w, dy):
    """The last programs' x w^T and dy w, by the kernel."""
    with batch_invariant():
        y = last_programs(2, lambda: raw("linear", x=x, w=w, b=None))
        need = [True, False]
        return y, last_programs(2, lambda: raw("linear_bwd", dy=dy, x=x, w=w, need=need)[0])


@needs("linear")
def test_linear_rows(kernel_device):
    """As many elements of x and dy, of y and dx."""
    for D, F in ((8192, 8), (8, 8192)):
        x, dy, w = tall(8192), tall(8192), torch.randn(F, D).to(DTYPE)
        narrow = torch.randn(x.shape[0], 8).to(DTYPE)
        x, dy = (x, narrow) if D == 8192 else (narrow, dy)
        found = products(x, w, dy), products(x[-ROWS:], w, dy[-ROWS:])
        for large, small in zip(*found, strict=True):
            assert torch.equal(large[-4:, -8:], small[-4:, -8:]) and small[-4:, -8:].all()


@needs("linear")
def test_linear_weight(kernel_device):
    """As many elements of a weight: its last rows forward, its last columns backward."""
    w = tall(2**15)[:, :64]
    F, last = w.shape[0], w[-ROWS:].clone()
    x, d_last = torch.randn(3, 64).to(DTYPE), torch.randn(3, ROWS).to(DTYPE)
    y, dx = products(x, w, torch.nn.functional.pad(d_last, (F - ROWS, 0)))
    expected, d_expected = products(x, last, d_last)
    assert torch.equal(y[:, -ROWS:], expected) and expected.all()
    assert torch.equal(dx, d_expected) and dx.all()


# --- embeddings ----------------------------------------------------------------------------------


@needs("embed")
@with_dropout_in_long
def test_embed(p, kernel_device):
    """More than 2^31 elements of the result, and of each table."""
    D = 8192
    tables = [tall(D) for _ in range(3)]
    V = T = tables[0].shape[0]
    w, b = torch.randn(D).to(DTYPE), torch.randn(D).to(DTYPE)
    ids = torch.full((T,), V - 1)
    ids[-ROWS:] = torch.randint(V - ROWS, V, (ROWS,))
    dropout = {"p": p, "seed": torch.tensor([SEED]) if p else None, "site": 3}

    def named(ids):
        names = ("input_ids", "position_ids", "token_type_ids", "word", "position", "type_")
        return dict(zip(names, (ids, ids, ids, *tables), strict=True)) | {"w": w}

    def forward(ids):
        return raw("embed", **named(ids), b=b, eps=1e-12, out_dtype=DTYPE, **dropout)

    large = last_programs(ROWS, lambda: forward(ids))
    small = forward(ids[-ROWS:])
    if p == 0:
        assert_last_rows(large, small)


@needs("embed")
def test_embed_backward(kernel_device):
    """Every row of gradient beyond 2^31, in the scratch and in the tables."""
    D = 8192
    tables, dy, z = [tall(D) for _ in range(3)], tall(D), tall(D)
    V = T = dy.shape[0]
    w, ids = torch.randn(D).to(DTYPE), torch.arange(T)
    stats = torch.zeros(T), torch.ones(T)
    dword, dposition, dtype, _, _ = last_programs(
        1,
        lambda: raw(
            "embed_bwd", dy=dy, input_ids=ids, position_ids=ids, token_type_ids=ids,
            word=tables[0], position=tables[1], type_=tables[2], w=w, z=z, mean=stats[0],
            rstd=stats[1], pad_id=0, p=0.0, seed=None, site=0,
        ),
    )  # fmt: skip
    small = [torch.zeros(2, D, dtype=DTYPE) for _ in range(3)]
    last = torch.arange(2)
    expected = last_programs(
        2,
        lambda: raw(
            "embed_bwd", dy=dy[-2:], input_ids=last, position_ids=last, token_type_ids=last,
            word=small[0], position=small[1], type_=small[2], w=w, z=z[-2:], mean=stats[0][:2],
            rstd=stats[1][:2], pad_id=-1, p=0.0, seed=None, site=0,
        ),
    )  # fmt: skip
    for got, want in zip((dword, dposition, dtype), expected, strict=False):
        assert got.shape == (V, D)
        columns = got[-1] != 0  # those of the last programs
        assert columns.any() and torch.equal(got[-1][columns], want[-1][columns])


# --- cross entropy -------------------------------------------------------------------------------


@needs("linear_cross_entropy")
def test_logits(kernel_device):
    """As many logits as the launcher's budget would never hold; PyTorch's products make few."""
    from bert_fast.kernels import cross_entropy

    V = 2**14
    N = LIMIT // V + ROWS
    x, w, b = torch.randn(N, 1).to(DTYPE), torch.randn(V, 1).to(DTYPE), torch.randn(V).to(DTYPE)
    labels = torch.randint(0, V, (N,))
    labels[-2] = -100
    products = []

    def product(left, right, bias=0.0):
        """Of two matrices: the last rows alone where it is large, nothing where its operand is."""
        products.append(left)
        rows, columns = left.shape[0], right.shape[1]
        if rows * columns >= LIMIT:
            out = lazy((rows, columns), DTYPE)
            out[-ROWS:] = left[-ROWS:] @ right + bias
            return out
        return torch.zeros(rows, columns, dtype=DTYPE)

    def addmm(bias, left, right, *, out):
        return out.set_(product(left, right, bias))

    def mm(left, right, *, out):
        return out.set_(product(left, right))

    def call():
        return raw("linear_cross_entropy", x=x, w=w, b=b, labels=labels, with_grad=True)

    with (
        mock.patch.object(cross_entropy, "LOGITS_BYTES", 2**40),
        mock.patch.object(torch, "mm", mm),
        mock.patch.object(torch, "addmm", addmm),
    ):
        last_programs(ROWS, call)
    gradient = products[1][-1].double()  # of the last row's logits, which the product for dx takes
    logits = (x[-1:] @ w.T + b).double()
    expected = logits.softmax(-1)[0]
    expected[labels[-1]] -= 1
    assert not products[1][-2, -512:].any()  # a row without a label
    torch.testing.assert_close(gradient[-512:], expected[-512:], rtol=1e-3, atol=1e-6)


# --- attention -----------------------------------------------------------------------------------


@needs("attention")
@pytest.mark.parametrize(
    "heads", [(1, 128), *in_long((64, 8), (48, 128))], ids=["rows", "heads by rows", "both"]
)
@pytest.mark.parametrize("lengths", [(5, 0, 33), (140,)], ids=["short", "long"])
def test_attention(heads, lengths, kernel_device):
    """The last rows of qkv, and of the log-sum-exp (H, T); no sequence has the rows before."""
    (H, K), n = heads, sum(lengths)
    T = max(LIMIT // (3 * H * K), LIMIT // H if K == 8 else 0) + n
    small, dy = torch.randn(n, 3, H, K).to(DTYPE), torch.randn(n, H, K).to(DTYPE)
    qkv, do, o = (lazy((T, *shape), DTYPE) for shape in ((3, H, K), (H, K), (H, K)))
    lse = lazy((H, T), torch.float32)
    qkv[-n:], do[-n:] = small, dy
    borders = op_cases.borders(lengths)
    options = {"max_len": max(lengths), "p": 0.0, "seed": None, "site": 0}

    def call(first, forward, **tensors):
        rows = tensors["qkv"].shape[0]
        cu_seqlens = borders + first
        work = raw("work_list", cu_seqlens=cu_seqlens, num_rows=rows, tile=128)
        name = "attention" if forward else "attention_bwd"
        arguments = options | tensors | {"cu_seqlens": cu_seqlens, "work": work}
        return last_programs(2, lambda: raw(name, **arguments), first=4 * H)

    expected = call(0, True, qkv=small)
    found = call(T - n, True, qkv=qkv)
    assert torch.equal(found[0][-n:], expected[0])
    assert torch.equal(found[1][:, -n:], expected[1])
    o[-n:], lse[:, -n:] = expected
    d_small = call(0, False, qkv=small, do=dy, o=expected[0], lse=expected[1])
    assert torch.equal(call(T - n, False, qkv=qkv, do=do, o=o, lse=lse)[-n:], d_small)
    assert d_small.any()
