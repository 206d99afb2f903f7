"""What a run of training needs to go on with the same bits, taken from it and given back.

    state = capture(model, optimizer, step=100, position={"epoch": 0, "batch": 400}, facts={...})
    restore(state, model, optimizer)

Everything goes by the parameters' names: weights in fp32, the optimizer's moments and counts beside
them. So a state fits any order of groups, any dtype of the parameters, any number of processes, and
both our optimizers and torch's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bert_fast.pretrained import BertPreTrainedModel
from bert_fast.train.optim import LAMB, AdamW
from bert_fast.weights import some

MOMENTS = "exp_avg", "exp_avg_sq", "step"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a run of training needs to go on.

    Attributes:
        step: optimizer steps made.
        position: where the data goes on, as ints: epoch, batch.
        facts: what else is to be kept or to be the same later, as JSON's types.
        weights: name of each parameter, tied ones once -> its value, fp32 where it has 16 bits.
        moments: `exp_avg.NAME`, `exp_avg_sq.NAME` (of the parameter's shape, fp32) and `step.NAME`
            (), of the parameters that the optimizer has updated.
    """

    step: int
    position: Mapping[str, int]
    facts: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for tensors in (self.weights, self.moments) for t in tensors.values())


@torch.no_grad()
def capture(
    model: BertPreTrainedModel,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    position: Mapping[str, int],
    facts: Mapping[str, Any],
) -> TrainingState:
    """Return the state of a run; before the optimizer's first step, too.

    Its tensors are the run's own where they need no conversion: write them, or copy them, before
    the next step. Parameters that are sharded over processes are gathered, which every process has
    to take part in.

    Args:
        model: the model itself, not a wrapper.
        optimizer: AdamW or LAMB of ours, or torch.optim.AdamW; of this model's parameters.
        step: optimizer steps made.
        position: where the data goes on.
        facts: what else to keep.

    Raises:
        ValueError: the optimizer has parameters that are not the model's, or the configuration
            ties weights that are not one.
        NotImplementedError: the optimizer keeps more than two moments.
    """
    named = _named(model)
    kept = _states(named, optimizer)
    weights, moments = {}, {}
    for name, p in named.items():
        state = kept.get(name, {})
        if unknown := sorted(state.keys() - {*MOMENTS, "master"}):
            raise NotImplementedError(
                f"optimizer: want a state of {', '.join(MOMENTS)}, got {unknown} for {name}"
            )
        master = _whole(state.get("master", p))
        weights[name] = master.to(torch.promote_types(master.dtype, torch.float32))
        for kind in MOMENTS:
            if kind in state:
                moment = _whole(torch.as_tensor(state[kind]))
                wide = torch.promote_types(moment.dtype, torch.float32)
                moments[f"{kind}.{name}"] = moment.to(wide)
    return TrainingState(
        step=step, position=dict(position), facts=dict(facts), weights=weights, moments=moments
    )


@torch.no_grad()
def restore(
    state: TrainingState, model: BertPreTrainedModel, optimizer: torch.optim.Optimizer
) -> None:
    """Give a model and its optimizer a captured state; all of it is checked before any change.

    Parameters of 16 bits become the rounding of what was kept, which becomes their master. The
    groups' hyperparameters stay as they are, and what the optimizer had of its own is dropped.

    Args:
        state: as `capture` returned it, on any device.
        model: with parameters of the same names and shapes, of any floating dtype.
        optimizer: of this model's parameters, of any of the classes that `capture` takes.

    Raises:
        ValueError: names that are missing or foreign, a shape that differs, an incomplete set of
            moments; or as for `capture`.
        TypeError: a tensor is not of a floating dtype.
    """
    named = _named(model)
    _states(named, optimizer)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    _check_weights(state, named)
    _check_moments(state, named, {name for name, p in named.items() if id(p) in trained})
    optimizer.state.clear()
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, p in named.items():
        _put(p, state.weights[name])
        if id(p) not in groups:
            continue
        made = _restored(state, name, p, groups[id(p)], optimizer)
        if made:
            optimizer.state[p] = made


