"""The directory in which an encoding keeps what is done, so that it can be killed at any moment.

Beside OUTPUT lies OUTPUT.parts: `manifest.json`, which says what the vectors are made with, and a
file for each chunk of texts, named by its number and a hash of its texts. A part takes its name
when it is whole and on the disk, so a part that is there is done; with other texts its name would
be another. The output is written in there too, takes its place by renaming, and then all goes.
"""

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from bert_fast.data.readers import STDIN
from bert_fast.encode.peers import Peers
from bert_fast.files import hold, read_json, staged

MANIFEST, PUBLISHING, JOINED, LOCK = "manifest.json", "publishing.json", "joined", "lock"
_MEASURED = "measured"
_OURS = re.compile(r"manifest\.json|publishing\.json|joined|lock|(part|process)-.*|\..*\.tmp")


class Work:
    """The work directory of one output.

    Attributes:
        path: the directory.
        target: the output.
        measured: what was measured where the work began; see `begin`.
    """

    def __init__(self, target: Path, sources: Sequence[str], overwrite: bool) -> None:
        """Name the directory; see `begin`."""
        self.path, self.target = target.with_name(f"{target.name}.parts"), target
        self._sources, self._overwrite = sources, overwrite
        self.measured: dict[str, Any] = {}
        self._lock: BinaryIO | None = None

    def check(self) -> None:
        """Refuse to replace an output that was there before.

        Raises:
            OSError: the output is there, or cannot be written there.
        """
        if self.target.is_dir() or (self.path.exists() and not self.path.is_dir()):
            raise IsADirectoryError(f"{self.target}: want the name of a file, got something else")
        if not self.target.parent.is_dir():
            raise FileNotFoundError(f"{self.target}: want a directory to write it into, got none")
        # an output that a run was killed while putting in its place is that run's own
        if self.target.exists() and not self._overwrite and self._published() is None:
            raise FileExistsError(f"{self.target}: is there already; --overwrite replaces it")

    def begin(
        self, manifest: dict[str, Any], peers: Peers, measure: Callable[[], dict[str, Any]] = dict
    ) -> bool:
        """Make the directory, or take up the work in it; return whether all is done already.

        Args:
            manifest: what decides the vectors; of another work nothing is taken up.
            peers: the processes that share it.
            measure: called where the work begins; what it returns is `measured` in every process
                and in every run that goes on with the work.

        Raises:
            ValueError: it belongs to a work with other arguments.
            OSError: another process works there; or as for `check`.
        """
        self.check()
        found = self._manifest()
        if found is not None and not _is_of(manifest, found) and not self._overwrite:
            keys = (found.keys() | manifest) - {_MEASURED}
            other = sorted(k for k in keys if found.get(k) != manifest.get(k))
            raise ValueError(
                f"{self.path}: holds the work of a run with another {', '.join(other)};"
                " run that again, or discard it with --overwrite"
            )
        if self._is_done(manifest):
            return True
        if peers.rank:
            peers.wait(lambda: _is_of(manifest, self._manifest()), of=[0])
        else:
            self._take(manifest, found, measure)
        self.measured = (self._manifest() or {}).get(_MEASURED, {})
        return False

    def has(self, part: str) -> bool:
        """Return whether a part is done."""
        return (self.path / part).exists()

    def keep(self, part: str, chunks: Any) -> None:
        """Write a part; it is there as a whole or not at all."""
        with staged(self.path) as write:
            write(part, chunks)

    def publish(self, write: Callable[[BinaryIO], None]) -> None:
        """Write the output and put it in its place."""
        with open(self.path / JOINED, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        published = {"manifest": self._manifest(), "inputs": self._inputs()}
        self.keep(PUBLISHING, [json.dumps(published).encode()])
        os.replace(self.path / JOINED, self.target)
        with suppress(OSError):  # not every system can do this to a directory
            handle = os.open(self.target.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def remove(self) -> None:
        """Remove the directory; what tells a restart that nothing is left to do goes last."""
        for name in sorted(os.listdir(self.path), key=[MANIFEST, PUBLISHING, PUBLISHING].count):
            with suppress(FileNotFoundError):
                (self.path / name).unlink()
        for attempt in range(50):
            try:
                shutil.rmtree(self.path)
                break
            except FileNotFoundError:
                break
            except OSError as error:  # other processes may still say here that they live
                if error.errno != errno.ENOTEMPTY or attempt == 49:
                    raise
                time.sleep(0.1)
        if self._lock is not None:
            self._lock.close()

    def is_there(self) -> bool:
        """Return whether the work goes on."""
        return (self.path / MANIFEST).exists()

    def _take(
        self,
        manifest: dict[str, Any],
        found: dict[str, Any] | None,
        measure: Callable[[], dict[str, Any]],
    ) -> None:
        """What the first process does: hold the directory, and make it that of this work."""
        self.path.mkdir(exist_ok=True)
        for name in os.listdir(self.path):
            if not _OURS.fullmatch(name):
                raise FileExistsError(f"{self.path}: holds {name}, which is of no encoding")
        self._lock = hold(self.path / LOCK)
        if not _is_of(manifest, found):
            for path in self.path.iterdir():
                if path.name != LOCK and not path.name.startswith("process-"):
                    path.unlink(missing_ok=True)
            text = json.dumps(manifest | {_MEASURED: measure()}, indent=1)
            self.keep(MANIFEST, [text.encode()])

    def _manifest(self) -> dict[str, Any] | None:
        return _read(self.path, MANIFEST)

    def _published(self) -> dict[str, Any] | None:
        """Return what an output that is, or is about to be, in its place was made of."""
        return _read(self.path, PUBLISHING)

    def _is_done(self, manifest: dict[str, Any]) -> bool:
        """Return whether the output is in its place, and of the inputs as they are now."""
        inputs, published = self._inputs(), self._published() or {}
        made = _is_of(manifest, published.get("manifest")) and published.get("inputs") == inputs
        return (
            made
            and None not in inputs
            and self.target.exists()
            and not (self.path / JOINED).exists()
        )

    def _inputs(self) -> list[list[int] | None]:
        """Size and time of each input; of one that is no file, as a pipe, nothing is known."""
        found: list[list[int] | None] = []
        for source in self._sources:
            is_file = source != STDIN and os.path.isfile(source)
            found.append(None)
            if is_file:
                stat = os.stat(source)
                found[-1] = [stat.st_size, stat.st_mtime_ns]
        return found


def _is_of(manifest: dict[str, Any], found: dict[str, Any] | None) -> bool:
    """Return whether what is found is the manifest of this work."""
    return found is not None and {k: v for k, v in found.items() if k != _MEASURED} == manifest


def _read(directory: Path, name: str) -> dict[str, Any] | None:
    try:
        return read_json(directory, name)
    except FileNotFoundError:
        return None
