"""What an accelerated model of transformers runs: its own modules, on packed rows.

It takes the padding out before the embeddings and puts zeros in its place at the end. Whatever it
cannot do raises NotImplementedError with the reason, before any result; the original does it then.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from bert_fast import functional
from bert_fast.functional import linear
from bert_fast.hf import families
from bert_fast.hf.families import Family
from bert_fast.packing import PackedBatch, pack

_PACKED = "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"
_TAKEN = {
    *("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"),
    *("output_attentions", "output_hidden_states", "return_dict"),
    *_PACKED,
}
# what an encoder has no use for in transformers either
_WITHOUT_EFFECT = {"use_cache", "cache_position", "num_items_in_batch", "seq_idx"}


class _Rows(NamedTuple):
    """The rows that a model's output was unpacked from, for its head.

    Attributes:
        rows: (T, D).
        batch: where they stand.
        version: of the output when it was made: another has been written to.
    """

    rows: Tensor
    batch: PackedBatch
    version: int | None


_unpacked: "WeakTensorKeyDictionary[Tensor, _Rows]" = WeakTensorKeyDictionary()


def check(model: nn.Module, cls: type, given: dict[str, Any]) -> None:
    """Raise NotImplementedError if a model has to run its original code on what is given."""
    reason = families.why_not(model, cls, families.family(cls)) or _unsupported(given)
    if reason:
        raise NotImplementedError(reason)


def _unsupported(given: dict[str, Any]) -> str:
    """Return why packed rows cannot do what is asked; empty: they can."""
    for name, value in given.items():
        if (
            name not in _TAKEN
            and name not in _WITHOUT_EFFECT
            and not (value is None or value is False)
        ):
            return f"it is given {name}"
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    tensor = ids if embeds is None else embeds
    if (ids is None) == (embeds is None) or not isinstance(tensor, Tensor):
        return "it is not given one tensor of input_ids or inputs_embeds"
    if tensor.device.type not in ("cpu", "cuda"):
        return f"it is on {tensor.device.type}"
    mask = given.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        return "its attention_mask is not (B, L)"
    return _being_exported()


def _being_exported() -> str:
    """Return a reason for the original code, whose graph needs no op of ours; empty: it is not."""
    exported = torch.compiler.is_exporting() or torch.jit.is_tracing()
    return "it is being exported" if exported else ""


def _version(t: Tensor) -> int | None:
    """Return what a write to a tensor changes; None for one of inference mode."""
    return None if t.is_inference() else t._version


def run(model: nn.Module, cls: type, given: dict[str, Any], *, legacy: bool, scored: bool) -> Any:
    """Return what the model's own forward returns, with 0 at padding.

    Args:
        model: the base model.
        cls: its class in transformers.
        given: arguments by name, checked.
        legacy: of transformers before 5.
        scored: whether a head follows that `score` runs.

    Raises:
        NotImplementedError: a row of the batch begins with padding; or an op refuses it.
    """
    config, family = model.config, families.family(cls)
    blocks = family.blocks(model)
    hidden = _Hidden(_asked(config, given, "output_hidden_states"), len(blocks) + 1)
    want_probs = bool(_asked(config, given, "output_attentions"))
    batch = _pack(model, family, given)
    if want_probs and batch.packed:
        raise NotImplementedError("it is to return attentions of packed sequences")
    seed = None
    if functional.drops(model):  # drawn outside of what checkpointing computes again
        seed = functional.draw_seed(batch.cu_seqlens.device)
    x = functional.embed(*family.embeddings(model), batch, seed)
    project = model._modules.get("embeddings_project")  # ELECTRA's
    x = x if project is None else linear(project, x)
    x, attentions = hidden.take(x, batch), []
    for i, block in enumerate(blocks):
        layer = partial(
            _layer, family, block, batch=batch, seed=seed, site=1 + 3 * i, want_probs=want_probs
        )
        if getattr(block, "gradient_checkpointing", False) and block.training:
            x, probs = block._gradient_checkpointing_func(layer, x)
        else:
            x, probs = layer(x)
        x = hidden.take(x, batch)
        attentions.append(probs)
    last = batch.unpack(x) if hidden.last is None else hidden.last
    mask = given.get("attention_mask")
    if torch.compiler.is_compiling():
        if mask is not None and not batch.packed:
            last = _unread(last, mask.to(last.device, torch.bool))
    elif scored:  # tracing knows no weak tables
        _unpacked[last] = _Rows(x, batch, _version(last))
    fields: dict[str, Any] = {"last_hidden_state": last}
    pooler = model._modules.get("pooler")
    if pooler is not None:
        fields["pooler_output"] = _pool(pooler, cls, family, x, last, batch)
    if hidden.taken:
        end = None if hidden.last is None else last
        fields["hidden_states"] = (*hidden.taken[:-1], end)
    if want_probs:
        fields["attentions"] = (*attentions,)
        if not legacy and family.prefix != "DistilBert":
            fields["cross_attentions"] = ()
    return _output(family, fields, _wants_dict(config, given), legacy)


def _asked(config: Any, given: dict[str, Any], name: str) -> Any:
    """Return an argument, or what the configuration says without it."""
    value = given.get(name)
    return getattr(config, name, False) if value is None else value


class _Hidden:
    """The hidden states that are asked for.

    Attributes:
        taken: (B, L, D) each, None for one that is not asked for; empty where none is.
    """

    def __init__(self, asked: bool | int | list[int] | None, count: int):
        """Take those of `count` that are asked for: all, none, or by their places.

        The place 0 alone asks for none, in transformers too.
        """
        if isinstance(asked, bool) or not asked:
            places = range(count) if asked else ()
        else:
            places = [asked] if isinstance(asked, int) else asked
        self._places = {place % count for place in places if -count <= place < count}
        self._is_asked = bool(asked)
        self.taken: list[Tensor | None] = []

    @property
    def last(self) -> Tensor | None:
        """The last of those taken, None if it is not asked for."""
        return self.taken[-1] if self.taken else None

    def take(self, x: Tensor, batch: PackedBatch) -> Tensor:
        """Return rows x (T, D), taken if they are asked for.

        What follows is made of what is taken, so that gradients flow through it.
        """
        if not self._is_asked:
            return x
        if len(self.taken) not in self._places:
            self.taken.append(None)
            return x
        self.taken.append(batch.unpack(x))
        return batch.gather(self.taken[-1]) if torch.is_grad_enabled() else x


def _unread(last: Tensor, mask: Tensor) -> Tensor:
    """Return the states (B, L, D) with NaN in column 0 of rows that begin with padding.

    transformers' heads read it, and being compiled we cannot look and run the original.
    """
    wrong = (~mask[:, 0] & mask.any(1))[:, None, None]
    return torch.cat((torch.where(wrong, torch.nan, last[:, :1]), last[:, 1:]), 1)


def _pack(model: nn.Module, family: Family, given: dict[str, Any]) -> PackedBatch:
    """Return the batch without padding."""
    ids, embeds, mask = (given.get(n) for n in ("input_ids", "inputs_embeds", "attention_mask"))
    tensor = ids if embeds is None else embeds
    table, positions = family.embeddings(model)[1], given.get("position_ids")
    packed = given.get("cu_seq_lens_q") is not None
    if family.after_padding and positions is None:
        if packed:
            raise NotImplementedError("its positions are not given beside cu_seq_lens_q")
        shape = tensor.shape[0], tensor.shape[1]
        positions = families.positions_after_padding(table, ids, shape, tensor.device)
    if mask is not None:
        mask = None if packed else mask.to(tensor.device, torch.bool)
    batch = pack(
        ids,
        mask,
        given.get("token_type_ids"),
        positions,
        embeds,
        cu_seqlens=given.get("cu_seq_lens_q"),
        max_len=given.get("max_length_q"),
        max_positions=table.num_embeddings,
    )
    # transformers' heads read column 0, be it padding
    if mask is not None and not torch.compiler.is_compiling() and not mask[:, 0].all():
        if (batch.nonempty() & ~mask[:, 0]).any():
            raise NotImplementedError("a row of its batch begins with padding")
    return batch


def _layer(
    family: Family,
    block: nn.Module,
    x: Tensor,
    *,
    batch: PackedBatch,
    seed: Tensor | None,
    site: int,
    want_probs: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the rows (T, D) after a layer and, if wanted, its probabilities (B, H, L, L)."""
    layer, add_layer_norm = family.layer(block), functional.linear_add_layer_norm
    attention = layer.projections, 0.0 if seed is None else layer.attention_p, layer.heads
    context, probs = functional.self_attention(*attention, x, batch, seed, site, want_probs)
    x = add_layer_norm(*layer.attention_output, context, x, seed, site + 1)
    h = functional.linear_gelu(*layer.intermediate, x)
    return add_layer_norm(*layer.output, h, x, seed, site + 2), probs


