"""Token lists to masked batches: this collator beside plain Python and transformers', timed.

    python benchmarks/data_path.py [--texts FILE] [--most N] [--vocab FILE] [--rounds 7]

All take the same lists and run on one thread. The texts (a text a line, .gz too) are taken as they
are, cut at 128 tokens, and once more joined into blocks of 512. The vocabulary is learnt from the
texts unless there is a file. Before anything is timed the compiled steps must give the bits of the
reference.
"""

import argparse
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

import checkout  # noqa: F401
import machine
import torch
import transformers
from rich.console import Console
from rich.table import Table
from sentences import read_texts

from bert_fast import BertTokenizer
from bert_fast.data import MaskedLMCollator, implementation, reference, steps

PAGE = Path(__file__).parent / "texts" / "pride_and_prejudice.txt"
LEAST = 0.02  # seconds of a turn
STEPS = ("flatten", "longest", "positions", "pad", "digests", "mask")
Batch = list[dict[str, list[int]]]
Collate = Callable[[Batch], dict]


def plain_python(tokenizer: BertTokenizer) -> Collate:
    """Return straight loops: BERT's choice of tokens, packed."""
    special, mask_id = set(tokenizer.all_special_ids), tokenizer.mask_token_id
    size, chance = len(tokenizer), random.Random(0)

    def collate(features: Batch) -> dict:
        batch = {"input_ids": [], "labels": [], "position_ids": [], "token_type_ids": []}
        borders = [0]
        for feature in features:
            ids = list(feature["input_ids"])
            labels = [-100] * len(ids)
            candidates = []
            for i, token in enumerate(ids):
                if token not in special and not feature["special_tokens_mask"][i]:
                    candidates.append(i)
            chance.shuffle(candidates)
            for i in candidates[: max(1, round(0.15 * len(candidates)))]:
                labels[i] = ids[i]
                if chance.random() < 0.8:
                    ids[i] = mask_id
                elif chance.random() < 0.5:
                    ids[i] = chance.randrange(size)
            for i, token in enumerate(ids):
                batch["input_ids"].append(token)
                batch["labels"].append(labels[i])
                batch["position_ids"].append(i)
                batch["token_type_ids"].append(feature["token_type_ids"][i])
            borders.append(borders[-1] + len(ids))
        made = {name: torch.tensor([values]) for name, values in batch.items()}
        return made | {"cu_seq_lens_q": torch.tensor(borders, dtype=torch.int32)}

    return collate


def only_ids(collate: Collate) -> Collate:
    """Return the collator for bare lists of ids."""
    return lambda features: collate([feature["input_ids"] for feature in features])


def by_reference(collate: Collate) -> Collate:
    """Return the collator as it is where the extension is not built."""

    def run(features: Batch) -> dict:
        with ExitStack() as stack:
            for name in STEPS:
                stack.enter_context(patch.object(steps, name, getattr(reference, name)))
            return collate(features)

    return run


def candidates(tokenizer: BertTokenizer, theirs) -> dict[str, tuple[str, Collate]]:
    """Return name -> (whom it is compared with, collator)."""
    ours = partial(MaskedLMCollator, tokenizer, seed=0)
    stock = transformers.DataCollatorForLanguageModeling
    return {
        "plain Python, packed": ("", plain_python(tokenizer)),
        "transformers, padded": ("", stock(theirs, seed=0)),
        "transformers, padded, ids only": ("", only_ids(stock(theirs, seed=0))),
        "NumPy reference, packed": ("plain Python, packed", by_reference(ours())),
        "bert_fast, packed": ("plain Python, packed", ours()),
        "bert_fast, packed, whole words": ("plain Python, packed", ours(whole_word_mask=True)),
        "bert_fast, padded": ("transformers, padded", ours(padded=True)),
        "bert_fast, padded, as transformers samples": (
            "transformers, padded",
            ours(padded=True, sampling="bernoulli"),
        ),
        "bert_fast, padded, ids only": (
            "transformers, padded, ids only",
            only_ids(ours(padded=True)),
        ),
    }


