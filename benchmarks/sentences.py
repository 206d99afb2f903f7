"""Sentences to vectors: sentence-transformers' `encode` plain, accelerated, and `Encoder`'s.

    python benchmarks/sentences.py --model DIRECTORY [--texts FILE] [--most N] [--rounds 5]

All are checked and timed. They read the same directory and text file (a text a line, .gz too; empty
lines are left out), and run with their defaults. The texts are timed in two orders.
"""

import argparse
import gzip
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import checkout  # noqa: F401
import demo
import harness
import machine
import torch
from gate import AbsentError, Candidate, Case, Outputs, Prepared, Work
from record import Run
from rich.console import Console

from bert_fast import Encoder, accelerate

CHECKED = 64  # texts whose vectors are compared


def read_texts(path: Path, most: int) -> list[str]:
    """Return the first texts of a file."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        texts = []
        for line in file:
            if line.strip():
                texts.append(line.rstrip("\n"))
            if len(texts) == most:
                break
    return texts


def sentence_transformer(model: Path, device: torch.device, dtype: torch.dtype):
    """Return the model as sentence-transformers has it."""
    if find_spec("sentence_transformers") is None:
        raise AbsentError("sentence-transformers is not installed")
    from sentence_transformers import SentenceTransformer

    made = SentenceTransformer(str(model), device=str(device))
    return made.to(dtype)


def _first(encoder, texts: Sequence[str]) -> Outputs:
    return {"vectors": encoder.encode(texts[:CHECKED], convert_to_tensor=True)}


def _candidate(name: str, make) -> Candidate:
    def prepare() -> Prepared:
        encoder = make()
        return Prepared(encoder.encode, lambda texts: _first(encoder, texts))

    return Candidate(name, prepare)


def sentence_case(
    model: Path, texts: list[str], device: torch.device
) -> tuple[Case, list[Candidate]]:
    """Return the texts, and the same in reverse, as a case for both encoders in fp32."""
    theirs = partial(sentence_transformer, model, device)
    ours = Encoder.from_pretrained(model, device=device, dtype="float32")
    lengths = [len(ids) for ids in ours._tokenize(texts, "")]
    case = Case(
        f"{len(texts)} texts of {min(lengths)} to {max(lengths)} tokens",
        device,
        "fp32",
        [texts, texts[::-1]],
        truth=partial(_first, theirs(torch.float64)),
        baseline=partial(_first, theirs(torch.float32)),
        baseline_name="sentence-transformers fp32",
        work=Work(tokens=sum(lengths), sequences=len(texts)),
    )
    return case, [
        _candidate("sentence-transformers", partial(theirs, torch.float32)),
        _candidate("accelerated", lambda: accelerate(theirs(torch.float32))),
        _candidate("bert_fast", lambda: ours),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--texts", type=Path, default=demo.PAGE)
    parser.add_argument("--most", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case, candidates = sentence_case(args.model, read_texts(args.texts, args.most), device)
    with tempfile.TemporaryDirectory() as folder:
        run = Run.start(Path(folder) / "run.json", "sentences", "python benchmarks/sentences.py")
        run.set("environment", machine.environment(device))
        harness.measure(case, candidates, run, rounds=args.rounds)
    console = Console(width=100)
    console.print(demo.table_of(run, case.name))
    console.print(demo.machine_of(run.data["environment"], args.rounds))
    return int(run.row(case.name, "bert_fast")["state"] != "measured")


if __name__ == "__main__":
    raise SystemExit(main())
