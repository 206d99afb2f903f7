"""Masked-LM projection and cross entropy, with the gradients, a few rows of logits at a time.

    s = x w^T + b      loss = sum over labelled rows of log(sum_v exp(s_v)) - s_label
    d = softmax(s) - one_hot(label), 0 in a row without label
    dx = d w           dw = d^T x           db = sum over the rows of d

N rows, D columns of x, V words; S is V up to a multiple of 64. Where V is no such multiple, as
BERT's 30,522, w is copied once with rows of 0 behind it, and the bias with -inf: then every row of
logits begins at an aligned address, products and kernels take whole vectors, and what is past V has
no part in a sum. The copy moves 4 V D bytes in 16 bits: by their rates an H200 makes the products
of about 90 rows in that time.

The products are PyTorch's (cuBLAS), of 16-bit matrices for 16-bit x. The logits of some rows are
made in x's dtype; two kernels read them, the second writes d over them; the products with w and x
follow, and the buffer serves the next rows. So the logits are never whole, and never in fp32 for
16 bits. The largest logit of a row and the sum of exponentials come out of one pass: each thread
keeps both for its own columns and rescales its sum when its largest grows (Milakov and Gimelshein,
Online normalizer calculation for softmax, 2018, https://arxiv.org/abs/1805.02867).

A label outside 0 to V - 1 is not read: the loss is NaN, and so is the row's gradient.

Bound by the products: 6 N D V FLOPs, of which at D = 768 the kernels' 3 N V elements moved (two
reads, one write) take about a fifth of the time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels import common

LOGITS_BYTES = 1 << 28  # of the buffer, at most; but it holds 16 rows at least
IGNORE = tl.constexpr(-100)  # label of a row that has none
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32

# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def _row_loss_kernel(
    logits_ptr,  # (rows, S), -inf past V
    labels_ptr,  # (rows,) int64
    largest_ptr,  # (rows,) fp32: the largest logit
    total_ptr,  # (rows,) fp32: the sum of exp(logit - largest)
    loss_ptr,  # (rows,) fp32
    V,
    S,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    logits_ptr += row * S
    # finite, so that no difference is one of two -inf, which would be NaN
    largest = tl.full((BLOCK_V,), LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_V,), dtype=tl.float32)
    end = tl.where(label == IGNORE, 0, S)  # a row without label is not read
    for first in tl.range(0, end, BLOCK_V, num_stages=3):
        cols = first + tl.arange(0, BLOCK_V)
        s = tl.load(logits_ptr + cols, mask=cols < S, other=float("-inf")).to(tl.float32)
        e = tl.exp(-tl.abs(s - largest))  # one exponential: of the smaller beside the larger
        total = tl.where(s > largest, total * e + 1.0, total + e)
        largest = tl.where(s > largest, s, largest)
    row_largest = tl.max(largest, axis=0)
    row_total = tl.sum(total * tl.exp(largest - row_largest), axis=0)

    labelled = (label >= 0) & (label < V)
    target = tl.load(logits_ptr + label, mask=labelled, other=0.0).to(tl.float32)
    # not log-sum-exp - target: the digits of the logarithm would be lost beside large logits
    row_total = tl.where(labelled, row_total, tl.where(label == IGNORE, 1.0, float("nan")))
    loss = (row_largest - target) + tl.log(row_total)
    tl.store(loss_ptr + row, tl.where(label == IGNORE, 0.0, loss))
    tl.store(largest_ptr + row, row_largest)
    tl.store(total_ptr + row, row_total)


@triton.jit(do_not_specialize=["N", "rows_per_program"])
def _logits_gradient_kernel(
    logits_ptr,  # (N, S), overwritten by their gradient
    labels_ptr,  # (N,) int64
    largest_ptr,  # (N,) fp32
    total_ptr,  # (N,) fp32
    partials_ptr,  # (programs, 1, V) fp32: the sums over a program's rows
    N,
    rows_per_program,
    V,
    S,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    db = tl.zeros((ROWS, BLOCK_V), dtype=tl.float32)
    begin = program * rows_per_program
    end = tl.minimum(begin + rows_per_program, N)
    for first in tl.range(begin, end, ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)
        here = rows < end
        label = tl.load(labels_ptr + rows, mask=here, other=IGNORE)[:, None]
        largest = tl.load(largest_ptr + rows, mask=here, other=0.0)[:, None]
        total = tl.load(total_ptr + rows, mask=here, other=1.0)[:, None]
        out = logits_ptr + rows[:, None] * S + cols[None, :]
        mask = here[:, None] & (cols < S)[None, :]
        read = mask & (label != IGNORE)  # of a row without label exp(-inf) is left, and no one
        s = tl.load(out, mask=read, other=float("-inf")).to(tl.float32)
        d = tl.exp(s - largest) * (1.0 / total) - tl.where(cols[None, :] == label, 1.0, 0.0)
        db += d
        tl.store(out, d.to(logits_ptr.dtype.element_ty), mask=mask)
    tl.store(partials_ptr + program * V + cols, tl.sum(db, axis=0), mask=cols < V)


# --- launch rules; GPU and date: not measured yet ------------------------------------------------

# By GPU generation (one without an entry takes the one below): (columns at most, warps) of a row's
# block. In 16 bits a thread loads 16 bytes at a time, and the eight programs of a multiprocessor
# keep 32 KB on their way, what covers a latency of 0.8 us at 4.8 TB/s.
LOSS_BLOCKS = {80: (2048, 8)}
# (rows, columns at most, warps) of a tile, stages of its loads, and the least rows of a program:
# few partial sums, whose bytes in fp32 are 1 / 32 of those of 16-bit logits.
GRADIENT_TILES = {80: (4, 512, 4, 3, 64)}


def _buffer_shape(N: int, V: int, itemsize: int) -> tuple[int, int]:
    """Return the (rows, S) of the buffer for the logits of N rows.

    Rows are a multiple of 16 where there are several chunks, so that the row a chunk begins with is
    aligned in every tensor.
    """
    S = 64 * triton.cdiv(V, 64)
    rows = max(16, LOGITS_BYTES // (S * itemsize) // 16 * 16)
    return min(rows, N), S


# --- launchers -----------------------------------------------------------------------------------


def _logits_to_gradient(
    logits: Tensor, labels: Tensor, largest: Tensor, total: Tensor, db: Tensor
) -> None:
    """Overwrite logits (rows, S) by their gradient; write its sums over the rows into db (V,)."""
    (N, S), V = logits.shape, db.shape[0]
    rows, block_v, warps, stages, least_rows = common.by_generation(GRADIENT_TILES, logits)
    block_v = min(block_v, triton.next_power_of_2(S))
    rows_per_program, programs = common.split_rows(N, least_rows)
    partials = torch.empty(programs, 1, V, dtype=torch.float32, device=logits.device)
    common.launch(
        _logits_gradient_kernel,
        (programs, triton.cdiv(S, block_v)),
        *(logits, labels, largest, total, partials, N, rows_per_program, V, S),
        ROWS=rows,
        BLOCK_V=block_v,
        STAGES=stages,
        num_warps=warps,
    )
    common.sum_partials(partials, [db])


def _check(x: Tensor, w: Tensor, b: Tensor | None) -> None:
    reasons = common.unsupported_dtypes(x=x, w=w, b=b)
    if w.shape[0] == 0:
        reasons.append("w: want a row at least on a GPU, got none")
    common.unsupported("linear_cross_entropy", reasons)


def linear_cross_entropy(
    x: Tensor, w: Tensor, b: Tensor | None, labels: Tensor, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (loss, dx, dw, db): the sum over labelled rows, () fp32, and gradients like inputs.

    Args:
        x: (N, D), fp32, fp16 or bf16.
        w: (V, D), dtype of x.
        b: (V,), dtype of x, or None for none.
        labels: (N,) int64: 0 to V - 1, or -100 for none.
        with_grad: whether to make the gradients, for a loss gradient of 1; else they are empty.

    Raises:
        NotImplementedError: a dtype is not supported, or there is no word.
    """
    _check(x, w, b)
    (N, D), V = x.shape, w.shape[0]
    narrow, wide = ({"dtype": dtype, "device": x.device} for dtype in (x.dtype, torch.float32))
    max_rows, S = _buffer_shape(N, V, x.element_size())
    chunks = [(first, min(first + max_rows, N)) for first in range(0, N, max(1, max_rows))]
    whole_w = w if S == V else torch.constant_pad_nd(w, (0, 0, 0, S - V))
    bias = torch.full((S,), float("-inf"), **narrow)
    bias[:V] = 0 if b is None else b
    logits = torch.empty(max_rows, S, **narrow)
    loss, largest, total = (torch.empty(N, **wide) for _ in range(3))
    dx, db = (torch.empty(n if with_grad else 0, **narrow) for n in (x.shape, V))
    # a sum over chunks is fp32: what one adds may be less than a 16-bit ulp of it
    dw = torch.zeros((S, D) if with_grad else 0, **(narrow if len(chunks) == 1 else wide))
    db_sums = torch.empty(len(chunks), 1, V, **wide) if with_grad else None

    block_v, warps = common.by_generation(LOSS_BLOCKS, x)
    block_v = min(block_v, triton.next_power_of_2(S))
    for i, (first, last) in enumerate(chunks):
        part = slice(first, last)
        s = logits[: last - first]
        torch.addmm(bias, x[part], whole_w.T, out=s)
        rows = labels[part], largest[part], total[part]
        common.launch(
            _row_loss_kernel,
            (last - first,),
            *(s, *rows, loss[part], V, S),
            BLOCK_V=block_v,
            num_warps=warps,
        )
        if with_grad:
            _logits_to_gradient(s, *rows, db_sums[i, 0])
            torch.mm(s, whole_w, out=dx[part])
            if len(chunks) == 1:
                torch.mm(s.T, x, out=dw)
            else:
                dw += s.T @ x[part]
    if with_grad:
        common.sum_partials(db_sums, [db])
    return loss.sum(), dx, dw[:V].to(w.dtype), db
