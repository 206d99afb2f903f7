"""Word + position + type embeddings, LayerNorm and dropout, forward and backward.

    z = word[input_id] + type[type_id] + position[position_id]     T rows (tokens), D columns
    y = dropout((z - mean) * rstd * w + b)            rstd = 1 / sqrt(var + eps) of a row of z

An id outside its table is not read: its row is NaN, which shows, and has no part in any gradient.

Backward, with x_hat = (z - mean) * rstd and g = (dy where kept) * w:
    dz = rstd * (g - mean(g) - x_hat * mean(g * x_hat))
    dw = sum of dy * x_hat over the rows         db = sum of dy over the rows
The gradient of a table's row is the sum of dz over the tokens that have its id:
`embedding_tables.table_gradient`.

Paper: Devlin et al., BERT, 2019, https://arxiv.org/abs/1810.04805, for the sum of three embeddings.
Bound by memory: forward moves 5 T D elements (three gathers, y, z). Backward moves 2 T D elements
(dy, z) and 4 T D of fp32 (dz written once, since its rounding must not precede the sums, and read
for each table), beside the gradients of the tables.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels import common
from bert_fast.kernels.embedding_tables import table_gradient

# --- device functions ----------------------------------------------------------------------------


@triton.jit
def _ids(ids_ptr, rows, mask, size):
    """Return the ids at `rows`, 0 in place of those outside a table, and which are inside it."""
    ids = tl.load(ids_ptr + rows, mask=mask, other=0).to(tl.int64)
    inside = (ids >= 0) & (ids < size)
    return tl.where(inside, ids, 0), inside


# --- kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "V", "P", "C", "eps", "site", "threshold", "factor"])
def _embed_fwd_kernel(
    position_ids_ptr,  # (T,) int32 or int64, as are the others
    input_ids_ptr,  # (T,), or None: word holds a row for each token
    token_type_ids_ptr,  # (T,)
    word_ptr,  # (V, D)
    position_ptr,  # (P, D)
    type_ptr,  # (C, D)
    w_ptr,  # (D,)
    b_ptr,  # (D,)
    y_ptr,  # (T, D)
    z_ptr,  # (T, D)
    mean_ptr,  # (T,) fp32
    rstd_ptr,  # (T,) fp32
    seed_ptr,  # (1,) int64, or None: no dropout
    T,
    V,
    P,
    C,
    eps,
    site,
    threshold,
    factor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)[None, :]
    here, in_row = rows < T, cols < D
    mask = here[:, None] & in_row
    offs = rows[:, None] * D + cols

    position_ids, known = _ids(position_ids_ptr, rows, here, P)
    type_ids, inside = _ids(token_type_ids_ptr, rows, here, C)
    known &= inside
    word_rows = rows
    if input_ids_ptr is not None:
        word_rows, inside = _ids(input_ids_ptr, rows, here, V)
        known &= inside
    read = mask & known[:, None]
    z = tl.load(word_ptr + word_rows[:, None] * D + cols, mask=read, other=0.0).to(tl.float32)
    kind = tl.load(type_ptr + type_ids[:, None] * D + cols, mask=read, other=0.0)
    place = tl.load(position_ptr + position_ids[:, None] * D + cols, mask=read, other=0.0)
    z += kind.to(tl.float32)
    z += place.to(tl.float32)
    z = tl.where(known[:, None], z, float("nan"))
    tl.store(z_ptr + offs, z.to(z_ptr.dtype.element_ty), mask=mask)

    x_hat, mean, rstd = common.normalise(z, eps, D, BLOCK_D)
    tl.store(mean_ptr + rows, mean, mask=here)
    tl.store(rstd_ptr + rows, rstd, mask=here)

    w = tl.load(w_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    y = x_hat * w + b
    if seed_ptr is not None:
        key = tl.load(seed_ptr) + site
        y *= common.row_dropout(rows, key, threshold, factor, ROWS, BLOCK_D)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["T", "V", "P", "C", "rows_per_program", "site", "threshold", "factor"]
)
def _embed_bwd_kernel(
    dy_ptr,  # (T, D)
    input_ids_ptr,  # (T,), or None
    position_ids_ptr,  # (T,)
    token_type_ids_ptr,  # (T,)
    w_ptr,  # (D,)
    z_ptr,  # (T, D)
    mean_ptr,  # (T,) fp32
    rstd_ptr,  # (T,) fp32
    seed_ptr,  # (1,) int64, or None: no dropout
    dz_ptr,  # (T, D) fp32
    dword_ptr,  # (T, D), or None with input_ids
    partials_ptr,  # (programs, 2, D) fp32: dw, db
    T,
    V,
    P,
    C,
    rows_per_program,
    site,
    threshold,
    factor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)[None, :]
    in_row = cols < D
    w = tl.load(w_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    key = tl.zeros((), dtype=tl.int64)
    if seed_ptr is not None:
        key = tl.load(seed_ptr) + site
    # summed over the tile's rows once, at the end: within the loop nothing crosses threads for them
    dw = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    db = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)

    begin = program * rows_per_program
    end = tl.minimum(begin + rows_per_program, T)
    for first in tl.range(begin, end, ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)
        here = rows < end
        _, known = _ids(position_ids_ptr, rows, here, P)
        _, inside = _ids(token_type_ids_ptr, rows, here, C)
        known &= inside
        if input_ids_ptr is not None:
            _, inside = _ids(input_ids_ptr, rows, here, V)
            known &= inside
        mask = here[:, None] & in_row
        known = mask & known[:, None]  # the others are NaN: they count as 0
        offs = rows[:, None] * D + cols
        dy = tl.load(dy_ptr + offs, mask=known, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + offs, mask=known, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=here, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=here, other=0.0)[:, None]

        if seed_ptr is not None:
            dy *= common.row_dropout(rows, key, threshold, factor, ROWS, BLOCK_D)
        x_hat = tl.where(known, (z - mean) * rstd, 0.0)
        dz = tl.where(known, common.normalise_bwd(dy * w, x_hat, rstd, D), 0.0)
        tl.store(dz_ptr + offs, dz, mask=mask)
        if dword_ptr is not None:
            tl.store(dword_ptr + offs, dz.to(dword_ptr.dtype.element_ty), mask=mask)
        dw += dy * x_hat
        db += dy

    cols = tl.arange(0, BLOCK_D)
    out = partials_ptr + program * 2 * D + cols
    tl.store(out, tl.sum(dw, axis=0), mask=cols < D)
    tl.store(out + D, tl.sum(db, axis=0), mask=cols < D)


# --- launch rules; GPU and date: not measured yet ------------------------------------------------

# By GPU generation (one without an entry takes the one below), then by columns of a tile, which are
# D up to a power of two: (rows, warps).
#
# Forward: 32 elements a thread, in 16 bits four loads of 16 bytes from each table. Up to 1,024
# columns a row is one warp's: its sums need no barrier.
FWD_TILES = {
    80: {
        **{8: (16, 1), 16: (16, 1), 32: (16, 1), 64: (16, 1), 128: (8, 1), 256: (4, 1)},
        **{512: (2, 1), 1024: (1, 1), 2048: (1, 2), 4096: (1, 4), 8192: (1, 16)},
    }
}
# Backward, and stages of its loads: of the few programs, a partial sum each, two are on a
# multiprocessor, so loads run ahead. 8 elements a thread leave registers for two sums of the whole
# tile and for Philox, and nothing spills.
BWD_TILES = {
    80: {
        **{8: (16, 1, 3), 16: (16, 1, 3), 32: (16, 2, 3), 64: (16, 4, 3), 128: (8, 4, 4)},
        **{256: (4, 4, 4), 512: (2, 4, 4), 1024: (1, 4, 4), 2048: (1, 8, 4), 4096: (1, 16, 3)},
        **{8192: (1, 16, 1)},
    }
}


# --- launchers -----------------------------------------------------------------------------------


def embed_fwd(
    input_ids: Tensor | None,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    type_: Tensor,
    w: Tensor,
    b: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
    site: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (y, z, mean, rstd).

    Args:
        input_ids: (T,) int32 or int64, or None where word holds a row for each token.
        position_ids: (T,) int32 or int64.
        token_type_ids: (T,) int32 or int64.
        word: (V, D), or (T, D) without input_ids; fp32, fp16 or bf16, as are all that follow.
        position: (P, D).
        type_: (C, D).
        w: (D,).
        b: (D,).
        eps: added to the variance.
        p: probability of dropping.
        seed: (1,) int64, or None for no dropout.
        site: number of the dropout in the model.
        out_dtype: of y and z; mean and rstd (T,) are fp32.

    Raises:
        NotImplementedError: a dtype or D is not supported.
    """
    T, D = position_ids.shape[0], word.shape[1]
    block_d = common.row_tile("embed", D, word=word, position=position, type_=type_, w=w, b=b)
    word, position, type_, w, b = common.aligned(word, position, type_, w, b)
    drops, threshold, factor = common.dropout_args(p, seed)
    y, z = (torch.empty(T, D, dtype=out_dtype, device=word.device) for _ in range(2))
    mean, rstd = (torch.empty(T, dtype=torch.float32, device=word.device) for _ in range(2))
    rows, warps = common.by_generation(FWD_TILES, word)[block_d]
    common.launch(
        _embed_fwd_kernel,
        (triton.cdiv(T, rows),),
        *(position_ids, input_ids, token_type_ids, word, position, type_, w, b, y, z, mean, rstd),
        *(seed if drops else None, T, word.shape[0], position.shape[0], type_.shape[0]),
        *(eps, site, threshold, factor),
        D=D,
        ROWS=rows,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    return y, z, mean, rstd


def embed_bwd(
    dy: Tensor,
    input_ids: Tensor | None,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    type_: Tensor,
    w: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    pad_id: int,
    p: float,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (dword, dposition, dtype, dw, db), each of the dtype of what it belongs to.

    Args:
        dy: (T, D).
        input_ids: as in `embed_fwd`, as are the arguments up to w.
        position_ids: (T,).
        token_type_ids: (T,).
        word: (V, D) or (T, D).
        position: (P, D).
        type_: (C, D).
        w: (D,), whose dtype db has as well.
        z: (T, D), saved by the forward.
        mean: (T,) fp32, saved by the forward.
        rstd: (T,) fp32, saved by the forward.
        pad_id: row of dword that is 0, with input_ids; negative: none.
        p: probability of dropping, as are seed and site, that of the forward.
        seed: (1,) int64, or None for no dropout.
        site: number of the dropout in the model.

    Raises:
        NotImplementedError: a dtype or D is not supported.
    """
    T, D = z.shape
    tables = {"word": word, "position": position, "type_": type_}
    block_d = common.row_tile("embed_bwd", D, dy=dy, z=z, w=w, **tables)
    dy, z, w = common.aligned(dy, z, w)
    drops, threshold, factor = common.dropout_args(p, seed)
    rows, warps, stages = common.by_generation(BWD_TILES, word)[block_d]
    rows_per_program, programs = common.split_rows(T, rows)
    dz = torch.empty(T, D, dtype=torch.float32, device=z.device)
    dword = torch.empty_like(word) if input_ids is None else None
    partials = torch.empty(programs, 2, D, dtype=torch.float32, device=z.device)
    common.launch(
        _embed_bwd_kernel,
        (programs,),
        *(dy, input_ids, position_ids, token_type_ids, w, z, mean, rstd),
        *(seed if drops else None, dz, dword, partials),
        *(T, word.shape[0], position.shape[0], type_.shape[0]),
        *(rows_per_program, site, threshold, factor),
        D=D,
        ROWS=rows,
        BLOCK_D=block_d,
        STAGES=stages,
        num_warps=warps,
    )
    dw, db = torch.empty_like(w), torch.empty_like(w)
    common.sum_partials(partials, (dw, db))
    if input_ids is not None:
        dword = table_gradient(dz, input_ids, word, pad_id)
    dposition = table_gradient(dz, position_ids, position, -1)
    dtype = table_gradient(dz, token_type_ids, type_, -1)
    return dword, dposition, dtype, dw, db
