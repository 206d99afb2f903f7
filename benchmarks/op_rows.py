"""How a row for an op is made: from a description, a case and its candidates.

The same `call` gives the op's answers by bert_fast and by the reference, whose functions have the
ops' signatures. The truth is the reference on wider inputs, a backward op's forward included; the
baseline is the reference in the case's own dtype. Neither goes through `torch.ops`.

A backward is timed by itself, its forward kept, or with `both` together with its forward.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from gate import AbsentError, Candidate, Case, Gate, Prepared, Work
from op_inputs import MODELS, Answers, Draw, Inputs
from op_peers import Peer
from torch import Tensor

from bert_fast import ops, reference, reference_optimizer
from bert_fast.accuracy import short

SEED = 20_240_607
SITE = 3  # of every dropout here
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SETS = 2  # of inputs
# Eager PyTorch rounds to 16 bits between its steps, and on a CPU in the sums of LayerNorm's
# gradients too, where the baseline does not: more than 12 times its error was seen. In fp32 it
# is as exact as the baseline.
PEER_FACTOR = {torch.float32: Candidate.factor, torch.bfloat16: 16.0, torch.float16: 16.0}
# By how much of the norm PyTorch's expression may differ from the reference in the same dtype.
_APART = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True)
class Row:
    """What is measured of an op, in one place for all its sizes.

    Attributes:
        op: name of the registered op.
        sizes: keywords of `make` and `work` by the name of the size; see `op_inputs.sizes`.
        make: gives the values of one set of inputs for (draw, **sizes), floating ones in fp32.
        call: gives the op's answers for (ops, inputs, p, saved).
        outputs: names of the answers.
        work: gives the work for (bytes of an element, p, **sizes).
        peers: by the candidate's name.
        save: gives what `call` starts from for (ops, inputs, p): what a backward op is left by its
            forward, which it must run; copies of what an op changes in place.
        only_ours: outputs that no peer gives: of bert_fast alone they are compared.
        p: probability of dropout.
        exact: the answers are whole numbers, whatever the dtype.
        direction: "forward", "backward", "both" together, or "step" of an optimizer.
        lengths: name of the distribution of lengths, where they play a role.
        baseline: the peer whose answers are the baseline; "": the reference's are.
        in_place: `call` changes what `save` gives, and that is timed as it goes on.
    """

    op: str
    sizes: Mapping[str, Mapping[str, Any]]
    make: Callable[..., Mapping[str, Any]]
    call: Callable[[Any, Inputs, float, Any], Answers]
    outputs: tuple[str, ...]
    work: Callable[..., Work]
    peers: Mapping[str, Peer]
    save: Callable[[Any, Inputs, float], Any] = lambda ops, inputs, p: None
    only_ours: tuple[str, ...] = ()
    p: float = 0.0
    exact: bool = False
    direction: str = "forward"
    lengths: str = ""
    baseline: str = ""
    in_place: bool = False

    def answers(self, ops: Any, inputs: Inputs, p: float) -> dict[str, Tensor]:
        """Return the answers by name, all that `save` does included."""
        return self.named(self.call(ops, inputs, p, self.save(ops, inputs, p)), self.outputs)

    def named(self, answers: Answers, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Return the answers by name, whole numbers as fp64."""
        named = dict(zip(names, answers, strict=True))
        return {n: t.double() if self.exact else t for n, t in named.items()}


def both(forward: Row, backward: Row) -> Row:
    """Return the row of a forward and its backward together, nothing being kept between calls."""

    def work(e: int, p: float, **sizes: Any) -> Work:
        one, two = forward.work(e, p, **sizes), backward.work(e, p, **sizes)
        return replace(one, bytes=one.bytes + two.bytes, flops=one.flops + two.flops)

    leaves = backward.peers["torch"].leaves
    others = {n: replace(peer, leaves=leaves) for n, peer in forward.peers.items()}
    peers = {**others, **backward.peers}
    return replace(backward, direction="both", work=work, peers=peers)


