"""Hugging Face's BERT with given weights, and ways to run it: attention backends, torch.compile."""

import importlib
import types
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import workload
from gate import AbsentError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bert_fast import BertConfig

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
MODES = ("default", "reduce-overhead", "max-autotune")  # of torch.compile
_CUDA_ONLY = ("cudnn", "efficient")


def need(name: str) -> types.ModuleType:
    """Return the module of that name.

    Raises:
        AbsentError: it is not installed. One that is installed and broken raises what it raises.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise AbsentError(f"{error.name} is not installed") from error


def encoder(
    state: Mapping[str, Tensor],
    config: BertConfig,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
) -> nn.Module:
    """Return transformers' BertModel in eval mode, without the pooler, which nobody reads here.

    Args:
        state: of a BertForPreTraining.
        config: of the weights.
        device: where the model goes.
        dtype: of its weights.
        attention: "eager" or "sdpa".
    """
    transformers = need("transformers")
    theirs = transformers.BertConfig.from_dict(config.to_dict())
    model = transformers.BertModel(theirs, add_pooling_layer=False)
    model.set_attn_implementation(attention)
    model.load_state_dict(workload.encoder_weights(state))
    return model.to(device, dtype).eval()


def pretraining(
    state: Mapping[str, Tensor],
    config: BertConfig,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
) -> nn.Module:
    """Return transformers' BertForPreTraining in train mode; Args as in `encoder`."""
    transformers = need("transformers")
    theirs = transformers.BertConfig.from_dict(config.to_dict())
    model = transformers.BertForPreTraining(theirs)
    model.set_attn_implementation(attention)
    model.load_state_dict(state)
    return model.to(device, dtype).train()


def forced(backend: str | None, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Return what makes a context in which SDPA takes that backend or raises; None: its own choice.

    Raises:
        AbsentError: the backend is one of CUDA alone, and the device is not.
    """
    if backend is None:
        return nullcontext
    if backend in _CUDA_ONLY and device.type != "cuda":
        raise AbsentError("needs CUDA")
    return lambda: sdpa_kernel(BACKENDS[backend])


def compiled(
    call: Callable[..., Any], mode: str, dynamic: bool, device: torch.device
) -> Callable[..., Any]:
    """Return the function compiled, apart from everything else that is compiled in this process.

    torch.compile keeps what it made with the code object, of which all functions that one `def`
    made share one: candidates would fill each other's limit of recompilations, and search each
    other's guards at every call. So the code object is copied; nothing is reset, since candidates
    that are ready already must stay so.

    Args:
        call: a plain Python function, such as a closure over a model.
        mode: of torch.compile.
        dynamic: of torch.compile; False: one graph for each shape.
        device: where it runs.

    Raises:
        AbsentError: the mode needs CUDA graphs.
    """
    if mode != "default" and device.type != "cuda":
        raise AbsentError("needs CUDA: CUDA graphs")
    alone = types.FunctionType(
        call.__code__.replace(),
        call.__globals__,
        call.__name__,
        call.__defaults__,
        call.__closure__,
    )
    return torch.compile(alone, mode=mode, dynamic=dynamic)
