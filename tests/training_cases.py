"""Small pretraining runs: a toy language on the disk, settings, runs in this process and others."""

import copy
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from bert_fast import cli
from bert_fast.data.batches import Batch
from bert_fast.data.shards import CorpusWriter
from bert_fast.ops.products import fixed_cpu_library, set_cpu_library
from bert_fast.tokenizer import BertTokenizer
from bert_fast.train import pretrain
from bert_fast.train.flops import Peak
from bert_fast.train.metrics import METRICS, read_records
from bert_fast.train.settings import PretrainSettings

TOPICS, FORMS = "bdfgklmnprst", "aeiouy"  # a word is a topic and a form
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = [*SPECIAL, ".", *(t + f for t in TOPICS for f in FORMS)]
DEADLINE = 60  # seconds; the longest run here needs about 5
# What a record says of the time and place of a run, not of what it computed.
CIRCUMSTANCES = (
    *("seconds", "tokens_per_second", "sequences_per_second", "mfu", "data_wait", "memory"),
    "left",
)


# --- texts and settings ---------------------------------------------------------------------------


def document(chance: random.Random, topics: str = TOPICS) -> list[list[int]]:
    """Sentences of one topic, whose forms follow one another, and a stop: "ki ko ku ."."""
    topic, sentences = chance.choice(topics), []
    for _ in range(chance.randint(2, 9)):
        first, length = chance.randrange(len(FORMS)), chance.randint(3, 9)
        words = [f"{topic}{FORMS[(first + i) % len(FORMS)]}" for i in range(length)]
        sentences.append([VOCABULARY.index(word) for word in [*words, "."]])
    return sentences


def corpus(
    path: Path,
    documents: int = 30,
    held_out: int = 8,
    seed: int = 0,
    apart: bool = False,
    vocabulary: Sequence[str] = VOCABULARY,
) -> Path:
    """Write a corpus of such documents with its tokenizer.

    Args:
        path: of its directory.
        documents: for training.
        held_out: documents for evaluation.
        seed: of the documents.
        apart: the topics of those held out are others, the last two.
        vocabulary: the words of the ids, in place of what they are in the documents.
    """
    chance = random.Random(seed)
    tokenizer = BertTokenizer(vocabulary)
    with CorpusWriter(path, vocab_size=len(vocabulary), shard_tokens=400) as writer:
        counts = np.zeros(len(vocabulary))
        for number in range(documents + held_out):
            split = "train" if number < documents else "held_out"
            topics = {"train": TOPICS[:-2], "held_out": TOPICS[-2:]}[split] if apart else TOPICS
            made = document(chance, topics)
            ids = [token for sentence in made for token in sentence]
            writer.add(split, ids, [*map(len, made)])
            counts += np.bincount(ids, minlength=len(counts)) * (number < documents)
        shares = counts[counts > 0] / counts.sum()
        facts = {"unigram_entropy": float(-(shares * np.log(shares)).sum())}
        writer.finish(facts, save_tokenizer=tokenizer.save_pretrained)
    return path


def settings(texts: Path | str, output: Path, **changes) -> PretrainSettings:
    """Settings of a run of 12 steps; changes by dotted names with "__" for the dots."""
    values = {
        "data": {"corpus": str(texts), "workers": 0},
        "model": {"size": "tiny", "config": {**SIZES, "max_position_embeddings": 32}},
        "phases": [{"steps": 12, "max_length": 24, "sequences": 4}],
        "optimizer": {"lr": 2e-3, "warmup": 0.2},
        "save": {"every": 4},
        "evaluate": {"every": None, "batches": 3},
        "log": {"every": 1, "plot": False},
        "output": str(output),
        "device": "cpu",
        "threads": 1,
    }
    for name, value in changes.items():
        *sections, last = name.split("__")
        place = values
        for section in sections:
            place = place[section]
        place[last] = copy.deepcopy(value)
    return PretrainSettings.from_dict(values)


SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


def padded(batch: Batch) -> dict[str, torch.Tensor]:
    """A packed micro-batch as transformers' BertForPreTraining takes it."""
    borders = batch["cu_seq_lens_q"].tolist()
    labels = torch.full_like(batch["input_ids"][0], -100)
    labels[batch["masked_positions"]] = batch["masked_labels"]
    columns = {
        "input_ids": batch["input_ids"][0],
        "token_type_ids": batch["token_type_ids"][0],
        "attention_mask": torch.ones_like(labels),
        "labels": labels,
    }
    fill = {"labels": -100}
    found = {
        name: torch.nn.utils.rnn.pad_sequence(
            [column[a:b] for a, b in pairwise(borders)], True, fill.get(name, 0)
        )
        for name, column in columns.items()
    }
    return found | {"next_sentence_label": batch["next_sentence_label"]}


# --- what a run leaves ----------------------------------------------------------------------------