def _pool(
    pooler: nn.Module, cls: type, family: Family, x: Tensor, last: Tensor, batch: PackedBatch
) -> Tensor:
    """Return what the pooler makes of each sequence's first row, (B, D)."""
    if not families.not_own(pooler, (f"{family.prefix}Pooler",), cls.__module__):
        first, nonempty = batch.first_rows(x), batch.nonempty()
        if torch.compiler.is_compiling() and not batch.packed:
            first = last[:, 0]  # NaN where nothing can be known
        return functional.pool(pooler.dense, pooler.activation, first, nonempty)
    return pooler(last)


def _wants_dict(config: Any, given: dict[str, Any]) -> bool:
    wanted = given.get("return_dict")
    return bool(getattr(config, "return_dict", True) if wanted is None else wanted)


def _output(family: Family, fields: dict[str, Any], as_dict: bool, legacy: bool) -> Any:
    """Return the fields as transformers' output, or as the tuple that it would be."""
    from transformers import modeling_outputs

    if legacy and not as_dict and "Pooling" in family.output:
        # its heads count on a place for the pooled output, be it None
        extras = [fields[n] for n in ("hidden_states", "attentions") if n in fields]
        return fields["last_hidden_state"], fields.get("pooler_output"), *extras
    out = getattr(modeling_outputs, family.output)(**fields)
    return out if as_dict else out.to_tuple()


def score(head: nn.Module, cls: type, hidden: Tensor) -> Tensor:
    """Return a masked-LM head's logits (B, L, V) of hidden states (B, L, D); 0 at padding.

    Those of an accelerated model are taken as the rows that they were made of.
    """
    known = None if torch.compiler.is_compiling() else _unpacked.get(hidden)
    if known is not None and known.version != _version(hidden):
        known = None
    transform, reason = head._modules.get("transform"), _being_exported()
    if transform is not None and not reason:
        reason = families.not_own(transform, ("BertPredictionHeadTransform",), cls.__module__)
    if reason:
        raise NotImplementedError(reason)
    x = hidden.flatten(0, -2) if known is None else known.rows
    if transform is not None:  # BERT's
        parts = transform.dense, families.activation(transform.transform_act_fn)
        x = functional.linear_gelu_layer_norm(*parts, transform.LayerNorm, x)
    else:  # RoBERTa's
        x = functional.linear_gelu_layer_norm(head.dense, families.GELU, head.layer_norm, x)
    logits = linear(head.decoder, x)
    return logits.unflatten(0, hidden.shape[:-1]) if known is None else known.batch.unpack(logits)
