"""Attention within each packed sequence, forward.

    S = Q K^T / sqrt(K)      P = softmax(S)      O = dropout(P) V      for each sequence and head

qkv (T, 3, H, K) is read in place: T rows of tokens, H heads of size K. Scores and probabilities
stay on the chip. Sums and exponentials are fp32, exponentials in base 2; what is saved for the
backward pass is the log-sum-exp of each row of S.

Work comes from a work list (`work_list.py`), whose entries are up to `tile` rows of one sequence,
longest sequence first; a program takes one for one head. Two forms, a kernel each:

- short, up to `tile` (128) rows: a sequence's keys fit on the chip, one product makes all scores of
  a query, nothing is rescaled. BERT's usual lengths; bound by memory: 4 T H K elements moved.
- long, any other length: keys stream past (Milakov and Gimelshein, Online normalizer calculation
  for softmax, 2018; Dao, FlashAttention-2, 2023). 4 n^2 K FLOPs a head, bound by the matrix units
  and the exponentials.

Form and tiles depend on the sequence's own length alone, so that a text has the same bits in any
batch. Loads past a sequence's end are masked to 0: a neighbour's Inf times 0 would be NaN. Programs
are not persistent: a loop over entries around these bodies makes the compiler keep every address
of every form in registers, which spills (255 registers and a stack, against 119 and none).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels import common
from bert_fast.kernels.attention_tiles import (
    LN_2,
    LOG2_E,
    Plan,
    check,
    entry_of,
    first_short,
    is_kept,
    key_order,
    load_rows,
    store_rows,
)
from bert_fast.kernels.work_list import work_list

# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def _one_pass(
    q_ptr,  # at the sequence's first row and the head, as o_ptr and lse_ptr
    o_ptr,
    lse_ptr,
    n,
    H,
    K,
    sequence,
    head,
    scale,
    key,
    threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A sequence of at most BLOCK_N rows: all its keys at once, BLOCK_M queries at a time."""
    keys = key_order(BLOCK_N, DROPOUT)
    k = load_rows(q_ptr + H * K, keys, 3 * H * K, n, K, BLOCK_K, EVEN_K)
    v = load_rows(q_ptr + 2 * H * K, keys, 3 * H * K, n, K, BLOCK_K, EVEN_K)
    for row in range(0, n, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, rows, 3 * H * K, n, K, BLOCK_K, EVEN_K)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        s = tl.where((keys < n)[None, :], s, float("-inf"))
        m = tl.max(s, axis=1)
        p = tl.exp2(s - m[:, None])
        total = tl.sum(p, axis=1)
        if DROPOUT:
            kept = is_kept(key, threshold, row, 0, sequence, head, BLOCK_M, BLOCK_N)
            p = tl.where(kept, p, 0.0)
        o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        store_rows(o_ptr, o * (keep_scale / total)[:, None], rows, H * K, n, K, BLOCK_K)
        tl.store(lse_ptr + rows, (m + tl.log2(total)) * LN_2, mask=rows < n)


