"""Extractive question answering: where the answer begins and ends."""

from typing import Any

import torch
from torch import Tensor, nn

from bert_fast import functional
from bert_fast.config import BertConfig
from bert_fast.heads import losses
from bert_fast.model import BertModel
from bert_fast.outputs import QuestionAnsweringOutput
from bert_fast.packing import Layout
from bert_fast.pretrained import BertPreTrainedModel


class BertForQuestionAnswering(BertPreTrainedModel):
    """BERT with a start and an end score for each token."""

    accepts_loss_kwargs = False  # the loss counts questions

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **options: Any,
    ) -> QuestionAnsweringOutput | tuple[Tensor, ...]:
        """Score each token as the first and as the last of the answer.

        Beside BertModel's arguments:
            start_positions: (B,) or (B, 1) integers, the column of the answer's first token;
                negative counts as 0, L and more as no answer, which takes no part in the loss.
            end_positions: likewise of its last token.

        Returns:
            `QuestionAnsweringOutput`: loss (), the mean of both losses, only with both positions;
            start_logits and end_logits (B, L), the dtype's lowest value at padding.

        Raises:
            ValueError: a position is at padding.
            NotImplementedError: positions for a batch that the caller packed.
        """
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        encoded = self.bert(*inputs, packed_output=True, **options)
        layout = encoded.layout
        logits = functional.linear(self.qa_outputs, encoded.rows)
        if logits.shape[1] != 2:
            raise ValueError(f"config.num_labels: want 2, got {logits.shape[1]}")
        logits = layout.unpack(logits, fill=torch.finfo(logits.dtype).min)
        start, end = (t.contiguous() for t in logits.unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            if layout.packed:
                raise NotImplementedError("start_positions: want a padded batch, got cu_seq_lens_q")
            first = _columns("start_positions", start_positions, layout)
            last = _columns("end_positions", end_positions, layout)
            L = layout.shape[1]
            first_loss = losses.cross_entropy(start, first, ignore=L)
            loss = (first_loss + losses.cross_entropy(end, last, ignore=L)) / 2
        fields = {"start_logits": start, "end_logits": end}
        return self.output(QuestionAnsweringOutput, encoded, return_dict, loss=loss, **fields)


def _columns(name: str, positions: Tensor, layout: Layout) -> Tensor:
    """Return positions (B,) from 0 to L, where L says that there is none."""
    B, L = layout.shape
    columns = losses.integers(name, positions)
    if columns.numel() != B:
        raise ValueError(f"{name}: want {[B]}, got {[*columns.shape]}")
    columns = columns.reshape(B).clamp(0, L)
    if layout.rows is None:
        return columns
    real = nn.functional.pad(layout.mask(), (0, 1), value=True)
    at_padding = ~real.gather(1, columns[:, None])[:, 0]
    if torch.compiler.is_compiling():  # raising would break the graph: it takes no part instead
        return torch.where(at_padding, L, columns)
    if at_padding.any():
        b = int(at_padding.nonzero()[0, 0])
        raise ValueError(f"{name}: want a token, got padding: column {int(columns[b])} of row {b}")
    return columns
