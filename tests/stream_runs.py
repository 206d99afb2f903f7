"""An encoder without a model, and encodings with it in processes of their own.

    python stream_runs.py '{"sources": ..., "target": ..., "chunk": ...}'

prints the summary and the process's largest memory in KiB as JSON.
"""

import dataclasses
import hashlib
import json
import os
import resource
import sys
import time

import numpy as np
import pytest

DIMENSION = 5
TEXTS = [f"text {i} é" for i in range(11)]


class FakeEncoder:
    """Vectors from a hash of each text; the first number is how many texts came in one call."""

    max_seq_length = 16

    def __init__(self, delay=0.0, record=True):
        self.calls, self.delay, self.record = [], delay, record

    def get_sentence_embedding_dimension(self):
        return DIMENSION

    def encode(self, texts, batch_size=32, prompt=None, prompt_name=None, show_progress_bar=None):
        if self.record:
            self.calls.append(list(texts))
        time.sleep(self.delay)
        vectors = np.stack([self.vector(f"{prompt or ''}{text}") for text in texts])
        vectors[:, 0] = len(texts)
        return vectors

    @staticmethod
    def vector(text):
        """The vector of one text, but for its first number."""
        digest = hashlib.blake2b(text.encode(), digest_size=2 * DIMENSION).digest()
        return np.frombuffer(digest, "<u2").astype(np.float32) / 7


def run(sources, target, *, encoder=None, delay=0.0, **options):
    """Encode with a fake encoder, in this process."""
    from bert_fast.encode.stream import encode_file

    encoder = encoder or FakeEncoder(delay)
    return encode_file(encoder, sources, target, fingerprint="fake", **options)


def want(texts, chunk):
    """The vectors of texts (None: NaN) that the fake encoder gives in chunks of that size."""
    rows = []
    for first in range(0, len(texts), chunk):
        part = texts[first : first + chunk]
        count = sum(text is not None for text in part)
        for text in part:
            rows.append(np.full(DIMENSION, np.nan) if text is None else FakeEncoder.vector(text))
            rows[-1][0] = count if text is not None else np.nan
    return np.array(rows, np.float32).reshape(-1, DIMENSION)


def same(got, expected):
    """Whether the bits are."""
    return got.dtype == expected.dtype and got.tobytes() == expected.tobytes()


def left(directory):
    """The names in a directory."""
    return sorted(path.name for path in directory.iterdir())


def in_child(action, kill_at=None, after=None):
    """Fork, do it, and return how the child ended: 0, or the number of the signal that killed it.

    Args:
        action: what the child does.
        kill_at: the child kills itself before this change of the disk, from 0.
        after: seconds after which it is killed.
    """
    child = os.fork()
    if not child:
        try:
            if kill_at is not None:
                die_at(kill_at)
            action()
            os._exit(0)
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    if after is not None:
        time.sleep(after)
        os.kill(child, 9)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status)


def die_at(moment):
    """Have this process killed before its moment-th change of the disk."""
    count = -1

    def before(name):
        function = getattr(os, name)

        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), 9)
            return function(*args, **kwargs)

        setattr(os, name, call)

    for name in ("replace", "fsync", "unlink", "rmdir", "mkdir"):
        before(name)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS), "utf-8")
    return path


if __name__ == "__main__":
    summary = run(**json.loads(sys.argv[1]), encoder=FakeEncoder(record=False))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({**dataclasses.asdict(summary), "peak": peak}, default=str))
