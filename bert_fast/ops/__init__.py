"""Operators on packed rows: `torch.ops.bert_fast.*`, and the functions the layers call.

Each op has one schema, an implementation for each kind of device, a fake for tracing and an
autograd.Function around it. The device decides which implementation runs; an input that it cannot
take raises. Letters: T tokens, D hidden, H heads, K head size, F feed-forward, V vocabulary.
"""

from bert_fast.ops.attention import attention, check_cu_seqlens
from bert_fast.ops.checks import Checks
from bert_fast.ops.cross_entropy import linear_cross_entropy
from bert_fast.ops.embedding import embed
from bert_fast.ops.gelu import ACTIVATIONS, gelu
from bert_fast.ops.layer_norm import add_layer_norm, layer_norm
from bert_fast.ops.linear import linear, linear_gelu
from bert_fast.ops.optimizer import adamw_, grad_norm, lamb_
from bert_fast.ops.registry import Implementation, implementations, is_autocast
from bert_fast.ops.unpad import unpad, unpad_work
from bert_fast.ops.work_list import work_list

__all__ = [
    "ACTIVATIONS",
    "Checks",
    "Implementation",
    "adamw_",
    "add_layer_norm",
    "attention",
    "check_cu_seqlens",
    "embed",
    "gelu",
    "grad_norm",
    "implementations",
    "is_autocast",
    "lamb_",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_gelu",
    "unpad",
    "unpad_work",
    "work_list",
]
