"""A random BERT-base on a page of English: checked, and timed beside transformers.

    python benchmarks/demo.py [--sentences 96] [--batch-size 32] [--rounds 3]

The weights are random, so the answers mean nothing; the lengths are those of real sentences, so
the padding and the times do mean something. The vocabulary is learnt from the page itself.
"""

import argparse
import tempfile
from pathlib import Path

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
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from workload import Batch

import bert_fast

PAGE = Path(__file__).parent / "texts" / "pride_and_prejudice.txt"
CHECKED = 4  # sentences of a page whose answers are compared
Page = list[Batch]


def tokenize(sentences: list[str], batch_size: int, device: torch.device) -> Page:
    """Return padded batches of the sentences, in their order."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=8000, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding()
    page = []
    for i in range(0, len(sentences), batch_size):
        encoded = tokenizer.encode_batch(sentences[i : i + batch_size])
        ids = torch.tensor([e.ids for e in encoded], device=device)
        mask = torch.tensor([e.attention_mask for e in encoded], device=device)
        page.append(Batch(ids, mask, tuple(mask.sum(1).tolist())))
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
    sentences: list[str], batch_size: int, device: torch.device
) -> tuple[Case, list[Candidate]]:
    """Return the sentences, and once more in reverse, as a case for transformers and for us."""
    pages = [tokenize(order, batch_size, device) for order in (sentences, sentences[::-1])]
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sentences", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    console = Console(width=100)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sentences = PAGE.read_text(encoding="utf-8").split("\n")[: args.sentences]
    case, candidates = page_case(sentences, args.batch_size, device)
    real, slots = case.work.tokens, case.work.slots
    console.print(
        f"{len(sentences)} sentences, {real} tokens, padded to {slots}: {real / slots:.0%} filled"
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Run.start(Path(folder) / "demo.json", "demo", "python benchmarks/demo.py")
        run.set("environment", machine.environment(device))
        harness.measure(case, candidates, run, rounds=args.rounds)
    table = Table("BERT-base, fp32", "off fp64, at most", "median", "tokens/s", "speed")
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
    console.print(table)
    found = run.data["environment"]
    console.print(
        f"{found['device']}, {found['threads']} threads, torch {found['torch']},"
        f" transformers {found['transformers']}, medians of {args.rounds} rounds in turn"
    )
    console.print(str(bert_fast.report()))
    return int(run.row(case.name, "bert_fast")["state"] != "measured")


if __name__ == "__main__":
    raise SystemExit(main())
