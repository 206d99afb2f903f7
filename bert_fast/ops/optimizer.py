"""AdamW and LAMB over all parameters, and the norm of all gradients.

csrc does it in a few passes over memory, on the CPU and on a GPU; where it is not built, PyTorch's
fused and foreach operators do, in more of them. Nothing here waits for a GPU.

Each list has a tensor a parameter, and group g has the next sizes[g] of them:

    params       floating, what is updated
    grads        floating, of the same shapes; only read
    exp_avgs, exp_avg_sqs  fp32 (fp64 with an fp64 parameter), laid as the parameter
    steps        () fp32, counted here
    masters      fp32 laid as the parameter, or a tensor without elements: none. With one, it is
                 what is updated, and the parameter becomes its rounded copy
    lrs, weight_decays  a number a group
    lr_tensors   () fp32 a group, on the device; without elements: lrs has it. Or no tensor at all
    norm         () fp32 or None: gradients are scaled down to max_norm if this is larger
    grad_scale   () fp32 or None: gradients are this many times too large
    found_inf    () fp32 or None: if not 0, nothing is changed
"""

import torch
from torch import Tensor

from bert_fast.ops import checks, registry

_LISTS = (
    "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] steps, Tensor(e!)[] masters, int[] sizes, float[] lrs, float[] weight_decays,"
    " Tensor[] lr_tensors, float beta1, float beta2, float eps, float max_norm, Tensor? norm,"
    " Tensor? grad_scale, Tensor? found_inf"
)
_NAMES = "grads", "exp_avgs", "exp_avg_sqs", "steps", "masters"


# --- by PyTorch's operators ----------------------------------------------------------------------


def _grad_norm(grads: list[Tensor], grad_scale: Tensor | None) -> Tensor:
    norms = torch._foreach_norm(grads, 2, dtype=_accumulate(grads))
    norm = torch.linalg.vector_norm(torch.stack(norms).double()).float()
    return norm if grad_scale is None else norm / grad_scale


def _accumulate(grads: list[Tensor]) -> torch.dtype | None:
    """Return the dtype of the norms: fp32 of 16 bits, else their own."""
    narrow = any(g.dtype.itemsize < 4 for g in grads)
    return torch.float32 if narrow else None


def _check(
    op: str,
    params: list[Tensor],
    lists: tuple[list[Tensor], ...],
    sizes: list[int],
    of_groups: dict[str, list],
) -> None:
    check = checks.Checks(op)
    for name, tensors in zip(_NAMES, lists, strict=True):
        if len(tensors) != len(params):
            check.note(f"{name}: want {len(params)} of them, got {len(tensors)}")
    for name, values in of_groups.items():
        if len(values) != len(sizes) and not (name == "lr_tensors" and not values):
            check.note(f"{name}: want {len(sizes)} of them, got {len(values)}")
    if sum(sizes) != len(params) or min(sizes, default=0) < 0:
        check.note(f"sizes: want the sum {len(params)}, got {sizes}")
    check.done()
    grads, exp_avgs, exp_avg_sqs, steps, masters = lists
    for i, p in enumerate(params):
        check.floating(**{f"params[{i}]": p, f"grads[{i}]": grads[i]})
        if grads[i].shape != p.shape:
            check.note(f"grads[{i}]: want {[*p.shape]}, got {[*grads[i].shape]}")
        check.dtype(f"steps[{i}]", steps[i], torch.float32)
        states = {"exp_avgs": exp_avgs[i], "exp_avg_sqs": exp_avg_sqs[i]}
        if masters[i].numel():
            states["masters"] = masters[i]
        for name, state in states.items():
            check.dtype(f"{name}[{i}]", state, torch.promote_types(p.dtype, torch.float32))
            if state.shape != p.shape:
                check.note(f"{name}[{i}]: want {[*p.shape]}, got {[*state.shape]}")
    check.done()


def _scaled(
    grads: list[Tensor],
    like: list[Tensor],
    max_norm: float,
    norm: Tensor | None,
    grad_scale: Tensor | None,
) -> list[Tensor]:
    """Return the gradients clipped and without their scale, laid as `like` and in its dtypes.

    torch._fused_adamw_ takes element i in memory of each for the same.
    """
    grads = [
        g.to(w.dtype) if g.stride() == w.stride() else torch.empty_like(w).copy_(g)
        for g, w in zip(grads, like, strict=True)
    ]
    factor = None if grad_scale is None else 1 / grad_scale.double()
    if norm is not None:
        clip = (max_norm / (norm.double() + 1e-6)).clamp(max=1.0)
        factor = clip if factor is None else clip * factor
    if factor is None:
        return grads
    return [g * factor.to(g.dtype) for g in grads]


