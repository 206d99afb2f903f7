"""Attention within each packed sequence, backward.

With P the probabilities, D dropout's factors (0 or 1 / the share kept) and dO the gradient of O:

    dV = (D P)^T dO      dP = D (dO V^T)      dS = P (dP - delta) / sqrt(K)
    dQ = dS K            dK = dS^T Q          delta = rowsum(dO O) = rowsum(P dP)

P is made anew from the log-sum-exp that the forward pass saved, D from its counters. Everything
is written once, by one program, into dqkv (T, 3, H, K): no atomics, the same bits every time.

Short sequences (up to the work list's tile): one program makes dQ, dK and dV, five products,
10 n^2 K FLOPs a head. Long ones: one kernel for the rows of dK and dV and one for those of dQ, each
with S and dP made anew: seven products, 14 n^2 K, and a pass beforehand for delta. Bound by the
matrix units and the exponentials; by memory (8 T H K elements) for the shortest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels import common
from bert_fast.kernels.attention_tiles import (
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
def _load_stat(ptr, rows, n):
    """A number a query; 0 past the end, where Q and dO are 0 too: nothing is added from there."""
    return tl.load(ptr + rows, mask=rows < n, other=0.0)


@triton.jit
def _probabilities_and_scores(
    q,  # (BLOCK_M, BLOCK_K)
    do,
    k,  # (BLOCK_N, BLOCK_K)
    v,
    lse,  # (BLOCK_M,) natural
    delta,
    row,  # first of the queries
    first,  # first of the keys
    keys,
    n,
    sequence,
    head,
    scale,  # 1 / sqrt(K)
    key,
    threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """D P and dS of a tile, (BLOCK_M, BLOCK_N), in the dtype of q: operands of products."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = tl.exp2(s * (scale * LOG2_E) - (lse * LOG2_E)[:, None])
    if MASKED:  # exp2 of -lse may be Inf, and dQ sums over the keys
        p = tl.where((keys < n)[None, :], p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    dropped = p
    if DROPOUT:
        kept = is_kept(key, threshold, row, first, sequence, head, BLOCK_M, BLOCK_N)
        dropped = tl.where(kept, p * keep_scale, 0.0)
        dp = tl.where(kept, dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None]) * scale
    return dropped.to(q.dtype), ds.to(q.dtype)


