"""A small case for the tests of the measuring core, and candidates that misbehave."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gate import Candidate, Case, Outputs, Prepared, Work
from record import Run
from torch import Tensor, library

T, D, N = 16, 512, 24
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SLACK = {"fp32": 1e-5, "bf16": 2.0**-8, "fp16": 2.0**-11}
CPU = torch.device("cpu")

Answer = Callable[[Tensor], Outputs]


def weight(dtype: torch.dtype) -> Tensor:
    """Return (D, N) values, the same in every dtype: bfloat16 holds them."""
    generator = torch.Generator().manual_seed(1)
    w_DN = torch.randn(D, N, generator=generator) * 0.1 + 0.05
    return w_DN.half().bfloat16().to(dtype)


def exact(x_TD: Tensor) -> Outputs:
    """Return the true answer: a large tensor, and a small one of small values."""
    x_TD = x_TD.double()
    return {"y": x_TD @ weight(torch.float64), "tiny": x_TD[:, :3].mean(0) / 100}


def plain(x_TD: Tensor) -> Outputs:
    """Return the answer computed in fp32 and rounded once to the dtype of x."""
    x32_TD = x_TD.float()
    y_TN, tiny = x32_TD @ weight(torch.float32), x32_TD[:, :3].mean(0) / 100
    return {"y": y_TN.to(x_TD.dtype), "tiny": tiny.to(x_TD.dtype)}


def in_blocks(x_TD: Tensor) -> Outputs:
    """Return the answer as a good kernel has it: blocks summed in fp32, rounded once."""
    w_DN = weight(torch.float32)
    y_TN = sum(x_TD[:, k : k + 64].float() @ w_DN[k : k + 64] for k in range(0, D, 64))
    return {"y": y_TN.to(x_TD.dtype), "tiny": plain(x_TD)["tiny"]}


def summed_in_dtype(x_TD: Tensor) -> Outputs:
    """Return the answer with a sum that is rounded to 16 bits after every product."""
    w_DN, y_TN = weight(x_TD.dtype), torch.zeros(T, N, dtype=x_TD.dtype)
    for k in range(D):
        y_TN = y_TN + x_TD[:, k : k + 1] * w_DN[k]
    return {"y": y_TN, "tiny": plain(x_TD)["tiny"]}


def case(dtype: str = "fp32", **fields: Any) -> Case:
    """Return the product of (T, D) and (D, N), with fields replaced."""
    generator = torch.Generator().manual_seed(0)
    inputs = [(torch.randn(T, D, generator=generator) + 0.5).to(DTYPES[dtype]) for _ in range(2)]
    work = Work(tokens=T, slots=2 * T, sequences=1, bytes=4 * T * D, flops=2 * T * D * N)
    whole = Case("case x", CPU, dtype, inputs, exact, plain, "fp32, rounded once", work)
    return replace(whole, **fields)


def start(folder: Path) -> Run:
    """Begin a run's file."""
    return Run.start(folder / "run.json", "test", "python test")


class Fake:
    """A candidate that counts its calls.

    Args:
        name: of it.
        answer: gives its answers.
        run: what is timed; gets the number of the call and the inputs.
        prepare: called when it is prepared.
        how: further fields of `Prepared`.
    """

    def __init__(
        self,
        name: str,
        answer: Answer = in_blocks,
        *,
        run: Callable[[int, Tensor], Any] = lambda i, x: None,
        prepare: Callable[[], Any] = lambda: None,
        **how: Any,
    ):
        self.name, self._answer, self._run, self._ready, self._how = name, answer, run, prepare, how
        self.prepared, self.checks, self.runs = 0, 0, 0

    def candidate(self) -> Candidate:
        """Return it as the harness takes it."""

        def prepare() -> Prepared:
            self.prepared += 1
            self._ready()
            return Prepared(run, check, **self._how)

        def run(inputs: Tensor) -> Any:
            self.runs += 1
            return self._run(self.runs, inputs)

        def check(inputs: Tensor) -> Outputs:
            self.checks += 1
            return self._answer(inputs)

        return Candidate(self.name, prepare)


def candidates(fakes: Sequence[Fake]) -> list[Candidate]:
    """Return all of them as the harness takes them."""
    return [fake.candidate() for fake in fakes]


def once(answer: Outputs) -> Answer:
    """Return what gives that answer whatever is asked."""
    return lambda x_TD: answer


@contextmanager
def planted(op, wrong):
    """Make `wrong` the op's implementation on the CPU meanwhile."""
    lib = library.Library("bert_fast", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it overrides
        lib.impl(op, wrong, "CPU", allow_override=True)
    try:
        yield
    finally:
        lib._destroy()
