"""What rows for ops are given: sizes by BERT's models, and tensors by name from a seed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Answers = tuple[Tensor, ...]


@dataclass(frozen=True)
class Model:
    """Widths of a BERT model."""

    D: int
    H: int
    F: int
    K: int = 64
    V: int = 30522


MODELS = {"base": Model(D=768, H=12, F=3072), "large": Model(D=1024, H=16, F=4096)}


def sizes(
    of: Callable[[Model, Any], Mapping[str, Any]],
    on_gpu: Any,
    on_cpu: Any,
    *,
    small: Mapping[str, Any],
    odd: Mapping[str, Any],
) -> dict[str, Mapping[str, Any]]:
    """Return a row's sizes by name.

    Args:
        of: gives them for (model, amount), such as a number of tokens.
        on_gpu: the amount that fills a GPU.
        on_cpu: one that two cores do in milliseconds.
        small: of a rehearsal.
        odd: those at which only the answers matter.
    """
    found = {name: of(model, on_gpu) for name, model in MODELS.items()}
    found |= {f"{name} cpu": of(model, on_cpu) for name, model in MODELS.items()}
    return {**found, "small": small, "odd": odd}


@dataclass(frozen=True, eq=False)
class Inputs:
    """One set of inputs, tensors and numbers by name."""

    values: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def having(self, **values: Any) -> "Inputs":
        """Return them with some replaced."""
        return Inputs({**self.values, **values})

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Return them with the floating ones in `dtype`."""
        floats = {
            n: t for n, t in self.values.items() if isinstance(t, Tensor) and t.is_floating_point()
        }
        return self.having(**{n: t.to(dtype) for n, t in floats.items()})

    def seed(self, p: float) -> Tensor | None:
        """Return dropout's seed (1,), None without dropout."""
        return self["seed"] if p else None


class Draw:
    """Random tensors on a device, in fp32.

    Args:
        device: where they are drawn: the same seed gives other numbers on another kind of device.
        seed: of the generator.
    """

    def __init__(self, device: torch.device, seed: int):
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._kind = {"generator": self._generator, "device": device}

    def normal(self, *shape: int, mean: float = 0.5, spread: float = 1.0) -> Tensor:
        """Return normal numbers whose mean is not 0."""
        return torch.randn(shape, **self._kind) * spread + mean

    def integers(self, size: int, n: int) -> Tensor:
        """Return (n,) int64 numbers in 0..size - 1."""
        return torch.randint(size, (n,), **self._kind)

    def words(self, size: int, n: int) -> Tensor:
        """Return (n,) int64 ids in 0..size - 1; as in a text, id r has a share ~ 1 / (r + 1)."""
        u = torch.rand(n, **self._kind)
        return ((size + 1) ** u).long().clamp(1, size) - 1

    def order(self, n: int) -> list[int]:
        """Return a permutation of 0..n - 1."""
        return torch.randperm(n, **self._kind).tolist()
