"""The gradient of an embedding table: the rows of dz summed by id, in a fixed order, no atomics.

    grad[i] = sum of dz[t] over the tokens t with ids[t] = i          T tokens, D columns

A stable sort of the ids gives, for each row of the table, a run of tokens in a fixed order. The
sorted list is cut into chunks of fixed size; a program adds a chunk's rows of dz in order and
writes each run that lies wholly in the chunk to the table. A run that crosses borders leaves one
partial sum in each chunk, which a second kernel adds in order: so a run as long as a type's, half
of all tokens, is spread over many programs. Ids outside the table are in no sum.

Bound by memory: T D elements of fp32 read, the table's gradient zeroed and its named rows written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels import common

# --- device functions ----------------------------------------------------------------------------


@triton.jit
def _place(D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return this program's chunk, columns, and which columns there are.

    In one dimension, columns first: a second dimension of a grid ends at 65,535.
    """
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    cols = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    return tl.program_id(0) // blocks, cols, cols < D


@triton.jit
def _is_wanted(row, num_rows, pad_id):
    return (row >= 0) & (row < num_rows) & (row != pad_id)


# --- kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "num_rows", "pad_id"])
def _sum_runs_kernel(
    dz_ptr,  # (T, D) fp32
    ids_ptr,  # (T,) int16 or int32, sorted
    order_ptr,  # (T,) int64: the token of each
    grad_ptr,  # (num_rows, D)
    partials_ptr,  # (chunks, 2, D) fp32: of a run begun earlier, and of one that goes on
    T,
    num_rows,
    pad_id,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    chunk, cols, in_row = _place(D, BLOCK_D)
    first = chunk.to(tl.int64) * CHUNK
    last = tl.minimum(first + CHUNK, T)
    begun = tl.load(ids_ptr + first).to(tl.int64)  # the first run's
    before = tl.load(ids_ptr + first - 1, mask=first > 0, other=0).to(tl.int64)
    crossed = (first > 0) & (before == begun)
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    j = tl.arange(0, ROWS)
    for start in range(first, last, ROWS):
        # several rows are on their way at once: one after the other would cost a latency each
        at = start + j
        live = at < last
        tokens = tl.load(order_ptr + at, mask=live, other=0)
        offs = tokens[:, None] * D + cols[None, :]
        dz = tl.load(dz_ptr + offs, mask=live[:, None] & in_row[None, :], other=0.0)
        row = tl.load(ids_ptr + at, mask=live, other=0).to(tl.int64)
        previous = tl.load(ids_ptr + at - 1, mask=live & (at > first), other=0).to(tl.int64)
        following = tl.load(ids_ptr + at + 1, mask=at + 1 < T, other=0).to(tl.int64)
        begins = previous != row  # at the chunk's first row it does not matter: total is 0
        ends = (at + 1 >= T) | (following != row)

        # sums[k]: of the run at hand up to row k. Which row is row k is known to the compiler, and
        # a sum with -0.0 changes nothing: what is left is one addition for each element of dz.
        sums = dz
        for k in tl.static_range(ROWS):
            is_k = (j == k)[:, None]
            sums = tl.where(is_k, dz + tl.where(begins[:, None], 0.0, total[None, :]), sums)
            total = tl.sum(tl.where(is_k, sums, -0.0), axis=0)

        wanted = live & _is_wanted(row, num_rows, pad_id)
        entered = crossed & (row == begun)
        whole = wanted & ends & ~entered
        out = grad_ptr + tl.where(wanted, row, 0)[:, None] * D + cols[None, :]
        mask = whole[:, None] & in_row[None, :]
        tl.store(out, sums.to(grad_ptr.dtype.element_ty), mask=mask)
        part = wanted & tl.where(ends, entered, at == first + CHUNK - 1)
        out = first // CHUNK * 2 + tl.where(entered, 0, 1)
        out = partials_ptr + out[:, None] * D + cols[None, :]
        tl.store(out, sums, mask=part[:, None] & in_row[None, :])


@triton.jit(do_not_specialize=["chunks", "num_rows", "pad_id"])
def _join_runs_kernel(
    ids_ptr,  # (T,) int16 or int32, sorted
    grad_ptr,  # (num_rows, D)
    partials_ptr,  # (chunks, 2, D) fp32
    chunks,
    num_rows,
    pad_id,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    chunk, cols, in_row = _place(D, BLOCK_D)
    first = chunk.to(tl.int64) * CHUNK
    row = tl.load(ids_ptr + first + CHUNK - 1).to(tl.int64)
    goes_on = tl.load(ids_ptr + first + CHUNK).to(tl.int64) == row
    before = tl.load(ids_ptr + first - 1, mask=first > 0, other=0).to(tl.int64)
    begins = (first == 0) | (before != row)  # else the program of an earlier chunk adds it up
    if goes_on & begins & _is_wanted(row, num_rows, pad_id):
        # The first chunk whose first id is another, by halves: to look at one chunk after the other
        # would wait hundreds of times in a run that is half of all tokens, and with the end known
        # the partial sums below wait for nothing.
        inside, outside = chunk + 1, chunks
        while inside + 1 < outside:
            middle = (inside + outside) // 2
            same = tl.load(ids_ptr + middle.to(tl.int64) * CHUNK).to(tl.int64) == row
            inside = tl.where(same, middle, inside)
            outside = tl.where(same, outside, middle)
        total = tl.load(partials_ptr + (first // CHUNK * 2 + 1) * D + cols, mask=in_row, other=0.0)
        for start in range(chunk + 1, outside, ROWS):
            at = start + tl.arange(0, ROWS)
            offs = at.to(tl.int64)[:, None] * 2 * D + cols[None, :]
            mask = (at < outside)[:, None] & in_row[None, :]
            total += tl.sum(tl.load(partials_ptr + offs, mask=mask, other=0.0), axis=0)
        out = grad_ptr + row * D + cols
        tl.store(out, total.to(grad_ptr.dtype.element_ty), mask=in_row)


# --- launch rule; GPU and date: not measured yet -------------------------------------------------

# By GPU generation, then by the least rows of a table, most first: (entries in a chunk, rows read
# at once). A word has few tokens: in small chunks more programs share the work. A type has half of
# all: the larger the chunk, the fewer partial sums one program adds up. One warp takes 256 columns,
# in 16 bits one store of 16 bytes for each thread, so that a thread holds all rows of its columns
# and adds them without the others. With 4 rows at once the 18 programs that fit on a multiprocessor
# keep 72 KB on their way, more than the 30 KB that cover a latency of 0.8 us at 4.8 TB/s.
CHUNKS = {80: ((2048, 32, 4), (0, 128, 4))}
TABLE_COLUMNS = 256
JOINED_ROWS = 16  # partial sums read at once


def _chunk(table: Tensor) -> tuple[int, int]:
    """Return (entries in a chunk, rows read at once) for the gradient of a table."""
    return next(
        rule[1:] for rule in common.by_generation(CHUNKS, table) if table.shape[0] >= rule[0]
    )


# --- launcher ------------------------------------------------------------------------------------


def table_gradient(dz: Tensor, ids: Tensor, table: Tensor, pad_id: int) -> Tensor:
    """Return the sums of the rows of dz (T, D) by id, (rows, D) in the table's dtype.

    Rows that no id names are 0, as is row pad_id; negative: none is. Of the partial sums in scratch
    those are read that the first kernel wrote, and no others.
    """
    grad = torch.zeros_like(table)
    T, D = dz.shape
    if T == 0:
        return grad
    # a radix sort reads as many bits as a key has; what is outside the table stays outside
    narrow = torch.int16 if table.shape[0] < 2**15 - 1 else torch.int32
    ids, order = torch.sort(ids.clamp(-1, table.shape[0]).to(narrow), stable=True)
    chunk, rows = _chunk(table)
    chunks = triton.cdiv(T, chunk)
    partials = torch.empty(chunks, 2, D, dtype=torch.float32, device=dz.device)
    block_d = min(TABLE_COLUMNS, triton.next_power_of_2(D))
    blocks = triton.cdiv(D, block_d)
    common.launch(
        _sum_runs_kernel,
        (chunks * blocks,),
        *(dz, ids, order, grad, partials, T, table.shape[0], pad_id),
        D=D,
        CHUNK=chunk,
        ROWS=rows,
        BLOCK_D=block_d,
        num_warps=1,
    )
    common.launch(
        _join_runs_kernel,
        ((chunks - 1) * blocks,),
        *(ids, grad, partials, chunks, table.shape[0], pad_id),
        D=D,
        CHUNK=chunk,
        ROWS=JOINED_ROWS,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return grad
