"""Processes that share a work: who they are, and whether the others still live.

The launcher (torchrun, say) sets RANK and WORLD_SIZE. They speak through small files in the work
directory, so it takes no network, and no clock that all of them have: each process writes its file
anew every second, and another is alive as long as its file changes.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

_BEAT = 1.0  # seconds
_POLL = 0.1


def ranks(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return (number of this process, number of processes), as a launcher has set them.

    Raises:
        ValueError: RANK is not below WORLD_SIZE, or one of them is no number.
    """
    values = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
    if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[1]):
        raise ValueError(f"RANK, WORLD_SIZE: want numbers, the first below, got {values}")
    return int(values[0]), int(values[1])


class Peers:
    """The processes of one work, seen from one of them.

    Within a `with` block this process shows that it lives; one that leaves by an exception tells
    the others why.
    """

    def __init__(
        self,
        directory: Path,
        rank: int = 0,
        world: int = 1,
        *,
        patience: float = 60.0,
    ) -> None:
        """Note what the files of the others say now: left by an earlier run, perhaps.

        Args:
            directory: where the files are; it need not exist yet.
            rank: number of this process.
            world: number of processes.
            patience: seconds without a change in its file until a process counts as dead; ten
                times as many until it counts as not coming.
        """
        self.rank, self.world = rank, world
        self._directory, self._patience = directory, patience
        self._token, self._beats, self._says = os.urandom(8).hex(), 0, "works"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        now = time.monotonic()
        self.others = [r for r in range(world) if r != rank]
        self._content = {r: self._read(r) for r in self.others}
        self._changed = dict.fromkeys(self.others, now)
        self._alive: set[int] = set()

    def __enter__(self) -> "Peers":
        if self.others:
            self._thread = threading.Thread(target=self._run, name="beat", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        if error is not None:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._says = f"failed {reason:.500}"
            self._beat()

    def ready(self) -> None:
        """Tell the others that this process has done its share."""
        self._says = "ready"

    def are_ready(self) -> bool:
        """Return whether every other process has come in this run and done its share."""
        self.look(self.others)
        return all(r in self._alive and self._content[r].endswith(b" ready") for r in self.others)

    def wait(self, until: Callable[[], bool], of: Iterable[int]) -> None:
        """Return when `until` is true, which these processes are to bring about.

        Raises:
            RuntimeError: one of them failed or shows no sign of life.
        """
        of = [*of]
        while not until():
            self.look(of)
            time.sleep(_POLL)

    def look(self, at: Iterable[int]) -> None:
        """See whether these processes live.

        Raises:
            RuntimeError: one of them failed or shows no sign of life.
        """
        now = time.monotonic()
        for r in at:
            content = self._read(r)
            if content and content != self._content[r]:
                self._content[r], self._changed[r] = content, now
                self._alive.add(r)
                says = content.decode(errors="replace").split(" ", 2)[-1]
                if says.startswith("failed "):
                    raise RuntimeError(f"process {r} of {self.world} {says}")
            silent = now - self._changed[r]
            if silent > self._patience * (1 if r in self._alive else 10):
                raise RuntimeError(
                    f"process {r} of {self.world}: no sign of life for {silent:.0f} seconds"
                )

    def _run(self) -> None:
        while not self._stop.is_set():
            self._beat()
            self._stop.wait(_BEAT)

    def _beat(self) -> None:
        self._beats += 1
        with suppress(OSError):  # the directory is not there yet, or not any more
            path = self._file(self.rank)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(f"{self._token} {self._beats} {self._says}", "utf-8")
            os.replace(temporary, path)

    def _read(self, rank: int) -> bytes:
        with suppress(OSError):
            return self._file(rank).read_bytes()
        return b""

    def _file(self, rank: int) -> Path:
        return self._directory / f"process-{rank}"