def _working(params: list[Tensor], masters: list[Tensor], dtypes: list[Tensor]) -> list[Tensor]:
    """Return what is updated: masters, parameters, or wide copies of 16-bit parameters."""
    found = [m if m.numel() else p for p, m in zip(params, masters, strict=True)]
    return [w.to(like.dtype) for w, like in zip(found, dtypes, strict=True)]


def _copy_back(params: list[Tensor], working: list[Tensor]) -> None:
    pairs = [(p, w) for p, w in zip(params, working, strict=True) if p is not w]
    if pairs:
        torch._foreach_copy_([p for p, _ in pairs], [w for _, w in pairs])


def _slices(sizes: list[int]) -> list[slice]:
    ends = [sum(sizes[: g + 1]) for g in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _rate(lrs: list[float], lr_tensors: list[Tensor], group: int) -> float | Tensor:
    given = bool(lr_tensors) and lr_tensors[group].numel() > 0
    return lr_tensors[group] if given else lrs[group]


def _adamw(
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
    of_groups = {"lrs": lrs, "weight_decays": weight_decays, "lr_tensors": lr_tensors}
    _check("adamw_", params, (grads, exp_avgs, exp_avg_sqs, steps, masters), sizes, of_groups)
    skip = None if found_inf is None else (found_inf != 0).float()
    for group, at in enumerate(_slices(sizes)):
        if not params[at]:
            continue
        working = _working(params[at], masters[at], exp_avgs[at])
        scaled = _scaled(grads[at], working, max_norm, norm, grad_scale)
        torch._foreach_add_(steps[at], 1 if skip is None else 1 - skip)
        for dtype in {w.dtype for w in working}:
            mine = [i for i, w in enumerate(working) if w.dtype == dtype]
            lists = working, scaled, exp_avgs[at], exp_avg_sqs[at], [], steps[at]
            torch._fused_adamw_(
                *([tensors[i] for i in mine] if tensors else [] for tensors in lists),
                lr=_rate(lrs, lr_tensors, group),
                beta1=beta1,
                beta2=beta2,
                weight_decay=weight_decays[group],
                eps=eps,
                amsgrad=False,
                maximize=False,
                found_inf=skip,
            )
        _copy_back(params[at], working)


def _lamb(
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
    of_groups = {"lrs": lrs, "weight_decays": weight_decays, "lr_tensors": lr_tensors}
    _check("lamb_", params, (grads, exp_avgs, exp_avg_sqs, steps, masters), sizes, of_groups)
    for group, at in enumerate(_slices(sizes)):
        if not params[at]:
            continue
        decay, m, v = weight_decays[group], exp_avgs[at], exp_avg_sqs[at]
        w = _working(params[at], masters[at], m)
        g = _scaled(grads[at], w, max_norm, norm, grad_scale)
        written = [*w, *m, *v, *steps[at]]
        before = None if found_inf is None else [t.clone() for t in written]
        torch._foreach_add_(steps[at], 1)
        torch._foreach_lerp_(m, g, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, 1 - beta2)
        t = torch.stack([s.double().reshape(()) for s in steps[at]])
        roots, corrections = (1 / (1 - beta2**t).sqrt()), 1 / (1 - beta1**t)
        denominators = torch._foreach_sqrt(v)
        u = []
        for i, denominator in enumerate(denominators):
            denominator.mul_(roots[i].to(denominator.dtype)).add_(eps)
            u.append((m[i] / denominator).mul_(corrections[i].to(denominator.dtype)))
        if decay:
            torch._foreach_add_(u, w, alpha=decay)
        rate = _rate(lrs, lr_tensors, group)
        if decay or always_adapt:
            for i, update in enumerate(u):
                norm_w, norm_u = (torch.linalg.vector_norm(x) for x in (w[i], update))
                ratio = torch.where((norm_w > 0) & (norm_u > 0), norm_w / norm_u, 1.0)
                update.mul_(ratio)
        torch._foreach_mul_(u, rate)
        torch._foreach_sub_(w, u)
        if before is not None:
            for t, old in zip(written, before, strict=True):
                t.copy_(torch.where(found_inf != 0, old, t))
        _copy_back(params[at], w)


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
