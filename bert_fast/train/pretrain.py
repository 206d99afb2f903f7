"""A pretraining run: trains, evaluates, saves, goes on where it was, and stops well."""

import json
import platform
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from bert_fast.data.batches import Batches, Position, Step, steps
from bert_fast.data.synthetic import SyntheticBatches
from bert_fast.files import hold, staged
from bert_fast.ops.products import LIBRARIES, cpu_library, set_cpu_library
from bert_fast.train.build import DTYPES, HeldOut, Texts, build, build_model
from bert_fast.train.checkpoints import Checkpoint, Checkpoints, load
from bert_fast.train.distributed import Ranks, settle
from bert_fast.train.flops import formula, peak
from bert_fast.train.metrics import Log, Meter, peak_memory
from bert_fast.train.plot import plot
from bert_fast.train.sections import Phase
from bert_fast.train.settings import PretrainSettings
from bert_fast.train.state import capture, restore
from bert_fast.train.step import NonFiniteError, Stepper, evaluate, first_nonfinite

DONE, NON_FINITE, DISK, TERMINATED = 0, 65, 74, 143
CHECKPOINTS, SETTINGS, CURVES, LOCK = "checkpoints", "settings.yaml", "curves.png", "lock"
_INTERRUPTED = 130
_STATUS = {signal.SIGTERM: TERMINATED, signal.SIGUSR1: TERMINATED, signal.SIGINT: _INTERRUPTED}


def run(settings: PretrainSettings) -> int:
    """Train as the settings say, and return the exit status.

    Under torchrun each of its processes calls this. What was asked for is told on the standard
    error, records go to metrics.jsonl in the settings' output directory.

    Returns:
        0; 65 after a loss or gradient that is not finite; 74 if a checkpoint could not be written;
        143 after SIGTERM or SIGUSR1, 130 after SIGINT, the step done and saved.

    Raises:
        FileNotFoundError, ValueError: a corpus or checkpoint is missing, damaged or does not fit.
        NotImplementedError: settings that do not go together.
        RuntimeError: another process, or one that makes batches, died.
    """
    ranks = Ranks.join(settings.device)
    try:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        with _asked_to_stop() as asked:
            return _Run(settings, ranks).go(asked)
    except NonFiniteError as error:
        _say(f"error: {error}")
        return NON_FINITE
    finally:
        ranks.leave()


