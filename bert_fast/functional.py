"""What BERT's layers do with packed rows (T, D), as functions of the modules that hold the weights.

A module that is not the plain PyTorch class (LoRA, quantised) or has hooks is called as it is, on
packed rows; the rest is fused. So whoever has such modules, under whatever names, has our layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from bert_fast import ops, reference
from bert_fast.ops import kept
from bert_fast.packing import Layout, PackedBatch


def is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Return whether reading the module's parameters does what calling it would."""
    weight = module._parameters.get("weight")
    # a quantised one, say, is another; a FakeTensor stands for a plain one in torch.export
    if weight is not None and type(weight) not in (nn.Parameter, Tensor, FakeTensor):
        return False
    return type(module) is cls and not (module._forward_hooks or is_watched(module))


def is_watched(module: nn.Module) -> bool:
    """Return whether calling the module does more than its class says, but for forward hooks."""
    return bool(
        "forward" in module.__dict__  # set on the instance, as accelerate does to offload weights
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """Return module(x) for rows x (T, D)."""
    if is_plain(module, nn.Linear):
        return ops.linear(x, module.weight, module.bias)
    return module(x)


def drops(model: nn.Module) -> bool:
    """Return whether a dropout of the model is in training, be it alone."""
    if model.training:
        return True
    found: set[nn.Module | None] = {None, model}
    modules: list[nn.Module] = [model]
    for module in modules:  # modules() is slower: this is part of every forward
        if type(module) is nn.Dropout and module.training:
            return True
        children = {*module._modules.values()} - found
        found |= children
        modules.extend(children)
    return False


def draw_seed(device: torch.device) -> Tensor:
    """Return the seed (1,) of a forward's dropouts, from PyTorch's default generator."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


def dropout_p(dropout: nn.Dropout, seed: Tensor | None) -> float:
    """Return the probability in force: 0 in evaluation."""
    return dropout.p if dropout.training and seed is not None else 0.0


class Activation(nn.Module):
    """The activation of that name, of rows (T, F)."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Return activation(x)."""
        return ops.gelu(x, activation=self.name)


def linear_gelu(module: nn.Module, activation: nn.Module, x: Tensor) -> Tensor:
    """Return activation(module(x)) for rows x (T, D)."""
    if is_plain(module, nn.Linear) and is_plain(activation, Activation):
        return ops.linear_gelu(x, module.weight, module.bias, activation.name)
    return activation(linear(module, x))


def linear_gelu_layer_norm(
    module: nn.Module, activation: nn.Module, norm: nn.Module, x: Tensor
) -> Tensor:
    """Return norm(activation(module(x))) for rows x (T, D)."""
    x = linear_gelu(module, activation, x)
    if is_plain(norm, nn.LayerNorm):
        return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)
    return norm(x)


def linear_add_layer_norm(
    dense: nn.Module,
    dropout: nn.Module,
    norm: nn.Module,
    x: Tensor,
    residual: Tensor,
    seed: Tensor | None,
    site: int,
) -> Tensor:
    """Return norm(dropout(dense(x)) + residual) for rows x and residual (T, D).

    The bias of dense is left to the LayerNorm, whose backward pass sums its gradient on the way.
    """
    if not is_plain(norm, nn.LayerNorm):
        return norm(dropout(linear(dense, x)) + residual)
    bias, p = None, 0.0
    if not is_plain(dropout, nn.Dropout):
        x = dropout(linear(dense, x))
    else:
        p = dropout_p(dropout, seed)
        if is_plain(dense, nn.Linear):
            x, bias = ops.linear(x, dense.weight), dense.bias
        else:
            x = dense(x)
    return ops.add_layer_norm(
        x, residual, norm.weight, norm.bias, norm.eps, bias=bias, p=p, seed=seed, site=site
    )


def embed(
    word: nn.Module,
    position: nn.Module,
    type_: nn.Module | None,
    norm: nn.Module,
    dropout: nn.Module,
    batch: PackedBatch,
    seed: Tensor | None,
) -> Tensor:
    """Return dropout(norm(word + type_ + position)) of a packed batch, rows (T, D).

    Without `type_` there are no types of tokens.
    """
    tokens, rows, pad_id = batch.tokens, batch.embeds, None
    if tokens is not None and is_plain(word, nn.Embedding):
        rows, pad_id = word.weight, word.padding_idx
    elif tokens is not None:
        # a batch of one: hooks expect (B, L)
        tokens, rows = None, word(tokens[None])[0]
    if not (
        is_plain(position, nn.Embedding)
        and (type_ is None or is_plain(type_, nn.Embedding))
        and is_plain(norm, nn.LayerNorm)
    ):
        x = nn.functional.embedding(tokens, rows, pad_id) if tokens is not None else rows
        x = x if type_ is None else x + type_(batch.types)
        return dropout(norm(x + position(batch.positions)))
    fuses_dropout = is_plain(dropout, nn.Dropout)
    x = ops.embed(
        tokens,
        batch.positions,
        batch.types,
        rows,
        _without_gradient(position.weight, position.padding_idx),
        rows.new_zeros(1, rows.shape[1]) if type_ is None else type_.weight,
        norm.weight,
        norm.bias,
        norm.eps,
        pad_id=pad_id,
        p=dropout_p(dropout, seed) if fuses_dropout else 0.0,
        seed=seed,
    )
    return x if fuses_dropout else dropout(x)


