"""BertModel: padded batch in, hidden states out; packed in between."""

from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from bert_fast.config import BertConfig
from bert_fast.functional import draw_seed, drops, linear
from bert_fast.layers import BertEmbeddings, BertEncoder, BertPooler
from bert_fast.outputs import BertModelOutput
from bert_fast.packing import Layout, pack
from bert_fast.pretrained import BertPreTrainedModel


class Encoded(NamedTuple):
    """What the encoder leaves for a head: packed rows.

    Attributes:
        rows: (T, D) last hidden states.
        pooled: (B, D), or None without a pooler; 0 for an empty sequence.
        layout: where the rows stand in the batch.
        hidden_states: (B, L, D) after the embeddings and each layer, or None.
        attentions: (B, H, L, L) of each layer, or None.
    """

    rows: Tensor
    pooled: Tensor | None
    layout: Layout
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None

    def sequence_logits(self, head: nn.Module, dropout: nn.Module | None = None) -> Tensor:
        """Return the logits (B, C) of a linear head on the pooled output; 0 for an empty one."""
        pooled = self.pooled if dropout is None else dropout(self.pooled)
        logits, nonempty = linear(head, pooled), self.layout.nonempty()
        return logits if nonempty is None else torch.where(nonempty[:, None], logits, 0)


class ForwardOptions(TypedDict, total=False):
    """Keyword arguments that every forward takes, with transformers' names.

    Attributes:
        output_hidden_states: return (B, L, D) after the embeddings and after each layer.
        output_attentions: return (B, H, L, L) of each layer; costs memory and time.
        cu_seq_lens_q: (B + 1,) integers: the inputs (1, T) are packed, sequence b is columns
            cu_seq_lens_q[b] to cu_seq_lens_q[b + 1].
        cu_seq_lens_k: as cu_seq_lens_q, which it must equal.
        max_length_q: the longest sequence; found here when absent.
        max_length_k: as max_length_q.
    """

    output_hidden_states: bool | None
    output_attentions: bool | None
    cu_seq_lens_q: Tensor | None
    cu_seq_lens_k: Tensor | None
    max_length_q: int | None
    max_length_k: int | None


_DECODER_ARGUMENTS = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    "past_key_values",
    "head_mask",
    "is_causal",
)
# what transformers' tools pass to every model, and what an encoder has no use for there either
_WITHOUT_EFFECT = ("num_items_in_batch", "output_router_logits", "seq_idx")