def _say(message: str) -> None:
    print(f"bert-fast: {message}", file=sys.stderr, flush=True)


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Collect the signals that ask for an end; a second one ends the process at once."""
    asked: list[int] = []

    def note(number: int, frame: object) -> None:
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in _STATUS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Run:
    """What a run has in hand."""

    def __init__(self, settings: PretrainSettings, ranks: Ranks) -> None:
        if settings.micro_batches % ranks.world:
            want = f"a multiple of the {ranks.world} processes"
            raise ValueError(f"micro_batches: want {want}, got {settings.micro_batches}")
        self.settings, self.ranks, self.output = settings, ranks, Path(settings.output)
        self.texts = Texts(settings, verify=ranks.rank == 0)
        self.config = settings.bert_config(self.texts.vocab_size, self.texts.pad_token_id)
        if (tokenizer := self.texts.tokenizer) is not None:  # it goes beside the model
            most = self.config.max_position_embeddings
            tokenizer.model_max_length = min(tokenizer.model_max_length, most)
        self.trained = build(settings, build_model(settings, self.config, self.texts), ranks)
        self.scaler = None
        if settings.precision == "fp16":
            self.scaler = torch.amp.GradScaler(ranks.device.type)
        parts = self.trained.module, self.trained.optimizer, ranks, settings.seed, self.scaler
        self.stepper = Stepper(*parts)
        self.checkpoints = Checkpoints(self.output / CHECKPOINTS, settings.save.keep)
        self.step, self.position = 0, Position(0, 0)
        self.tokens = 0  # real ones, since the first step
        self.recent: deque[tuple[int, Step, Batches | SyntheticBatches]] = deque(maxlen=2)

    def go(self, asked: list[int]) -> int:
        """Train from where the last run stopped to the end; return the exit status."""
        settings, ranks = self.settings, self.ranks
        if ranks.rank == 0:
            self.output.mkdir(parents=True, exist_ok=True)
            self.lock = hold(self.output / LOCK)
        self._resume()
        if ranks.rank == 0:
            (self.output / SETTINGS).write_text(settings.to_yaml(), encoding="utf-8")
        ceiling = peak(ranks.device, DTYPES[settings.precision])
        done = {"steps": settings.steps, "step": self.step}
        self.meter = Meter(
            self.config, **done, tokens=self.tokens, peak=ceiling.flops * ranks.world
        )
        self.log = self._open_log(done)
        self._record("resume" if self.step else "start", **self._facts(), peak=ceiling.source)
        try:
            while self.step < settings.steps:
                status = self._phase(asked)
                if status != DONE:
                    self._record("stop", status=status)
                    return status
            self._record("stop", status=DONE)
            return DONE
        except NonFiniteError as error:
            found = NonFiniteError(error.step, f"{error}; {self._diagnose(error)}")
            self._record("stop", status=NON_FINITE, reason=str(found))
            raise found from None
        finally:
            if self.log is not None:
                self.log.close()
                if settings.log.plot:
                    _say(plot(self.output, self.output / CURVES))

    def _phase(self, asked: list[int]) -> int:
        """Train to the end of a phase; return DONE, or why the run ends before."""
        settings, ranks = self.settings, self.ranks
        number, within = settings.place_of(self.step)
        phase = settings.phases[number]
        if within == 0 and self.position.batch:  # its micro-batches are others than the last one's
            self.position = Position(self.position.epoch + 1, 0)
        batches = self.texts.batches(phase)
        if self.position.batch >= batches.count(self.position.epoch):  # it had smaller ones
            self.position = Position(self.position.epoch + 1, 0)
        held_out = self._held_out(phase)
        if self.step == 0 and settings.model.init is not None:  # what it knows already
            with self.meter.paused():
                self._evaluate(held_out)
        made = steps(
            batches,
            self.position,
            settings.micro_batches,
            rank=ranks.rank,
            world=ranks.world,
            workers=settings.data.workers,
            pin_memory=ranks.device.type == "cuda",
        )
        with closing(made):
            for _ in range(phase.steps - within):
                with self.meter.waiting():
                    step = next(made)
                self.recent.append((self.step, step, batches))
                status = self._step(step, held_out, asked)
                if status is not None:
                    return status
        return DONE

    def _step(self, step: Step, held_out: list[HeldOut], asked: list[int]) -> int | None:
        """Make a step, and what is due behind it; return the exit status if the run ends here."""
        settings, ranks = self.settings, self.ranks
        rate, due = settings.learning_rate(self.step), self._due(self.step + 1)
        self.stepper.run(self.step, step, rate, count_correct=due(settings.log.every))
        self.step, self.position = self.step + 1, step.after
        stop = ranks.any(bool(asked))
        saves = settings.save.every is not None and (stop or due(settings.save.every))
        for figures in self.stepper.figures(wait=saves or stop or due(None)):
            self.meter.add(figures)
        if due(settings.log.every):
            self._tell(rate)
        with self.meter.paused():
            if settings.evaluate.every is not None and due(settings.evaluate.every):
                self._evaluate(held_out)
            if saves and not self._save():
                return DISK
        if not stop:
            return None
        return _STATUS[asked[0]] if asked else TERMINATED

    def _due(self, step: int) -> Callable[[int | None], bool]:
        """Return what says whether something is due that is done every so many steps."""
        last = step == self.settings.steps
        return lambda every: last or (every is not None and step % every == 0)

    # --- state -----------------------------------------------------------------------------------

    def _resume(self) -> None:
        """Go on from a checkpoint, the same in all processes, if the settings ask for one."""
        wanted, ranks = self.settings.save.resume, self.ranks
        found = None
        if wanted == "auto":
            found = self._newest() if ranks.rank == 0 else None
            step = ranks.of_first(-1 if found is None else found.state.step)
            aside = ranks.of_first(found is not None and found.aside)
            if found is None and step >= 0:
                found = load(self.checkpoints.path_of(step, bool(aside)), config=self.config)
        elif wanted != "no":
            self.texts.check_vocabulary("save.resume", wanted)
            found = load(wanted, config=self.config)
            if found.state.step > self.settings.steps:
                want = f"a checkpoint of at most {self.settings.steps} steps, as the run has"
                raise ValueError(f"save.resume: {wanted}: want {want}, got {found.state.step}")
        self._choose_library(found)
        if found is None:
            return
        state = found.state
        restore(state, self.trained.model, self.trained.optimizer)
        self.step, self.position = state.step, Position(**state.position)
        self.tokens = state.facts["tokens"]
        if self.scaler is not None and state.facts["scaler"] is not None:
            self.scaler.load_state_dict(state.facts["scaler"])
        if ranks.rank == 0:
            _say(f"goes on from {found.path}")

    def _newest(self) -> Checkpoint | None:
        """Return the newest checkpoint of this run; None where there is none at all."""
        refused: list[str] = []
        found = self.checkpoints.newest(refused.append, config=self.config, facts=self._identity())
        for reason in refused:
            _say(f"passed over: {reason}")
        if refused and found is None:
            want = "a checkpoint of this run, or save.resume=no to begin anew"
            raise ValueError(
                f"{self.checkpoints.directory}: want {want}, got {len(refused)} others"
            )
        return found

    def _choose_library(self, found: Checkpoint | None) -> None:
        """Take a checkpoint's library for products on the CPU, else the first process's choice."""
        if self.ranks.device.type == "cpu":
            chosen = cpu_library() if found is None else found.state.facts["cpu_library"]
            set_cpu_library(LIBRARIES[self.ranks.of_first(LIBRARIES.index(chosen))])

    def _identity(self) -> dict[str, Any]:
        """Return the facts by which a checkpoint is known as this run's."""
        return {"fingerprint": self.settings.fingerprint(self.texts.digest)}

    def _facts(self) -> dict[str, Any]:
        """Return what a checkpoint and the log tell of a run."""
        return self._identity() | {
            "corpus": self.texts.digest,
            "tokens": self.meter.tokens,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "cpu_library": cpu_library(),
            "threads": torch.get_num_threads(),
            "world": self.ranks.world,
            "device": _name_of(self.ranks.device),
            "torch": torch.__version__,
            "bert_fast": sys.modules["bert_fast"].__version__,
            "parameters": sum(p.numel() for p in self.trained.model.parameters()),
            "flops": formula(self.config),
        }

    def _save(self) -> bool:
        """Write a checkpoint; return whether the run may go on."""
        saved = True
        if self.ranks.rank == 0 or self.settings.fsdp:
            settle(self.trained.module)
            state = capture(
                self.trained.model,
                self.trained.optimizer,
                step=self.step,
                position=self.position._asdict(),
                facts=self._facts(),
            )
        if self.ranks.rank == 0:
            try:
                tokenizer = self.texts.tokenizer
                self.checkpoints.save(state, config=self.config, tokenizer=tokenizer)
            except OSError as error:
                saved = self.settings.save.on_error == "warn"
                kind, reason = "warning" if saved else "error", error.strerror or str(error)
                at = f"{error.filename}: " if error.filename and error.strerror else ""
                _say(f"{kind}: no checkpoint of step {self.step}: {at}{reason}")
        return bool(self.ranks.of_first(int(saved)))

    # --- figures ---------------------------------------------------------------------------------

    def _open_log(self, done: dict[str, int]) -> Log | None:
        """Return what is told of the run; only the first process tells."""
        if self.ranks.rank != 0:
            return None
        return Log(self.output, **done, tensorboard=self.settings.log.tensorboard)

    def _record(self, kind: str, **facts: Any) -> None:
        if self.log is not None:
            self.log.write({"kind": kind, "step": self.step} | facts)

    def _tell(self, rate: float) -> None:
        """Record what was trained since the last time."""
        memory = peak_memory(self.ranks.device)
        scale = None if self.scaler is None else self.scaler.get_scale()
        record = self.meter.record(epoch=self.position.epoch, lr=rate, memory=memory, scale=scale)
        if self.log is not None:
            self.log.write(record)

    def _held_out(self, phase: Phase) -> list[HeldOut]:
        """Return what the model is tried on."""
        if self.settings.evaluate.every is None:
            return []
        return self.texts.held_out(phase, self.ranks.rank, self.ranks.world)

    def _evaluate(self, held_out: list[HeldOut]) -> None:
        for one in held_out:
            found = evaluate(self.trained.objective, one.batches, self.ranks)
            facts = {name: getattr(one, name) for name in ("corpus", "digest", "unigram_entropy")}
            self._record("evaluation", **found, **facts)

    def _diagnose(self, error: NonFiniteError) -> str:
        """Return what was not finite first, and where the ids of the batches are now written."""
        step, batches = next(last[1:] for last in self.recent if last[0] == error.step)
        first = "not looked for in sharded parameters"
        if not self.settings.fsdp:
            parts = self.trained.objective, step, error.step, self.settings.seed, self.ranks
            first = first_nonfinite(*parts)
        ids = [{**at._asdict(), "pairs": batches.numbers(at)} for at in step.positions]
        name = f"nonfinite-step-{error.step:08}-rank-{self.ranks.rank}.json"
        found = {"step": error.step, "first": first, "reason": str(error), "batches": ids}
        with staged(self.output) as write:
            write(name, [json.dumps(found, indent=1).encode()])
        return f"first of all {first}; the batches are in {self.output / name}"


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
