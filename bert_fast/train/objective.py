"""The loss of MLM + NSP pre-training over micro-batches whose labels are counted together.

A micro-batch gives sums. They are divided by the labels of the whole step, all micro-batches and
processes together, so that the gradients of the step are those of its mean loss however it is
divided; a mean of means is not that where the counts differ.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bert_fast.data.batches import Batch
from bert_fast.heads import BertForPreTraining
from bert_fast.heads.losses import wide


class Sums(NamedTuple):
    """Sums over the labels of a micro-batch, or of several; each () fp32 or wider.

    Attributes:
        mlm: cross entropy of the masked tokens in nats.
        nsp: cross entropy of the pairs in nats.
        mlm_correct: masked tokens whose likeliest token is the right one; NaN where not counted.
        nsp_correct: pairs judged rightly.
    """

    mlm: Tensor
    nsp: Tensor
    mlm_correct: Tensor
    nsp_correct: Tensor


class PreTrainingObjective(nn.Module):
    """A model with its loss; what is wrapped for several processes, and compiled.

    Args:
        model: the model; its parameters are this module's, under "model.".
    """

    def __init__(self, model: BertForPreTraining) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, batch: Batch, counts: Tensor, count_correct: bool = False
    ) -> tuple[Tensor, Sums]:
        """Return a micro-batch's share of the loss, and its sums.

        Args:
            batch: as `data.batches.Batches` makes it, on the model's device.
            counts: (2,), masked tokens and pairs of the whole step, at least 1.
            count_correct: count the masked tokens that are right too, which takes another product
                with the vocabulary.

        Returns:
            The loss (): summed over the micro-batches of a step it is the step's; and `Sums`.
        """
        encoded = self.model.bert(
            batch["input_ids"],
            token_type_ids=batch["token_type_ids"],
            position_ids=batch["position_ids"],
            cu_seq_lens_q=batch["cu_seq_lens_q"],
            cu_seq_lens_k=batch["cu_seq_lens_k"],
            max_length_q=batch["max_length_q"],
            max_length_k=batch["max_length_k"],
            packed_output=True,
        )
        rows = encoded.rows.index_select(0, batch["masked_positions"])
        labels, follows = batch["masked_labels"], batch["next_sentence_label"]
        mlm = self.model.cls.predictions.loss_sum(rows, labels)
        scores = wide(encoded.sequence_logits(self.model.cls.seq_relationship))
        nsp = F.cross_entropy(scores, follows, reduction="sum")
        loss = mlm / counts[0] + nsp / counts[1]
        with torch.no_grad():
            right = torch.full_like(nsp, torch.nan)
            if count_correct:
                right = (self.model.cls.predictions(rows).argmax(-1) == labels).sum().to(nsp.dtype)
            follow = (scores.argmax(-1) == follows).sum().to(nsp.dtype)
        return loss, Sums(mlm.detach(), nsp.detach(), right, follow)
