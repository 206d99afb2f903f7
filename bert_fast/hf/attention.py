"""Our attention for any model of transformers that takes one by name, with the mask it needs.

transformers makes no mask at all for a name that has an attention and no mask function, and the
padding would be attended to: both are registered together. The name must not hold "flash", which
transformers takes for FlashAttention's.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from bert_fast import functional, ops
from bert_fast.packing import Layout, find_layout

NAME = "bert_fast"
_UNSUPPORTED = "sliding_window", "softcap", "s_aux", "position_bias", "head_mask"
# the layers of a model share a mask: mask -> its version, layout
_layouts: "WeakTensorKeyDictionary[Tensor, tuple[int, Layout]]" = WeakTensorKeyDictionary()


def register_attention() -> str:
    """Make `attn_implementation="bert_fast"` a choice for models of transformers.

    For encoders that are not accelerated as a whole: attention alone is ours then, packed and
    unpacked in each layer. Of its masks only padding is supported, (B, L); anything else raises
    NotImplementedError. Outputs of attention at padding are 0. BERT itself takes an attention by
    name from transformers 5 on.

    Returns:
        The name.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)
    return NAME


def padding_mask(*_: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """Return the mask (B, L) bool that transformers is to pass on to `attention`.

    Args:
        attention_mask: (B, L), True where there is a token; None: everywhere.
        **options: transformers' others; mask_function says who attends to whom.

    Raises:
        NotImplementedError: not all tokens attend to all, or there is a cache.
    """
    from transformers import masking_utils

    everyone = getattr(masking_utils, "bidirectional_mask_function", None)
    function = options.get("mask_function")
    if everyone is not None and function is not everyone:
        name = getattr(function, "__qualname__", function)
        raise NotImplementedError(f"{NAME}: want attention to all tokens, got the mask {name}")
    if options.get("q_offset", 0) or options.get("kv_offset", 0):
        raise NotImplementedError(f"{NAME}: want attention without a cache, got one")
    return attention_mask


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return attention's context (B, L, H, K), 0 at padding, and if wanted the probabilities.

    Args:
        module: the caller, which says whether it is causal.
        query: (B, H, L, K) floating.
        key: as query.
        value: as query.
        attention_mask: (B, L) bool, as `padding_mask` gives it; None: no padding.
        dropout: probability of dropping a probability.
        scaling: of the scores; None: K ** -0.5.
        **options: transformers' others: cu_seq_lens_q and max_length_q for packed sequences,
            output_attentions.

    Raises:
        NotImplementedError: causal, of different lengths or numbers of heads, or with a bias.
    """
    _check(module, query, key, value, attention_mask, options)
    B, _, L, K = query.shape
    layout = _layout((B, L), query.device, attention_mask, options)
    if scaling is not None and scaling != K**-0.5:
        query = query * (scaling * K**0.5)
    qkv = torch.stack([layout.gather(t.transpose(1, 2)) for t in (query, key, value)], 1)
    seed = functional.draw_seed(query.device) if dropout else None
    where = layout.cu_seqlens, layout.max_len
    context = ops.attention(qkv, *where, p=dropout, seed=seed, work=layout.work, checked=True)
    probs = None
    if options.get("output_attentions") and not layout.packed:
        probs = functional.attention_probs(qkv, layout, dropout, seed, 0)
    return layout.unpack(context), probs


def _check(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> None:
    causal = options.get("is_causal")
    if getattr(module, "is_causal", False) if causal is None else causal:
        raise NotImplementedError(f"{NAME}: want bidirectional attention, got causal")
    if not query.shape == key.shape == value.shape:
        got = ", ".join(str([*t.shape]) for t in (query, key, value))
        raise NotImplementedError(f"{NAME}: want query, key and value of one shape, got {got}")
    if mask is not None and mask.ndim != 2:
        raise NotImplementedError(f"{NAME}: want a mask (B, L), got {[*mask.shape]}")
    for name in _UNSUPPORTED:
        if options.get(name) is not None:
            raise NotImplementedError(f"{NAME}: want no {name}, got one")


def _layout(
    shape: tuple[int, int], device: torch.device, mask: Tensor | None, options: dict[str, Any]
) -> Layout:
    borders = options.get("cu_seq_lens_q")
    if borders is not None:
        return find_layout(shape, device, None, borders, options.get("max_length_q"))
    # writes to a mask of inference mode would not be seen
    if mask is None or mask.is_inference() or torch.compiler.is_compiling():
        return find_layout(shape, device, mask)
    version, layout = _layouts.get(mask, (None, None))
    if layout is None or version != mask._version:
        version, layout = mask._version, find_layout(shape, device, mask)
        _layouts[mask] = version, layout
    return layout
