"""AdamW and LAMB over all parameters, and the norm of all gradients.

csrc does it in a few passes over memory, on the CPU and on a GPU; where it is not built, PyTorch's
fused and foreach operators do, in more of them. Nothing here waits for a GPU. The arguments are
those of `reference_optimizer.Step`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bert_fast.ops import checks, registry
from bert_fast.reference_optimizer import Step

_LISTS = (
    "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] steps, Tensor(e!)[] masters, int[] sizes, float[] lrs, float[] weight_decays,"
    " Tensor[] lr_tensors, float beta1, float beta2, float eps, float max_norm, Tensor? norm,"
    " Tensor? grad_scale, Tensor? found_inf"
)


# --- by PyTorch's operators ----------------------------------------------------------------------


def _grad_norm(grads: list[Tensor], grad_scale: Tensor | None) -> Tensor:
    norms = torch._foreach_norm(grads, 2, dtype=_accumulate(grads))
    norm = torch.linalg.vector_norm(torch.stack(norms).double()).float()
    return norm if grad_scale is None else norm / grad_scale


def _accumulate(grads: list[Tensor]) -> torch.dtype | None:
    """Return the dtype of the norms: fp32 of 16 bits, else their own."""
    narrow = any(g.dtype.itemsize < 4 for g in grads)
    return torch.float32 if narrow else None


def _check(op: str, step: Step) -> None:
    check = checks.Checks(op)
    count, groups = len(step.params), len(step.sizes)
    for name in ("grads", "exp_avgs", "exp_avg_sqs", "steps", "masters"):
        if (got := len(getattr(step, name))) != count:
            check.note(f"{name}: want {count} of them, got {got}")
    for name in ("lrs", "weight_decays", "lr_tensors"):
        got = len(getattr(step, name))
        if got != groups and not (name == "lr_tensors" and not got):
            check.note(f"{name}: want {groups} of them, got {got}")
    if sum(step.sizes) != count or min(step.sizes, default=0) < 0:
        check.note(f"sizes: want the sum {count}, got {step.sizes}")
    check.done()
    for i, p in enumerate(step.params):
        check.floating(**{f"params[{i}]": p, f"grads[{i}]": step.grads[i]})
        if step.grads[i].shape != p.shape:
            check.note(f"grads[{i}]: want {[*p.shape]}, got {[*step.grads[i].shape]}")
        check.dtype(f"steps[{i}]", step.steps[i], torch.float32)
        for name in ("exp_avgs", "exp_avg_sqs", "masters"):
            state = getattr(step, name)[i]
            if name == "masters" and not state.numel():
                continue
            check.dtype(f"{name}[{i}]", state, torch.promote_types(p.dtype, torch.float32))
            if state.shape != p.shape:
                check.note(f"{name}[{i}]: want {[*p.shape]}, got {[*state.shape]}")
    check.done()


class _Group(NamedTuple):
    """What a step updates of a group: masters, parameters, or wide copies of 16-bit parameters."""

    params: list[Tensor]
    working: list[Tensor]
    grads: list[Tensor]  # clipped and without their scale, laid as `working` and in its dtypes
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    rate: float | Tensor
    weight_decay: float

    def copy_back(self) -> None:
        """Bring into the parameters what was computed elsewhere."""
        pairs = [(p, w) for p, w in zip(self.params, self.working, strict=True) if p is not w]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [w for _, w in pairs])


def _groups(step: Step) -> Iterator[_Group]:
    end = 0
    for group, size in enumerate(step.sizes):
        at = slice(end, end := end + size)
        if not size:
            continue
        m, v, params = step.exp_avgs[at], step.exp_avg_sqs[at], step.params[at]
        wanted = [t if t.numel() else p for p, t in zip(params, step.masters[at], strict=True)]
        working = [w.to(like.dtype) for w, like in zip(wanted, m, strict=True)]
        grads = _scaled(step, step.grads[at], working)
        rate, decay = step.rate(group), step.weight_decays[group]
        yield _Group(params, working, grads, m, v, step.steps[at], rate, decay)


def _scaled(step: Step, grads: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """Return the gradients clipped and without their scale.

    torch._fused_adamw_ takes element i in memory of each for the same.
    """
    grads = [
        g.to(w.dtype) if g.stride() == w.stride() else torch.empty_like(w).copy_(g)
        for g, w in zip(grads, like, strict=True)
    ]
    factor = None if step.grad_scale is None else 1 / step.grad_scale.double()
    if step.norm is not None:
        clip = (step.max_norm / (step.norm.double() + 1e-6)).clamp(max=1.0)
        factor = clip if factor is None else clip * factor
    if factor is None:
        return grads
    return [g * factor.to(g.dtype) for g in grads]


def _adamw(*args) -> None:
    step = Step(*args)
    _check("adamw_", step)
    skip = None if step.found_inf is None else (step.found_inf != 0).float()
    for group in _groups(step):
        torch._foreach_add_(group.steps, 1 if skip is None else 1 - skip)
        for dtype in {w.dtype for w in group.working}:
            mine = [i for i, w in enumerate(group.working) if w.dtype == dtype]
            lists = group.working, group.grads, group.exp_avgs, group.exp_avg_sqs, [], group.steps
            torch._fused_adamw_(
                *([tensors[i] for i in mine] if tensors else [] for tensors in lists),
                lr=group.rate,
                beta1=step.beta1,
                beta2=step.beta2,
                weight_decay=group.weight_decay,
                eps=step.eps,
                amsgrad=False,
                maximize=False,
                found_inf=skip,
            )
        group.copy_back()


def _lamb(*args) -> None:
    step = Step(*args)
    _check("lamb_", step)
    beta1, beta2 = step.beta1, step.beta2
    for group in _groups(step):
        w, g, m, v = group.working, group.grads, group.exp_avgs, group.exp_avg_sqs
        written = [*w, *m, *v, *group.steps]
        before = None if step.found_inf is None else [t.clone() for t in written]
        torch._foreach_add_(group.steps, 1)
        torch._foreach_lerp_(m, g, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, 1 - beta2)
        t = torch.stack([s.double().reshape(()) for s in group.steps])
        roots, corrections = (1 / (1 - beta2**t).sqrt()), 1 / (1 - beta1**t)
        denominators = torch._foreach_sqrt(v)
        u = []
        for i, denominator in enumerate(denominators):
            denominator.mul_(roots[i].to(denominator.dtype)).add_(step.eps)
            u.append((m[i] / denominator).mul_(corrections[i].to(denominator.dtype)))
        if group.weight_decay:
            torch._foreach_add_(u, w, alpha=group.weight_decay)
        if group.weight_decay or step.always_adapt:
            for i, update in enumerate(u):
                norm_w, norm_u = (torch.linalg.vector_norm(x) for x in (w[i], update))
                ratio = torch.where((norm_w > 0) & (norm_u > 0), norm_w / norm_u, 1.0)
                update.mul_(ratio)
        torch._foreach_mul_(u, group.rate)
        torch._foreach_sub_(w, u)
        if before is not None:
            for t, old in zip(written, before, strict=True):
                t.copy_(torch.where(step.found_inf != 0, old, t))
        group.copy_back()


# --- the ops -------------------------------------------------------------------------------------


def _fake_norm(grads: list[Tensor], grad_scale: Tensor | None) -> Tensor:
    return grads[0].new_empty((), dtype=torch.float32)


grad_norm = registry.register(
    "grad_norm(Tensor[] grads, Tensor? grad_scale) -> Tensor",
    reference=_grad_norm,
    fake=_fake_norm,
    cpu=_grad_norm,
    cuda=_grad_norm,
    by="pytorch",
)
adamw_ = registry.register(
    f"adamw_({_LISTS}) -> ()",
    reference=_adamw,
    fake=lambda *args: None,
    cpu=_adamw,
    cuda=_adamw,
    by="pytorch",
)
lamb_ = registry.register(
    f"lamb_({_LISTS}, bool always_adapt) -> ()",
    reference=_lamb,
    fake=lambda *args: None,
    cpu=_lamb,
    cuda=_lamb,
    by="pytorch",
)