def texts_as_they_are(tokenizer: BertTokenizer, texts: list[str]) -> Batch:
    encoded = tokenizer(texts, truncation=True, max_length=128, return_special_tokens_mask=True)
    return [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)]


def blocks(tokenizer: BertTokenizer, texts: list[str], length: int = 512) -> Batch:
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    ids = [i for row in rows for i in row]
    inside = length - 2
    made = []
    for at in range(0, len(ids) - inside + 1, inside):
        row = [tokenizer.cls_token_id, *ids[at : at + inside], tokenizer.sep_token_id]
        made.append(
            {
                "input_ids": row,
                "token_type_ids": [0] * length,
                "attention_mask": [1] * length,
                "special_tokens_mask": [1, *[0] * inside, 1],
            }
        )
    return made


def differing(tokenizer: BertTokenizer, features: Batch) -> list[str]:
    """Return the settings under which the compiled steps and the reference differ."""
    found = []
    for sampling in ("exact", "bernoulli"):
        for words in (False, True):
            for padded in (False, True):
                options = {"sampling": sampling, "whole_word_mask": words, "padded": padded}
                collate = MaskedLMCollator(tokenizer, seed=1, **options)
                got, want = collate(features), by_reference(collate)(features)
                for name, value in want.items():
                    same = torch.equal if isinstance(value, torch.Tensor) else int.__eq__
                    if not same(got[name], value):
                        found.append(f"{name} under {options}")
    return found


def median_seconds(
    collators: dict[str, Collate], batches: list[Batch], rounds: int
) -> dict[str, float]:
    """Return the median time of all batches by each collator; they take turns of LEAST at least."""

    def turn(collate: Collate, passes: int) -> float:
        start = time.perf_counter()
        for _ in range(passes):
            for batch in batches:
                collate(batch)
        return (time.perf_counter() - start) / passes

    order, chance = list(collators), random.Random(0)
    first = {name: min(turn(collate, 1) for _ in range(2)) for name, collate in collators.items()}
    passes = {name: math.ceil(LEAST / seconds) for name, seconds in first.items()}
    seconds = {name: [] for name in collators}
    for _ in range(rounds):
        chance.shuffle(order)
        for name in order:
            seconds[name].append(turn(collators[name], passes[name]))
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--texts", type=Path, default=PAGE)
    parser.add_argument("--most", type=int, default=2000)
    parser.add_argument("--vocab", type=Path)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=100)
    served, why = implementation()
    if why:
        console.print(f"the steps are the NumPy reference: {why}")
    texts = read_texts(args.texts, args.most)
    tokenizer = BertTokenizer.train(texts, vocab_size=8000)
    if args.vocab is not None:
        tokenizer = BertTokenizer(str(args.vocab))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        theirs = transformers.BertTokenizerFast.from_pretrained(folder)
    wrong = []
    for title, features in (
        (f"{len(texts)} texts", texts_as_they_are(tokenizer, texts)),
        ("blocks of 512", blocks(tokenizer, texts)),
    ):
        size = args.batch_size
        batches = [features[i : i + size] for i in range(0, len(features), size)]
        wrong += [what for batch in batches for what in differing(tokenizer, batch)]
        tokens = sum(len(feature["input_ids"]) for feature in features)
        found = candidates(tokenizer, theirs)
        collators = {name: collate for name, (_, collate) in found.items()}
        medians = median_seconds(collators, batches, args.rounds)
        table = Table(f"{title}, {tokens:,} tokens", "ns a token", "speed beside", title=served)
        for name, seconds in medians.items():
            beside, _ = found[name]
            speed = f"{medians[beside] / seconds:.1f}x {beside}" if beside else ""
            table.add_row(name, f"{1e9 * seconds / tokens:,.1f}", speed)
        console.print(table)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    cpu = machine.environment(torch.device("cpu"))["device"]
    console.print(f"{cpu}, 1 thread, {versions}, medians of {args.rounds} rounds in turn")
    for what in wrong:
        console.print(f"differs from the reference: {what}")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
