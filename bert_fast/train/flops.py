"""Operations of training, and how many a device makes in a second: what MFU is made of.

With D hidden, F feed-forward, V vocabulary, T tokens, M masked ones, n a sequence's length: a
forward takes 2 T (4 D^2 + 2 D F) for the products of a layer, 4 D sum n^2 for its attention, and
M (2 D^2 + 2 D V) for the masked-LM head; training takes three times as many. Padding and what runs
again in the backward pass do not count, nor do the pooler and the next-sentence head.
"""

import re
import time
from typing import NamedTuple

import torch

from bert_fast.config import BertConfig
from bert_fast.ops.products import linear

FORMULA = "3 (layers (2 T (4 D^2 + 2 D F) + 4 D sum n^2) + M (2 D^2 + 2 D V))"
_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# FLOP/s in 16 bits without sparsity, from NVIDIA's data sheets: A100 (June 2021) 312; H100
# (2023, half of what stands there with sparsity) SXM 989, NVL 835, PCIe 756; H200 (2024) 989, NVL
# 835. By the names that CUDA gives the devices; the first that fits counts.
_VENDOR = (
    (r"\bH[12]00 NVL\b", 835e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bG?H[12]00\b", 989e12),
    (r"\bA100\b", 312e12),
)
_SMALLEST, _SURE, _LARGEST = 256, 1024, 8192  # of the products that are measured
_SPENT, _MOST = 0.1, 0.5  # seconds behind which none larger than _SURE is begun, or none at all


class Peak(NamedTuple):
    """What a device can do.

    Attributes:
        flops: per second.
        source: whose figure it is, for the log.
    """

    flops: float
    source: str


def forward_flops(config: BertConfig, tokens: int, squares: int) -> int:
    """Return the operations of an encoder's forward.

    Args:
        config: of the model.
        tokens: real ones.
        squares: the lengths of the sequences, squared and summed.
    """
    D, F = config.hidden_size, config.intermediate_size
    products = 2 * tokens * (4 * D * D + 2 * D * F)
    return config.num_hidden_layers * (products + 4 * D * squares)


def training_flops(config: BertConfig, tokens: int, squares: int, labels: float) -> float:
    """Return the operations of a forward and backward with the masked-LM head.

    Args:
        config: of the model.
        tokens: real ones.
        squares: the lengths of the sequences, squared and summed.
        labels: masked tokens, or how many are expected.
    """
    D, V = config.hidden_size, config.vocab_size
    return 3 * (forward_flops(config, tokens, squares) + labels * (2 * D * D + 2 * D * V))


def formula(config: BertConfig) -> str:
    """Return the formula with a model's sizes, for the log."""
    sizes = {
        "layers": config.num_hidden_layers,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "V": config.vocab_size,
    }
    return f"{FORMULA}, {', '.join(f'{name} = {size}' for name, size in sizes.items())}"


def vendor_peak(name: str, dtype: torch.dtype) -> float | None:
    """Return the customary FLOP/s of a GPU, None where none is known here.

    Args:
        name: as torch.cuda.get_device_name gives it.
        dtype: only 16-bit ones are known.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    return next((flops for pattern, flops in _VENDOR if re.search(pattern, name)), None)


@torch.no_grad()
def measured_peak(device: torch.device | str, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a square matrix product, made for the moment; a fraction of a second.

    It is the best of products that are larger and larger, since a small one does not fill the
    device, and any may have been disturbed. On a CPU they are made as the model's are.
    """
    generator = torch.Generator(device).manual_seed(0)  # no draw from the run's own
    like = {"device": device, "dtype": dtype, "generator": generator}
    size, best, spent = _SMALLEST, 0.0, 0.0
    while size <= _LARGEST and (size <= _SURE or spent < _SPENT) and spent < _MOST:
        a, b = (torch.randn(size, size, **like) for _ in range(2))
        _product(a, b)  # the first of a size may prepare something
        seconds = [_seconds(a, b) for _ in range(3)]
        best, spent = max(best, 2 * size**3 / min(seconds)), spent + sum(seconds)
        size *= 2
    return best


def peak(device: torch.device | str, dtype: torch.dtype) -> Peak:
    """Return the vendor's figure for a device where it is known, else the measured one."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    flops = vendor_peak(name, dtype)
    known = flops is not None
    flops = flops if known else measured_peak(device, dtype)
    whose = "its vendor's figure" if known else "measured with a matrix product"
    said = f"{flops / 1e12:,.3g} TFLOP/s of {name} in {_SHORT[dtype]}, {whose}"
    return Peak(flops, said)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.mm(a, b) if a.is_cuda else linear(a, b, None)


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the time of one product; on a GPU the mean of ten."""
    calls = 10 if a.is_cuda else 1
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    started = time.perf_counter()
    for _ in range(calls):
        _product(a, b)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return (time.perf_counter() - started) / calls
