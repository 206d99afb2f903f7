"""What a training run tells: records of its intervals in metrics.jsonl, and a live line.

A record is a JSON object of one line. All have "kind" and "step", the number of steps that are
done. "start", "resume" and "stop" hold facts; "train" has what `Meter.record` returns; "evaluation"
losses and accuracies on held-out documents, and their unigram entropy in nats.
"""

import json
import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bert_fast.config import BertConfig
from bert_fast.files import staged
from bert_fast.train.flops import training_flops
from bert_fast.train.live import Live
from bert_fast.train.step import Figures

METRICS = "metrics.jsonl"
_SUMS = ("mlm", "nsp", "nsp_correct", "labels", "pairs", "tokens")
_RECENT = 20  # intervals that tell the time left


class Meter:
    """Sums of the steps of an interval, and its time, of which a record is made.

    Args:
        config: of the model.
        steps: of the whole run.
        step: steps that are done at the start.
        tokens: real ones that were trained on before.
        peak: FLOP/s of all devices together; None: MFU is not told.
        clock: seconds.
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        steps: int,
        step: int = 0,
        tokens: int = 0,
        peak: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._config, self._steps, self._peak, self._clock = config, steps, peak, clock
        self.step, self.tokens = step, tokens
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT)
        self._begin()

    def _begin(self) -> None:
        self._first, self._started = self.step, self._clock()
        self._sums = dict.fromkeys(_SUMS, 0.0)
        self._counted = self._correct = 0.0  # labels of the steps that counted right ones; those
        self._flops, self._waited, self._paused = 0, 0.0, 0.0
        self._last: Figures | None = None

    def add(self, figures: Figures) -> None:
        """Add a step."""
        for name in _SUMS:
            self._sums[name] += getattr(figures, name)
        if not math.isnan(figures.mlm_correct):
            self._correct += figures.mlm_correct
            self._counted += figures.labels
        counts = figures.tokens, figures.squares, figures.labels
        self._flops += training_flops(self._config, *map(int, counts))
        self.tokens += int(figures.tokens)
        self.step, self._last = figures.step + 1, figures

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for data."""
        started = self._clock()
        yield
        self._waited += self._clock() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out: evaluations, checkpoints."""
        started = self._clock()
        yield
        self._paused += self._clock() - started

    def record(
        self, *, epoch: int, lr: float, memory: int | None = None, scale: float | None = None
    ) -> dict[str, Any]:
        """Return the record of the steps since the last one, and begin anew.

        Args:
            epoch: of the last step.
            lr: its learning rate.
            memory: bytes at most, see `peak_memory`.
            scale: of fp16's loss.

        Returns:
            kind: "train". step: steps done. epoch, lr, scale, memory: as given. loss: the sum of
            mlm_loss and nsp_loss, means in nats. mlm_accuracy: None where no step counted it.
            nsp_accuracy. grad_norm: of the last step. tokens, sequences, labels: of the interval,
            of all processes. seconds: of it. tokens_per_second, sequences_per_second. mfu: share of
            the peak, or None. data_wait: seconds of it. skipped: steps since the process began.
            tokens_total: since the first step. left: seconds.
        """
        sums, last, done = self._sums, self._last, self.step - self._first
        seconds = max(self._clock() - self._started - self._paused, 1e-9)
        self._recent.append((done, seconds))
        steps = sum(count for count, _ in self._recent)
        pace = sum(spent for _, spent in self._recent) / max(steps, 1)
        mlm, nsp = (sums[a] / max(sums[b], 1) for a, b in (("mlm", "labels"), ("nsp", "pairs")))
        record = {
            "kind": "train",
            "step": self.step,
            "epoch": epoch,
            "lr": lr,
            "loss": mlm + nsp,
            "mlm_loss": mlm,
            "nsp_loss": nsp,
            "mlm_accuracy": self._correct / self._counted if self._counted else None,
            "nsp_accuracy": sums["nsp_correct"] / max(sums["pairs"], 1),
            "grad_norm": None if last is None else last.grad_norm,
            "tokens": int(sums["tokens"]),
            "sequences": int(sums["pairs"]),
            "labels": int(sums["labels"]),
            "seconds": seconds,
            "tokens_per_second": sums["tokens"] / seconds,
            "sequences_per_second": sums["pairs"] / seconds,
            "mfu": None if self._peak is None else self._flops / seconds / self._peak,
            "data_wait": self._waited,
            "memory": memory,
            "scale": scale,
            "skipped": 0 if last is None else int(last.skipped),
            "tokens_total": self.tokens,
            "left": pace * (self._steps - self.step),
        }
        self._begin()
        return record


class Log:
    """Writes records to a file as they come, shows them, and hands them to TensorBoard.

    Args:
        directory: of the run; it is there.
        steps: of the whole run.
        step: steps that are done at the start. Records of later ones, which an earlier process
            made, are removed, and half a line that it left; with 0 the file begins anew.
        tensorboard: write events into directory/tensorboard too.
        shown: whether the live line is.

    Raises:
        ImportError: tensorboard is wanted and not installed.
    """

    def __init__(
        self,
        directory: Path,
        *,
        steps: int,
        step: int = 0,
        tensorboard: bool = False,
        shown: bool = True,
    ) -> None:
        self.path = directory / METRICS
        self._board = _tensorboard(directory / "tensorboard", step) if tensorboard else None
        if self.path.exists():
            kept = [line for line in _lines(self.path) if 0 < step and line["step"] <= step]
            with staged(directory) as write:
                write(METRICS, [_line(record) for record in kept])
        self._file = open(self.path, "ab")
        self._live = Live(steps, shown)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Show the last line and close the file."""
        self._live.close()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def note(self, message: str) -> None:
        """Print a line, above the live one."""
        self._live.note(message)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record; numbers that are not finite become null."""
        self._file.write(_line(record))
        self._file.flush()
        kind, step = record["kind"], record["step"]
        if kind in ("train", "evaluation"):
            self._live.show(record)
            for name, value in record.items() if self._board is not None else ():
                if name not in ("kind", "step") and isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file; half a line, as a killed process leaves it, is none.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return list(_lines(path))


def peak_memory(device: torch.device) -> int:
    """Return the bytes that were taken at most: a GPU's by tensors, else those of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            kinds = {"kind": str, "step": int}
            if isinstance(record, dict) and all(
                isinstance(record.get(name), kind) for name, kind in kinds.items()
            ):
                yield record


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(_finite(record), ensure_ascii=False) + "\n").encode()


def _finite(value: Any) -> Any:
    """Return the value with None for what is not finite, since JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tensorboard(directory: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        want = "want tensorboard for log.tensorboard, got nothing"
        raise ImportError(f"{want}: pip install 'bert-fast[train]'") from error
    return SummaryWriter(str(directory), purge_step=step + 1)
