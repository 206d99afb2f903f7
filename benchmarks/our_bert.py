"""This project's encoder with given weights, and what its rows say of it."""

from collections.abc import Mapping
from typing import Any

import checkout  # noqa: F401
import torch
import workload
from torch import Tensor, nn

import bert_fast
from bert_fast import BertConfig
from bert_fast.extension import load as load_extension
from bert_fast.ops.products import cpu_library, cpu_library_times


def encoder(
    state: Mapping[str, Tensor], config: BertConfig, device: torch.device, dtype: torch.dtype
) -> bert_fast.BertModel:
    """Return the encoder in eval mode, without the pooler; Args as in `stock_bert.encoder`."""
    model = bert_fast.BertModel(config, add_pooling_layer=False)
    model.load_state_dict(workload.encoder_weights(state))
    return model.to(device, dtype).eval()


def notes(model: nn.Module) -> dict[str, Any]:
    """Return what the row of our model should say of it: what serves each op, and on a CPU how."""
    said = {"ops": {entry.op: entry.implementation for entry in bert_fast.report(model).ops}}
    dtypes = {(p.device.type, p.dtype) for p in model.parameters()}
    extension, why = load_extension()
    if ("cpu", torch.float32) in dtypes:
        said |= {"cpu_library": cpu_library(), "cpu_library_ms": cpu_library_times()}
    if "cpu" in {kind for kind, _ in dtypes}:
        said["extension"] = why if extension is None else extension.cpu_capability()
    return said
