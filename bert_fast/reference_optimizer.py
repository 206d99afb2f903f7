"""AdamW and LAMB over lists of tensors in eager PyTorch: the truth the tests compare with.

Each computes in promote_types(dtype, float32), so float64 stays float64. The arguments are those of
`bert_fast.ops.optimizer`. What is in a list belongs to one parameter each; group g has the next
sizes[g] parameters.

    m <- beta1 m + (1 - beta1) g
    v <- beta2 v + (1 - beta2) g^2
    AdamW: w <- w - lr wd w - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
    LAMB:  u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + wd w
           w <- w - lr ||w|| / ||u|| u

Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019; You et al., Large Batch
Optimization for Deep Learning: Training BERT in 76 minutes, 2020.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def grad_norm(grads: list[Tensor], grad_scale: Tensor | None) -> Tensor:
    """Return the norm () fp32 of all gradients together, of what they are without their scale."""
    squares = sum(float(g.double().square().sum()) for g in grads)
    scale = 1.0 if grad_scale is None else float(grad_scale)
    return torch.tensor(squares**0.5 / scale, dtype=torch.float32, device=grads[0].device)


def _factor(max_norm: float, norm: Tensor | None, grad_scale: Tensor | None) -> float:
    """Return what gradients are multiplied by: as torch.nn.utils.clip_grad_norm_, and unscaled."""
    factor = 1.0 if grad_scale is None else 1 / float(grad_scale)
    if norm is not None:
        clip = max_norm / (float(norm) + 1e-6)
        factor *= 1.0 if clip > 1 else clip
    return factor


def _each(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    masters: list[Tensor],
    sizes: list[int],
    lrs: list[float],
    weight_decays: list[float],
    lr_tensors: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    factor: float,
) -> Iterator[tuple[Tensor, Tensor | None, Tensor, Tensor, float, float]]:
    """Advance the moments; yield each (parameter, master, w, m / sqrt(v) corrected, lr, decay)."""
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    for i, group in enumerate(groups):
        m, v = exp_avgs[i], exp_avg_sqs[i]
        master = masters[i] if masters[i].numel() else None
        w = (params[i] if master is None else master).to(m.dtype)
        g = grads[i].to(m.dtype) * factor
        steps[i] += 1
        t = float(steps[i])
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g.square())
        direction = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)
        given = bool(lr_tensors) and lr_tensors[group].numel() > 0
        lr = float(lr_tensors[group]) if given else lrs[group]
        yield params[i], master, w, direction, lr, weight_decays[group]


def _write(param: Tensor, master: Tensor | None, w: Tensor) -> None:
    if master is not None:
        master.copy_(w)
    param.copy_(w)


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    masters: list[Tensor],
    sizes: list[int],
    lrs: list[float],
    weight_decays: list[float],
    lr_tensors: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    max_norm: float,
    norm: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One step of AdamW; with found_inf nothing is changed."""
    if found_inf is not None and float(found_inf):
        return
    lists = params, grads, exp_avgs, exp_avg_sqs, steps, masters
    groups = sizes, lrs, weight_decays, lr_tensors
    factor = _factor(max_norm, norm, grad_scale)
    for param, master, w, direction, lr, decay in _each(*lists, *groups, beta1, beta2, eps, factor):
        _write(param, master, w - lr * decay * w - lr * direction)


def lamb_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    masters: list[Tensor],
    sizes: list[int],
    lrs: list[float],
    weight_decays: list[float],
    lr_tensors: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    max_norm: float,
    norm: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    always_adapt: bool,
) -> None:
    """One step of LAMB; a parameter without weight decay is adapted if always_adapt only."""
    if found_inf is not None and float(found_inf):
        return
    lists = params, grads, exp_avgs, exp_avg_sqs, steps, masters
    groups = sizes, lrs, weight_decays, lr_tensors
    factor = _factor(max_norm, norm, grad_scale)
    for param, master, w, direction, lr, decay in _each(*lists, *groups, beta1, beta2, eps, factor):
        u = direction + decay * w
        norm_w, norm_u = float(w.double().norm()), float(u.double().norm())
        adapted = (always_adapt or decay != 0) and norm_w > 0 and norm_u > 0
        _write(param, master, w - lr * (norm_w / norm_u if adapted else 1.0) * u)
