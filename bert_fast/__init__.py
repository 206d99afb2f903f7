"""BERT with the padding taken out once and every memory-bound step fused."""

from bert_fast.config import BertConfig
from bert_fast.encode import Encoder
from bert_fast.heads import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from bert_fast.hf import accelerate, patch_transformers, register_attention, restore, verify
from bert_fast.model import BertModel
from bert_fast.ops.invariant import batch_invariant, is_batch_invariant
from bert_fast.ops.kept import forget as forget_weights
from bert_fast.ops.products import cpu_library, set_cpu_library
from bert_fast.pretrained import BertPreTrainedModel
from bert_fast.report import report
from bert_fast.shipped import ENGLISH_MINI
from bert_fast.tokenizer import BertTokenizer

__version__ = "0.1.0"

__all__ = [
    "ENGLISH_MINI",
    "BertConfig",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "BertPreTrainedModel",
    "BertTokenizer",
    "Encoder",
    "__version__",
    "accelerate",
    "batch_invariant",
    "cpu_library",
    "forget_weights",
    "is_batch_invariant",
    "patch_transformers",
    "register_attention",
    "report",
    "restore",
    "set_cpu_library",
    "verify",
]
