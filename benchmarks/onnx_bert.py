"""Hugging Face's BERT in ONNX Runtime on the CPU, its layers fused for BERT or not."""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import stock_bert
import torch
from gate import AbsentError
from torch import Tensor, nn

from bert_fast import BertConfig

FOLDER = "BENCH_ONNX_DIR"
_OPSET = 17  # the first in which LayerNormalization is one operator


class _HiddenStates(nn.Module):
    """The model with tensors alone as inputs and output."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask).last_hidden_state


def _export(model: nn.Module, path: Path) -> None:
    """Write the model, with batch and length open.

    It is traced (`dynamo=False`) with eager attention: from the graphs of torch.export and of SDPA
    the optimizer's patterns fuse no attention (onnxruntime 1.31, torch 2.13).
    """
    wrapped = _HiddenStates(model).eval()  # the exporter gives the model back in the wrapper's mode
    ids = torch.full((2, 16), 5)
    mask = (torch.arange(16) < torch.tensor([[16], [9]])).long()
    axes = {0: "batch", 1: "length"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the tracing exporter is the older one
        torch.onnx.export(
            wrapped,
            (ids, mask),
            str(path),
            input_names=["input_ids", "attention_mask"],
            output_names=["hidden"],
            dynamic_axes={"input_ids": axes, "attention_mask": axes, "hidden": axes},
            opset_version=_OPSET,
            dynamo=False,
        )


def _files(
    state: Mapping[str, Tensor], config: BertConfig, fused: bool, folder: Path
) -> tuple[Path, dict[str, int]]:
    """Return the model's file in the folder, and how many nodes of each kind were fused.

    What is there already is taken as it is.
    """
    path, fused_path = folder / "bert.onnx", folder / "fused.onnx"
    if not path.exists():
        model = stock_bert.encoder(state, config, torch.device("cpu"), torch.float32, "eager")
        _export(model, path)
    if not fused:
        return path, {}
    counts_path = folder / "fused.json"
    if not counts_path.exists():
        optimizer = stock_bert.need("onnxruntime.transformers.optimizer")
        model = optimizer.optimize_model(
            str(path),
            "bert",
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            opt_level=0,
            use_gpu=False,
        )
        model.save_model_to_file(str(fused_path))
        counts = {name: n for name, n in model.get_fused_operator_statistics().items() if n}
        counts_path.write_text(json.dumps(counts), "utf-8")
    return fused_path, json.loads(counts_path.read_text("utf-8"))


def _key(state: Mapping[str, Tensor], config: BertConfig) -> str:
    """Return a name for what is exported: the configuration and the weights' own sums."""
    sums = [f"{t.double().sum().item():.17g}" for t in state.values()]
    text = json.dumps([config.to_dict(), sums], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def session(
    state: Mapping[str, Tensor],
    config: BertConfig,
    device: torch.device,
    dtype: torch.dtype,
    fused: bool = True,
) -> tuple[Callable[[Tensor, Tensor | None], Tensor], dict[str, object]]:
    """Return a function of ids and mask (B, L) that gives hidden states, and notes for its row.

    The notes count the fused nodes: a fusion that a version of the exporter prevents shows there.
    The files are made anew unless the variable BENCH_ONNX_DIR names a folder that keeps them.

    Args:
        state: of a BertForPreTraining.
        config: of the weights.
        device: the CPU.
        dtype: fp32.
        fused: through ONNX Runtime's optimizer for transformers; else the exported graph as it is,
            with the optimizations that a session makes by itself.

    Raises:
        AbsentError: a package is not installed, or device or dtype are not the CPU's fp32.
    """
    if device.type != "cpu" or dtype != torch.float32:
        raise AbsentError("runs on the CPU in fp32 alone")
    onnxruntime = stock_bert.need("onnxruntime")
    stock_bert.need("onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # its threads would take the cores from whoever runs next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with ExitStack() as stack:
        if FOLDER in os.environ:
            folder = Path(os.environ[FOLDER]) / _key(state, config)
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path, counts = _files(state, config, fused, folder)
        ready = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    notes = {"onnxruntime": onnxruntime.__version__, "weights": "fp32"}
    notes |= {"fused": counts} if fused else {"graph": "as exported, optimized by the session"}

    def call(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        inputs = {"input_ids": input_ids.numpy(), "attention_mask": mask.numpy()}
        return torch.from_numpy(ready.run(None, inputs)[0])

    return call, notes