@triton.jit
def _all_gradients(
    q_ptr,  # at the sequence's first row and the head, as the other pointers
    o_ptr,
    do_ptr,
    lse_ptr,
    dq_ptr,
    n,
    H,
    K,
    sequence,
    head,
    scale,
    key,
    threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,  # at least n
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ, dK and dV of a sequence of at most BLOCK_M rows, BLOCK_N keys at a time."""
    rows = tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, rows, 3 * H * K, n, K, BLOCK_K, EVEN_K)
    o = load_rows(o_ptr, rows, H * K, n, K, BLOCK_K, EVEN_K)
    do = load_rows(do_ptr, rows, H * K, n, K, BLOCK_K, EVEN_K)
    lse = _load_stat(lse_ptr, rows, n)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    dq = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for first in range(0, n, BLOCK_N):
        keys = first + key_order(BLOCK_N, DROPOUT)
        k = load_rows(q_ptr + H * K, keys, 3 * H * K, n, K, BLOCK_K, EVEN_K)
        v = load_rows(q_ptr + 2 * H * K, keys, 3 * H * K, n, K, BLOCK_K, EVEN_K)
        dropped, ds = _probabilities_and_scores(
            q, do, k, v, lse, delta, 0, first, keys, n, sequence, head, scale, key, threshold,
            keep_scale, BLOCK_M, BLOCK_N, DROPOUT, PRECISION, MASKED=True,
        )  # fmt: skip
        dv = tl.dot(tl.trans(dropped), do, input_precision=PRECISION)
        store_rows(dq_ptr + 2 * H * K, dv, keys, 3 * H * K, n, K, BLOCK_K)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
        store_rows(dq_ptr + H * K, dk, keys, 3 * H * K, n, K, BLOCK_K)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    store_rows(dq_ptr, dq, rows, 3 * H * K, n, K, BLOCK_K)


@triton.jit
def _zero(dq_ptr, n, H, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows of no sequence."""
    for row in range(0, n, BLOCK_N):
        rows = row + tl.arange(0, BLOCK_N)
        zeros = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        for part in tl.static_range(3):
            store_rows(dq_ptr + part * H * K, zeros, rows, 3 * H * K, n, K, BLOCK_K)


# What changes with the batch, or from step to step, is not compiled in.
@triton.jit(do_not_specialize=["T", "B", "site", "threshold", "keep_scale"])
def _attention_short_bwd_kernel(
    qkv_ptr,  # (T, 3, H, K)
    o_ptr,  # (T, H, K)
    do_ptr,  # (T, H, K)
    lse_ptr,  # (H, T) fp32
    dqkv_ptr,  # (T, 3, H, K)
    work_ptr,  # (1 + capacity, 4) int32
    seed_ptr,  # (1,) int64, read with DROPOUT
    T,
    B,
    H,
    K8,  # K / 8
    scale,  # 1 / sqrt(K)
    site,
    threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,  # the work list's tile
    BLOCK_N: tl.constexpr,
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
        at = (begin * 3 * H + head) * K
        q_ptr, dq_ptr = qkv_ptr + at, dqkv_ptr + at
        at = (begin * H + head) * K
        o_ptr, do_ptr = o_ptr + at, do_ptr + at
        lse_ptr += head.to(tl.int64) * T + begin
        if sequence == B:
            _zero(dq_ptr, n, H, K, BLOCK_N, BLOCK_K)
        elif not STREAM_ALL:
            if n <= 32:
                _all_gradients(
                    q_ptr, o_ptr, do_ptr, lse_ptr, dq_ptr, n, H, K, sequence, head, scale, key,
                    threshold, keep_scale, 32, 32, BLOCK_K, EVEN_K, DROPOUT, PRECISION,
                )  # fmt: skip
            elif n <= 64:
                _all_gradients(
                    q_ptr, o_ptr, do_ptr, lse_ptr, dq_ptr, n, H, K, sequence, head, scale, key,
                    threshold, keep_scale, 64, BLOCK_N, BLOCK_K, EVEN_K, DROPOUT, PRECISION,
                )  # fmt: skip
            else:
                _all_gradients(
                    q_ptr, o_ptr, do_ptr, lse_ptr, dq_ptr, n, H, K, sequence, head, scale, key,
                    threshold, keep_scale, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, DROPOUT, PRECISION,
                )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _attention_delta_kernel(
    o_ptr,  # (T, H, K)
    do_ptr,  # (T, H, K)
    delta_ptr,  # (H, T) fp32
    work_ptr,  # (1 + capacity, 4) int32
    T,
    H,
    K8,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,  # of BLOCK_M rows in the work list's tile
    EVEN_K: tl.constexpr,
    STREAM_ALL: tl.constexpr,
):
    K = K8 * 8
    head = tl.program_id(0) % H
    block = tl.program_id(0) // H
    _, begin, n, row = entry_of(work_ptr, block // BLOCKS)
    row += block % BLOCKS * BLOCK_M
    if (block // BLOCKS < first_short(work_ptr, STREAM_ALL)) & (row < n):
        rows = row + tl.arange(0, BLOCK_M)
        at = (begin * H + head) * K
        o = load_rows(o_ptr + at, rows, H * K, n, K, BLOCK_K, EVEN_K)
        do = load_rows(do_ptr + at, rows, H * K, n, K, BLOCK_K, EVEN_K)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
        tl.store(delta_ptr + head.to(tl.int64) * T + begin + rows, delta, mask=rows < n)


@triton.jit(do_not_specialize=["T", "site", "threshold", "keep_scale"])
def _attention_long_bwd_kv_kernel(
    qkv_ptr,  # (T, 3, H, K)
    do_ptr,  # (T, H, K)
    lse_ptr,  # (H, T) fp32
    delta_ptr,  # (H, T) fp32
    dqkv_ptr,  # (T, 3, H, K)
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
    BLOCKS: tl.constexpr,  # of BLOCK_N rows in the work list's tile
    EVEN_K: tl.constexpr,
    STREAM_ALL: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    K = K8 * 8
    head = tl.program_id(0) % H
    block = tl.program_id(0) // H
    sequence, begin, n, first = entry_of(work_ptr, block // BLOCKS)
    first += block % BLOCKS * BLOCK_N
    if (block // BLOCKS < first_short(work_ptr, STREAM_ALL)) & (first < n):
        key = 0
        if DROPOUT:
            key = tl.load(seed_ptr) + site
        q_ptr = qkv_ptr + (begin * 3 * H + head) * K
        do_ptr += (begin * H + head) * K
        stat = head.to(tl.int64) * T + begin
        keys = first + key_order(BLOCK_N, DROPOUT)
        k = load_rows(q_ptr + H * K, keys, 3 * H * K, n, K, BLOCK_K, EVEN_K)
        v = load_rows(q_ptr + 2 * H * K, keys, 3 * H * K, n, K, BLOCK_K, EVEN_K)
        dk = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        for row in range(0, n, BLOCK_M):
            rows = row + tl.arange(0, BLOCK_M)
            q = load_rows(q_ptr, rows, 3 * H * K, n, K, BLOCK_K, EVEN_K)
            do = load_rows(do_ptr, rows, H * K, n, K, BLOCK_K, EVEN_K)
            lse = _load_stat(lse_ptr + stat, rows, n)
            delta = _load_stat(delta_ptr + stat, rows, n)
            dropped, ds = _probabilities_and_scores(
                q, do, k, v, lse, delta, row, first, keys, n, sequence, head, scale, key,
                threshold, keep_scale, BLOCK_M, BLOCK_N, DROPOUT, PRECISION, MASKED=False,
            )  # fmt: skip
            dv = tl.dot(tl.trans(dropped), do, dv, input_precision=PRECISION)
            dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
        dk_ptr = dqkv_ptr + (begin * 3 * H + H + head) * K
        store_rows(dk_ptr, dk, keys, 3 * H * K, n, K, BLOCK_K)
        store_rows(dk_ptr + H * K, dv, keys, 3 * H * K, n, K, BLOCK_K)


@triton.jit(do_not_specialize=["T", "site", "threshold", "keep_scale"])
def _attention_long_bwd_q_kernel(
    qkv_ptr,  # (T, 3, H, K)
    do_ptr,  # (T, H, K)
    lse_ptr,  # (H, T) fp32
    delta_ptr,  # (H, T) fp32
    dqkv_ptr,  # (T, 3, H, K)
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
        stat = head.to(tl.int64) * T + begin
        rows = row + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, rows, 3 * H * K, n, K, BLOCK_K, EVEN_K)
        do = load_rows(do_ptr + (begin * H + head) * K, rows, H * K, n, K, BLOCK_K, EVEN_K)
        lse = _load_stat(lse_ptr + stat, rows, n)
        delta = _load_stat(delta_ptr + stat, rows, n)
        dq = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        for first in range(0, n, BLOCK_N):
            keys = first + key_order(BLOCK_N, DROPOUT)
            k = load_rows(q_ptr + H * K, keys, 3 * H * K, n, K, BLOCK_K, EVEN_K)
            v = load_rows(q_ptr + 2 * H * K, keys, 3 * H * K, n, K, BLOCK_K, EVEN_K)
            _, ds = _probabilities_and_scores(
                q, do, k, v, lse, delta, row, first, keys, n, sequence, head, scale, key,
                threshold, keep_scale, BLOCK_M, BLOCK_N, DROPOUT, PRECISION, MASKED=True,
            )  # fmt: skip
            dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        dq_ptr = dqkv_ptr + (begin * 3 * H + head) * K
        store_rows(dq_ptr, dq, rows, 3 * H * K, n, K, BLOCK_K)


# --- launch rules; GPU and date: not measured yet ------------------------------------------------

# By GPU generation, then by bytes of an element and BLOCK_K. Chosen by registers and spills
# (ptxas of Triton 3.7.1, sm_80 and sm_90).
SHORT = {
    80: {
        (2, 16): {"BLOCK_N": 64, "num_warps": 8, "num_stages": 1},
        (2, 32): {"BLOCK_N": 64, "num_warps": 8, "num_stages": 1},
        (2, 64): {"BLOCK_N": 64, "num_warps": 8, "num_stages": 1},
        # what a sequence needs at once is more than the shared memory of smaller GPUs; all stream
        (2, 128): None,
        (4, 16): None,
        (4, 32): None,
        (4, 64): None,
        (4, 128): None,
    }
}
DELTA = {80: {"BLOCK_M": 64, "num_warps": 4}}
LONG_KV = {
    80: {
        (2, 16): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (2, 32): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (2, 64): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (2, 128): {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1},
        (4, 16): {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        (4, 32): {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        (4, 64): {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        (4, 128): {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    }
}
LONG_Q = {
    80: {
        (2, 16): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (2, 32): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (2, 64): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (2, 128): {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (4, 16): {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        (4, 32): {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        (4, 64): {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        (4, 128): {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    }
}


def attention_bwd(
    do: Tensor,
    qkv: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    work: Tensor | None,
    max_len: int,
    tile: int,
    p: float,
    seed: Tensor | None,
    site: int,
    tf32: bool,
) -> Tensor:
    """Return dqkv (T, 3, H, K) in the dtype of qkv; 0 in rows of no sequence.

    Args:
        do: (T, H, K) contiguous, the gradient of o.
        qkv: (T, 3, H, K) fp32, fp16 or bf16, contiguous.
        o: (T, H, K) of the forward pass.
        lse: (H, T) fp32 of the forward pass.
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
    check("attention_bwd", qkv)
    if work is None:
        work = work_list(cu_seqlens, qkv.shape[0], tile)
    plan = Plan(qkv, cu_seqlens, max_len, tile, SHORT, p, seed, tf32)
    dqkv = torch.empty_like(qkv)
    random = seed if plan.dropout else work
    numbers = plan.H, plan.K // 8, plan.K**-0.5, site, plan.threshold, plan.keep_scale
    if plan.num_streamed:
        delta = torch.empty_like(lse)
        grid, options = plan.streamed(common.by_generation(DELTA, qkv), "BLOCK_M")
        options |= plan.shape | {"STREAM_ALL": plan.flags["STREAM_ALL"]}
        args = o, do, delta, work, plan.T, plan.H, plan.K // 8
        common.launch(_attention_delta_kernel, grid, *args, **options)
        tensors = qkv, do, lse, delta, dqkv, work, random
        grid, options = plan.streamed(plan.rule(LONG_KV), "BLOCK_N")
        options |= plan.flags
        common.launch(_attention_long_bwd_kv_kernel, grid, *tensors, plan.T, *numbers, **options)
        grid, options = plan.streamed(plan.rule(LONG_Q), "BLOCK_M")
        options |= plan.flags
        common.launch(_attention_long_bwd_q_kernel, grid, *tensors, plan.T, *numbers, **options)
    tensors = qkv, o, do, lse, dqkv, work, random
    grid, options = plan.short(SHORT, "BLOCK_M")
    common.launch(_attention_short_bwd_kernel, grid, *tensors, plan.T, plan.B, *numbers, **options)
    return dqkv