def records(output: Path, kind: str = "train") -> list[dict]:
    """Its records of a kind, without what differs between runs of the same bits."""
    found = [r for r in read_records(Path(output) / METRICS) if r["kind"] == kind]
    return [{k: v for k, v in record.items() if k not in CIRCUMSTANCES} for record in found]


def checkpoints(output: Path) -> list[Path]:
    """Its checkpoints, the newest last."""
    return sorted((Path(output) / pretrain.CHECKPOINTS).glob("step-*"))


def last(output: Path) -> dict:
    """What is in its newest checkpoint: bytes of weights and moments, and where it was."""
    path = checkpoints(output)[-1]
    state = json.loads((path / "state.json").read_text())
    facts = {name: state["facts"][name] for name in ("tokens", "scaler", "fingerprint")}
    tensors = {name: (path / name).read_bytes() for name in TENSORS}
    return {"step": state["step"], "position": state["position"], **facts, **tensors}


TENSORS = "model.safetensors", "optimizer.safetensors"


def assert_same(output: Path, expected: Path) -> None:
    """Two runs have ended with the same bits, and told the same of every step."""
    got, want = last(output), last(expected)
    assert [name for name in want if got[name] != want[name]] == []
    assert records(output) == records(expected)
    assert records(output, "evaluation") == records(expected, "evaluation")


# --- runs -----------------------------------------------------------------------------------------


@contextmanager
def folder() -> Iterator[Path]:
    """A directory in memory, where there is one: no disk is waited for."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as path:
        yield Path(path)


def _unmeasured(*_: object) -> Peak:
    """In place of a measurement of half a second, of which MFU is made."""
    return Peak(1e12, "not measured")


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing of more, and wait for each other where others compute too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run(given: PretrainSettings, library: str = "blas") -> int:
    """A run in this process, which afterwards has its threads and library again."""
    with one_thread(), fixed_cpu_library(library), patch.object(pretrain, "peak", _unmeasured):
        return pretrain.run(given)


class Process:
    """A run in a forked process, by the command line: torch need not be imported again.

    Args:
        given: its settings.
        before: called in it before the run.
        env: variables of its own.
    """

    def __init__(self, given: PretrainSettings, before=None, env=None) -> None:
        self._file = tempfile.TemporaryFile()  # without a name: nothing is left of it
        self._file.write(given.to_yaml().encode())
        self._file.flush()
        self._said = tempfile.TemporaryFile("w+")
        self.status: int | None = None
        self.pid = os.fork()
        if not self.pid:
            status = 70
            try:
                os.setpgid(0, 0)
                os.dup2(self._said.fileno(), 1)
                os.dup2(self._said.fileno(), 2)
                sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
                os.environ.update(env or {})
                torch.set_num_threads(1)
                set_cpu_library("blas")
                pretrain.peak = _unmeasured
                if before is not None:
                    before()
                status = cli.main(["pretrain", f"/proc/self/fd/{self._file.fileno()}"])
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)

    def wait(self, seconds: float = DEADLINE) -> int:
        """Its exit status, or minus the signal that ended it; it is ended after the time."""
        end = time.monotonic() + seconds
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                self.kill()
                os.waitpid(self.pid, 0)
                raise AssertionError(f"it still ran after {seconds} s: {self.said}")
            else:
                time.sleep(0.005)
        return self.status

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def said(self) -> str:
        """What it printed so far."""
        self._said.seek(0)
        return self._said.read()

    def errors(self) -> list[str]:
        """The lines with errors among it; nothing looks like a traceback."""
        assert "Traceback" not in self.said, self.said
        return [line for line in self.said.splitlines() if line.startswith("bert-fast: error")]


def ranks(given: PretrainSettings, world: int = 2, before=None, wait: bool = True):
    """Processes of a distributed run, with the variables that torchrun sets.

    Args:
        given: their settings.
        world: how many.
        before: called in each with its rank.
        wait: until all have ended.

    Returns:
        Them, and the store by which they meet, which must live as long.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    meet |= {"WORLD_SIZE": str(world), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    started = []
    for rank in range(world):
        env = meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        act = None if before is None else lambda rank=rank: before(rank)
        started.append(Process(given, act, env))
    try:
        for process in started if wait else ():
            process.wait()
    finally:
        for process in started if wait else ():
            if process.status is None:
                process.kill()
    return started, store


def at_step(number: int, act) -> None:
    """Have something done when a step begins; for good: in a process of its own, or restored."""
    from bert_fast.train.step import Stepper

    make = Stepper.run

    def made(self, step, *args, **kwargs):
        if step == number:
            act(self)
        return make(self, step, *args, **kwargs)

    Stepper.run = made


def mean_loss(output: Path, first: int, end: int) -> float:
    """The mean loss of the steps behind the first ones up to the end."""
    losses = [r["loss"] for r in records(output) if first < r["step"] <= end]
    assert len(losses) == end - first and all(map(math.isfinite, losses))
    return sum(losses) / len(losses)
