"""When an answer counts as right: beside the truth and a baseline in the same dtype."""

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
# What rounding may add to twice the baseline's error, as a share of the largest true value, and a
# quarter of it as a share of the norm: one unit in the last place of 16 bits, 1e-5 in fp32.
_SLACK = {"fp64": 1e-12, "fp32": 1e-5, "fp16": 2.0**-11, "bf16": 2.0**-8}
FACTOR = 2.0  # times the baseline's error, which is what this project asks of itself
NOT_ZEROS = 0.9  # of the truth's norm: an error above it is as wrong as zeros would be


def short(dtype: torch.dtype) -> str:
    """Return the dtype's name as rows have it: "bf16", "fp32"..."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def errors(own: Tensor, truth: Tensor) -> tuple[float, float]:
    """Return the largest error and the norm of the error over that of the truth."""
    truth = truth.double()
    error = own.to(truth.device).double() - truth
    norm = truth.norm().item()
    return error.abs().max().item(), error.norm().item() / norm if norm else error.norm().item()


@dataclass(frozen=True)
class Bound:
    """The baseline's errors, `top` at most and `norm` of the truth's, and what rounding may add."""

    top: float
    norm: float
    more_top: float
    more_norm: float
    limit: float

    def allowed(self, factor: float = FACTOR) -> dict[str, float]:
        """Return what a candidate may be off by."""
        return {
            "max": factor * self.top + self.more_top,
            "l2": min(factor * self.norm + self.more_norm, self.limit),
        }


def bound(baseline: Tensor, truth: Tensor, dtype: str, limit: float = NOT_ZEROS) -> Bound:
    """Return the bound that a baseline in a dtype ("bf16", ...) gives."""
    top, norm = errors(baseline, truth) if truth.numel() else (0.0, 0.0)
    scale = truth.abs().max().item() if truth.numel() else 0.0
    return Bound(top, norm, _SLACK[dtype] * scale, _SLACK[dtype] / 4, limit)
