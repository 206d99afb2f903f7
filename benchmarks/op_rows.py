"""How a row for an op is made: from a description, a case and its candidates.

The same `call` gives the op's answers by bert_fast and by the reference, whose functions have the
ops' signatures. The truth is the reference on wider inputs, a backward op's forward included; the
baseline is the reference in the case's own dtype. Neither goes through `torch.ops`.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from gate import AbsentError, Candidate, Case, Gate, Prepared, Work
from torch import Tensor

from bert_fast import ops, reference
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

Answers = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Inputs:
    """One set of inputs, tensors and numbers by name."""

    values: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def having(self, **values: Any) -> "Inputs":
        """Return them with some replaced."""
        return Inputs({**self.values, **values})

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Return them with the floating ones in `dtype`."""
        floats = {
            n: t for n, t in self.values.items() if isinstance(t, Tensor) and t.is_floating_point()
        }
        return self.having(**{n: t.to(dtype) for n, t in floats.items()})

    def seed(self, p: float) -> Tensor | None:
        """Return dropout's seed (1,), None without dropout."""
        return self["seed"] if p else None


class Draw:
    """Random tensors on a device, in fp32.

    Args:
        device: where they are drawn: the same seed gives other numbers on another kind of device.
        seed: of the generator.
    """

    def __init__(self, device: torch.device, seed: int):
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._kind = {"generator": self._generator, "device": device}

    def normal(self, *shape: int, mean: float = 0.5, spread: float = 1.0) -> Tensor:
        """Return normal numbers whose mean is not 0."""
        return torch.randn(shape, **self._kind) * spread + mean

    def integers(self, size: int, n: int) -> Tensor:
        """Return (n,) int64 numbers in 0..size - 1."""
        return torch.randint(size, (n,), **self._kind)

    def words(self, size: int, n: int) -> Tensor:
        """Return (n,) int64 ids in 0..size - 1; as in a text, id r has a share ~ 1 / (r + 1)."""
        u = torch.rand(n, **self._kind)
        return ((size + 1) ** u).long().clamp(1, size) - 1

    def order(self, n: int) -> list[int]:
        """Return a permutation of 0..n - 1."""
        return torch.randperm(n, **self._kind).tolist()


def _same(inputs: Inputs) -> Inputs:
    return inputs


def _all(inputs: Inputs, answers: Answers) -> Answers:
    return answers