def _restored(
    state: TrainingState,
    name: str,
    p: Tensor,
    group: dict[str, Any],
    optimizer: torch.optim.Optimizer,
) -> dict[str, Tensor]:
    """Return a parameter's entry in `optimizer.state`, in the dtypes that this optimizer has."""
    ours = isinstance(optimizer, AdamW | LAMB)
    wide = torch.promote_types(p.dtype, torch.float32)
    made: dict[str, Tensor] = {}
    if f"step.{name}" in state.moments:
        on_device = ours or group.get("capturable") or group.get("fused")
        step = state.moments[f"step.{name}"]
        made["step"] = step.to(p.device if on_device else "cpu", torch.float32, copy=True)
        for kind in MOMENTS[:2]:
            made[kind] = _like(p, wide if ours else p.dtype, state.moments[f"{kind}.{name}"])
    if ours and optimizer.master_weights and p.dtype.itemsize == 2:
        master = _like(p, wide, state.weights[name])
        if made or not torch.equal(master, p.to(wide)):  # else the first step makes the same
            made["master"] = master
    return made


def _named(model: BertPreTrainedModel) -> dict[str, Tensor]:
    """Return the model's parameters, tied ones under their first name only."""
    named = dict(model.named_parameters())
    if model.config.tie_word_embeddings and (loose := named.keys() & model.tied_weights.keys()):
        raise ValueError(f"model: want tied weights to be one, got others for {some(loose)}")
    return named


def _states(
    named: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Any]]:
    """Return what the optimizer keeps, by the parameters' names."""
    names = {id(p): name for name, p in named.items()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if foreign := [[*p.shape] for p in params if id(p) not in names]:
        want = "parameters of the model"
        raise ValueError(f"optimizer: want {want}, got {len(foreign)} others, of {foreign[:5]}")
    return {names[id(p)]: optimizer.state[p] for p in params if p in optimizer.state}


def _check_weights(state: TrainingState, named: Mapping[str, Tensor]) -> None:
    if state.weights.keys() != named.keys():
        raise ValueError(
            f"weights: want the model's, got none for {some(named.keys() - state.weights.keys())}, "
            f"beside them {some(state.weights.keys() - named.keys())}"
        )
    for name, p in named.items():
        _check(name, state.weights[name], p)


def _check_moments(state: TrainingState, named: Mapping[str, Tensor], trained: set[str]) -> None:
    kept = {name: [f"{kind}.{name}" for kind in MOMENTS] for name in trained}
    known = {key for keys in kept.values() for key in keys}
    if foreign := state.moments.keys() - known:
        raise ValueError(f"moments: want those of the optimizer's parameters, got {some(foreign)}")
    for name, keys in kept.items():
        missing = [key for key in keys if key not in state.moments]
        if 0 < len(missing) < len(keys):
            raise ValueError(f"moments: want {', '.join(keys)}, got none for {some(missing)}")
        if not missing:
            for key, like in zip(keys, (named[name], named[name], torch.empty(())), strict=True):
                _check(key, state.moments[key], like)


def _check(name: str, got: Tensor, like: Tensor) -> None:
    if got.shape != like.shape:
        raise ValueError(f"{name}: want {[*like.shape]}, got {[*got.shape]}")
    if not got.is_floating_point():
        raise TypeError(f"{name}: want a floating dtype, got {got.dtype}")


def _whole(tensor: Tensor) -> Tensor:
    """Return a tensor with what other processes have of it."""
    tensor = tensor.detach()
    return tensor.full_tensor().cpu() if _is_sharded(tensor) else tensor


def _like(p: Tensor, dtype: torch.dtype, value: Tensor) -> Tensor:
    made = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format)
    _put(made, value)
    return made


def _put(into: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, of a sharded one this process's part."""
    if _is_sharded(into):
        from torch.distributed.tensor import distribute_tensor  # 0.8 s

        mesh, placements = into.device_mesh, into.placements
        value = distribute_tensor(value.to(into.device), mesh, placements, src_data_rank=None)
    into.copy_(value)


def _is_sharded(tensor: Tensor) -> bool:
    """Return whether it is a DTensor, as FSDP2 makes them of parameters."""
    return hasattr(tensor, "full_tensor")
