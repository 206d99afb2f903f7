"""Checkpoints of a tiny model, and a disk that fails, or takes the process with it, at a moment."""

import builtins
import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch

from bert_fast import BertConfig, BertForPreTraining, BertTokenizer
from bert_fast.train.checkpoints import MANIFEST
from bert_fast.train.state import TrainingState

CONFIG = BertConfig(
    vocab_size=11,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=6,
)
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a b c d e f".split()
FROZEN = "bert.embeddings.token_type_embeddings.weight"
UNUSED = "bert.pooler"  # gets no gradient


def tokenizer():
    """One with a word for each of the model's ids."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.txt"
        path.write_text("\n".join(WORDS))
        return BertTokenizer(str(path))


def model(dtype=torch.float32, seed=0, **fields):
    """A tiny model with random weights, biases too."""
    torch.manual_seed(seed)
    made = BertForPreTraining(BertConfig.from_dict(CONFIG.to_dict(), **fields))
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(0.1)
    made.get_parameter(FROZEN).requires_grad_(False)
    return made.to(dtype)


def train(trained, optimizer, steps, seed=0):
    """Steps with random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for name, p in trained.named_parameters():
            drawn = torch.randn(p.shape, generator=generator) * 0.3 + 0.1
            if p.requires_grad and not name.startswith(UNUSED):
                p.grad = drawn.to(p.dtype)
        optimizer.step()


def state(step, mark=None):
    """A state whose tensors all hold the mark; None: the step."""
    mark = step if mark is None else mark
    weights = {
        "a.weight": torch.full((32, 16), float(mark)),
        "a.bias": torch.full((8,), mark + 0.5),
    }
    moments = {
        f"{kind}.{n}": t + 0.25 for n, t in weights.items() for kind in ("exp_avg", "exp_avg_sq")
    }
    moments |= {f"step.{name}": torch.tensor(float(mark)) for name in weights}
    position, facts = {"epoch": 0, "batch": 4 * step}, {"seed": 7, "mark": mark, "scale": 2.0**16}
    return TrainingState(
        step=step, position=position, facts=facts, weights=weights, moments=moments
    )


def same(one, other):
    """Whether two states are, to the bit and in the order of their names."""
    if (one.step, one.position, one.facts) != (other.step, other.position, other.facts):
        return False
    for tensors, others in ((one.weights, other.weights), (one.moments, other.moments)):
        if tensors.keys() != others.keys():
            return False
        for name, t in tensors.items():
            if t.dtype != others[name].dtype or not torch.equal(t, others[name]):
                return False
    return True


def contents(directory):
    """Every file under a directory, by its path there."""
    files = (path for path in Path(directory).rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def names(directory):
    return sorted(os.listdir(directory))


def sealed(path, **entries):
    """Make a checkpoint's manifest anew, so that its sums are those of what is there."""
    manifest = json.loads((path / MANIFEST).read_text())
    for name in manifest["files"]:
        if (path / name).is_file():
            raw = (path / name).read_bytes()
            manifest["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (path / MANIFEST).write_text(json.dumps(manifest | entries))


class Disk:
    """Calls something before each change of the disk; half of a write is done by then.

    Attributes:
        calls: (what, its first argument) of each change, in order.
    """

    def __init__(self, before):
        self.calls, self._before = [], before

    def __enter__(self):
        self._kept = [(os, name, getattr(os, name)) for name in CHANGES]
        self._kept.append((builtins, "open", open))
        self._file = open
        for owner, name, function in self._kept:
            setattr(owner, name, self._open if name == "open" else self._counted(name, function))
        return self

    def __exit__(self, *error):
        for owner, name, function in self._kept:
            setattr(owner, name, function)

    def tell(self, what, argument):
        self.calls.append((what, argument))
        self._before(len(self.calls) - 1)

    def _counted(self, name, function):
        def call(*args, **kwargs):
            self.tell(name, os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else args)
            return function(*args, **kwargs)

        return call

    def _open(self, path, mode="r", *args, **kwargs):
        if not set(mode) & set("wxa"):
            return self._file(path, mode, *args, **kwargs)
        self.tell("open", str(path))
        return _File(self._file(path, mode, *args, **kwargs), self)


CHANGES = ("replace", "rename", "fsync", "unlink", "rmdir", "mkdir")


class _File:
    """A file whose writes are told of."""

    def __init__(self, file, disk):
        self._file, self._disk = file, disk

    def write(self, data):
        half = len(data) // 2
        self._file.write(data[:half])
        self._file.flush()
        self._disk.tell("write", self._file.name)
        self._file.write(data[half:])
        return len(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()
