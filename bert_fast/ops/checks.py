"""What is wrong with the arguments of a call: all of it, before anything is allocated."""

import torch
from torch import Tensor

from bert_fast.config import DTYPES


class Checks:
    """What is wrong with a call, all of it in one error.

    The error is of the kind of the first problem found; `done` raises it.
    """

    def __init__(self, op: str = ""):
        self.op = op
        self.problems: list[tuple[type[Exception], str]] = []

    def note(self, problem: str, error: type[Exception] = ValueError) -> None:
        """Add a problem: "name: want ..., got ..."."""
        self.problems.append((error, problem))

    def done(self) -> None:
        """Raise ValueError, TypeError or NotImplementedError if there was a problem."""
        if self.problems:
            text = "; ".join(text for _, text in self.problems)
            raise self.problems[0][0](f"{self.op}: {text}" if self.op else text)

    def floating(self, **tensors: Tensor | None) -> None:
        """Every tensor is of a floating dtype the ops take."""
        for name, t in tensors.items():
            if t is not None and t.dtype not in DTYPES:
                self.note(f"{name}: want fp32, fp16, bf16 or fp64, got {t.dtype}", TypeError)

    def dtype(self, name: str, t: Tensor | None, *want: torch.dtype) -> None:
        """The tensor is of one of these dtypes."""
        if t is not None and t.dtype not in want:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in want)
            self.note(f"{name}: want {wanted}, got {t.dtype}", TypeError)

    def same(self, what: str, **tensors: Tensor | None) -> None:
        """The tensors agree in `what`: "dtype" or "device"."""
        first = None
        for t in tensors.values():  # plain loops: a forward makes some hundred of these checks
            value = None if t is None else getattr(t, what)
            if first is None:
                first = value
            elif value is not None and value != first:
                break
        else:
            return
        got = ", ".join(f"{n} {getattr(t, what)}" for n, t in tensors.items() if t is not None)
        error = TypeError if what == "dtype" else ValueError
        self.note(f"want one {what} for all, got {got}", error)

    def shape(
        self, name: str, t: Tensor | None, want: tuple[int | None, ...], letters: str
    ) -> None:
        """The tensor has the shape `want`, where None stands for any size."""
        if t is None:
            return
        shape = t.shape
        if len(shape) == len(want):
            for w, s in zip(want, shape, strict=True):
                if w is not None and w != s:
                    break
            else:
                return
        wanted = "[" + ", ".join("*" if w is None else str(w) for w in want) + "]"
        self.note(f"{name}: want {letters} {wanted}, got {[*shape]}")

    def range(self, name: str, ids: Tensor, size: int, ignore: int | None = None) -> None:
        """0 <= ids < size, or equal to `ignore`; looks at CPU tensors only.

        On another device the look would wait for it; there, kernels must not trust ids.
        """
        if ids.device.type != "cpu" or torch.compiler.is_compiling() or not ids.numel():
            return
        low, high = (int(v) for v in ids.aminmax())
        if 0 <= low and high < size:
            return
        bad = (ids < 0) | (ids >= size)
        if ignore is not None:
            bad &= ids != ignore
        if bad.any():
            at = int(bad.flatten().nonzero()[0])
            or_ignored = "" if ignore is None else f" or {ignore}"
            got = f"{int(ids.flatten()[at])} at {at}"
            self.note(f"{name}: want 0 to {size - 1}{or_ignored}, got {got}")

    def dropout(self, p: float, seed: Tensor | None, device: torch.device) -> None:
        """Probability p is one, and there is a seed (1,) int64 on the device if p > 0."""
        if not 0 <= p <= 1:
            self.note(f"p: want 0 to 1, got {p}")
        if p <= 0:
            return
        if seed is None or seed.shape != (1,) or seed.dtype != torch.int64:
            got = "None" if seed is None else f"{[*seed.shape]} {seed.dtype}"
            self.note(f"seed: want [1] torch.int64 with p > 0, got {got}")
        elif seed.device != device:
            self.note(f"seed: want it on {device}, got {seed.device}")


def size(t: Tensor, dim: int) -> int | None:
    """Return t.shape[dim]; None where there is no such dimension."""
    return t.shape[dim] if t.ndim > dim else None
