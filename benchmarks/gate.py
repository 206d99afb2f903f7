"""Cases, candidates, and the gate: only right answers are ever timed.

A case is one piece of work with its inputs; a candidate is a way to do it. A candidate passes if
its error against the truth is at most twice that of a baseline in the same dtype, and what rounding
may add.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import checkout  # noqa: F401
import torch
from torch import Tensor

from bert_fast.accuracy import FACTOR, NOT_ZEROS, Bound, bound, errors

Outputs = Mapping[str, Tensor]


class AbsentError(Exception):
    """What a candidate needs is not on this machine; the message says what."""


@dataclass(frozen=True)
class Work:
    """How much a case does; what is 0 is not counted.

    Attributes:
        tokens: real tokens; padding is none.
        slots: tokens and padding together.
        sequences: sequences.
        bytes: least that must be read and written.
        flops: operations on real tokens, those of recomputation not among them.
    """

    tokens: int = 0
    slots: int = 0
    sequences: int = 0
    bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Case:
    """One piece of work.

    Attributes:
        name: as the rows have it.
        device: where it runs.
        dtype: what it computes in, "bf16" or "fp32"...: chooses the bound and the ceiling.
        inputs: at least two sets of one shape: each is checked, and they are timed in turn.
        truth: gives the right answer for inputs, in fp32 at least.
        baseline: gives the answer of plain arithmetic in `dtype`; its error is the measure.
        baseline_name: what the baseline is.
        work: what one call does.
        facts: model, shapes, seed: what a stranger needs to repeat it.
        flush: time with cold caches, as for kernels.
        limit: what no error's norm may exceed as a share of the truth's, whatever the baseline's:
            where the baseline is so inexact that twice its error would hide a wrong model.
    """

    name: str
    device: torch.device
    dtype: str
    inputs: Sequence[Any]
    truth: Callable[[Any], Outputs]
    baseline: Callable[[Any], Outputs]
    baseline_name: str
    work: Work
    facts: Mapping[str, Any] = field(default_factory=dict)
    flush: bool = False
    limit: float = NOT_ZEROS


@dataclass(frozen=True)
class Prepared:
    """A candidate, ready to run.

    Attributes:
        run: does the work for inputs; what is timed.
        check: gives the answer of the same code for inputs, by the names that the truth has.
        changes_state: run trains, so that the truth of before does not hold after it.
        notes: what the row should say, such as which implementation ran.
    """

    run: Callable[[Any], Any]
    check: Callable[[Any], Outputs]
    changes_state: bool = False
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """A way to do a case's work.

    Attributes:
        name: as the rows have it.
        prepare: loads, compiles or captures; may raise `AbsentError`.
        factor: how many times the baseline's error it may have: 2 is what this project asks of
            itself; a peer that does the same less exactly is shown with its error.
    """

    name: str
    prepare: Callable[[], Prepared]
    factor: float = FACTOR


class RefusedError(Exception):
    """The answers are wrong.

    Attributes:
        error: what was found, as in a row; None if the answers cannot be compared.
    """

    def __init__(self, message: str, error: dict[str, Any] | None = None):
        super().__init__(message)
        self.error = error


def _tensors(inputs: Any) -> list[Tensor]:
    """Return the tensors in a set of inputs: itself, in a mapping, a sequence or a dataclass."""
    if isinstance(inputs, Tensor):
        return [inputs]
    if is_dataclass(inputs):
        inputs = vars(inputs)
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    if isinstance(inputs, list | tuple):
        return [t for part in inputs for t in _tensors(part)]
    return []


class Gate:
    """What answers are compared with; computed once for all candidates of a case.

    Raises:
        ValueError: the case itself is broken: a true value or one of the baseline is not finite,
            the baseline has another shape or is as wrong as zeros would be, or the answer for the
            first inputs would pass as that for all others.
    """

    def __init__(self, case: Case):
        self._case = case
        self._inputs = [[t.clone() for t in _tensors(inputs)] for inputs in case.inputs]
        self._truths = [case.truth(inputs) for inputs in case.inputs]
        self._baseline: list[dict[str, Bound]] = []
        for inputs, truth in zip(case.inputs, self._truths, strict=True):
            baseline, bounds = case.baseline(inputs), {}
            for name, t in truth.items():
                what = f"{case.name}: {name}"
                if baseline[name].shape != t.shape:
                    got = [*baseline[name].shape]
                    raise ValueError(f"{what}: want a baseline of shape {[*t.shape]}, got {got}")
                if not (t.isfinite().all() and baseline[name].isfinite().all()):
                    raise ValueError(f"{what}: want finite values, got others")
                found = bounds[name] = bound(baseline[name], t, case.dtype, case.limit)
                if found.more_top and Candidate.factor * found.norm >= 1:
                    raise ValueError(
                        f"{what}: want a baseline by which zeros are wrong, got one with an error"
                        f" of {found.norm:.1e} of the norm"
                    )
            self._baseline.append(bounds)
        if all(self._passes_as(0, i) for i in range(1, len(self._truths))):
            raise ValueError(f"{case.name}: want two sets of inputs whose answers differ")

    def check(self, prepared: Prepared, factor: float = Candidate.factor) -> dict[str, Any]:
        """Return the row's "error": the worst of own and of the baseline over inputs and outputs.

        Raises:
            RefusedError: an error is over `factor` times the baseline's and what rounding may
                add, a value is not finite, names or shapes are not those of the truth, or inputs
                were changed.
        """
        worst: dict[str, Any] = {}
        for i, inputs in enumerate(self._case.inputs):
            try:
                found = self._worst(prepared.check(inputs), i, factor)
            finally:
                changed = self._restore(i)
            if changed:
                raise RefusedError("inputs: want them left as they are, got them changed")
            if found and (not worst or found["share"] > worst["share"]):
                worst = found
        if not worst:
            raise RefusedError("answers: want values to compare, got none")
        if worst["share"] > 1:
            own, most = worst["own"], worst["allowed"]
            raise RefusedError(
                f"{worst['worst']}: want errors of at most {most['max']:.1e} and {most['l2']:.1e}"
                f" of the norm, got {own['max']:.1e} and {own['l2']:.1e}",
                worst,
            )
        return worst

    def _restore(self, i: int) -> bool:
        """Return whether inputs i were changed; that is undone for the next candidate."""
        changed = False
        for t, original in zip(_tensors(self._case.inputs[i]), self._inputs[i], strict=True):
            if not torch.equal(t, original):
                t.copy_(original)
                changed = True
        return changed

    def _worst(self, own: Outputs, i: int, factor: float) -> dict[str, Any]:
        """Return the largest error of an answer for inputs i, as a share of what is allowed."""
        truth, worst = self._truths[i], {}
        if set(own) != set(truth):
            raise RefusedError(f"answers: want {sorted(truth)}, got {sorted(own)}")
        for name, t in truth.items():
            if own[name].shape != t.shape:
                raise RefusedError(f"{name}: want {[*t.shape]}, got {[*own[name].shape]}")
            if not own[name].isfinite().all():
                raise RefusedError(f"{name}: want finite values, got others")
            if not t.numel():
                continue
            top, norm = errors(own[name], t)
            baseline = self._baseline[i][name]
            most = baseline.allowed(factor)
            # a truth of zeros that is known exactly allows nothing
            over = top / most["max"] if most["max"] else 2.0 * (top > 0)
            share = max(over, norm / most["l2"])
            if not worst or share > worst["share"]:
                worst = {
                    "own": {"max": top, "l2": norm},
                    "baseline": {"max": baseline.top, "l2": baseline.norm},
                    "allowed": most,
                    "baseline_name": self._case.baseline_name,
                    "worst": name,
                    "factor": factor,
                    "share": share,
                }
        return worst

    def _passes_as(self, one: int, other: int) -> bool:
        """Return whether the truth for some inputs would do for other inputs too."""
        try:
            found = self._worst(self._truths[one], other, Candidate.factor)
            return found.get("share", 0.0) <= 1
        except RefusedError:
            return False


def check(case: Case, prepared: Prepared) -> dict[str, Any]:
    """Return what `Gate.check` does, for a single candidate."""
    return Gate(case).check(prepared)
