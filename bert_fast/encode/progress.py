"""How far an encoding is, on the standard error: a bar on a terminal, else a line now and then."""

import sys
import time
from types import TracebackType
from typing import Any

_EVERY = 15.0  # seconds between lines


class Progress:
    """Rows, bytes, rate and time left, as a context manager."""

    def __init__(self, total: int | None = None, shown: bool = True) -> None:
        """Show nothing yet.

        Args:
            total: bytes of the inputs; None: nobody knows.
            shown: False keeps it quiet.
        """
        self._total, self._shown = total, shown
        self._started = self._last = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        self._rows = 0  # that were encoded here, and tell the rate

    def __enter__(self) -> "Progress":
        if self._shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("encode"),
                BarColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("encode", total=self._total, facts="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, message: str) -> None:
        """Print a line, above the bar."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            print(message, file=sys.stderr, flush=True)

    def update(self, position: int, rows: int, encoded: int) -> None:
        """Show how far it is.

        Args:
            position: bytes of the inputs that were read.
            rows: how many there were until now.
            encoded: how many of them this process encoded in this run.
        """
        now = time.monotonic()
        rate = encoded / max(now - self._started, 1e-9)
        size = f"{position / 1e6:,.1f}"
        if self._total is not None:
            size += f" of {self._total / 1e6:,.1f}"
        facts = f"{rows:,} rows, {size} MB, {rate:,.0f} texts/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=position, facts=facts)
        elif self._shown and now - self._last >= _EVERY:
            if self._total and position and encoded:
                left = (now - self._started) * (self._total / position - 1)
                facts += f", {int(left // 3600)}:{int(left // 60 % 60):02}:{int(left % 60):02} left"
            print(f"bert-fast: {facts}", file=sys.stderr, flush=True)
            self._last = now
