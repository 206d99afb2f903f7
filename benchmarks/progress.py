"""How far a run is and how long it will take: a bar on a terminal, else a line at each step.

Nothing here imports torch.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


def words(seconds: float) -> str:
    """Return a time in words: "40 s", "12 min", "1 h 5 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class Progress:
    """The steps of a run, as a context manager.

    Args:
        expected: the seconds that each step is expected to take, in order; what the first steps
            took beside it corrects the rest.
        clock: gives the time in seconds.
    """

    def __init__(
        self, expected: Mapping[str, float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._expected, self._clock = dict(expected), clock
        self._done: set[str] = set()
        self._now: str | None = None
        self._start = self._since = clock()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "Progress":
        if sys.stdout.isatty():
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = TextColumn("{task.fields[says]}"), BarColumn()
            self._bar = Bar(*columns, transient=True)  # what is printed meanwhile stands above it
            self._task = self._bar.add_task("", total=1.0, says="")
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def at(self, step: str) -> None:
        """Say that a step is under way; those begun before it are over. Others are ignored."""
        if step not in self._expected:
            step = self._now or ""
        elif step != self._now:
            if self._now is not None:
                self._done.add(self._now)
            self._now, self._since = step, self._clock()
            if self._bar is None:
                with contextlib.suppress(OSError, ValueError):  # whoever reads may have gone
                    print(f"--- {self}", flush=True)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.share(), says=str(self))

    def left(self) -> float:
        """Return about how many seconds are left."""
        known = sum(self._expected[step] for step in self._done)
        pace = (self._since - self._start) / known if known else 1.0
        open_ = [s for s in self._expected if s not in self._done and s != self._now]
        rest = pace * sum(self._expected[step] for step in open_)
        if self._now is not None:
            own = pace * self._expected[self._now] - (self._clock() - self._since)
            rest += max(own, 0.0)
        return rest

    def share(self) -> float:
        """Return the share of the run that is over, of 1."""
        over = self._clock() - self._start
        return over / (over + self.left()) if over else 0.0

    def __str__(self) -> str:
        number = min(len(self._done) + 1, len(self._expected))
        return f"{number} of {len(self._expected)}, {self._now}: about {words(self.left())} left"
