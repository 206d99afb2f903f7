"""`bert-fast bench`: runs the measuring scripts of a checkout.

They are no part of the package, and nothing of it imports them: each runs as a process of its own.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from bert_fast.cli.options import Debug, example

bench = typer.Typer(
    help="Measure beside other BERTs, report it, compare two runs.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
_BESIDE = Path(__file__).resolve().parents[2]  # of a checkout's package its root
_FILES = ("run.py", "harness.py", "ledger.py")  # another project's folder has not all of them


class Where(str, Enum):
    """Devices to measure on."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


On = Annotated[
    Where,
    typer.Option(
        help="auto is a GPU if there is one. cuda without one: in small on the CPU, to show that it"
        " works; no result."
    ),
]
Cases = Annotated[
    list[str] | None,
    typer.Option(
        "--case",
        metavar="NAME",
        help="A case, or how its name begins, with * for anything; may be repeated.  [default:"
        " all of them]",
    ),
]
Peers = Annotated[
    list[str] | None,
    typer.Option(
        "--peers",
        metavar="NAME",
        help="Only peers whose names begin so; none, or all; may be repeated.",
    ),
]
Small = Annotated[
    bool,
    typer.Option("--small", help="Everything in small: a rehearsal that shows that it works."),
]
List = Annotated[
    bool, typer.Option("--list", help="Print the cases and how each is made, and run none.")
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where the run goes.  [default: build/benchmarks there]"),
]


def _suite(name: str, words: str, *examples: str) -> None:
    """Make the command that measures a suite.

    Args:
        name: of the suite, and of the command.
        words: its help.
        examples: of its use.
    """

    def command(
        device: On = Where.auto,
        case: Cases = None,
        peers: Peers = None,
        small: Small = False,
        list: List = False,
        out: Out = None,
        debug: Debug = False,
    ) -> None:
        options = [f"--device={device.value}"]
        options += [f"--case={name}" for name in case or ()]
        options += [f"--peers={name}" for name in peers or ()]
        options += [word for word, on in (("--small", small), ("--list", list)) if on]
        options += [] if out is None else [f"--out={out}"]
        _run("run.py", name, *options)

    bench.command(name, help=words, epilog=example(*examples))(command)


_suite(
    "kernels",
    "Measure each op alone, beside PyTorch's.\n\nForward and backward, with its rate as a share of"
    " what this machine was seen to reach. Wrong answers are never timed.",
    "bert-fast bench kernels --list",
    "bert-fast bench kernels --case layer_norm --small --out runs",
)
_suite(
    "encoder",
    "Measure inference of whole models beside others.\n\nThese are of transformers, ONNX Runtime"
    " and more. All candidates of a case take turns. Wrong answers are never timed.",
    "bert-fast bench encoder --list",
    "bert-fast bench encoder --case 1x128 --peers onnxruntime --small --out runs",
)
_suite(
    "pretraining",
    "Measure a step of pre-training beside transformers.\n\nLoss and gradients are checked first.",
    "bert-fast bench pretraining --list",
    "bert-fast bench pretraining --case small --peers none --small --out runs",
)
_suite(
    "all",
    "Measure kernels, encoder and pre-training in one run.",
    "bert-fast bench all --list",
)


@bench.command(epilog=example("bert-fast bench report results --out report"))
def report(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="RESULTS...", help="Runs (.json), or directories of them."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the report goes.")] = Path(
        "report"
    ),
    debug: Debug = False,
) -> None:
    """Write a report of runs: tables, pictures, where a peer wins.

    As report.md and as index.html.
    """
    _run("report.py", f"--out={out}", "--", *results)


@bench.command(
    epilog=example(
        "bert-fast bench compare before.json after.json",
        "bert-fast bench compare results results --fail-over 10 --all",
    )
)
def compare(
    before: Annotated[
        Path, typer.Argument(metavar="A", help="A run (.json); of a directory the newest.")
    ],
    after: Annotated[Path, typer.Argument(metavar="B", help="The same, measured later.")],
    fail_over: Annotated[
        float,
        typer.Option(
            metavar="PERCENT", help="What a regression is, if it is beyond noise, too.  [above 0]"
        ),
    ] = 5.0,
    all: Annotated[bool, typer.Option("--all", help="Show every row of the peers, too.")] = False,
    debug: Debug = False,
) -> None:
    """Compare two runs of one machine, and say what became slower.

    How much may be noise comes from the spread of the calls, and from what the machine itself was
    seen to change. The exit status is 1 after a regression, 2 if the runs cannot be compared.
    """
    _run("compare.py", f"--fail-over={fail_over}", *(["--all"] if all else []), "--", before, after)


# --- running them --------------------------------------------------------------------------------


def _benchmarks() -> Path:
    """Return the folder of the scripts: beside the package, or here.

    Raises:
        FileNotFoundError: it is nowhere.
    """
    for root in (_BESIDE, Path()):
        if all((root / "benchmarks" / name).is_file() for name in _FILES):
            return root / "benchmarks"
    raise FileNotFoundError(
        "want a checkout of bert_fast, whose benchmarks/ is not part of the package, got none"
        " beside the package or here: git clone it and run from there"
    )


def _run(script: str, *arguments: Any) -> None:
    """Run a script to its end; the exit status is its own."""
    command = [sys.executable, _benchmarks() / script, *arguments]
    sys.stdout.flush()
    process = subprocess.Popen([str(word) for word in command])
    with _passing_on(process):
        while True:
            try:
                status = process.wait()
                break
            except KeyboardInterrupt:  # Ctrl-C reached it, too: it ends in its own way
                continue
    raise typer.Exit(status if status >= 0 else 128 - status)


@contextmanager
def _passing_on(process: subprocess.Popen) -> Iterator[None]:
    """Send the process the SIGTERM that comes here: it must not be left behind."""
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
