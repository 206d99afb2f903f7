"""Signals and dead workers, for test_batches.py: `python batches_worker.py FOLDER CASE...`.

In a process of its own, since signals and handlers are a process's. Prints a JSON object: what came
of each case.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from itertools import islice
from pathlib import Path

import corpora
import data_cases

from bert_fast.data.batches import Batches, Position, steps
from bert_fast.data.masking import MaskingRule
from bert_fast.data.shards import Split

VOCABULARY = 600
OPTIONS = {"cls_id": 2, "sep_id": 3, "max_length": 32, "seed": 1, "sequences": 2}


class Dying(Batches):
    """The worker that makes the third micro-batch ends."""

    status = 0

    def __getitem__(self, position):
        if position[1] == 3:
            os._exit(self.status)
        return super().__getitem__(position)


class Failing(Batches):
    """What makes the third micro-batch raises."""

    def __getitem__(self, position):
        if position[1] == 3:
            raise OSError("a file is gone")
        return super().__getitem__(position)


class Slow(Batches):
    """Each micro-batch takes a moment, so that the process waits for its workers."""

    def __getitem__(self, position):
        time.sleep(0.05)
        return super().__getitem__(position)


def ids(made, count):
    return [step.batches[0][1]["input_ids"][0].tolist() for step in islice(made, count)]


def until_error(made, count=12):
    """How many steps came, what error, and after how many seconds."""
    begun, came = time.monotonic(), 0
    try:
        for _ in islice(made, count):
            came += 1
    except Exception as error:
        return [came, type(error).__name__, str(error), time.monotonic() - begun]
    return [came, "", "", time.monotonic() - begun]


def children_left(seconds=10):
    """How many processes are left a while after."""
    end = time.monotonic() + seconds
    while multiprocessing.active_children() and time.monotonic() < end:
        time.sleep(0.05)
    return len(multiprocessing.active_children())


def kill_one(number):
    def act():
        os.kill(multiprocessing.active_children()[0].pid, number)

    return act


def signalled(batches, act):
    """Ask for 12 steps; `act` after the second. What came, and what this process was told."""
    made = steps(batches, Position(0, 0), 1, workers=2)
    got, error, told = ids(made, 2), None, []
    both = signal.SIGTERM, signal.SIGINT
    before = {number: signal.signal(number, lambda n, _: told.append(n)) for number in both}
    act()
    try:
        got += ids(made, 10)
    except Exception as caught:
        error = type(caught).__name__
    made.close()
    for number, handler in before.items():
        signal.signal(number, handler)
    return {"steps": len(got), "same": got, "told": told, "error": error, "left": children_left()}


def split_of(folder: Path) -> Split:
    documents = [
        [[5 + (7 * i + n) % 500 for n in range(4 + (i + j) % 9)] for j in range(6)]
        for i in range(14)
    ]
    return corpora.build(folder / "corpus", documents, vocab_size=VOCABULARY).split("train")


ACTIONS = {
    "nothing": lambda: None,
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGTERM to all": lambda: os.killpg(os.getpgid(0), signal.SIGTERM),
    "SIGINT to all": lambda: os.killpg(os.getpgid(0), signal.SIGINT),
    "SIGKILL to a worker": kill_one(signal.SIGKILL),
    "SIGTERM to a worker": kill_one(signal.SIGTERM),
}


def main(folder: Path, cases: list[str]) -> None:
    arguments = split_of(folder), MaskingRule(data_cases.tokenizer(VOCABULARY))
    plain = Batches(*arguments, **OPTIONS)
    want, made = ids(steps(plain, Position(0, 0), 1), 12), {}
    assert len({*map(str, want)}) == len(want)
    for case in cases:
        if case in ACTIONS:
            made[case] = signalled(Slow(*arguments, **OPTIONS), ACTIONS[case])
            made[case]["same"] = made[case]["same"] == want[: made[case]["steps"]]
            continue
        kind, number = case.split()
        batches = {"exit": Dying, "raise": Failing}[kind](*arguments, **OPTIONS)
        workers = 2
        if kind == "exit":
            batches.status = int(number)
        else:
            workers = int(number)
        made[case] = until_error(steps(batches, Position(0, 0), 1, workers=workers))
    print(json.dumps(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