class _References:
    """The references of all ops: they stand in two modules."""

    def __getattr__(self, op: str) -> Callable[..., Any]:
        optimizer = op in ("adamw_", "lamb_", "grad_norm")
        return getattr(reference_optimizer if optimizer else reference, op)

    @staticmethod
    def unpad_work(mask: Tensor, tile: int, num_rows: None, max_len: None) -> Answers:
        """Return what the two ops give one after the other."""
        rows, cu_seqlens, longest = reference.unpad(mask)
        return rows, cu_seqlens, reference.work_list(cu_seqlens, rows.shape[0], tile), longest


REFERENCES = _References()


def _without(answers: Mapping[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: t for name, t in answers.items() if name not in names}


def registered() -> SimpleNamespace:
    """Return the registered ops by name: `torch.ops.bert_fast` without a search at each call."""
    names = ops.implementations()
    return SimpleNamespace(**{n: getattr(torch.ops.bert_fast, n).default for n in names})


def build(
    name: str, row: Row, device: torch.device | str, dtype: torch.dtype, size: str
) -> tuple[Case, list[Candidate]]:
    """Return the case of a row and its candidates.

    Args:
        name: of the row. The case's has the model too; at odd sizes the dtype, since all are
            looked at.
        row: its description.
        device: where it runs; a CPU has fewer tokens of a model.
        dtype: of what is floating: torch.float32, bfloat16 or float16.
        size: "base", "large", "small" or "odd".

    Raises:
        ValueError: there is no such size or dtype.
    """
    if size not in row.sizes or dtype not in DTYPES:
        want = f"want one of {[*row.sizes]} and one of {[*DTYPES]}"
        raise ValueError(f"{name}: size, dtype: {want}, got {size!r}, {dtype}")
    device, kind = torch.device(device), short(dtype)
    fewer = device.type == "cpu" and f"{size} cpu" in row.sizes
    sizes = row.sizes[f"{size} cpu" if fewer else size]
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    sets = [row.make(Draw(device, SEED + i), **sizes) for i in range(SETS)]
    inputs = [Inputs(values).to(dtype) for values in sets]

    @functools.cache
    def truth(v: Inputs, p: float = row.p) -> dict[str, Tensor]:
        return row.answers(REFERENCES, v.to(wider), p)

    def trusted(v: Inputs) -> dict[str, Tensor]:
        wide = v.to(wider)
        other = _peer(row, case, row.peers["torch"], truth, wider).check(wide)
        _agree(name, truth(v), other, _APART[wider])
        return truth(v)

    @functools.cache
    def baseline(v: Inputs) -> dict[str, Tensor]:
        if row.baseline:
            return _peer(row, case, row.peers[row.baseline], truth, wider).check(v)
        return row.answers(REFERENCES, v, row.p)

    case = Case(
        _case_name(name, size, kind),
        device,
        "fp64" if row.exact else kind,  # the bound that lets no whole number differ
        inputs,
        lambda v: _without(trusted(v), row.only_ours),
        lambda v: _without(baseline(v), row.only_ours),
        "reference, in whole numbers" if row.exact else f"{row.baseline or 'reference'} in {kind}",
        row.work(dtype.itemsize, row.p, **sizes),
        _facts(row, size, sizes, inputs[0]),
        flush=True,
    )
    shared = tuple(n for n in row.outputs if n not in row.only_ours)
    rest = replace(
        case,
        truth=lambda v: _without(truth(v), shared),
        baseline=lambda v: _without(baseline(v), shared),
    )
    candidates = [Candidate("bert_fast", lambda: _bert_fast(row, case, rest))]
    for peer_name, peer in row.peers.items():
        prepare = functools.partial(_peer, row, case, peer, truth, wider)
        candidates.append(Candidate(peer_name, prepare, PEER_FACTOR[dtype]))
    return case, candidates


def _case_name(name: str, size: str, kind: str) -> str:
    """Return a case's name: with the model, or with the dtype at odd sizes."""
    if size in MODELS:
        return f"{name}, {size}"
    return f"{name}, odd, {kind}" if size == "odd" else name


def _facts(row: Row, size: str, sizes: Mapping[str, Any], inputs: Inputs) -> dict[str, Any]:
    """Return what a stranger needs to make the case again."""
    tensors = {n: t for n, t in inputs.values.items() if isinstance(t, Tensor)}
    facts = {
        "op": row.op,
        "direction": row.direction,
        "sizes": dict(sizes),
        "inputs": {n: f"{[*t.shape]} {str(t.dtype)[6:]}" for n, t in tensors.items()},
        "p": row.p,
        "seed": SEED,
    }
    facts |= {"model": size} if size in MODELS else {}
    facts |= {"lengths": row.lengths} if row.lengths and size in MODELS else {}
    return facts | ({"dtype": "int64"} if row.exact else {})


def _agree(
    name: str, truth: Mapping[str, Tensor], other: Mapping[str, Tensor], most: float
) -> None:
    """Raise ValueError unless PyTorch's own expression agrees with the reference.

    The op may be the reference itself: without this a mistake there would pass as the truth.
    """
    for output, t in other.items():
        off = (t.double() - truth[output].double()).norm().item()
        if off > most * max(truth[output].double().norm().item(), 1e-30):
            raise ValueError(f"{name}: {output}: want a truth that PyTorch agrees with, got {off}")


def _bert_fast(row: Row, case: Case, rest: Case) -> Prepared:
    """Return the registered op; its check compares what no peer gives, by a gate of its own."""
    registered_ops = registered()
    saved = functools.cache(lambda v: row.save(registered_ops, v, row.p))

    def anew(v: Inputs) -> Answers:
        return row.call(registered_ops, v, row.p, row.save(registered_ops, v, row.p))

    def kept(v: Inputs) -> Answers:
        return row.call(registered_ops, v, row.p, saved(v))

    run = anew if row.direction == "both" else kept

    def answers(v: Inputs) -> dict[str, Tensor]:
        return row.named(anew(v) if row.in_place else run(v), row.outputs)

    gate = functools.cache(lambda: Gate(rest))
    shared = tuple(n for n in row.outputs if n not in row.only_ours)

    def check(v: Inputs) -> dict[str, Tensor]:
        if row.only_ours and v is case.inputs[0]:  # once a pass: it looks at every set
            gate().check(Prepared(run, lambda v: _without(answers(v), shared)))
        return _without(answers(v), row.only_ours)

    served = ops.implementations()[row.op][case.device.type].name
    return Prepared(run, check, row.in_place, {"implementation": served})


def _peer(
    row: Row,
    case: Case,
    peer: Peer,
    truth: Callable[[Inputs, float], Mapping[str, Tensor]],
    wider: torch.dtype,
) -> Prepared:
    """Return the peer.

    Its dropout has another mask. So it is checked without dropout: its difference from the truth
    without dropout is added to the truth with dropout.
    """
    if why := peer.lacks(case, row.p):
        raise AbsentError(why)
    enter = functools.cache(peer.enter)
    keeps = row.direction == "backward"
    expression = peer.expression
    if peer.compiled:
        from stock_bert import compiled

        expression = compiled(expression, "default", False, case.device)

    def graph(v: Inputs, p: float) -> tuple[Tensor, list[Tensor]]:
        leaves = {n: v[n].detach().requires_grad_() for n in peer.leaves}
        with torch.enable_grad():
            return expression(v.having(**leaves), p), [*leaves.values()]

    kept = functools.cache(lambda v: graph(v, row.p))

    def answers(v: Inputs, p: float) -> Answers:
        if not peer.leaves:
            with torch.no_grad():
                out = expression(v, p)
            return out if isinstance(out, tuple) else (out,)
        out, leaves = kept(v) if keeps and p == row.p else graph(v, p)
        dy = None if peer.value else v["dy"]
        grads = torch.autograd.grad(out, leaves, dy, retain_graph=keeps)
        return (out.detach(), *grads) if peer.value else grads

    names = tuple(n for n in row.outputs if n not in row.only_ours)

    def check(v: Inputs) -> dict[str, Tensor]:
        entered = peer.enter(v) if row.in_place else enter(v)
        own = row.named(peer.leave(entered, answers(entered, 0.0)), names)
        if not row.p:
            return own
        plain, dropped = truth(v, 0.0), truth(v, row.p)
        return {n: dropped[n] + (t.to(wider) - plain[n]) for n, t in own.items()}

    notes = dict(peer.notes)
    if peer.leaves:
        made = "that is kept" if keeps else "that each call makes anew"
        notes["backward"] = f"autograd of a graph {made}"
    if row.p:
        notes["checked"] = "without dropout, its mask being another"
    return Prepared(lambda v: answers(enter(v), row.p), check, row.in_place, notes)
