"""Every op in eager PyTorch: the truth the tests compare with, and the path of last resort.

Ops work on packed rows: T tokens without padding, sequence b in rows cu_seqlens[b] to
cu_seqlens[b + 1]. Each computes in promote_types(dtype, float32), so float64 stays float64, and
rounds where the contract stores the input's dtype: outputs, saved z and O, the matrix operands P
and dS. Rows past cu_seqlens[-1] belong to nobody: attention leaves 0 there.

The whole encoder on padded batches, built from none of these ops, is in `reference_model.py`.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bert_fast.reference_dropout import dropout_factors, row_dropout

IGNORE = -100  # label of a row that has none, as in torch.nn.functional.cross_entropy
_CHUNK_LOGITS = 1 << 24  # logits held at once by linear_cross_entropy: 64 MiB in fp32


def _wide_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def _wide(*tensors: Tensor) -> list[Tensor]:
    dtype = _wide_dtype(*tensors)
    return [t.to(dtype) for t in tensors]


# --- LayerNorm -----------------------------------------------------------------------------------


def add_layer_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    w: Tensor,
    b: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
    site: int,
    out_dtype: torch.dtype,
    save: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (y, z, mean, rstd) of y = LayerNorm(z), z = dropout(x + bias) + residual, rows (T, D).

    Without bias, dropout and residual z would be x: it is empty then. Unless `save`, all but y are
    empty: only a backward pass needs them.
    """
    wide = _wide_dtype(x, w)
    z = x.to(wide)
    if bias is not None:
        z = z + bias
    factors = row_dropout(z, p, seed, site)
    if factors is not None:
        z = z * factors
    if residual is not None:
        z = z + residual
    y, mean, rstd = torch.native_layer_norm(z, w.shape, w.to(z.dtype), b.to(z.dtype), eps)
    is_x = bias is None and residual is None and factors is None
    z = z.new_empty(0, dtype=out_dtype) if is_x or not save else z.to(out_dtype)
    mean, rstd = (s[:, 0] if save else s.new_empty(0) for s in (mean, rstd))
    return y.to(out_dtype), z, mean, rstd


def _layer_norm_bwd(
    dy: Tensor, z: Tensor, w: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dz, dw, db) of y = LayerNorm(z); dz is wide, dw and db have the dtype of w."""
    w_dtype = w.dtype
    dy, z, w = _wide(dy, z, w)
    x_hat = (z - mean[:, None]) * rstd[:, None]
    g = dy * w
    dz = rstd[:, None] * (g - g.mean(-1, True) - x_hat * (g * x_hat).mean(-1, True))
    return dz, (dy * x_hat).sum(0).to(w_dtype), dy.sum(0).to(w_dtype)


def add_layer_norm_bwd(
    dy: Tensor,
    z: Tensor,
    w: Tensor,
    mean: Tensor,
    rstd: Tensor,
    with_bias: bool,
    p: float,
    seed: Tensor | None,
    site: int,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, dz, dw, db, dbias): dz is the residual's gradient, dbias sums dx over the rows.

    Without dropout dx would be dz: it is empty then, unless x has a dtype of its own. dbias is
    empty where there was no bias; it has the dtype to which x and w promote.
    """
    dz, dw, db = _layer_norm_bwd(dy, z, w, mean, rstd)
    factors = row_dropout(dz, p, seed, site)
    dx = dz if factors is None else dz * factors
    dbias_dtype = torch.promote_types(x_dtype, w.dtype)
    dbias = (dx.sum(0) if with_bias else dx.new_empty(0)).to(dbias_dtype)
    is_dz = factors is None and x_dtype == z.dtype
    dx = dx.new_empty(0, dtype=x_dtype) if is_dz else dx.to(x_dtype)
    return dx, dz.to(z.dtype), dw, db, dbias


# --- embeddings ----------------------------------------------------------------------------------