def _without_gradient(table: Tensor, row: int | None) -> Tensor:
    """Return a table whose row `row` gets no gradient."""
    if row is None or not (torch.is_grad_enabled() and table.requires_grad):
        return table
    return torch.cat([table[:row], table[row : row + 1].detach(), table[row + 1 :]])


class Projections(NamedTuple):
    """The modules that make query, key and value of rows."""

    query: nn.Module
    key: nn.Module
    value: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        """Return query, key and value of rows x (T, D) as (T, 3, H K)."""
        fused = self._weights(x)
        if fused is not None:
            return ops.linear(x, *fused).unflatten(1, (3, fused[0].shape[0] // 3))
        return torch.stack([linear(part, x) for part in self], dim=1)

    def _weights(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the three weights and biases in one; None where three products of x are better.

        While gradients are off they are kept.
        """
        if not all(is_plain(part, nn.Linear) and part.bias is not None for part in self):
            return None
        weights, biases = [part.weight for part in self], [part.bias for part in self]
        tensors = *weights, *biases
        if len({t.dtype for t in tensors}) > 1 or len({w.shape for w in weights}) > 1:
            return None  # the op has to refuse them
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or any(t.is_inference() for t in tensors)  # these have no version
            or not all(t.is_contiguous() for t in tensors)
        ):
            return (torch.cat(weights), torch.cat(biases)) if _joins(x) else None
        return kept.joined(weights), kept.joined(biases)


def _joins(x: Tensor) -> bool:
    """Return whether a product is worth putting its weights together each time.

    On a GPU, for it saves launches. On the CPU it is as fast as three (BERT-base, 16 to 1,024 rows,
    2 cores of an AMD EPYC, 2026-11-21).
    """
    return x.is_cuda


def self_attention(
    projections: Projections,
    p: float,
    heads: int,
    x: Tensor,
    layout: Layout,
    seed: Tensor | None,
    site: int,
    output_attentions: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return attention's context (T, H K) of rows x (T, D), and if wanted the probabilities.

    Those are (B, H, L, L), of H heads, after a dropout with the probability p.
    """
    qkv = projections(x)
    qkv = qkv.unflatten(2, (heads, qkv.shape[2] // heads))
    context = ops.attention(
        qkv,
        layout.cu_seqlens,
        layout.max_len,
        p=p,
        seed=seed,
        site=site,
        work=layout.work,
        checked=True,
    )
    probs = attention_probs(qkv, layout, p, seed, site) if output_attentions else None
    return context.flatten(1), probs


def attention_probs(
    qkv: Tensor, layout: Layout, p: float, seed: Tensor | None, site: int
) -> Tensor:
    """Return the probabilities (B, H, L, L) of a padded batch, after dropout; 0 at padding.

    Eager and with gradients by plain autograd, for `output_attentions` alone: attention itself
    never holds them.
    """
    _, _, H, K = qkv.shape
    B, L = layout.shape
    q, k, _ = (layout.unpack(t).transpose(1, 2) for t in qkv.unbind(1))  # (B, H, L, K)
    real = layout.mask()
    pair = real[:, None, :, None] & real[:, None, None, :]
    scores = (q @ k.mT) * K**-0.5
    # finite, not -inf: the softmax of a padded row, zeroed below, must not be NaN
    scores = scores.masked_fill(~pair, torch.finfo(scores.dtype).min)
    probs = torch.where(pair, scores.softmax(-1), 0)
    if p == 0:
        return probs
    columns = layout.columns()
    factors = probs.new_zeros(B, H, L, L)
    dtype = probs.dtype
    for b, first, last in reference.sequences(layout.cu_seqlens):
        at = columns[first:last]
        kept = reference.attention_dropout(p, seed, site, b, H, last - first, dtype)
        factors[b, :, at[:, None], at[None, :]] = kept
    return probs * factors


def pool(dense: nn.Module, activation: nn.Module, first: Tensor, nonempty: Tensor | None) -> Tensor:
    """Return activation(dense(first)) of first rows (B, D); 0 for an empty sequence."""
    pooled = activation(linear(dense, first))
    return pooled if nonempty is None else torch.where(nonempty[:, None], pooled, 0)
