"""A small BERT learns from a book for about a minute on a CPU: its loss beside the unigram line.

    python benchmarks/demo_training.py [--steps 700] [--out build/demo]

The book is Pride and Prejudice, of which some chapters are held out. What is shown is the loss on
those: below the dashed line a model knows more than how frequent each word is. That is all a minute
is enough for; nobody would use this model. The one that comes with bert_fast learned for an hour,
not from this book; it fills a mask at the end.
"""

import argparse
import shutil
from pathlib import Path

import checkout  # noqa: F401
from rich.console import Console
from rich.table import Table

from bert_fast import ENGLISH_MINI, BertTokenizer, Encoder
from bert_fast.cli.show import print_masks
from bert_fast.data.documents import Documents
from bert_fast.data.prepare import prepare
from bert_fast.train import pretrain
from bert_fast.train.metrics import METRICS, read_records
from bert_fast.train.settings import load

BOOK = Path(__file__).parent / "texts" / "pride_and_prejudice_whole.txt.gz"
OUT = Path("build/demo")
STEPS = 700
VOCABULARY = 2000
HELD_OUT = 0.08  # of the chapters
SENTENCE = "She had been at the [MASK] of her sister for many years."


def train(steps: int, out: Path) -> tuple[int, Path]:
    """Train from the beginning; return the exit status and the directory of the run."""
    corpus, run = out / "corpus", out / "run"
    for directory in (corpus, run):
        shutil.rmtree(directory, ignore_errors=True)
    tokenizer = BertTokenizer.train(Documents([str(BOOK)]).paragraphs(), vocab_size=VOCABULARY)
    prepare(BOOK, corpus, tokenizer, held_out=HELD_OUT)
    settings = load(
        "tiny",
        [
            f"data.corpus={corpus}",
            f"output={run}",
            f"phases=[{{steps: {steps}, max_length: 32, tokens: 2048}}]",
            f"evaluate={{every: {max(steps // 8, 1)}, batches: 8}}",
            "save.every=null",
        ],
    )
    return pretrain.run(settings), run


def table_of(run: Path) -> Table:
    """Return the evaluations of a run."""
    table = Table(
        "steps", "MLM loss", "unigrams", "right words", "NSP right", title="BERT-tiny, held out"
    )
    for record in read_records(run / METRICS):
        if record["kind"] == "evaluation":
            table.add_row(
                f"{record['step']}",
                f"{record['mlm_loss']:.2f}",
                f"{record['unigram_entropy']:.2f}",
                f"{record['mlm_accuracy']:.0%}",
                f"{record['nsp_accuracy']:.0%}",
            )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    status, run = train(args.steps, args.out)
    console = Console(width=100)
    console.print(table_of(run))
    if (curves := run / pretrain.CURVES).exists():
        console.print(f"curves: {curves}")
    if status == 0:
        console.print(f"\nThe model that comes along: {SENTENCE}")
        print_masks(Encoder.from_pretrained(ENGLISH_MINI, dtype="float32").fill_mask(SENTENCE))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
