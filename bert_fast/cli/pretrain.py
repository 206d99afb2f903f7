"""`bert-fast pretrain` and `bert-fast plot`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from bert_fast.cli.options import Debug


def pretrain(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="A YAML file, or a shipped one: tiny, mini, base, large, adapt, throughput.",
        ),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME=VALUE",
            help="Settings in place of the file's, as optimizer.lr=1e-4 phases.0.steps=100.",
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|no|PATH",
            help="Go on from the output's newest valid checkpoint, from none, or from this one."
            "  [default: save.resume of the file]",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print all settings and the run's sizes, and end.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train a BERT on masked tokens and next sentences.

    CONFIG says on which corpus (see bert-fast data prepare), which model, how long, and where to
    put records, curves and checkpoints, which open in transformers. The same command goes on where
    a run stopped.

    Several processes: torchrun --nproc-per-node 2 -m bert_fast pretrain ...

    The exit status is 0 when all is done, 65 after a loss or gradient that is not finite, 74 when
    a checkpoint cannot be written, 143 after SIGTERM, 130 after Ctrl-C, with all saved, 1 after
    another error.
    """
    from bert_fast.train.settings import load

    given = [*(settings or [])]
    if resume is not None:
        given.append(f"save.resume={json.dumps(resume)}")  # a text, whatever it looks like
    wanted = load(config, given)
    if dry_run:
        from bert_fast.train.build import Texts
        from bert_fast.train.sizes import sizes

        for line in sizes(wanted, Texts(wanted, verify=False).vocab_size):
            print(f"# {line}")
        print(wanted.to_yaml(), end="")
        return
    from bert_fast.train import pretrain

    raise typer.Exit(pretrain.run(wanted))


def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Directories of runs, or their metrics.jsonl."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="A .png file, replaced.")
    ] = Path("curves.png"),
    debug: Debug = False,
) -> None:
    """Draw the curves of training runs in one picture.

    Loss, share of right answers, and throughput, from the records in their directories.
    """
    from bert_fast.train.plot import draw

    draw(runs, output)
    print(f"bert-fast: curves in {output}", file=sys.stderr)
