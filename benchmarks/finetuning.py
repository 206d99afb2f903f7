"""Fine-tuning by transformers' Trainer: a BERT as it is and accelerated, the same losses, timed.

    python benchmarks/finetuning.py --data FILE [--size mini] [--steps 30] [--rounds 3]

FILE is a table of texts and labels with a line of names (GLUE's SST-2, .gz too). Weights are random
and without dropout, so that the losses of all steps can be compared; batches are padded as the
Trainer's collator pads them.
"""

import argparse
import csv
import gzip
import tempfile
from pathlib import Path

import checkout  # noqa: F401
import demo
import machine
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import bert_fast
from bert_fast import BertTokenizer

LOSS = 1e-4  # what the losses of a step may differ by


def read_table(path: Path, most: int) -> tuple[list[str], list[int]]:
    """Return the texts and labels of a file's first rows."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1 : most + 1]
    return [row[0] for row in rows], [int(row[1]) for row in rows]


def examples_of(texts: list[str], labels: list[int]) -> tuple[list[dict], BertTokenizer]:
    """Return tokenized examples, by a vocabulary that is made of the texts."""
    tokenizer = BertTokenizer.train(texts, vocab_size=8000)
    found = tokenizer(texts, truncation=True, max_length=128)
    columns = zip(found["input_ids"], labels, strict=True)
    return [{"input_ids": ids, "labels": label} for ids, label in columns], tokenizer


def padded(pad_id: int):
    """Return a collator that pads to the longest example."""

    def collate(features: list[dict]) -> dict[str, torch.Tensor]:
        longest = max(len(f["input_ids"]) for f in features)
        ids = torch.full((len(features), longest), pad_id)
        for row, feature in zip(ids, features, strict=True):
            row[: len(feature["input_ids"])] = torch.tensor(feature["input_ids"])
        labels = torch.tensor([f["labels"] for f in features])
        return {"input_ids": ids, "attention_mask": (ids != pad_id).long(), "labels": labels}

    return collate


def train(
    examples: list[dict], vocab: int, pad_id: int, size: str, steps: int, batch: int, fast: bool
) -> tuple[np.ndarray, float]:
    """Return the losses of all steps and their seconds."""
    import transformers

    config = bert_fast.BertConfig.named(size, vocab_size=vocab, pad_token_id=pad_id).to_dict()
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**config))
    if fast:
        bert_fast.accelerate(model, strict=True)
    with tempfile.TemporaryDirectory() as folder:
        options = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            logging_steps=1,
            learning_rate=1e-4,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
        )
        trainer = transformers.Trainer(
            model, options, train_dataset=examples, data_collator=padded(pad_id)
        )
        trainer.log = lambda logs, *_: trainer.state.log_history.append(logs)
        seconds = trainer.train().metrics["train_runtime"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return np.array(losses), seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--size", default="mini")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    examples, tokenizer = examples_of(*read_table(args.data, args.steps * args.batch))
    case = len(tokenizer), tokenizer.pad_token_id, args.size, args.steps, args.batch
    times: dict[bool, list[float]] = {False: [], True: []}
    losses: dict[bool, np.ndarray] = {}
    for i in range(1 + args.rounds):
        for fast in (False, True) if i % 2 else (True, False):
            losses[fast], seconds = train(examples, *case, fast)
            if i:  # the first round makes kernels and fills caches
                times[fast].append(seconds)
    off = float(np.abs(losses[True] - losses[False]).max())
    table = Table("", "seconds, median", "speed", title=f"BERT-{args.size}, {args.steps} steps")
    plain = float(np.median(times[False]))
    for fast, name in ((False, "transformers"), (True, "accelerated")):
        seconds = float(np.median(times[fast]))
        table.add_row(name, f"{seconds:.2f}", f"{plain / seconds:.2f}x")
    console = Console(width=100)
    console.print(table)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console.print(f"losses differ by {off:.1e} at most")
    console.print(demo.machine_of(machine.environment(device), args.rounds))
    return int(not off <= LOSS)


if __name__ == "__main__":
    raise SystemExit(main())
