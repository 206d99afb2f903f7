"""AdamW and LAMB: all parameters in a few launches, clipping and 16-bit weights in the same pass.

They take the place of torch.optim.AdamW and of clip_grad_norm_ before it. Parameters in 16 bits
have an fp32 master each, which is what is updated; the moments are fp32. Nothing waits for a GPU:
the norm, the factor of clipping, the step count and GradScaler's tensors stay there, so that a step
can be captured in a CUDA graph, with a learning rate that is a tensor on the device.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bert_fast.ops import optimizer as ops

_UNSUPPORTED = "amsgrad", "maximize"  # of torch.optim.AdamW


@functools.cache
def _nothing(device: torch.device) -> Tensor:
    """Return a tensor without elements: what the ops take for none."""
    return torch.empty(0, dtype=torch.float32, device=device)


@dataclass
class _Lists:
    """What one call of an op takes, in its order."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    masters: list[Tensor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    weight_decays: list[float] = field(default_factory=list)
    lr_tensors: list[Tensor] = field(default_factory=list)

    def args(self) -> Iterator[list]:
        return iter(vars(self).values())


def _check(lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr: want one number, got {[*lr.shape]}")
    if not isinstance(lr, Tensor) and not lr >= 0:
        raise ValueError(f"lr: want 0 or more, got {lr}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: want two numbers from 0 to below 1, got {betas}")
    if not eps >= 0:
        raise ValueError(f"eps: want 0 or more, got {eps}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay: want 0 or more, got {weight_decay}")


class _Optimizer(torch.optim.Optimizer):
    """What AdamW and LAMB share: state, groups, clipping, GradScaler.

    Attributes:
        max_grad_norm: the norm to which all gradients together are scaled down; None: they are not.
        master_weights: whether 16-bit parameters have an fp32 master.
        skip_nonfinite: whether a step whose norm is not finite changes nothing; otherwise it is
            made as torch.optim makes it, and leaves NaN.
        grad_norm: () fp32, the norm of all gradients at the last step, before clipping; None
            before it and where neither of the above asks for it.
    """

    _step_supports_amp_scaling = True  # GradScaler leaves grad_scale and found_inf to us
    grad_norm: Tensor | None = None

    def __init__(
        self,
        params: Iterable,
        defaults: dict[str, Any],
        max_grad_norm: float | None,
        master_weights: bool | None,
        skip_nonfinite: bool,
    ):
        _check(**defaults)
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: want more than 0 or None, got {max_grad_norm}")
        self.max_grad_norm = max_grad_norm
        self.master_weights = master_weights is not False
        self.skip_nonfinite = skip_nonfinite
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        own = "max_grad_norm", "master_weights", "skip_nonfinite"
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with hyperparameters of their own, as torch.optim.Optimizer does.

        Raises:
            ValueError: a hyperparameter out of its range.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check(**{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")})

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        """Return the parameter's state, made at its first step."""
        state = self.state[p]
        if "step" not in state:
            wide = torch.promote_types(p.dtype, torch.float32)
            like = {"dtype": wide, "memory_format": torch.preserve_format}
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, **like)
            state["exp_avg_sq"] = torch.zeros_like(p, **like)
        if "master" not in state and self.master_weights and p.dtype.itemsize == 2:
            state["master"] = p.detach().to(torch.float32)
        return state

    def _lists(self) -> dict[tuple, _Lists]:
        """Return the parameters with a gradient, by device, betas and eps."""
        found: dict[tuple, _Lists] = {}
        for group in self.param_groups:
            with_grad = [p for p in group["params"] if p.grad is not None]
            for device in dict.fromkeys(p.device for p in with_grad):
                key = device, *(float(beta) for beta in group["betas"]), group["eps"]
                lists = found.setdefault(key, _Lists())
                nothing = _nothing(device)
                before = len(lists.params)
                for p in with_grad:
                    if p.device == device:
                        state = self._state_of(p)
                        lists.params.append(p)
                        lists.grads.append(_dense(p.grad))
                        lists.exp_avgs.append(state["exp_avg"])
                        lists.exp_avg_sqs.append(state["exp_avg_sq"])
                        lists.steps.append(state["step"])
                        lists.masters.append(state.get("master", nothing))
                lr = group["lr"]
                on_device = isinstance(lr, Tensor) and lr.device == device and device.type != "cpu"
                lists.sizes.append(len(lists.params) - before)
                lists.lrs.append(0.0 if on_device else float(lr))
                lists.lr_tensors.append(lr.detach().float() if on_device else nothing)
                lists.weight_decays.append(float(group["weight_decay"]))
        return found

    def _norms(
        self, lists: Iterable[_Lists], grad_scale: Tensor | None
    ) -> dict[torch.device, Tensor]:
        """Return the norm of all gradients, on each device that has some."""
        grads: dict[torch.device, list[Tensor]] = {}
        for one in lists:
            grads.setdefault(one.params[0].device, []).extend(one.grads)
        norms = {d: ops.grad_norm(g, _on(grad_scale, d)) for d, g in grads.items()}
        if len(norms) < 2:
            return norms
        return {d: torch.stack([n.to(d) for n in norms.values()]).norm() for d in norms}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: computes the loss again, gradients included, and returns it.

        Returns:
            What the closure returns; None without one.

        Raises:
            NotImplementedError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        lists = self._lists()
        norms: dict[torch.device, Tensor] = {}
        if lists and (self.max_grad_norm is not None or self.skip_nonfinite):
            norms = self._norms(lists.values(), grad_scale)
            self.grad_norm = next(iter(norms.values()))
        for (device, beta1, beta2, eps), one in lists.items():
            skip = _on(found_inf, device)
            if self.skip_nonfinite:
                bad = (~norms[device].isfinite()).float()
                skip = bad if skip is None else torch.maximum(skip.reshape(()), bad)
            clip, norm = 0.0, None
            if self.max_grad_norm is not None:
                clip, norm = float(self.max_grad_norm), norms[device]
            scale = _on(grad_scale, device)
            self._run(*one.args(), beta1, beta2, eps, clip, norm, scale, skip)
            torch.autograd.graph.increment_version(one.params)
        return loss

    def _run(self, *args: Any) -> None:
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, here or of torch.optim.AdamW.

        Moments and masters stay in fp32 whatever the parameters' dtype.

        Raises:
            ValueError: groups that do not fit, or that ask for amsgrad or maximize.
        """
        for group in state_dict["param_groups"]:
            asked = [name for name in _UNSUPPORTED if group.get(name)]
            if asked:
                raise ValueError(f"load_state_dict: want {asked[0]} False, got True")
        given = []  # behind what other hooks make of it
        hook = self.register_load_state_dict_pre_hook(lambda _, loaded: given.append(loaded))
        try:
            super().load_state_dict(state_dict)  # in the parameters' dtypes
        finally:
            hook.remove()
        saved = itertools.chain.from_iterable(g["params"] for g in given[0]["param_groups"])
        params = itertools.chain.from_iterable(g["params"] for g in self.param_groups)
        for name, p in zip(saved, params, strict=True):
            if name in given[0]["state"]:
                self.state[p].update(_restored(given[0]["state"][name], p))


def _dense(grad: Tensor) -> Tensor:
    if grad.layout != torch.strided:
        raise NotImplementedError(f"gradient: want a dense tensor, got {grad.layout}")
    return grad


def _on(scalar: Tensor | None, device: torch.device) -> Tensor | None:
    """Return GradScaler's tensor as the ops take it."""
    if scalar is None:
        return None
    return scalar.to(device=device, dtype=torch.float32, non_blocking=True)


def _restored(saved: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
    """Return a copy of a parameter's saved state, on its device, in the dtypes it has here."""
    wide = torch.promote_types(p.dtype, torch.float32)
    found = {}
    for name in ("exp_avg", "exp_avg_sq", "master"):
        if name in saved:
            laid = torch.empty_like(p, dtype=wide, memory_format=torch.preserve_format)
            found[name] = laid.copy_(saved[name])
    if "step" in saved:
        found["step"] = torch.tensor(float(saved["step"]), dtype=torch.float32, device=p.device)
    return found


class AdamW(_Optimizer):
    """Adam with decoupled weight decay, as torch.optim.AdamW.

    Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019.

    Args:
        params: parameters, or groups of them as dicts with hyperparameters of their own.
        lr: learning rate; a tensor on the parameters' device is read there at each step.
        betas: decay of the mean of gradients and of their squares.
        eps: added to the root of the latter.
        weight_decay: times lr, what parameters lose at a step; see `decay_groups`.
        max_grad_norm: as torch.nn.utils.clip_grad_norm_ over all groups; None: no clipping.
            Gradients themselves are not changed.
        master_weights: whether 16-bit parameters have an fp32 master; None: they have. It is made
            at the first step: load weights before.
        skip_nonfinite: change nothing at a step whose gradients' norm is not finite.

    Raises:
        ValueError: a hyperparameter out of its range.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_grad_norm: float | None = None,
        master_weights: bool | None = None,
        skip_nonfinite: bool = False,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, max_grad_norm, master_weights, skip_nonfinite)

    def _run(self, *args: Any) -> None:
        ops.adamw_(*args)


class LAMB(_Optimizer):
    """Adam whose step of each parameter is as long as the parameter times lr, for large batches.

    You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, 2020; with
    the gradients' norm clipped and bias correction.

    Args:
        params: parameters, or groups of them as dicts with hyperparameters of their own.
        lr: learning rate; a tensor on the parameters' device is read there at each step.
        betas: decay of the mean of gradients and of their squares.
        eps: added to the root of the latter.
        weight_decay: added to the step before it is scaled; see `decay_groups`.
        max_grad_norm: as torch.nn.utils.clip_grad_norm_ over all groups; None: no clipping.
        always_adapt: scale the steps of parameters without weight decay too.
        master_weights: whether 16-bit parameters have an fp32 master; None: they have. It is made
            at the first step: load weights before.
        skip_nonfinite: change nothing at a step whose gradients' norm is not finite.

    Raises:
        ValueError: a hyperparameter out of its range.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        max_grad_norm: float | None = 1.0,
        always_adapt: bool = False,
        master_weights: bool | None = None,
        skip_nonfinite: bool = False,
    ):
        self.always_adapt = always_adapt
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, max_grad_norm, master_weights, skip_nonfinite)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"always_adapt": self.always_adapt}

    def _run(self, *args: Any) -> None:
        ops.lamb_(*args, self.always_adapt)


def decay_groups(module: nn.Module, weight_decay: float = 1e-2) -> list[dict[str, Any]]:
    """Return a module's parameters in two groups: matrices with weight decay, the rest without.

    The rest are biases and LayerNorm's weights, as in BERT's own training. A parameter that does
    not require a gradient is in neither.

    Args:
        module: whose parameters; tied ones count once.
        weight_decay: of the first group.
    """
    params = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
