"""What the rows for ops are compared with: what a user of PyTorch writes for the same result."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

from gate import Case
from op_inputs import Answers, Inputs


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
        value: the expression's value, a number, is an answer too, before its gradients.
        compiled: the expression is for torch.compile.
        notes: for its row.
    """

    expression: Callable[[Inputs, float], Any]
    leaves: tuple[str, ...] = ()
    enter: Callable[[Inputs], Inputs] = _same
    leave: Callable[[Inputs, Answers], Answers] = _all
    lacks: Callable[[Case, float], str] = lambda case, p: ""
    value: bool = False
    compiled: bool = False
    notes: Mapping[str, str] = field(default_factory=dict)


def _compile_lacks(case: Case, p: float) -> str:
    cuda = case.device.type == "cuda"
    return "" if cuda else "compiled peers are for CUDA here: on a CPU see the encoder"


def compiled(peer: Peer) -> Peer:
    """Return the peer under torch.compile."""
    return replace(peer, compiled=True, lacks=_compile_lacks)


def liger_lacks(case: Case, p: float) -> str:
    """Say what Liger's kernels lack."""
    if find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    return "" if case.device.type == "cuda" else "liger_kernel needs CUDA"
