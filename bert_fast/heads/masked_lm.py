"""Masked-language modelling, alone and with next-sentence prediction: the two of pre-training."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bert_fast import functional, ops
from bert_fast.config import BertConfig
from bert_fast.heads import losses
from bert_fast.model import BertModel, Encoded
from bert_fast.outputs import LogitsOutput, PreTrainingOutput
from bert_fast.pretrained import BertPreTrainedModel
from bert_fast.reference import IGNORE


class BertPredictionHeadTransform(nn.Module):
    """dense, activation, LayerNorm."""

    def __init__(self, config: BertConfig):
        super().__init__()
        D = config.hidden_size
        self.dense = nn.Linear(D, D)
        self.transform_act_fn = functional.Activation(config.hidden_act)
        self.LayerNorm = nn.LayerNorm(D, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Return rows (N, D)."""
        parts = self.dense, self.transform_act_fn, self.LayerNorm
        return functional.linear_gelu_layer_norm(*parts, x)


class BertLMPredictionHead(nn.Module):
    """From hidden states to scores of the vocabulary; the decoder is tied to the embeddings."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, V) of rows (N, D)."""
        return functional.linear(self.decoder, self.transform(x))

    def loss_sum(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy () summed over rows x (N, D), without keeping logits."""
        x = self.transform(x)
        if functional.is_plain(self.decoder, nn.Linear):
            return ops.linear_cross_entropy(x, self.decoder.weight, self.decoder.bias, labels)
        return F.cross_entropy(losses.wide(self.decoder(x)), labels, reduction="sum")


class BertOnlyMLMHead(nn.Module):
    """The head of BertForMaskedLM."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.predictions = BertLMPredictionHead(config)


class BertPreTrainingHeads(nn.Module):
    """The heads of BertForPreTraining."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.predictions = BertLMPredictionHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


class _MaskedLMModel(BertPreTrainedModel):
    """What the two models share: the tied decoder, and when its logits are skipped."""

    tied_weights = {  # noqa: RUF012 - read only
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def get_output_embeddings(self) -> nn.Module:
        """Return the decoder."""
        return self.cls.predictions.decoder

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder, and the bias that is tied to its bias."""
        self.cls.predictions.decoder = value
        self.cls.predictions.bias = value.bias

    def _masked_lm(
        self,
        encoded: Encoded,
        labels: Tensor | None,
        skip_logits: bool | None,
        return_dict: bool | None,
        num_items: Tensor | int | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return (loss, logits (B, L, V)): no loss without labels, no logits if skipped."""
        head, layout = self.cls.predictions, encoded.layout
        if skip_logits is None:
            skip_logits = labels is not None and self.training and self.wants_dict(return_dict)
        if labels is not None:
            labels = losses.token_labels(labels, layout)
        if not skip_logits:
            logits = head(encoded.rows)
            loss = None if labels is None else losses.cross_entropy(logits, labels, num_items)
            return loss, layout.unpack(logits)
        if labels is None:
            return None, None
        rows = ops.unpad((labels != IGNORE)[None])[0]
        total = head.loss_sum(encoded.rows.index_select(0, rows), labels.index_select(0, rows))
        loss = losses.mean(total, rows.shape[0], num_items)
        return loss.to(losses.loss_dtype(encoded.rows)), None


class BertForMaskedLM(_MaskedLMModel):
    """BERT with the masked-language-modelling head."""

    accepts_loss_kwargs = True  # transformers' Trainer then passes num_items_in_batch

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        labels: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        skip_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **options: Any,
    ) -> LogitsOutput | tuple[Tensor, ...]:
        """Score the vocabulary at every token.

        Beside BertModel's arguments:
            labels: (B, L) integers, 0 to V - 1, or -100 for none; those at padding do not count.
            skip_logits: True: run the head on the labelled tokens only and return no logits;
                needs labels. None: do so in training with labels, unless return_dict is False.
            num_items_in_batch: divisor of the summed loss in place of the number of labels.

        Returns:
            `LogitsOutput`: loss (); logits (B, L, V), 0 at padding.
        """
        if skip_logits and labels is None:
            raise ValueError("skip_logits: want labels with True, got None")
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        decoders = encoder_hidden_states, encoder_attention_mask
        encoded = self.bert(*inputs, *decoders, packed_output=True, **options)
        loss, logits = self._masked_lm(
            encoded, labels, skip_logits, return_dict, num_items_in_batch
        )
        return self.output(LogitsOutput, encoded, return_dict, loss=loss, logits=logits)


class BertForPreTraining(_MaskedLMModel):
    """BERT with the masked-language-modelling and the next-sentence head."""

    accepts_loss_kwargs = False  # the NSP loss is a mean over sequences, not over labelled tokens

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config)
        self.cls = BertPreTrainingHeads(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        skip_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **options: Any,
    ) -> PreTrainingOutput | tuple[Tensor, ...]:
        """Score the vocabulary at every token, and whether the second sentence is the next.

        Beside BertModel's arguments:
            labels: (B, L), as BertForMaskedLM.
            next_sentence_label: (B,) integers, 0: the second sentence follows, 1: it is random.
            skip_logits: as BertForMaskedLM, but True without labels is fine: the NSP logits are
                always there.
            num_items_in_batch: divisor of the summed MLM loss.

        Returns:
            `PreTrainingOutput`: loss (), the sum of both losses, only with both labels;
            prediction_logits (B, L, V); seq_relationship_logits (B, 2).
        """
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        encoded = self.bert(*inputs, packed_output=True, **options)
        if next_sentence_label is None:
            labels = None
        loss, logits = self._masked_lm(
            encoded, labels, skip_logits, return_dict, num_items_in_batch
        )
        nsp = encoded.sequence_logits(self.cls.seq_relationship)
        if loss is not None:
            name, nonempty = "next_sentence_label", encoded.layout.nonempty()
            target = losses.sequence_labels(name, next_sentence_label, nsp.shape[0], nonempty)
            loss = loss + losses.cross_entropy(nsp, target, name=name)
        fields = {"prediction_logits": logits, "seq_relationship_logits": nsp}
        return self.output(PreTrainingOutput, encoded, return_dict, loss=loss, **fields)
