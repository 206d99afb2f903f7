"""The live line of a run: rewritten in place on a terminal, else a line now and then."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

_EVERY = 15.0  # seconds between lines where there is no terminal


class Live:
    """Shows records on the standard error.

    Args:
        steps: of the whole run.
        shown: False keeps it quiet.
        clock: seconds.
    """

    def __init__(
        self, steps: int, shown: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._steps, self._shown, self._clock = steps, shown, clock
        self._last = clock()
        self._line = ""  # to be printed
        self._screen: Any = None
        if shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live as Screen

            console = Console(stderr=True, highlight=False)
            self._screen = Screen(console=console, auto_refresh=False)
            self._screen.start()

    def show(self, record: Mapping[str, Any]) -> None:
        """Show a "train" record in the live line, an "evaluation" in one of its own."""
        if not self._shown:
            return
        line = format_record(record, self._steps)
        if record["kind"] == "evaluation":
            self.note(line)
        elif self._screen is not None:
            from rich.text import Text

            self._screen.update(Text(line), refresh=True)
        else:
            self._line = line
            if self._clock() - self._last >= _EVERY:
                self._print()

    def note(self, message: str) -> None:
        """Print a line, above the live one."""
        if self._screen is not None:
            self._screen.console.print(message, markup=False, soft_wrap=True)
        else:
            if self._line:  # what it is about comes first
                self._print()
            print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the last line there."""
        if self._screen is not None:
            self._screen.stop()
        elif self._line:
            self._print()

    def _print(self) -> None:
        print(self._line, file=sys.stderr, flush=True)
        self._line, self._last = "", self._clock()


def format_record(record: Mapping[str, Any], steps: int) -> str:
    """Return the line for a "train" or "evaluation" record.

    Args:
        record: see `metrics`.
        steps: of the whole run.
    """
    losses = f"MLM {_number(record['mlm_loss'])}, NSP {_number(record['nsp_loss'])}"
    right = f"right {_percent(record['mlm_accuracy'])}, {_percent(record['nsp_accuracy'])}"
    if record["kind"] == "evaluation":
        of = f"(unigrams {_number(record['unigram_entropy'])})"
        return f"step {record['step']:,} held out of {record['corpus']}: {losses} {of}, {right}"
    parts = [
        f"step {record['step']:,}/{steps:,}",
        f"loss {_number(record['loss'])} ({losses})",
        right,
        f"{record['tokens_per_second']:,.0f} tokens/s",
        f"{record['sequences_per_second']:,.0f} sequences/s",
    ]
    if record["mfu"] is not None:
        parts.append(f"MFU {_percent(record['mfu'])}")
    parts.append(f"data wait {_percent(record['data_wait'] / record['seconds'])}")
    if record["memory"] is not None:
        parts.append(f"{record['memory'] / 1e9:.1f} GB")
    if record["skipped"]:
        parts.append(f"{record['skipped']:,} skipped")
    return ", ".join([*parts, f"{_duration(record['left'])} left"])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(share: float | None) -> str:
    return "- %" if share is None else f"{100 * share:.1f} %"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
