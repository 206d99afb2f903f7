"""The rows for the steps of AdamW and LAMB and for the norm of gradients.

They work on the parameters of one layer of BERT: matrices with weight decay, biases and LayerNorm
without. On a CPU they are those of its attention alone, which take a third of the time to check.
In 16 bits a step updates masters in fp32 and rounds them into the parameters. Gradients are only
read; what a step changes are copies of the inputs.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from gate import Work
from op_inputs import Answers, Draw, Inputs, sizes
from op_peers import Peer
from op_rows import Row
from torch import Tensor

_RATE = 0.1  # so large that no rounding of 16 bits hides a wrong step
_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-6
_DECAYS = (0.1, 0.0)  # of matrices, of vectors
_STEPS = 1000  # done before

_SIZES = sizes(
    lambda model, whole: {"D": model.D, "F": model.F if whole else 0},
    True,
    False,
    small={"D": 64, "F": 256},
    odd={"D": 37, "F": 51},
)


def _shapes(D: int, F: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return the shapes of the matrices, and those of biases and of LayerNorm's parameters.

    F: 0 without the feed-forward part.
    """
    attention, feed_forward = [(3 * D, D), (D, D)], [(F, D), (D, F)] if F else []
    matrices = attention + feed_forward
    return matrices, [*((rows,) for rows, _ in matrices), *[(D,)] * len(matrices)]


def _count(D: int, F: int) -> int:
    return sum(prod(shape) for group in _shapes(D, F) for shape in group)


def _make(draw: Draw, D: int, F: int) -> dict[str, Any]:
    """Return all parameters in one piece, and so on: the parts are views."""
    n = _count(D, F)
    return {
        "param": draw.normal(n),
        "grad": draw.normal(n, mean=0.05, spread=0.1),
        "exp_avg": draw.normal(n, mean=0.02, spread=0.1),
        "exp_avg_sq": draw.normal(n).square() * 0.01 + 0.005,
        "shapes": _shapes(D, F),
    }