@triton.jit
def _zero(o_ptr, lse_ptr, n, H, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows of no sequence."""
    for row in range(0, n, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        zeros = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        store_rows(o_ptr, zeros, rows, H * K, n, K, BLOCK_K)
        tl.store(lse_ptr + rows, tl.zeros((BLOCK_M,), dtype=tl.float32), mask=rows < n)


# What changes with the batch, or from step to step, is not compiled in.
@triton.jit(do_not_specialize=["T", "B", "site", "threshold", "keep_scale"])
def _attention_short_fwd_kernel(
    qkv_ptr,  # (T, 3, H, K)
    o_ptr,  # (T, H, K)
    lse_ptr,  # (H, T) fp32
    work_ptr,  # (1 + capacity, 4) int32
    seed_ptr,  # (1,) int64, read with DROPOUT
    T,
    B,
    H,
    K8,  # K / 8: loads of 16 bytes need a K known to be a multiple of 8
    scale,  # log2(e) / sqrt(K)
    site,
    threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # the work list's tile
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    STREAM_ALL: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    K = K8 * 8
    entry = first_short(work_ptr, STREAM_ALL) + tl.program_id(0) // H
    if entry < tl.load(work_ptr):
        key = 0
        if DROPOUT:
            key = tl.load(seed_ptr) + site
        head = tl.program_id(0) % H
        sequence, begin, n, _ = entry_of(work_ptr, entry)
        q_ptr = qkv_ptr + (begin * 3 * H + head) * K
        o_ptr += (begin * H + head) * K
        lse_ptr += head.to(tl.int64) * T + begin
        if sequence == B:
            _zero(o_ptr, lse_ptr, n, H, K, BLOCK_M, BLOCK_K)
        elif not STREAM_ALL:
            if n <= 32:
                _one_pass(
                    q_ptr, o_ptr, lse_ptr, n, H, K, sequence, head, scale, key, threshold,
                    keep_scale, 32, 32, BLOCK_K, EVEN_K, DROPOUT, PRECISION,
                )  # fmt: skip
            elif n <= 64:
                _one_pass(
                    q_ptr, o_ptr, lse_ptr, n, H, K, sequence, head, scale, key, threshold,
                    keep_scale, 64, 64, BLOCK_K, EVEN_K, DROPOUT, PRECISION,
                )  # fmt: skip
            else:
                _one_pass(
                    q_ptr, o_ptr, lse_ptr, n, H, K, sequence, head, scale, key, threshold,
                    keep_scale, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, DROPOUT, PRECISION,
                )  # fmt: skip


@triton.jit
def _stream_step(
    q,  # (BLOCK_M, BLOCK_K)
    m,
    total,
    acc,
    k_ptr,
    row,  # first of the queries
    first,  # first of the keys
    n,
    H,
    K,
    sequence,
    head,
    scale,
    key,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add BLOCK_N keys to the running maximum, sum and output of each query."""
    keys = first + key_order(BLOCK_N, DROPOUT)
    k = load_rows(k_ptr, keys, 3 * H * K, n, K, BLOCK_K, EVEN_K, MASKED)
    v = load_rows(k_ptr + H * K, keys, 3 * H * K, n, K, BLOCK_K, EVEN_K, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if MASKED:
        s = tl.where((keys < n)[None, :], s, float("-inf"))
    larger = tl.maximum(m, tl.max(s, axis=1))
    p = tl.exp2(s - larger[:, None])
    rescale = tl.exp2(m - larger)
    total = total * rescale + tl.sum(p, axis=1)
    if DROPOUT:
        kept = is_kept(key, threshold, row, first, sequence, head, BLOCK_M, BLOCK_N)
        p = tl.where(kept, p, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return larger, total, acc


@triton.jit(do_not_specialize=["T", "site", "threshold", "keep_scale"])
def _attention_long_fwd_kernel(
    qkv_ptr,  # (T, 3, H, K)
    o_ptr,  # (T, H, K)
    lse_ptr,  # (H, T) fp32
    work_ptr,  # (1 + capacity, 4) int32
    seed_ptr,  # (1,) int64, read with DROPOUT
    T,
    H,
    K8,
    scale,
    site,
    threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,  # of BLOCK_M rows in the work list's tile
    EVEN_K: tl.constexpr,
    STREAM_ALL: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    K = K8 * 8
    head = tl.program_id(0) % H
    block = tl.program_id(0) // H
    sequence, begin, n, row = entry_of(work_ptr, block // BLOCKS)
    row += block % BLOCKS * BLOCK_M
    if (block // BLOCKS < first_short(work_ptr, STREAM_ALL)) & (row < n):
        key = 0
        if DROPOUT:
            key = tl.load(seed_ptr) + site
        q_ptr = qkv_ptr + (begin * 3 * H + head) * K
        rows = row + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, rows, 3 * H * K, n, K, BLOCK_K, EVEN_K)
        m = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        whole = n // BLOCK_N * BLOCK_N
        for first in range(0, whole, BLOCK_N):
            m, total, acc = _stream_step(
                q, m, total, acc, q_ptr + H * K, row, first, n, H, K, sequence, head, scale, key,
                threshold, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, DROPOUT, PRECISION, MASKED=False,
            )  # fmt: skip
        if whole < n:
            m, total, acc = _stream_step(
                q, m, total, acc, q_ptr + H * K, row, whole, n, H, K, sequence, head, scale, key,
                threshold, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, DROPOUT, PRECISION, MASKED=True,
            )  # fmt: skip
        o_ptr += (begin * H + head) * K
        store_rows(o_ptr, acc * (keep_scale / total)[:, None], rows, H * K, n, K, BLOCK_K)
        lse_ptr += head.to(tl.int64) * T + begin
        tl.store(lse_ptr + rows, (m + tl.log2(total)) * LN_2, mask=rows < n)


# --- launch rules; GPU and date: not measured yet ------------------------------------------------

# By GPU generation, then by bytes of an element and BLOCK_K. Chosen by registers and spills
# (ptxas of Triton 3.7.1, sm_80 and sm_90), so that two programs or more fit on a multiprocessor.
SHORT = {
    80: {
        (2, 16): {"BLOCK_M": 64, "num_warps": 4, "num_stages": 1},
        (2, 32): {"BLOCK_M": 64, "num_warps": 4, "num_stages": 1},
        (2, 64): {"BLOCK_M": 64, "num_warps": 4, "num_stages": 1},
        (2, 128): {"BLOCK_M": 64, "num_warps": 4, "num_stages": 1},
        # fp32 products are made of fused multiply-adds: tiles are small, all sequences stream
        (4, 16): None,
        (4, 32): None,
        (4, 64): None,
        (4, 128): None,
    }
}
LONG = {
    80: {
        (2, 16): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        (2, 32): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        (2, 64): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        (2, 128): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (4, 16): {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        (4, 32): {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        (4, 64): {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        (4, 128): {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    }
}


def attention_fwd(
    qkv: Tensor,
    cu_seqlens: Tensor,
    work: Tensor | None,
    max_len: int,
    tile: int,
    p: float,
    seed: Tensor | None,
    site: int,
    tf32: bool,
) -> tuple[Tensor, Tensor]:
    """Return o (T, H, K) and lse (H, T) fp32; both 0 in rows of no sequence.

    Args:
        qkv: (T, 3, H, K) fp32, fp16 or bf16, contiguous.
        cu_seqlens: (B + 1,) int32.
        work: its work list; None: made here.
        max_len: no sequence is longer.
        tile: the work list's.
        p: probability of dropping a probability.
        seed: (1,) int64, or None.
        site: number of this dropout in the model.
        tf32: whether fp32 products may round their operands to TF32.

    Raises:
        NotImplementedError: a dtype or head size that the kernels do not take.
    """
    check("attention", qkv)
    if work is None:
        work = work_list(cu_seqlens, qkv.shape[0], tile)
    plan = Plan(qkv, cu_seqlens, max_len, tile, SHORT, p, seed, tf32)
    o = qkv.new_empty(plan.T, plan.H, plan.K)
    lse = qkv.new_empty(plan.H, plan.T, dtype=torch.float32)
    tensors = qkv, o, lse, work, seed if plan.dropout else work
    numbers = plan.H, plan.K // 8, plan.K**-0.5 * LOG2_E.value
    numbers += site, plan.threshold, plan.keep_scale
    grid, options = plan.streamed(plan.rule(LONG), "BLOCK_M")
    options |= plan.flags
    common.launch(_attention_long_fwd_kernel, grid, *tensors, plan.T, *numbers, **options)
    grid, options = plan.short(SHORT, "BLOCK_N")
    common.launch(_attention_short_fwd_kernel, grid, *tensors, plan.T, plan.B, *numbers, **options)
    return o, lse
