"""The ops in torch.nn.functional, and dropout's factors in numpy: nothing of bert_fast.

`stores` is the dtype in which the contract keeps outputs, the saved z of a LayerNorm, the saved h
of linear_gelu, the logits, the saved O and the matrix operands P and dS of attention; None: nothing
is kept, gradients are autograd's. `factors` is what dropout multiplies by.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

SEED = 0x0123456789ABCDEF  # both halves of the key differ from 0

# --- dropout -------------------------------------------------------------------------------------


def philox(key: int, *counters: Any) -> np.ndarray:
    """Four words (..., 4) of Philox4x32-10 for each of four broadcast counters."""
    low = np.uint64(0xFFFFFFFF)
    c = [np.asarray(counter, dtype=np.uint64) for counter in counters]
    k0, k1 = key % 2**32, (key >> 32) % 2**32
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high_a, high_b = a >> np.uint64(32), b >> np.uint64(32)
        c = [high_b ^ c[1] ^ np.uint64(k0), b & low, high_a ^ c[3] ^ np.uint64(k1), a & low]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack(np.broadcast_arrays(*c), axis=-1)


def dropout_factors(
    p: float, seed: int, site: int, row: Any, width: int, c2: Any, c3: Any
) -> Tensor:
    """(..., width) fp64: 0 where dropped, else 1 / share kept; column j has 16 bits of its own."""
    column = np.arange(width)
    words = philox(seed + site, np.asarray(row)[..., None], column // 8, c2, c3)
    word = words[..., column, column % 8 // 2].astype(np.int64)
    bits = word >> 16 * (column % 2) & 0xFFFF
    threshold = round(p * 65536)
    scale = 65536 / (65536 - threshold) if threshold < 65536 else 0.0
    return torch.from_numpy((bits >= threshold) * scale)


def row_factors(T: int, D: int, p: float, seed: int = SEED, site: int = 0) -> Tensor:
    """Factors of rows (T, D): counters row, column // 8, 0, 0."""
    return dropout_factors(p, seed, site, np.arange(T), D, 0, 0)


def attention_factors(
    n: int, sequence: int, heads: int, p: float, seed: int = SEED, site: int = 0
) -> Tensor:
    """Factors (H, n, n) of a sequence: counters row in it, key // 8, sequence, head."""
    head = np.arange(heads)[:, None, None]
    return dropout_factors(p, seed, site, np.arange(n)[None], n, sequence, head)


# --- the ops -------------------------------------------------------------------------------------


class _Rounded(torch.autograd.Function):
    """x, and its gradient, as the dtype `stores` holds them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stores: torch.dtype) -> Tensor:
        ctx.stores = stores
        return x.to(stores).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        return d.to(ctx.stores).to(d.dtype), None


def rounded(x: Tensor, stores: torch.dtype | None) -> Tensor:
    return x if stores is None else _Rounded.apply(x, stores)


class _StoredLayerNorm(torch.autograd.Function):
    """F.layer_norm that keeps z in 16 bits for its backward, mean and rstd in fp32."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, w: Tensor, b: Tensor, eps: float, stores: torch.dtype
    ) -> Tensor:
        y, mean, rstd = torch.ops.aten.native_layer_norm(z, w.shape, w, b, eps)
        ctx.save_for_backward(z.to(stores).to(z.dtype), mean, rstd, w, b)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, mean, rstd, w, b = ctx.saved_tensors
        backward = torch.ops.aten.native_layer_norm_backward
        return *backward(dy, z, w.shape, mean, rstd, w, b, [True] * 3), None, None


class _StoredAttention(torch.autograd.Function):
    """One sequence (H, n, K); P and dS as `stores` holds them for the products, O for the backward.

    The row sums of dP come from O, as a kernel makes them, in fp32 too.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, factors: Tensor, stores: torch.dtype
    ) -> Tensor:
        probs = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        dropped = (probs * factors).to(stores).to(q.dtype)
        o = (dropped @ v).to(stores).to(q.dtype)
        ctx.save_for_backward(q, k, v, o, probs, dropped, factors)
        ctx.stores = stores
        return o

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, probs, dropped, factors = ctx.saved_tensors
        ds = probs * (d @ v.mT * factors - (d * o).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        ds = ds.to(ctx.stores).to(d.dtype)
        return ds @ k, ds.mT @ q, dropped.mT @ d, None, None


def layer_norm(x, w, b, eps, residual=None, bias=None, factors=None, stores=None):
    z = x if bias is None else x + bias
    z = z if factors is None else z * factors
    z = z if residual is None else z + residual
    if stores is None:
        return F.layer_norm(z, w.shape, w, b, eps)
    return _StoredLayerNorm.apply(z, w, b, eps, stores)


def embed(
    input_ids, position_ids, token_type_ids, word, position, type_, w, b, eps,
    pad_id=None, factors=None, stores=None,
):  # fmt: skip
    z = word if input_ids is None else F.embedding(input_ids, word, pad_id)
    z = z + F.embedding(token_type_ids, type_) + F.embedding(position_ids, position)
    y = layer_norm(z, w, b, eps, stores=stores)
    return y if factors is None else y * factors


def gelu(x, b=None, activation="gelu", stores=None):
    x = x if b is None else x + b
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="none" if activation == "gelu" else "tanh")


def linear(x, w, b=None, stores=None):
    return F.linear(x, w, b)


def linear_gelu(x, w, b=None, activation="gelu", stores=None):
    return gelu(rounded(F.linear(x, w, b), stores), None, activation)


def attention(qkv, cu_seqlens, max_len, slack=False, factors=None, stores=None):
    T, _, _, K = qkv.shape
    outputs = []
    for b, (first, last) in enumerate(pairwise(cu_seqlens.tolist())):
        q, k, v = qkv[first:last].permute(1, 2, 0, 3)
        if first == last:
            continue
        masked = torch.ones(()) if factors is None else factors[b]
        if stores is not None:
            o = _StoredAttention.apply(q, k, v, masked.to(q), stores)
        elif factors is not None:
            o = (q @ k.mT * K**-0.5).softmax(-1) * masked.to(q) @ v
        else:
            o = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        outputs.append(o.transpose(0, 1))
    o = torch.cat(outputs) if outputs else qkv[:0, 0]
    return F.pad(o, (0, 0, 0, 0, 0, T - o.shape[0]))


def linear_cross_entropy(x, w, b, labels, stores=None):
    return F.cross_entropy(rounded(F.linear(x, w, b), stores), labels, reduction="sum")
