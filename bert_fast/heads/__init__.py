"""The models with a head, and their losses.

Heads work on packed rows: token heads on the T tokens, sequence heads on each sequence's first
token. Padding takes no part in a loss, nor does a row of the batch that is all padding.

Every forward takes BertModel's arguments (input_ids, attention_mask, token_type_ids,
position_ids, inputs_embeds, return_dict and `ForwardOptions`) and raises its errors; labels of
another shape or out of range raise ValueError. Losses are 0, with gradients of 0, where nothing
is labelled.
"""

from bert_fast.heads.classification import (
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from bert_fast.heads.masked_lm import BertForMaskedLM, BertForPreTraining
from bert_fast.heads.question_answering import BertForQuestionAnswering

__all__ = [
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
]