def embed(
    tokens: Tensor | None,
    positions: Tensor,
    types: Tensor,
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
    save: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (y, z, mean, rstd) of y = dropout(LayerNorm(z)), z the sum of three table rows.

    Without tokens, `word` holds one row per token already. Unless `save`, all but y are empty.
    """
    rows = word if tokens is None else word[tokens]
    rows, table, kinds = _wide(rows, position, type_)
    z = rows + kinds[types] + table[positions]
    y, _, mean, rstd = add_layer_norm(z, None, None, w, b, eps, 0.0, None, 0, z.dtype, save)
    factors = row_dropout(y, p, seed, site)
    if factors is not None:
        y = y * factors
    z = z.to(out_dtype) if save else z.new_empty(0, dtype=out_dtype)
    return y.to(out_dtype), z, mean, rstd


def embed_bwd(
    dy: Tensor,
    tokens: Tensor | None,
    positions: Tensor,
    types: Tensor,
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
    """Return (dword, dposition, dtype, dw, db); row pad_id of dword is 0 (pad_id < 0: none is)."""
    dy = _wide(dy)[0]
    factors = row_dropout(dy, p, seed, site)
    dz, dw, db = _layer_norm_bwd(dy if factors is None else dy * factors, z, w, mean, rstd)

    def scatter(ids: Tensor, table: Tensor, padding: int = -1) -> Tensor:
        grad = torch.ops.aten.embedding_dense_backward(dz, ids, table.shape[0], padding, False)
        return grad.to(table.dtype)

    dword = dz.to(word.dtype) if tokens is None else scatter(tokens, word, pad_id)
    return dword, scatter(positions, position), scatter(types, type_), dw, db


# --- activations ---------------------------------------------------------------------------------

_TANH_FORMS = ("gelu_new", "gelu_pytorch_tanh")
_TANH_SCALE = (2 / torch.pi) ** 0.5


def activation(x: Tensor, name: str) -> Tensor:
    """Return gelu (exact, erf), gelu_new or gelu_pytorch_tanh (tanh form), or relu of x."""
    if name == "relu":
        return torch.relu(x)
    # not F.gelu: on the CPU it computes the last few elements another way, so that the bits of a
    # row would depend on how many rows there are
    inner = _TANH_SCALE * (x + 0.044715 * x**3) if name in _TANH_FORMS else x * 0.5**0.5
    cdf = inner.tanh_() if name in _TANH_FORMS else inner.erf_()
    return cdf.add_(1).mul_(x).mul_(0.5)


def activation_bwd(dy: Tensor, x: Tensor, name: str) -> Tensor:
    """Return dy times the derivative of `activation` at x."""
    if name == "relu":
        return torch.where(x > 0, dy, 0)
    if name in _TANH_FORMS:
        t = torch.tanh(_TANH_SCALE * (x + 0.044715 * x**3))
        inner = _TANH_SCALE * (1 + 3 * 0.044715 * x * x)
        return dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner)
    density = torch.exp(-0.5 * x * x) / (2 * torch.pi) ** 0.5
    return dy * (0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * density)


def bias_gelu(x: Tensor, b: Tensor | None, name: str) -> Tensor:
    """Return activation(x + b) for rows x (T, F)."""
    wide = _wide(x)[0]
    return activation(wide if b is None else wide + b, name).to(x.dtype)


def bias_gelu_bwd(dy: Tensor, x: Tensor, b: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    """Return (dx, db) of `bias_gelu`, recomputed from x."""
    wide_dy, wide = _wide(dy, x)
    dx = activation_bwd(wide_dy, wide if b is None else wide + b, name)
    return dx.to(x.dtype), dx.sum(0).to(x.dtype if b is None else b.dtype)


# --- linear --------------------------------------------------------------------------------------


def linear(x: Tensor, w: Tensor, b: Tensor | None, save: bool = True) -> Tensor:
    """Return x w^T + b for rows x (T, D) and w (F, D); PyTorch's GEMMs sum 16 bits in fp32."""
    return F.linear(x, w, b)


def linear_bwd(dy: Tensor, x: Tensor, w: Tensor, need: list[bool]) -> tuple[Tensor, Tensor]:
    """Return (dx, dw) of `linear`; empty where `need` says that nobody wants it."""
    dx = dy @ w if need[0] else x.new_empty(0)
    dw = dy.T @ x if need[1] else w.new_empty(0)
    return dx, dw


def column_sums(dy: Tensor) -> Tensor:
    """Return the sums (F,) over the rows of dy (T, F): the gradient of a bias."""
    return dy.sum(0, dtype=_wide_dtype(dy)).to(dy.dtype)


def linear_gelu(
    x: Tensor, w: Tensor, b: Tensor | None, name: str, save: bool = True
) -> tuple[Tensor, Tensor]:
    """Return (activation(h), h) with h = x w^T + b; unless `save`, h is empty."""
    h = F.linear(x, w, b)
    return bias_gelu(h, None, name), h if save else h.new_empty(0)


# --- attention -----------------------------------------------------------------------------------


def sequences(cu_seqlens: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (sequence, first row, row past the last) for each sequence that is not empty."""
    for b, (first, last) in enumerate(pairwise(cu_seqlens.tolist())):
        if last > first:
            yield b, first, last


def attention_dropout(
    p: float,
    seed: Tensor | None,
    site: int,
    sequence: int,
    heads: int,
    length: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """Return the (H, n, n) factors of one sequence's probabilities, or None without dropout."""
    if seed is None or p == 0:
        return None
    row = torch.arange(length, device=seed.device)[None, :, None]
    head = torch.arange(heads, device=seed.device)[:, None, None]
    c2 = torch.full((), sequence, dtype=torch.int64, device=seed.device)
    return dropout_factors(p, seed, site, row, length, c2, head, dtype)


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    p: float,
    seed: Tensor | None,
    site: int,
    work: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (o (T, H, K), lse (H, T)) of softmax(q k^T / sqrt(K)) v within each sequence.

    `work`, the order in which a GPU takes the tiles, is of no use here.
    """
    T, _, H, K = qkv.shape
    wide = _wide_dtype(qkv)
    o = qkv.new_zeros(T, H, K)
    lse = qkv.new_zeros(H, T, dtype=wide)
    for b, first, last in sequences(cu_seqlens):
        q, k, v = qkv[first:last].to(wide).permute(1, 2, 0, 3)  # each (H, n, K)
        scores = (q * K**-0.5) @ k.mT
        largest = scores.amax(-1, keepdim=True)
        weights = scores.sub_(largest).exp_()  # in 0 to 1; the sum divides after the product
        total = weights.sum(-1, keepdim=True)
        factors = attention_dropout(p, seed, site, b, H, last - first, wide)
        if factors is not None:
            weights = weights * factors
        part = (weights.to(qkv.dtype).to(wide) @ v) / total
        o[first:last] = part.transpose(0, 1).to(qkv.dtype)
        lse[:, first:last] = (largest + total.log())[..., 0]
    return o, lse


def attention_bwd(
    do: Tensor,
    qkv: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    p: float,
    seed: Tensor | None,
    site: int,
    work: Tensor | None = None,
) -> Tensor:
    """Return dqkv (T, 3, H, K).

    A kernel makes P from the saved log-sum-exp and the row sums of dP from the saved o, to save
    passes. Both are made anew here, which is more exact; the row sums in 16 bits excepted, where
    the contract has o rounded.
    """
    H, K = qkv.shape[2:]
    wide = _wide_dtype(qkv)
    dqkv = torch.zeros_like(qkv)
    for b, first, last in sequences(cu_seqlens):
        q, k, v = qkv[first:last].to(wide).permute(1, 2, 0, 3)
        d_o = do[first:last].to(wide).transpose(0, 1)  # (H, n, K)
        probs = ((q * K**-0.5) @ k.mT).softmax(-1)
        d_probs = d_o @ v.mT
        dropped = probs
        factors = attention_dropout(p, seed, site, b, H, last - first, wide)
        if factors is not None:
            dropped, d_probs = probs * factors, d_probs * factors
        if qkv.dtype.itemsize == 2:
            sums = (d_o * o[first:last].to(wide).transpose(0, 1)).sum(-1, keepdim=True)
        else:
            sums = (probs * d_probs).sum(-1, keepdim=True)
        ds = probs * (d_probs - sums) * K**-0.5
        ds = ds.to(qkv.dtype).to(wide)
        dv = dropped.to(qkv.dtype).to(wide).mT @ d_o
        dqkv[first:last] = torch.stack((ds @ k, ds.mT @ q, dv)).permute(2, 0, 1, 3).to(qkv.dtype)
    return dqkv


# --- cross entropy -------------------------------------------------------------------------------


def linear_cross_entropy(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    labels: Tensor,
    with_grad: bool,
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (loss, dx, dw, db): the cross entropy of x w^T + b summed over the labelled rows.

    The logits are made a few rows at a time and never held whole; the gradients for a loss
    gradient of 1 come out of the same pass. Without `with_grad` they are empty. `linear` computes
    the logits.
    """
    N, V = x.shape[0], w.shape[0]
    wide = _wide_dtype(x)
    loss = x.new_zeros((), dtype=wide)
    if not with_grad:
        dx, dw, db = (x.new_empty(0) for _ in range(3))
    else:
        dx, db = torch.zeros_like(x), w.new_zeros(V, dtype=wide)
        dw = w.new_zeros(w.shape, dtype=wide)
    rows = max(1, _CHUNK_LOGITS // V)
    for first in range(0, N, rows):
        part, target = x[first : first + rows], labels[first : first + rows]
        logits = linear(part, w, b).to(wide)
        loss = loss + F.cross_entropy(logits, target, reduction="sum", ignore_index=IGNORE)
        if with_grad:
            labelled = target != IGNORE
            d_logits = logits.softmax(-1)
            one = labelled[:, None].to(wide)
            d_logits.scatter_add_(1, target.clamp(min=0)[:, None], -one)
            d_logits = torch.where(labelled[:, None], d_logits, 0)
            db += d_logits.sum(0)
            d_logits = d_logits.to(x.dtype)
            dx[first : first + rows] = d_logits @ w
            dw += d_logits.T @ part
    if with_grad:
        dw, db = dw.to(w.dtype), db.to(w.dtype)
    return loss, dx, dw, db


# --- packing -------------------------------------------------------------------------------------


def unpad(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (rows, cu_seqlens, max_len) of a (B, L) bool mask.

    rows (T,) int64 are the flat indices of the True entries, cu_seqlens (B + 1,) int32 and
    max_len a 0-d int64 tensor on the CPU. From another device this copies 16 bytes to the host.
    """
    lengths = mask.sum(1)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    longest = lengths.max() if mask.shape[0] else cu_seqlens[0]
    total, max_len = torch.stack((cu_seqlens[-1], longest)).tolist()
    rows = torch.nonzero_static(mask.flatten(), size=total).flatten()
    return rows, cu_seqlens.to(torch.int32), torch.tensor(max_len, device="cpu")


def work_list(cu_seqlens: Tensor, num_rows: int, tile: int) -> Tensor:
    """Return the tiles of each sequence, the longest first; last, as one, the rows of none.

    A row is (sequence, its first row, its length, the tile's first row within it); before them is
    (how many there are, how many of sequences, how many of sequences longer than a tile, 0), behind
    them zeros to a number of rows that T and B alone decide.
    """
    B = cu_seqlens.shape[0] - 1
    lengths = cu_seqlens.diff(append=cu_seqlens.new_tensor([num_rows]))  # the last: of no sequence
    order = torch.cat((lengths[:B].argsort(descending=True, stable=True), lengths.new_tensor([B])))
    tiles = (lengths[order] + tile - 1) // tile
    tiles[B:].clamp_(max=1)
    order, count = order.repeat_interleave(tiles), int(tiles.sum())
    offsets = torch.cat([torch.arange(n, device=lengths.device) * tile for n in tiles.tolist()])
    entries = cu_seqlens.new_zeros(2 + num_rows // tile + B, 4)
    entries[0, :3] = torch.stack((tiles.sum(), tiles[:B].sum(), tiles[tiles > 1].sum()))
    entries[1 : 1 + count] = torch.stack((order, cu_seqlens[order], lengths[order], offsets), 1)
    return entries
