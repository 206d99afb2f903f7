"""What attention's kernels share: rows of a head, dropout's mask, entries, plans of launches."""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels import common

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
Rule = Mapping[str, int]
Rules = Mapping[int, Mapping[tuple[int, int], Rule | None]]  # generation, (bytes, BLOCK_K)
ONLY_ZEROS = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}

# --- on the device -------------------------------------------------------------------------------


@triton.jit
def load_rows(
    ptr,  # first row of a sequence
    rows,  # (R,) int32, within the sequence
    stride,
    n,
    K,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    MASKED: tl.constexpr = True,
):
    """Rows (R, BLOCK_K) of one head; 0 past row n and past column K."""
    cols = tl.arange(0, BLOCK_K)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if MASKED and EVEN_K:
        x = tl.load(ptrs, mask=(rows < n)[:, None], other=0.0)
    elif MASKED:
        x = tl.load(ptrs, mask=(rows < n)[:, None] & (cols < K)[None, :], other=0.0)
    elif EVEN_K:
        x = tl.load(ptrs)
    else:
        x = tl.load(ptrs, mask=(cols < K)[None, :], other=0.0)
    return x


@triton.jit
def store_rows(
    ptr,
    x,  # (R, BLOCK_K) fp32
    rows,
    stride,
    n,
    K,
    BLOCK_K: tl.constexpr,
):
    """Store rows below n and columns below K."""
    cols = tl.arange(0, BLOCK_K)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    mask = (rows < n)[:, None] & (cols < K)[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def key_order(N: tl.constexpr, DROPOUT: tl.constexpr):
    """Which key stands in each column of a tile of scores.

    In the accumulators of a matrix product a thread holds columns 2 c and 2 c + 1 of every eight.
    With dropout the keys are dealt out so that the eight of a Philox call are one thread's: then
    no bit passes through shared memory, and none is drawn twice. Sums do not mind the order.
    """
    j = tl.arange(0, N)
    if DROPOUT:
        j = j // 32 * 32 + j % 8 // 2 * 8 + j % 32 // 8 * 2 + j % 2
    return j


@triton.jit
def is_kept(
    key,
    threshold,
    row,  # first of the rows, within the sequence
    column,  # first of the keys, a multiple of 32
    sequence,
    head,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Which of the probabilities (R, C) dropout keeps, keys in `key_order`."""
    rows = row + tl.arange(0, R)
    groups = column // 8 + tl.arange(0, C // 8)
    bits = common.dropout_bits(key, rows[:, None], groups[None, :], sequence, head, R, C // 8)
    bits = tl.permute(tl.reshape(bits, (R, C // 32, 4, 4, 2)), (0, 1, 3, 2, 4))
    return tl.reshape(bits, (R, C)) >= threshold


@triton.jit
def entry_of(work_ptr, entry):
    """Sequence, first row (int64), length, and first row of the tile within it."""
    ptr = work_ptr + 4 * (1 + entry).to(tl.int64)
    begin = tl.load(ptr + 1).to(tl.int64)
    return tl.load(ptr), begin, tl.load(ptr + 2), tl.load(ptr + 3)


@triton.jit
def first_short(work_ptr, STREAM_ALL: tl.constexpr):
    """The first entry that is not for the kernels that stream: theirs stand before it."""
    return tl.load(work_ptr + (1 if STREAM_ALL else 2))


# --- on the host ---------------------------------------------------------------------------------


class Plan:
    """Grids and options of the launches for one batch.

    The entries of long sequences come first in the work list, then a sequence each, then the rows
    of no sequence. Where a dtype or head size has no kernel for short sequences (its rule is None),
    those stream too. Grids hold as many programs as there may be entries, for the host knows no
    lengths; the surplus ends at once.
    """

    def __init__(
        self,
        qkv: Tensor,
        cu_seqlens: Tensor,
        max_len: int,
        tile: int,
        short: Rules,
        p: float,
        seed: Tensor | None,
        tf32: bool,
    ):
        self.T, _, self.H, self.K = qkv.shape
        self.B = cu_seqlens.shape[0] - 1
        self.tile = tile
        self.dropout, self.threshold, self.keep_scale = common.dropout_args(p, seed)
        BLOCK_K = max(16, triton.next_power_of_2(self.K))
        self.key = qkv.element_size(), BLOCK_K
        self.qkv = qkv
        self.shape = {"BLOCK_K": BLOCK_K, "EVEN_K": self.K == BLOCK_K}
        self.flags = {
            **self.shape,
            "STREAM_ALL": self.rule(short) is None,
            "DROPOUT": self.dropout,
            "PRECISION": "tf32" if tf32 and qkv.dtype == torch.float32 else "ieee",
        }
        if self.flags["STREAM_ALL"]:
            streamed, self.num_short = min(self.B, self.T), 1
        else:  # those of tile + 1 rows and more
            streamed = min(self.B, self.T // (tile + 1)) if max_len > tile else 0
            self.num_short = self.B + 1
        # a sequence has no more tiles than max_len has, and one more than its rows fill
        by_length = streamed * triton.cdiv(max_len, tile)
        self.num_streamed = min(by_length, self.T // tile + streamed)

    def rule(self, rules: Rules) -> Any:
        """Return the entry for the GPU, dtype and head size."""
        return common.by_generation(rules, self.qkv)[self.key]

    def short(self, rules: Rules, block: str) -> tuple[tuple[int], dict[str, Any]]:
        """Return grid and options of a kernel for short sequences and the rows of none.

        Option `block` is the tile, into which all of a sequence fits.
        """
        rule = self.rule(rules) or ONLY_ZEROS
        return (self.num_short * self.H,), self.flags | rule | {block: self.tile}

    def streamed(self, rule: Rule, block: str) -> tuple[tuple[int], dict[str, int]]:
        """Return grid and options of a kernel that streams, a program for each `block` rows."""
        blocks = self.tile // rule[block]
        return (self.num_streamed * blocks * self.H,), {**rule, "BLOCKS": blocks}


def check(op: str, qkv: Tensor) -> None:
    """Raise NotImplementedError for what the kernels do not take."""
    K = qkv.shape[3]
    reasons = common.unsupported_dtypes(qkv=qkv)
    if not 8 <= K <= 128 or K % 8:
        reasons.append(f"head size: want a multiple of 8 from 8 to 128 on a GPU, got {K}")
    common.unsupported(op, reasons)
