"""Calls of adamw_ and lamb_, and the rule by which they agree with reference_optimizer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bert_fast import reference_optimizer

OPS = "adamw_", "lamb_"
BETAS = 0.9, 0.999
NONE = torch.empty(0)


@dataclass(frozen=True)
class Call:
    """The arguments of one step.

    Attributes:
        lists: params, grads, exp_avgs, exp_avg_sqs, steps, masters.
        groups: sizes, lrs, weight_decays, lr_tensors.
        scalars: norm, grad_scale, found_inf.
        max_norm: to which gradients are clipped where there is a norm.
        always_adapt: LAMB's.
    """

    lists: tuple[list[Tensor], ...]
    groups: tuple[list, ...]
    scalars: tuple[Tensor | None, ...] = (None, None, None)
    max_norm: float = 1.0
    always_adapt: bool = False
    eps: float = 1e-6

    def args(self, op: str) -> tuple[Any, ...]:
        last = (self.always_adapt,) if op == "lamb_" else ()
        return *self.lists, *self.groups, *BETAS, self.eps, self.max_norm, *self.scalars, *last

    def map(self, function: Callable[[Tensor], Tensor]) -> "Call":
        """The call with every tensor replaced."""
        groups = *self.groups[:3], [function(t) for t in self.groups[3]]
        scalars = tuple(None if t is None else function(t) for t in self.scalars)
        lists = tuple([function(t) for t in tensors] for tensors in self.lists)
        return replace(self, lists=lists, groups=groups, scalars=scalars)

    def clone(self) -> "Call":
        return self.map(torch.clone)

    def to(self, device: str) -> "Call":
        return self.map(lambda t: t.clone().to(device))

    def truth(self, op: str) -> "Call":
        """The call in float64, made by the reference; steps and scalars stay what they are."""
        wide = self.clone()
        for tensors in (*wide.lists[:4], wide.lists[5]):
            tensors[:] = [t.double() for t in tensors]
        getattr(reference_optimizer, op)(*wide.args(op))
        return wide


@dataclass(frozen=True)
class Shape:
    """What a parameter of a case is like."""

    numel: int
    dtype: torch.dtype = torch.float32
    grad: torch.dtype | None = None
    master: bool = False
    group: int = 0
    zero: bool = False  # the parameter


@dataclass(frozen=True)
class Case:
    """How a call is drawn; see `Call` and bert_fast/reference_optimizer.py."""

    shapes: Sequence[Shape]
    clip: bool = False
    limit: float = 0.5  # of the norm
    scale: float | None = None
    found_inf: float | None = None
    lr_tensor: bool = False
    always_adapt: bool = False
    lrs: tuple[float, ...] = (1e-2, 3e-2)
    weight_decays: tuple[float, ...] = (0.05, 0.0)
    options: dict[str, Any] = field(default_factory=dict)

    def draw(self, place: Callable[[Tensor], Tensor] = torch.clone) -> Call:
        """Return a call; `place` says where tensors lie in memory."""
        shapes = sorted(self.shapes, key=lambda shape: shape.group)
        lists: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
        scale = self.scale or 1.0
        for i, shape in enumerate(shapes):
            n = shape.numel
            wide = torch.float64 if shape.dtype == torch.float64 else torch.float32
            w = torch.zeros(n, dtype=wide) if shape.zero else torch.randn(n, dtype=wide) + 0.25
            grad = (torch.randn(n) * 0.1 + 0.05) * scale
            made = (
                w.to(shape.dtype),
                grad.to(shape.grad or shape.dtype),
                torch.randn(n, dtype=wide) * 0.1,
                torch.rand(n, dtype=wide) * 0.1 + 0.001,
                torch.tensor(float(i % 5)),
                w if shape.master else torch.empty(0, dtype=wide),
            )
            for tensors, t in zip(lists, made, strict=True):
                tensors.append(place(t) if t.ndim and t.numel() else t)
        sizes = [sum(s.group == g for s in shapes) for g in range(len(self.lrs))]
        lr_tensors = [torch.tensor(lr) for lr in self.lrs] if self.lr_tensor else []
        lrs = [0.0 if self.lr_tensor else lr for lr in self.lrs]
        grads = torch.cat([g.double() for g in lists[1]])
        given = (
            (grads.norm() / scale).float() if self.clip else None,
            None if self.scale is None else torch.tensor(self.scale),
            None if self.found_inf is None else torch.tensor(self.found_inf),
        )
        groups = sizes, lrs, [*self.weight_decays], lr_tensors
        norm = self.limit * float(given[0]) if self.clip else 1.0
        return Call(lists, groups, given, norm, self.always_adapt, **self.options)


BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64
MIXED = (
    Shape(0),
    Shape(1, group=1),
    Shape(3, BF16, master=True),
    Shape(130),
    Shape(16384, BF16, master=True, group=1),
    Shape(16385),
    Shape(40001, FP16, master=True),
    Shape(37, BF16, grad=torch.float32),
    Shape(64, torch.float32, grad=BF16, group=1),
    Shape(9, FP16),
    Shape(0, BF16),
)
CASES = {
    "plain": Case([Shape(5), Shape(4100), Shape(7, group=1)]),
    "mixed": Case(MIXED),
    "clipped": Case(MIXED, clip=True),
    "within the limit": Case(MIXED, clip=True, limit=3.0),
    "scaled": Case(MIXED, clip=True, scale=1024.0),
    "unscaled": Case([Shape(77), Shape(5, group=1)], scale=8.0),
    "finite": Case(MIXED[:5], found_inf=0.0),
    "lr on the device": Case(MIXED, lr_tensor=True),
    "zeros": Case([Shape(50, zero=True), Shape(50, zero=True, group=1), Shape(9)]),
    "adapts all": Case(MIXED, always_adapt=True, clip=True),
}


def assert_agrees(got: Call, truth: Call, before: Call) -> None:
    """Within fp32's 1e-5 of the largest, and where 16 bits are stored within half an ulp more."""
    names = "params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "masters"
    for name, tensors, exact, old in zip(names, got.lists, truth.lists, before.lists, strict=True):
        for i, (t, e, o) in enumerate(zip(tensors, exact, old, strict=True)):
            assert t.dtype == o.dtype and t.shape == e.shape
            if name in ("grads", "steps"):
                assert torch.equal(t.cpu().double(), e.double()), f"{name}[{i}]"
            elif t.numel():
                e = e.double()
                eps = 1e-5 if t.dtype.itemsize == 4 else 1e-12 if t.dtype == FP64 else 0
                error = (t.cpu().double() - e).abs()
                if not eps:  # rounded once, from what fp32 has
                    eps, half_ulp = 1e-5, e.abs() * torch.finfo(t.dtype).eps / 2
                    error -= half_ulp
                limit = eps * e.abs().max().clamp(min=1e-3)
                assert error.max() <= limit, f"{name}[{i}]: {error.max():.1e} > {limit:.1e}"


def assert_same_bits(got: Call, expected: Call) -> None:
    for tensors, others in zip(got.lists, expected.lists, strict=True):
        for t, other in zip(tensors, others, strict=True):
            assert torch.equal(t.cpu().nan_to_num(7.5), other.cpu().nan_to_num(7.5))
