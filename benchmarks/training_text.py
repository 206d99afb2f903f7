"""Pre-training on text: a step of ours with its data beside transformers with its collator.

    python benchmarks/training_text.py --corpus DIR [--size mini] [--sequences 32] [--rounds 7]

DIR is what `bert-fast data prepare` made. Both learn from the same pairs of segments with dropout
0.1 and AdamW, clipping included; transformers' masks are drawn by its own collator, which pads a
batch to its longest pair. First the losses of both are compared on the same masks, without dropout.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import checkout  # noqa: F401
import demo
import machine
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import bert_fast
from bert_fast.data import MaskingRule
from bert_fast.data.batches import Batch, Batches, Position, steps
from bert_fast.data.shards import Corpus
from bert_fast.train.distributed import Ranks
from bert_fast.train.objective import PreTrainingObjective
from bert_fast.train.optim import AdamW, decay_groups
from bert_fast.train.step import Stepper, to_device

LOSS = 1e-4  # what the losses of a batch may differ by
LR, DECAY, CLIP = 1e-4, 0.01, 1.0
_IGNORED = -100


def batches_of(args: argparse.Namespace, masked: float) -> tuple[Batches, bert_fast.BertTokenizer]:
    """Return micro-batches of the corpus with that share of tokens masked, and its tokenizer."""
    tokenizer = bert_fast.BertTokenizer.from_pretrained(args.corpus)
    return Batches(
        Corpus(args.corpus).split("train"),
        MaskingRule(tokenizer, masked),
        cls_id=tokenizer.cls_token_id,
        sep_id=tokenizer.sep_token_id,
        max_length=args.max_length,
        seed=0,
        sequences=args.sequences,
    ), tokenizer


def features_of(batch: Batch) -> list[dict]:
    """Return the pairs of a batch as transformers' collator takes them."""
    ends = batch["cu_seq_lens_q"].tolist()
    found = []
    for i, (a, b) in enumerate(pairwise(ends)):
        columns = {name: batch[name][0, a:b].tolist() for name in ("input_ids", "token_type_ids")}
        found.append(columns | {"next_sentence_label": int(batch["next_sentence_label"][i])})
    return found


def padded(batch: Batch) -> dict[str, torch.Tensor]:
    """Return a batch of ours, masks included, as transformers' models take it."""
    lengths = batch["cu_seq_lens_q"].diff().tolist()
    labels = torch.full_like(batch["input_ids"][0], _IGNORED)
    labels[batch["masked_positions"]] = batch["masked_labels"]
    columns = {"input_ids": (batch["input_ids"][0], 0), "labels": (labels, _IGNORED)}
    columns["token_type_ids"] = batch["token_type_ids"][0], 0
    columns["attention_mask"] = torch.ones_like(labels), 0
    return {
        name: torch.nn.utils.rnn.pad_sequence(values.split(lengths), True, fill)
        for name, (values, fill) in columns.items()
    } | {"next_sentence_label": batch["next_sentence_label"]}


def our_steps(model: bert_fast.BertForPreTraining, batches: Batches, ranks: Ranks) -> Iterator[int]:
    """Make a step each time something is asked for; yield its real tokens."""
    objective = PreTrainingObjective(model.train())
    groups = decay_groups(model, DECAY)
    optimizer = AdamW(groups, lr=LR, max_grad_norm=CLIP, skip_nonfinite=True)
    stepper = Stepper(objective, optimizer, ranks, seed=0)
    for number, step in enumerate(steps(batches, Position(0, 0), 1)):
        stepper.run(number, step, LR, count_correct=False)
        yield sum(figures.tokens for figures in stepper.figures(wait=True))


def their_steps(model: torch.nn.Module, batches: Batches, collate: Callable) -> Iterator[int]:
    """The same by transformers."""
    model.train()
    optimizer = torch.optim.AdamW(decay_groups(model, DECAY), lr=LR, fused=True)
    for step in steps(batches, Position(0, 0), 1):
        features = features_of(step.batches[0][1])
        inputs = to_device(collate(features), model.device)
        model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield sum(len(feature["input_ids"]) for feature in features)


def difference(ours: bert_fast.BertForPreTraining, theirs: torch.nn.Module, batch: Batch) -> float:
    """Return by how much the losses of a batch differ, without dropout."""
    counts = torch.tensor([batch["masked_labels"].numel(), batch["next_sentence_label"].numel()])
    with torch.no_grad():
        on_device = to_device(batch, theirs.device)
        mine, _ = PreTrainingObjective(ours.eval())(on_device, counts.to(theirs.device))
        loss = theirs.eval()(**to_device(padded(batch), theirs.device)).loss
    return abs(float(mine - loss))


def main() -> int:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--size", default="mini")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches, tokenizer = batches_of(args, 0.15)
    plain, _ = batches_of(args, 0.0)
    config = bert_fast.BertConfig.named(args.size, vocab_size=len(tokenizer))
    torch.manual_seed(0)
    ours = bert_fast.BertForPreTraining(config).to(device)
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**config.to_dict()))
    theirs.load_state_dict(ours.state_dict())
    theirs.to(device)
    off = difference(ours, theirs, batches[0, 0])
    collate = transformers.DataCollatorForLanguageModeling(
        transformers.BertTokenizerFast.from_pretrained(args.corpus), mlm_probability=0.15
    )
    runs = {
        "transformers": their_steps(theirs, plain, collate),
        "bert_fast": our_steps(ours, batches, Ranks(0, 1, device)),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    tokens = dict.fromkeys(runs, 0)
    for i in range(2 + args.rounds):
        for name in [*runs] if i % 2 else [*runs][::-1]:
            began = time.perf_counter()
            found = next(runs[name])
            if i >= 2:  # the first make kernels and fill caches
                times[name].append(time.perf_counter() - began)
                tokens[name] += found
    size = f"{args.sequences} x {args.max_length}"
    table = Table(
        "", "ms a step, median", "real tokens/s", "speed", title=f"BERT-{args.size}, {size}"
    )
    slow = float(np.median(times["transformers"]))
    for name, seconds in times.items():
        median = float(np.median(seconds))
        rate = tokens[name] / len(seconds) / median
        table.add_row(name, f"{1e3 * median:,.0f}", f"{rate:,.0f}", f"{slow / median:.2f}x")
    console = Console(width=100)
    console.print(table)
    console.print(f"losses differ by {off:.1e} at most")
    console.print(demo.machine_of(machine.environment(device), args.rounds))
    return int(not off <= LOSS)


if __name__ == "__main__":
    raise SystemExit(main())
