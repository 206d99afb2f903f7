"""AdamW and LAMB over lists of tensors in eager PyTorch: the truth the tests compare with.

Each computes in promote_types(dtype, float32), so float64 stays float64.

    m <- beta1 m + (1 - beta1) g
    v <- beta2 v + (1 - beta2) g^2
    AdamW: w <- w - lr wd w - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
    LAMB:  u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + wd w
           w <- w - lr ||w|| / ||u|| u

Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019; You et al., Large Batch
Optimization for Deep Learning: Training BERT in 76 minutes, 2020.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """The arguments of an optimizer's step. Lists have a tensor a parameter.

    Attributes:
        params: floating, what is updated.
        grads: floating, of the same shapes; only read.
        exp_avgs: m, fp32 (fp64 with an fp64 parameter), laid as the parameter.
        exp_avg_sqs: v, the same.
        steps: () fp32, counted here.
        masters: fp32 laid as the parameter, or a tensor without elements: none. With one, it is
            what is updated, and the parameter becomes its rounded copy.
        sizes: group g has the next sizes[g] parameters.
        lrs: a number a group.
        weight_decays: the same.
        lr_tensors: () fp32 a group, on the device; without elements: lrs has it. Or none at all.
        beta1: of m.
        beta2: of v.
        eps: of the denominator.
        max_norm: gradients are scaled down to it if `norm` is larger.
        norm: () fp32 or None.
        grad_scale: () fp32 or None: gradients are this many times too large.
        found_inf: () fp32 or None: if not 0, nothing is changed.
        always_adapt: LAMB's: whether parameters without weight decay are adapted too.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    masters: list[Tensor]
    sizes: list[int]
    lrs: list[float]
    weight_decays: list[float]
    lr_tensors: list[Tensor]
    beta1: float
    beta2: float
    eps: float
    max_norm: float
    norm: Tensor | None
    grad_scale: Tensor | None
    found_inf: Tensor | None
    always_adapt: bool = False

    def rate(self, group: int) -> float | Tensor:
        """Return the learning rate of a group."""
        given = bool(self.lr_tensors) and self.lr_tensors[group].numel() > 0
        return self.lr_tensors[group] if given else self.lrs[group]


def grad_norm(grads: list[Tensor], grad_scale: Tensor | None) -> Tensor:
    """Return the norm () fp32 of all gradients together, of what they are without their scale."""
    squares = sum(float(g.double().square().sum()) for g in grads)
    scale = 1.0 if grad_scale is None else float(grad_scale)
    return torch.tensor(squares**0.5 / scale, dtype=torch.float32, device=grads[0].device)


def _factor(step: Step) -> float:
    """Return what gradients are multiplied by: as torch.nn.utils.clip_grad_norm_, and unscaled."""
    factor = 1.0 if step.grad_scale is None else 1 / float(step.grad_scale)
    if step.norm is not None:
        clip = step.max_norm / (float(step.norm) + 1e-6)
        factor *= 1.0 if clip > 1 else clip
    return factor


def _each(step: Step) -> Iterator[tuple[int, Tensor, Tensor, float, float]]:
    """Advance the moments; yield each (number, w, m / sqrt(v) corrected, lr, decay)."""
    factor = _factor(step)
    groups = [g for g, size in enumerate(step.sizes) for _ in range(size)]
    for i, group in enumerate(groups):
        m, v, master = step.exp_avgs[i], step.exp_avg_sqs[i], step.masters[i]
        w = (master if master.numel() else step.params[i]).to(m.dtype)
        g = step.grads[i].to(m.dtype) * factor
        step.steps[i] += 1
        t = float(step.steps[i])
        m.copy_(step.beta1 * m + (1 - step.beta1) * g)
        v.copy_(step.beta2 * v + (1 - step.beta2) * g.square())
        corrected = m / (1 - step.beta1**t), v / (1 - step.beta2**t)
        direction = corrected[0] / (corrected[1].sqrt() + step.eps)
        yield i, w, direction, float(step.rate(group)), step.weight_decays[group]


def _write(step: Step, i: int, w: Tensor) -> None:
    if step.masters[i].numel():
        step.masters[i].copy_(w)
    step.params[i].copy_(w)


def _is_skipped(step: Step) -> bool:
    return step.found_inf is not None and bool(step.found_inf)


def adamw_(*args) -> None:
    """One step of AdamW, of a `Step`'s arguments."""
    step = Step(*args)
    if _is_skipped(step):
        return
    for i, w, direction, lr, decay in _each(step):
        _write(step, i, w - lr * decay * w - lr * direction)


def lamb_(*args) -> None:
    """One step of LAMB, of a `Step`'s arguments."""
    step = Step(*args)
    if _is_skipped(step):
        return
    for i, w, direction, lr, decay in _each(step):
        u = direction + decay * w
        norm_w, norm_u = float(w.double().norm()), float(u.double().norm())
        adapted = (step.always_adapt or decay != 0) and norm_w > 0 and norm_u > 0
        _write(step, i, w - lr * (norm_w / norm_u if adapted else 1.0) * u)