def _parts(whole: Tensor, v: Inputs) -> list[Tensor]:
    shapes = [shape for group in v["shapes"] for shape in group]
    parts = whole.split([prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class _State:
    """Copies of what a step changes, in one piece and in parts."""

    def __init__(self, v: Inputs):
        wide = torch.promote_types(v["param"].dtype, torch.float32)
        self.param = v["param"].clone()
        self.working = self.param if self.param.dtype == wide else self.param.to(wide)
        self.exp_avg, self.exp_avg_sq = (
            v[name].to(wide, copy=True) for name in ("exp_avg", "exp_avg_sq")
        )
        self.params, self.grads = _parts(self.param, v), _parts(v["grad"], v)
        self.workings = _parts(self.working, v)
        self.exp_avgs, self.exp_avg_sqs = _parts(self.exp_avg, v), _parts(self.exp_avg_sq, v)
        self.has_masters = self.working is not self.param

    def answers(self) -> Answers:
        return self.param, self.working, self.exp_avg, self.exp_avg_sq


_OUTPUTS = ("param", "master", "exp_avg", "exp_avg_sq")  # without a master: the parameter

# --- steps ---------------------------------------------------------------------------------------


def _save(ops: Any, v: Inputs, p: float, *last: bool) -> tuple[Answers, tuple[Any, ...]]:
    """Return what a step changes, and the op's arguments."""
    state, device = _State(v), v["param"].device
    steps = [torch.full((), float(_STEPS), device=device) for _ in state.params]
    none = state.working.new_empty(0)
    masters = state.workings if state.has_masters else [none] * len(steps)
    lists = state.params, state.grads, state.exp_avgs, state.exp_avg_sqs, steps, masters
    groups = [len(group) for group in v["shapes"]], [_RATE] * 2, [*_DECAYS], [none] * 2
    numbers = _BETA1, _BETA2, _EPS, 0.0, None, None, None
    return state.answers(), (*lists, *groups, *numbers, *last)


def _adamw_call(ops: Any, v: Inputs, p: float, saved: tuple[Answers, Any]) -> Answers:
    answers, args = saved
    ops.adamw_(*args)
    return answers


def _lamb_save(ops: Any, v: Inputs, p: float) -> tuple[Answers, tuple[Any, ...]]:
    return _save(ops, v, p, False)  # no adaption without weight decay


def _lamb_call(ops: Any, v: Inputs, p: float, saved: tuple[Answers, Any]) -> Answers:
    answers, args = saved
    ops.lamb_(*args)
    return answers


def _step_work(e: int, p: float, D: int, F: int) -> Work:
    """Read the gradient, write a 16-bit parameter; read and write w, m, v in fp32, and counters."""
    rounded = e if e < 4 else 0
    matrices, vectors = _shapes(D, F)
    counters = 8 * (len(matrices) + len(vectors))
    return Work(bytes=_count(D, F) * (e + rounded + 2 * 3 * 4) + counters)


class _AdamW:
    """torch.optim.AdamW with that state."""

    def __init__(self, v: Inputs, **how: bool):
        self._state = state = _State(v)
        self._grads = [torch.empty_like(w) for w in state.workings] if state.has_masters else []
        for w, grad in zip(state.workings, self._grads or state.grads, strict=True):
            w.grad = grad
        matrices = len(v["shapes"][0])
        parts = state.workings[:matrices], state.workings[matrices:]
        groups = [
            {"params": params, "weight_decay": decay}
            for params, decay in zip(parts, _DECAYS, strict=True)
        ]
        self._optimizer = torch.optim.AdamW(groups, _RATE, (_BETA1, _BETA2), _EPS, **how)
        moments = zip(state.workings, state.exp_avgs, state.exp_avg_sqs, strict=True)
        at = v["param"].device if how.get("fused") else torch.device("cpu")
        for w, exp_avg, exp_avg_sq in moments:
            step = torch.tensor(float(_STEPS), device=at)
            self._optimizer.state[w] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    def __call__(self) -> Answers:
        if self._grads:
            torch._foreach_copy_(self._grads, self._state.grads)
        self._optimizer.step()
        if self._grads:
            torch._foreach_copy_(self._state.params, self._state.workings)
        return self._state.answers()


class _Lamb:
    """LAMB by the operators that torch.optim is made of, since PyTorch has none."""

    def __init__(self, v: Inputs):
        self._state, self._steps, self._matrices = _State(v), _STEPS, len(v["shapes"][0])

    def __call__(self) -> Answers:
        state, adapted = self._state, slice(self._matrices)
        w, m, sq = state.workings, state.exp_avgs, state.exp_avg_sqs
        grads = [g.to(m[0].dtype) for g in state.grads] if state.has_masters else state.grads
        self._steps += 1
        torch._foreach_lerp_(m, grads, 1 - _BETA1)
        torch._foreach_mul_(sq, _BETA2)
        torch._foreach_addcmul_(sq, grads, grads, 1 - _BETA2)
        below = torch._foreach_sqrt(sq)
        torch._foreach_div_(below, (1 - _BETA2**self._steps) ** 0.5)
        torch._foreach_add_(below, _EPS)
        update = torch._foreach_div(m, below)
        torch._foreach_div_(update, 1 - _BETA1**self._steps)
        torch._foreach_add_(update[adapted], w[adapted], alpha=_DECAYS[0])
        ratios = torch._foreach_norm(w[adapted])
        torch._foreach_div_(ratios, torch._foreach_norm(update[adapted]))
        torch._foreach_mul_(update[adapted], ratios)
        torch._foreach_add_(w, update, alpha=-_RATE)
        if state.has_masters:
            torch._foreach_copy_(state.params, w)
        return state.answers()


def _peer(step: Callable[[Inputs], Callable[[], Answers]]) -> Peer:
    return Peer(lambda v, p: v["step"](), enter=lambda v: v.having(step=step(v)))


_ADAMW = Row(
    "adamw_",
    _SIZES,
    _make,
    _adamw_call,
    _OUTPUTS,
    _step_work,
    {
        "torch": _peer(partial(_AdamW, foreach=True)),
        "torch fused": _peer(partial(_AdamW, fused=True)),
    },
    save=_save,
    direction="step",
    in_place=True,
)
_LAMB = Row(
    "lamb_",
    _SIZES,
    _make,
    _lamb_call,
    _OUTPUTS,
    _step_work,
    {"torch": _peer(_Lamb)},
    save=_lamb_save,
    direction="step",
    in_place=True,
)

# --- the norm of gradients -----------------------------------------------------------------------


def _norm_make(draw: Draw, D: int, F: int) -> dict[str, Any]:
    """Return gradients of a scale of their own: by chance alone so many have one norm."""
    scale = 1 + draw.integers(1000, 1) / 1000
    return {"grad": draw.normal(_count(D, F), mean=0.05) * scale, "shapes": _shapes(D, F)}


def _norm_save(ops: Any, v: Inputs, p: float) -> list[Tensor]:
    return _parts(v["grad"], v)


def _norm_call(ops: Any, v: Inputs, p: float, saved: list[Tensor]) -> Answers:
    return (ops.grad_norm(saved, None),)


def _norm_work(e: int, p: float, D: int, F: int) -> Work:
    return Work(bytes=e * _count(D, F) + 4)


def _norm_torch(v: Inputs, p: float) -> Tensor:
    """As clip_grad_norm_ has it, except that 16 bits are not rounded at each parameter."""
    if v["grad"].dtype.itemsize >= 4:
        return torch.nn.utils.get_total_norm(v["grads"], foreach=True).float()
    norms = torch._foreach_norm(v["grads"], 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))


def _norm_enter(v: Inputs) -> Inputs:
    return v.having(grads=_parts(v["grad"], v))


_GRAD_NORM = Row(
    "grad_norm",
    _SIZES,
    _norm_make,
    _norm_call,
    ("norm",),
    _norm_work,
    {"torch": Peer(_norm_torch, enter=_norm_enter)},
    save=_norm_save,
    direction="step",
    baseline="torch",  # the reference adds up in fp64: no measure of what fp32 can do
)

ROWS = {"adamw_": _ADAMW, "lamb_": _LAMB, "grad_norm": _GRAD_NORM}
