"""How far a long work is, on the standard error: a bar on a terminal, else a line now and then."""

import sys
import time
from typing import Any

_EVERY = 15.0  # seconds between lines


class Progress:
    """Facts, rate and time left, as a context manager.

    Args:
        total: how much there is to do, in any unit; None: nobody knows.
        shown: False keeps it quiet; None shows it where the standard error is a terminal.
        label: what is done.
        unit: what the rate counts.
    """

    def __init__(
        self,
        total: int | None = None,
        shown: bool | None = True,
        label: str = "encode",
        unit: str = "texts",
    ) -> None:
        terminal = sys.stderr.isatty()
        self._total, self._terminal = total, terminal
        self._label, self._unit = label, unit
        self._shown = terminal if shown is None else shown
        self._started = self._last = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        self._line = ""  # to be printed

    def __enter__(self) -> "Progress":
        if self._shown and self._terminal:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn(self._label),
                BarColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(self._label, total=self._total, facts="")
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._line and error == (None, None, None):
            self._print()

    def note(self, message: str) -> None:
        """Print a line, above the bar."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            print(message, file=sys.stderr, flush=True)

    def update(self, completed: int, done: int, facts: str) -> None:
        """Show how far it is.

        Args:
            completed: of the total.
            done: units since the start, which tell the rate.
            facts: what to say.
        """
        now = time.monotonic()
        passed = max(now - self._started, 1e-9)
        facts += f", {done / passed:,.0f} {self._unit}/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=completed, facts=facts)
        elif self._shown:
            if self._total and completed and done:
                left = passed * (self._total / completed - 1)
                facts += f", {int(left // 3600)}:{int(left // 60 % 60):02}:{int(left % 60):02} left"
            self._line = f"bert-fast: {facts}"
            if now - self._last >= _EVERY:
                self._print()
                self._last = now

    def _print(self) -> None:
        print(self._line, file=sys.stderr, flush=True)
        self._line = ""
