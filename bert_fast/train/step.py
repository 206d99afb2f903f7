"""One step of pre-training: micro-batches, gradients, optimizer; nothing in it waits for a GPU.

A loss or gradient that is not finite is never applied. With fp16 the step is skipped and the scale
of the loss lowered. Else nothing is applied from that step on, and the process, which reads a
step's figures while the next one runs, stops.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bert_fast.data.batches import Batch, Step
from bert_fast.data.reference import mix
from bert_fast.train.distributed import Ranks, without_sync
from bert_fast.train.objective import PreTrainingObjective, Sums

SKIPPED_IN_A_ROW = 20  # steps with fp16, before training is given up


class NonFiniteError(ArithmeticError):
    """A loss or gradient is not finite, and was not applied.

    Attributes:
        step: in which it was seen.
    """

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class Figures(NamedTuple):
    """What is known of a step, over all processes.

    Attributes:
        step: its number.
        mlm: sum of the cross entropy of masked tokens in nats.
        nsp: sum of the cross entropy of pairs in nats.
        mlm_correct: masked tokens that were right; NaN where not counted.
        nsp_correct: pairs that were right.
        labels: masked tokens.
        pairs: of segments.
        tokens: real ones.
        squares: the lengths of the sequences, squared and summed.
        grad_norm: norm of the gradients before clipping.
        skipped: steps that were skipped until then, this one too.
        in_a_row: of them behind one another, up to this one.
    """

    step: int
    mlm: float
    nsp: float
    mlm_correct: float
    nsp_correct: float
    labels: int
    pairs: int
    tokens: int
    squares: int
    grad_norm: float
    skipped: int
    in_a_row: int

    @property
    def loss(self) -> float:
        """What was minimised: the sum of both means."""
        return self.mlm / max(self.labels, 1) + self.nsp / max(self.pairs, 1)


class Stepper:
    """Makes steps, and tells of each while the next one runs.

    Args:
        module: a `PreTrainingObjective` as `distributed.wrap` returned it.
        optimizer: with `grad_norm` and `found_inf` as those of `optim` have.
        ranks: the processes.
        seed: of dropout, with the number of step and micro-batch.
        scaler: of fp16; None: another precision.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        seed: int,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.module, self.optimizer, self.ranks = module, optimizer, ranks
        self.seed, self.scaler = seed, scaler
        device = ranks.device
        self._stopped = torch.zeros((), device=device)  # 1 from the first step that is not finite
        self._skips = torch.zeros(2, dtype=torch.float64, device=device)  # all, in a row
        self._pending: list[tuple[int, torch.Event | None, Tensor]] = []

    def run(self, number: int, step: Step, lr: float, count_correct: bool) -> None:
        """Make a step.

        Args:
            number: its number, from 0.
            step: the micro-batches of this process.
            lr: learning rate of all groups.
            count_correct: count how many masked tokens are right.
        """
        device = self.ranks.device
        counts = self.ranks.sum(_counts([b for _, b in step.batches]).to(device, non_blocking=True))
        batches = [(j, to_device(batch, device)) for j, batch in step.batches]
        divisors = counts[:2].clamp(min=1)
        total = torch.zeros(len(Sums._fields), dtype=torch.float64, device=device)
        for j, batch in batches:
            seed_of(self.seed, number, j)
            with without_sync(self.module, last=j == batches[-1][0]):
                loss, sums = self.module(batch, divisors, count_correct)
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            total += torch.stack(sums)
        self.ranks.sum(total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.scaler is None:
            self._apply(total[:2])
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        norm = self.optimizer.grad_norm
        skipped = ~norm.isfinite()
        self._skips = torch.stack([self._skips[0] + skipped, (self._skips[1] + 1) * skipped])
        self._tell(number, torch.cat([total, counts, norm.double().reshape(1), self._skips]))

    def _apply(self, losses: Tensor) -> None:
        """Update the parameters unless this step, or one before, was not finite."""
        self._stopped = torch.maximum(self._stopped, (~losses.isfinite().all()).float())
        self.optimizer.found_inf = self._stopped
        self.optimizer.step()
        finite = self.optimizer.grad_norm.isfinite()
        self._stopped = torch.maximum(self._stopped, (~finite).float())

    def figures(self, wait: bool = False) -> list[Figures]:
        """Return the figures of the steps that have none yet, but the last one's.

        Args:
            wait: return those of the last one, too, which on a GPU waits for it.

        Raises:
            NonFiniteError: a loss or gradient is not finite, with fp16 20 times in a row.
        """
        found = []
        while self._pending and (wait or len(self._pending) > 1 or self._pending[0][1] is None):
            number, event, values = self._pending.pop(0)
            if event is not None:
                event.synchronize()
            figures = _figures(number, values.tolist())
            finite = np.isfinite([figures.mlm, figures.nsp, figures.grad_norm]).all()
            if self.scaler is None and not finite:
                got = f"the loss {figures.loss} and the norm {figures.grad_norm}, not applied"
                want = f"step {number}: want a finite loss and gradient"
                raise NonFiniteError(number, f"{want}, got {got}")
            if figures.in_a_row >= SKIPPED_IN_A_ROW:
                got = f"none {SKIPPED_IN_A_ROW} times in a row, at every scale of the loss"
                raise NonFiniteError(number, f"step {number}: want a finite gradient, got {got}")
            found.append(figures)
        return found

    def _tell(self, number: int, values: Tensor) -> None:
        """Have the figures of a step brought to the host."""
        if values.device.type == "cpu":
            self._pending.append((number, None, values))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.Event(values.device)
        event.record()
        self._pending.append((number, event, host))


def _figures(step: int, values: list[float]) -> Figures:
    kinds = [Figures.__annotations__[name] for name in Figures._fields[1:]]
    return Figures(step, *(kind(value) for kind, value in zip(kinds, values, strict=True)))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return a micro-batch on a device; from pinned memory without waiting."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def _counts(batches: list[Batch]) -> Tensor:
    """Return (4,) int64: masked tokens, pairs, tokens, squared lengths of all micro-batches."""
    names = "masked_labels", "next_sentence_label", "input_ids"
    counts = [sum(batch[name].numel() for batch in batches) for name in names]
    lengths = torch.cat([batch["cu_seq_lens_q"].diff() for batch in batches]).long()
    return torch.tensor([*counts, int(lengths.square().sum())])


def seed_of(seed: int, step: int, micro_batch: int) -> None:
    """Seed PyTorch's generators, of which dropout's bits come, for a micro-batch of a step."""
    key = np.array([seed % 2**64], np.uint64)
    for word in (step, micro_batch):
        key = mix(key + np.uint64(word + 1))
    torch.manual_seed(int(key[0]))


@torch.no_grad()
def evaluate(
    objective: PreTrainingObjective, batches: Iterable[tuple[Batch, bool]], ranks: Ranks
) -> dict[str, float]:
    """Return the mean losses and accuracies of micro-batches, without dropout.

    Args:
        objective: not wrapped.
        batches: those of this process, and whether they count.
        ranks: the processes, whose micro-batches count together.

    Returns:
        mlm_loss and nsp_loss in nats, mlm_accuracy, nsp_accuracy, labels, sequences.
    """
    training = objective.training
    objective.eval()
    total = torch.zeros(6, dtype=torch.float64, device=ranks.device)
    ones = torch.ones(2, device=ranks.device)
    try:
        for batch, counted in batches:
            _, sums = objective(to_device(batch, ranks.device), ones, True)
            counts = _counts([batch])[:2].to(ranks.device)
            if counted:
                total += torch.cat([torch.stack(sums).double(), counts.double()])
    finally:
        objective.train(training)
    mlm, nsp, mlm_correct, nsp_correct, labels, pairs = ranks.sum(total).tolist()
    labels, pairs = max(labels, 1), max(pairs, 1)
    return {
        "mlm_loss": mlm / labels,
        "nsp_loss": nsp / pairs,
        "mlm_accuracy": mlm_correct / labels,
        "nsp_accuracy": nsp_correct / pairs,
        "labels": int(labels),
        "sequences": int(pairs),
    }


def first_nonfinite(
    objective: PreTrainingObjective, step: Step, number: int, seed: int, ranks: Ranks
) -> str:
    """Return the name of what is not finite first in a step, which is made again for that.

    It is a parameter, the output of a module in the order of the forward, a loss, or a parameter's
    gradient in the order of the backward.
    """
    parameters = dict(objective.model.named_parameters())
    for name, p in parameters.items():
        if not p.isfinite().all():
            return f"the parameter {name}"
    counts = torch.ones(2, device=ranks.device)
    for j, batch in step.batches:
        seed_of(seed, number, j)
        objective.zero_grad(set_to_none=True)
        with _watched(objective.model) as seen:
            loss, _ = objective(to_device(batch, ranks.device), counts)
        if seen:
            return f"the output of {seen[0]}"
        if not loss.isfinite():
            return "the loss"
        loss.backward()
        for name, p in reversed(parameters.items()):
            if p.grad is not None and not p.grad.isfinite().all():
                return f"the gradient of {name}"
    objective.zero_grad(set_to_none=True)
    return "nothing when the step is made again"


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Collect the names of modules whose output is not finite, in the order in which they end."""
    seen: list[str] = []
    hooks = []
    for name, module in model.named_modules():

        def note(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            for tensor in tensors:
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    if not tensor.isfinite().all():
                        seen.append(name or "the model")

        hooks.append(module.register_forward_hook(note))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