class BertModel(BertPreTrainedModel):
    """The encoder, with transformers' arguments and outputs.

    Args:
        config: sizes; validated here.
        add_pooling_layer: whether there is a pooler.
    """

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings."""
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        past_key_values: None = None,
        use_cache: bool | None = None,
        *,
        return_dict: bool | None = None,
        packed_output: bool = False,
        **options: object,
    ) -> BertModelOutput | tuple[Tensor, ...] | Encoded:
        """Encode a batch.

        Args:
            input_ids: (B, L) int64 or int32; or None with inputs_embeds.
            attention_mask: (B, L) bool, int or float, above 0 where there is a token, wherever the
                padding is; None: everywhere.
            token_type_ids: (B, L) or (1, L) integers; None: 0.
            position_ids: (B, L) or (1, L) integers; None: the column.
            inputs_embeds: (B, L, D) in place of word embeddings.
            encoder_hidden_states: None, as the next two: this is an encoder only.
            encoder_attention_mask: None.
            past_key_values: None.
            use_cache: without effect, in transformers' encoder too.
            return_dict: False for a tuple; None: as the config says.
            packed_output: True for an `Encoded` on packed rows, as the heads want it.
            **options: see `ForwardOptions`.

        Returns:
            `BertModelOutput`: last_hidden_state (B, L, D), 0 at padding, and pooler_output (B, D)
            of each sequence's first token, 0 for a row that is all padding.

        Raises:
            ValueError: a shape does not fit, a sequence is too long, an id is out of range.
            TypeError: ids are not integers; an unknown argument.
            NotImplementedError: a decoder's arguments; a 3-D or 4-D mask; attentions of a batch
                that the caller packed.
        """
        config = self.config
        if not torch.compiler.is_compiling():
            config.validate()
        options["encoder_hidden_states"] = encoder_hidden_states
        options["encoder_attention_mask"] = encoder_attention_mask
        options["past_key_values"] = past_key_values
        options = _check_options(options, config)
        if isinstance(inputs_embeds, Tensor):
            self._check_embeds(inputs_embeds)
        batch = pack(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            cu_seqlens=options["cu_seq_lens_q"],
            max_len=options["max_length_q"],
            max_positions=config.max_position_embeddings,
        )
        want_hidden, want_probs = options["output_hidden_states"], options["output_attentions"]
        if want_probs and batch.packed:
            raise NotImplementedError("output_attentions: want a padded batch, got cu_seq_lens_q")
        seed = None
        if drops(self):  # drawn outside of what checkpointing computes again
            seed = draw_seed(batch.cu_seqlens.device)
        x = self.embeddings(batch, seed)
        x, hidden, probs = self.encoder(x, batch, seed, want_hidden, want_probs)
        pooled = None
        if self.pooler is not None:
            pooled = self.pooler(batch.first_rows(x), batch.nonempty())
        hidden_states = tuple(batch.unpack(h) for h in hidden) if want_hidden else None
        attentions = tuple(probs) if want_probs else None
        if packed_output:
            return Encoded(x, pooled, batch, hidden_states, attentions)
        last = hidden_states[-1] if want_hidden else batch.unpack(x)
        out = BertModelOutput(
            last_hidden_state=last,
            pooler_output=pooled,
            hidden_states=hidden_states,
            attentions=attentions,
            cross_attentions=() if want_probs else None,
        )
        return out if self.wants_dict(return_dict) else out.to_tuple()

    def _check_embeds(self, inputs_embeds: Tensor) -> None:
        """Raise unless inputs_embeds (B, L, D) fits the other embeddings."""
        table = self.embeddings.position_embeddings.weight
        if not inputs_embeds.is_floating_point() or (
            torch.promote_types(inputs_embeds.dtype, table.dtype) != table.dtype
        ):
            raise TypeError(f"inputs_embeds: want {table.dtype}, got {inputs_embeds.dtype}")
        if inputs_embeds.ndim == 3 and inputs_embeds.shape[2] != table.shape[1]:
            want = f"(B, L, {table.shape[1]})"
            raise ValueError(f"inputs_embeds: want {want}, got {[*inputs_embeds.shape]}")


def _check_options(options: dict, config: BertConfig) -> dict:
    """Return every option of ForwardOptions, the config's value where it is absent or None."""
    options = dict(options)
    for name in _WITHOUT_EFFECT:
        options.pop(name, None)
    for name in _DECODER_ARGUMENTS:
        value = options.pop(name, None)
        if value is not None and value is not False:
            raise NotImplementedError(f"{name}: want None, got a value: this is an encoder only")
    unknown = options.keys() - ForwardOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"forward: unknown arguments {', '.join(sorted(unknown))}")
    options = {name: options.get(name) for name in ForwardOptions.__annotations__}
    for name in ("output_hidden_states", "output_attentions"):
        if options[name] is None:
            options[name] = bool(getattr(config, name))
    if options["max_length_q"] is not None and options["cu_seq_lens_q"] is None:
        raise ValueError("max_length_q: want cu_seq_lens_q beside it, got None")
    for name in ("cu_seq_lens", "max_length"):
        q, k = options[f"{name}_q"], options[f"{name}_k"]
        if k is not None and (q is None or not _same(q, k)):
            raise ValueError(f"{name}_k: want {name}_q ({q}), got {k}: this is self-attention")
    return options


def _same(q: Tensor | int, k: Tensor | int) -> bool:
    """Return whether they are equal; of tensors on a device only the shape is looked at."""
    if q is k:
        return True
    if isinstance(q, Tensor) and isinstance(k, Tensor):
        looked_at = q.device.type == "cpu" and not torch.compiler.is_compiling()
        return q.shape == k.shape and (not looked_at or torch.equal(q, k))
    return int(q) == int(k)
