"""What is made of weights and kept beside them, in no module, until they change or die.

A table is keyed by weights and holds them weakly. Who reads it compares `state_of` the weight with
the state that its entry was made for. After each step of an optimizer all tables are emptied, since
fused ones write without PyTorch's counting it.
"""

import functools
from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

_SAMPLES = 16  # numbers of a weight that are looked at
_tables: list[MutableMapping[Tensor, Any]] = []


def table() -> MutableMapping[Tensor, Any]:
    """Return a table that `forget` empties too."""
    made: MutableMapping[Tensor, Any] = WeakTensorKeyDictionary()
    _tables.append(made)
    return made


def forget() -> None:
    """Drop all that is kept: weights may have changed in a way that PyTorch does not count."""
    for kept in _tables:
        kept.clear()


@functools.cache
def watch_optimizers() -> None:
    """Forget after every step of any optimizer from here on; for whoever keeps something."""
    register_optimizer_step_post_hook(lambda *_: forget())


def state_of(w: Tensor) -> Any:
    """Return what tells a weight from what it was before: equal to that, or it has changed.

    PyTorch counts writes, but those through `.data` or by a fused optimizer it does not. On the CPU
    a few of the numbers betray most of these; on a GPU to look at them would be to wait. Gradients
    are off, and w is contiguous.
    """
    step = w.numel() // _SAMPLES
    some = w.as_strided((_SAMPLES,), (step,)).tolist() if step and w.is_cpu else []
    return w._version, w.data_ptr(), some


class _Joined(NamedTuple):
    """Others than the key, held so that no other tensor has their address; states; the result."""

    others: list[Tensor]
    states: list[Any]
    joined: Tensor


_joined = table()


def joined(weights: Sequence[Tensor]) -> Tensor:
    """Return the weights (F_i, ...) in one (sum of F_i, ...), kept for their next use."""
    first, *others = weights
    kept, states = _joined.get(first), [state_of(w) for w in weights]
    same = kept is not None and all(a is b for a, b in zip(kept.others, others, strict=True))
    if not same or kept.states != states:
        watch_optimizers()
        with torch.inference_mode(False), torch.no_grad():  # what it makes has a version too
            kept = _joined[first] = _Joined(others, states, torch.cat([*weights]))
    return kept.joined