@dataclass(frozen=True)
class Peer:
    """What a user of PyTorch writes for the same result.

    Attributes:
        expression: gives the answers, or what is to be differentiated, for (inputs, p).
        leaves: inputs whose gradients are the answers; empty: the expression gives them itself.
        enter: brings inputs into the layout the peer's users have; not timed.
        leave: brings answers back from it; not timed.
        lacks: says what it needs and the case has not; "" if nothing.
        notes: for its row.
    """

    expression: Callable[[Inputs, float], Any]
    leaves: tuple[str, ...] = ()
    enter: Callable[[Inputs], Inputs] = _same
    leave: Callable[[Inputs, Answers], Answers] = _all
    lacks: Callable[[Case, float], str] = lambda case, p: ""
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """What is measured of an op, in one place for all its sizes.

    Attributes:
        op: name of the registered op.
        sizes: keywords of `make` and `work` by the name of the size: "full", "small", "odd".
        make: gives the values of one set of inputs for (draw, **sizes), floating ones in fp32.
        call: gives the op's answers for (ops, inputs, p, saved).
        outputs: names of the answers.
        work: gives the work for (bytes of an element, p, **sizes).
        peers: by the candidate's name.
        save: gives what the forward op leaves to its backward for (ops, inputs, p).
        only_ours: outputs that no peer gives: of bert_fast alone they are compared.
        p: probability of dropout.
        exact: the answers are whole numbers, whatever the dtype.
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

    def answers(self, ops: Any, inputs: Inputs, p: float) -> dict[str, Tensor]:
        """Return the answers by name, the forward that a backward needs included."""
        return self.named(self.call(ops, inputs, p, self.save(ops, inputs, p)), self.outputs)

    def named(self, answers: Answers, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Return the answers by name, whole numbers as fp64."""
        named = dict(zip(names, answers, strict=True))
        return {n: t.double() if self.exact else t for n, t in named.items()}


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
        name: of the row; at odd sizes the case's has the dtype too, since all are looked at.
        row: its description.
        device: where it runs.
        dtype: of what is floating: torch.float32, bfloat16 or float16.
        size: "full", "small" or "odd".

    Raises:
        ValueError: there is no such size or dtype.
    """
    if size not in row.sizes or dtype not in DTYPES:
        want = f"want one of {[*row.sizes]} and one of {[*DTYPES]}"
        raise ValueError(f"{name}: size, dtype: {want}, got {size!r}, {dtype}")
    device, kind, sizes = torch.device(device), short(dtype), row.sizes[size]
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    sets = [row.make(Draw(device, SEED + i), **sizes) for i in range(SETS)]
    inputs = [Inputs(values).to(dtype) for values in sets]

    @functools.cache
    def truth(v: Inputs, p: float = row.p) -> dict[str, Tensor]:
        return row.answers(reference, v.to(wider), p)

    def trusted(v: Inputs) -> dict[str, Tensor]:
        wide = v.to(wider)
        other = _peer(row, case, row.peers["torch"], truth, wider).check(wide)
        _agree(name, truth(v), other, _APART[wider])
        return truth(v)

    @functools.cache
    def baseline(v: Inputs) -> dict[str, Tensor]:
        return row.answers(reference, v, row.p)

    tensors = {n: t for n, t in inputs[0].values.items() if isinstance(t, Tensor)}
    facts = {
        "op": row.op,
        "sizes": dict(sizes),
        "inputs": {n: f"{[*t.shape]} {str(t.dtype)[6:]}" for n, t in tensors.items()},
        "p": row.p,
        "seed": SEED,
    }
    case = Case(
        f"{name}, odd, {kind}" if size == "odd" else name,
        device,
        "fp64" if row.exact else kind,  # the bound that lets no whole number differ
        inputs,
        lambda v: _without(trusted(v), row.only_ours),
        lambda v: _without(baseline(v), row.only_ours),
        "reference, in whole numbers" if row.exact else f"reference in {kind}",
        row.work(dtype.itemsize, row.p, **sizes),
        facts | ({"dtype": "int64"} if row.exact else {}),
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

    def run(v: Inputs) -> Answers:
        return row.call(registered_ops, v, row.p, saved(v))

    def answers(v: Inputs) -> dict[str, Tensor]:
        return row.named(run(v), row.outputs)

    gate = functools.cache(lambda: Gate(rest))
    shared = tuple(n for n in row.outputs if n not in row.only_ours)

    def check(v: Inputs) -> dict[str, Tensor]:
        if row.only_ours and v is case.inputs[0]:  # once a pass: it looks at every set
            gate().check(Prepared(run, lambda v: _without(answers(v), shared)))
        return _without(answers(v), row.only_ours)

    served = ops.implementations()[row.op][case.device.type].name
    return Prepared(run, check, notes={"implementation": served})


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

    def graph(v: Inputs, p: float) -> tuple[Tensor, list[Tensor]]:
        leaves = {n: v[n].detach().requires_grad_() for n in peer.leaves}
        with torch.enable_grad():
            return peer.expression(v.having(**leaves), p), [*leaves.values()]

    kept = functools.cache(lambda v: graph(v, row.p))

    def answers(v: Inputs, p: float) -> Answers:
        v = enter(v)
        if not peer.leaves:
            with torch.no_grad():
                out = peer.expression(v, p)
            return out if isinstance(out, tuple) else (out,)
        out, leaves = kept(v) if p == row.p else graph(v, p)
        return torch.autograd.grad(out, leaves, v["dy"], retain_graph=True)

    names = tuple(n for n in row.outputs if n not in row.only_ours)

    def check(v: Inputs) -> dict[str, Tensor]:
        own = row.named(peer.leave(enter(v), answers(v, 0.0)), names)
        if not row.p:
            return own
        plain, dropped = truth(v, 0.0), truth(v, row.p)
        return {n: dropped[n] + (t.to(wider) - plain[n]) for n, t in own.items()}

    notes = dict(peer.notes)
    if peer.leaves:
        notes["backward"] = "autograd of a graph that is kept"
    if row.p:
        notes["checked"] = "without dropout, its mask being another"
    return Prepared(lambda v: answers(v, row.p), check, notes=notes)
