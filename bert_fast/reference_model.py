"""The whole encoder and its heads on padded batches in plain PyTorch: the truth for the models.

Functions of a state dict with Hugging Face's names, so that one set of weights feeds this, the
packed models and transformers. Made of torch.nn.functional alone, not of `reference.py`'s ops;
no dropout; works in the dtype of the weights, float64 included.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bert_fast.config import BertConfig

Params = Mapping[str, Tensor]

_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class Encoded(NamedTuple):
    """What `encoder` returns; D features, H heads.

    Attributes:
        last_hidden_state: (B, L, D), 0 at padding.
        hidden_states: after the embeddings and after each layer, (B, L, D) each.
        attentions: (B, H, L, L) a layer, 0 in padded rows and columns.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...]
    attentions: tuple[Tensor, ...]


def _linear(params: Params, name: str, x: Tensor) -> Tensor:
    return F.linear(x, params[f"{name}.weight"], params[f"{name}.bias"])


def _layer_norm(params: Params, name: str, x: Tensor, eps: float) -> Tensor:
    w, b = params[f"{name}.weight"], params[f"{name}.bias"]
    return F.layer_norm(x, w.shape, w, b, eps)


def encoder(
    params: Params,
    config: BertConfig,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    prefix: str = "",
) -> Encoded:
    """Return the hidden states and attentions of the encoder.

    Args:
        params: state dict; names begin with `prefix`.
        config: sizes, activation and LayerNorm epsilon.
        input_ids: (B, L) int64, or None with inputs_embeds.
        attention_mask: (B, L), not 0 where there is a token; None: everywhere.
        token_type_ids: (B, L) int64; None: 0.
        position_ids: (B, L) or (1, L) int64; None: the column.
        inputs_embeds: (B, L, D) in place of the word embeddings.
        prefix: "bert." for the state dict of a model with a head.
    """
    words = prefix + "embeddings.word_embeddings.weight"
    x = F.embedding(input_ids, params[words]) if inputs_embeds is None else inputs_embeds
    B, L, D = x.shape
    H, K = config.num_attention_heads, D // config.num_attention_heads
    columns = torch.arange(L, device=x.device)[None]
    kinds = torch.zeros_like(columns) if token_type_ids is None else token_type_ids
    x = x + F.embedding(kinds, params[prefix + "embeddings.token_type_embeddings.weight"])
    position_ids = columns if position_ids is None else position_ids
    x = x + F.embedding(position_ids, params[prefix + "embeddings.position_embeddings.weight"])
    if attention_mask is None:
        attention_mask = torch.ones(B, L, device=x.device)
    real = attention_mask != 0
    eps = config.layer_norm_eps

    def clean(t: Tensor) -> Tensor:
        return torch.where(real[..., None], t, 0)

    x = clean(_layer_norm(params, prefix + "embeddings.LayerNorm", x, eps))
    hidden_states, attentions = [x], []
    for i in range(config.num_hidden_layers):
        layer = f"{prefix}encoder.layer.{i}."
        q, k, v = (
            _linear(params, f"{layer}attention.self.{name}", x).view(B, L, H, K).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        scores = (q @ k.mT) * K**-0.5
        # a row without any key has no softmax: let it see everything, then count it as 0
        keys = (real | ~real.any(1, keepdim=True))[:, None, None, :]
        probs = scores.masked_fill(~keys, -torch.inf).softmax(-1)
        probs = torch.where(real[:, None, :, None] & real[:, None, None, :], probs, 0)
        context = (probs @ v).transpose(1, 2).reshape(B, L, D)
        a = _linear(params, layer + "attention.output.dense", context) + x
        a = _layer_norm(params, layer + "attention.output.LayerNorm", a, eps)
        act = _ACTIVATIONS[config.hidden_act]
        f = act(_linear(params, layer + "intermediate.dense", a))
        f = _linear(params, layer + "output.dense", f) + a
        x = clean(_layer_norm(params, layer + "output.LayerNorm", f, eps))
        hidden_states.append(x)
        attentions.append(probs)
    return Encoded(x, tuple(hidden_states), tuple(attentions))


def first_tokens(x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return the row (B, D) of the first real token of each sequence of x (B, L, D)."""
    if attention_mask is None:
        return x[:, 0]
    column = (attention_mask != 0).to(torch.int64).argmax(1)
    return x[torch.arange(x.shape[0], device=x.device), column]


def pooled(params: Params, first: Tensor, prefix: str = "") -> Tensor:
    """Return the pooler's output (B, D) for the first tokens (B, D)."""
    return torch.tanh(_linear(params, prefix + "pooler.dense", first))


def masked_lm_logits(params: Params, config: BertConfig, x: Tensor) -> Tensor:
    """Return the MLM logits (..., V) of hidden states (..., D)."""
    head = "cls.predictions."
    h = _ACTIVATIONS[config.hidden_act](_linear(params, head + "transform.dense", x))
    h = _layer_norm(params, head + "transform.LayerNorm", h, config.layer_norm_eps)
    return _linear(params, head + "decoder", h)


def next_sentence_logits(params: Params, pooled_output: Tensor) -> Tensor:
    """Return the NSP logits (B, 2)."""
    return _linear(params, "cls.seq_relationship", pooled_output)


def classifier_logits(params: Params, x: Tensor) -> Tensor:
    """Return the logits (..., C) of the sequence, token and multiple-choice heads."""
    return _linear(params, "classifier", x)


def span_logits(
    params: Params, x: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the start and end logits (B, L) of question answering; lowest at padding."""
    logits = _linear(params, "qa_outputs", x)
    if attention_mask is not None:
        padding = (attention_mask == 0)[..., None]
        logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
    start, end = logits.unbind(-1)
    return start, end
