"""Classes for sequences, sentence pairs, tokens and choices."""

from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bert_fast import functional
from bert_fast.config import BertConfig
from bert_fast.heads import losses
from bert_fast.model import BertModel, Encoded
from bert_fast.outputs import LogitsOutput
from bert_fast.packing import check_tensor
from bert_fast.pretrained import BertPreTrainedModel


def _dropout(config: BertConfig) -> nn.Dropout:
    p = config.classifier_dropout
    return nn.Dropout(config.hidden_dropout_prob if p is None else p)


class BertOnlyNSPHead(nn.Module):
    """The head of BertForNextSentencePrediction."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


class BertForNextSentencePrediction(BertPreTrainedModel):
    """BERT with the next-sentence head."""

    accepts_loss_kwargs = False  # the loss counts sequences

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config)
        self.cls = BertOnlyNSPHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **options: Any,
    ) -> LogitsOutput | tuple[Tensor, ...]:
        """Score whether the second sentence follows the first.

        Beside BertModel's arguments:
            labels: (B,) integers, 0: it follows, 1: it is random.

        Returns:
            `LogitsOutput`: loss (); logits (B, 2).
        """
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        encoded = self.bert(*inputs, packed_output=True, **options)
        logits = encoded.sequence_logits(self.cls.seq_relationship)
        loss = None
        if labels is not None:
            nonempty = encoded.layout.nonempty()
            target = losses.sequence_labels("labels", labels, logits.shape[0], nonempty)
            loss = losses.cross_entropy(logits, target)
        return self.output(LogitsOutput, encoded, return_dict, loss=loss, logits=logits)


class BertForSequenceClassification(BertPreTrainedModel):
    """BERT with a linear head on each sequence: classes, several labels, or numbers."""

    accepts_loss_kwargs = False  # the loss counts sequences

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config)
        self.dropout = _dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **options: Any,
    ) -> LogitsOutput | tuple[Tensor, ...]:
        """Score each sequence.

        Beside BertModel's arguments:
            labels: (B,) integers for classes (cross entropy), (B, C) floating for several labels
                (binary cross entropy), (B,) or (B, C) floating for numbers (squared error). Which
                of them config.problem_type says; None there: numbers if there is one label,
                classes if labels are integers, else several labels, and the choice is kept.

        Returns:
            `LogitsOutput`: loss (); logits (B, C).
        """
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        encoded = self.bert(*inputs, packed_output=True, **options)
        logits = encoded.sequence_logits(self.classifier, self.dropout)
        loss = None if labels is None else self._loss(logits, labels, encoded)
        return self.output(LogitsOutput, encoded, return_dict, loss=loss, logits=logits)

    def _loss(self, logits: Tensor, labels: Tensor, encoded: Encoded) -> Tensor:
        check_tensor("labels", labels)
        problem, nonempty = self.config.problem_type, encoded.layout.nonempty()
        if problem is None and self.num_labels == 1:
            problem = "regression"
        elif problem is None:
            kind = "multi" if labels.is_floating_point() else "single"
            problem = f"{kind}_label_classification"
        if problem == "single_label_classification":
            target = losses.sequence_labels("labels", labels, logits.shape[0], nonempty)
            loss = losses.cross_entropy(logits, target)
        else:
            if labels.shape != logits.shape and (self.num_labels > 1 or labels.ndim != 1):
                raise ValueError(f"labels: want {[*logits.shape]}, got {[*labels.shape]}")
            if labels.numel() != logits.numel():
                raise ValueError(f"labels: want {[logits.shape[0]]}, got {[*labels.shape]}")
            wide = losses.wide(logits)
            target = labels.view_as(logits).to(wide.dtype)
            error = F.mse_loss if problem == "regression" else _binary_cross_entropy
            total = losses.row_mean(error(wide, target, reduction="none"), nonempty)
            loss = total.to(losses.loss_dtype(logits))
        self.config.problem_type = problem
        return loss


_binary_cross_entropy = F.binary_cross_entropy_with_logits


class BertForMultipleChoice(BertPreTrainedModel):
    """BERT that scores each of several texts, and takes the best."""

    accepts_loss_kwargs = False  # the loss counts questions

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config)
        self.dropout = _dropout(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **options: Any,
    ) -> LogitsOutput | tuple[Tensor, ...]:
        """Score C choices for each of B questions.

        BertModel's arguments have a dimension more: (B, C, L), and (B, C, L, D) inputs_embeds.
        Beside them:
            labels: (B,) integers, the right choice.

        Returns:
            `LogitsOutput`: loss (); logits (B, C); hidden states and attentions of B * C texts.
        """
        given = inputs_embeds if input_ids is None else input_ids
        if given is None or given.ndim != (4 if input_ids is None else 3):
            got = None if given is None else [*given.shape]
            raise ValueError(f"want input_ids (B, C, L) or inputs_embeds (B, C, L, D), got {got}")
        if options.get("cu_seq_lens_q") is not None:
            raise NotImplementedError("cu_seq_lens_q: want a padded batch of choices, got borders")
        B, C = given.shape[:2]
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        inputs = (None if t is None else t.flatten(0, 1) for t in inputs)
        encoded = self.bert(*inputs, packed_output=True, **options)
        logits = encoded.sequence_logits(self.classifier, self.dropout).view(B, C)
        loss = None
        if labels is not None:
            nonempty = encoded.layout.nonempty()
            nonempty = None if nonempty is None else nonempty.view(B, C).any(1)
            target = losses.sequence_labels("labels", labels, B, nonempty)
            loss = losses.cross_entropy(logits, target)
        return self.output(LogitsOutput, encoded, return_dict, loss=loss, logits=logits)


class BertForTokenClassification(BertPreTrainedModel):
    """BERT with a linear head on each token, as for entities."""

    accepts_loss_kwargs = True  # transformers' Trainer then passes num_items_in_batch

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False)
        self.dropout = _dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **options: Any,
    ) -> LogitsOutput | tuple[Tensor, ...]:
        """Score each token.

        Beside BertModel's arguments:
            labels: (B, L) integers, 0 to C - 1, or -100 for none; those at padding do not count.
            num_items_in_batch: divisor of the summed loss in place of the number of labels.

        Returns:
            `LogitsOutput`: loss (); logits (B, L, C), 0 at padding.
        """
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        encoded = self.bert(*inputs, packed_output=True, **options)
        layout = encoded.layout
        logits = functional.linear(self.classifier, self.dropout(encoded.rows))
        loss = None
        if labels is not None:
            target = losses.token_labels(labels, layout)
            loss = losses.cross_entropy(logits, target, num_items_in_batch)
        logits = layout.unpack(logits)
        return self.output(LogitsOutput, encoded, return_dict, loss=loss, logits=logits)
