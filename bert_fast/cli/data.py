"""`bert-fast data`: vocabularies and corpora for pretraining."""

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from bert_fast.cli.options import Debug, Format, example
from bert_fast.cli.show import note_prepared, note_tokenizer, print_corpus, print_json

data = typer.Typer(
    help="Make a vocabulary and a corpus of texts, for pretraining.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


class Lines(str, Enum):
    """What a line of text is."""

    paragraphs = "paragraphs"
    sentences = "sentences"


class Borders(str, Enum):
    """Where documents end in text files."""

    blank = "blank"
    line = "line"


class Split(str, Enum):
    """What a corpus has documents for."""

    train = "train"
    held_out = "held_out"


Inputs = Annotated[
    list[str],
    typer.Argument(metavar="INPUT...", help="Files of texts (.txt, .jsonl, .csv, .parquet, .gz)."),
]
Kind = Annotated[Format | None, typer.Option(help="Of the inputs.  [default: by their suffix]")]
Column = Annotated[
    str, typer.Option(metavar="NAME", help="Field of a JSON line, column of CSV and Parquet.")
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Stop at a text that cannot be read and at an empty file."),
]
Bar = Annotated[bool, typer.Option("--progress/--no-progress", help="Show how far it is.")]


@data.command(
    epilog=example(
        "bert-fast data vocab book.txt -o tokenizer --size 400",
        "bert-fast data vocab reviews.csv --column body -o cased --size 100 --cased",
    )
)
def vocab(
    inputs: Inputs,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the tokenizer goes.")
    ],
    size: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens, at most.")] = 30522,
    cased: Annotated[
        bool, typer.Option("--cased", help="Keep capital letters and accents apart.")
    ] = False,
    min_frequency: Annotated[
        int, typer.Option(min=1, metavar="N", help="How often a joined token must be there.")
    ] = 2,
    alphabet: Annotated[
        int, typer.Option(min=1, metavar="N", help="Characters, at most: the most frequent.")
    ] = 1000,
    format: Kind = None,
    column: Column = "text",
    strict: Strict = False,
    progress: Bar = True,
    debug: Debug = False,
) -> None:
    """Learn a WordPiece vocabulary and write a tokenizer.

    The same texts give the same vocabulary. The files are read several times, never as a whole.
    """
    from bert_fast.data.documents import Documents
    from bert_fast.data.readers import STDIN, total_size
    from bert_fast.progress import Progress
    from bert_fast.tokenizer import BertTokenizer

    for name in inputs:
        if name == STDIN or (os.path.exists(name) and not os.path.isfile(name)):
            got = "the standard input" if name == STDIN else "something else"
            raise ValueError(f"{name}: want a file, which can be read again, got {got}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output}: want a new or empty directory, got one with files")
    options = {"format": format and format.value, "column": column, "strict": strict}
    with Progress(None, progress, "vocab", "paragraphs") as bar:
        stream = Documents(
            inputs, note=lambda message: bar.note(f"bert-fast: {message}"), **options
        )
        total = total_size(inputs)

        def show(times: int, position: int, paragraphs: int) -> None:
            bar.update(position, paragraphs, f"reading {times}, {_size(position, total)}")

        tokenizer = BertTokenizer.train(
            stream.paragraphs(show), size, min_frequency, alphabet, do_lower_case=not cased
        )
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output)
    note_tokenizer(len(tokenizer), output)


@data.command(
    epilog=example(
        "bert-fast data prepare book.txt --tokenizer model -o corpus --held-out 0.2",
        "bert-fast data prepare reviews.csv --column body --tokenizer model -o made",
    )
)
def prepare(
    inputs: Inputs,
    tokenizer: Annotated[
        str,
        typer.Option("--tokenizer", metavar="DIR", help="Of `data vocab`, a model, or a hub's id."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the corpus goes.")
    ],
    format: Kind = None,
    column: Column = "text",
    lines: Annotated[
        Lines, typer.Option(help="What a line is; paragraphs are split into sentences.")
    ] = Lines.paragraphs,
    documents: Annotated[
        Borders, typer.Option(help="A document of a text file ends at a blank line, or is a line.")
    ] = Borders.blank,
    held_out: Annotated[
        float, typer.Option(metavar="SHARE", help="Of the documents, kept for evaluation.")
    ] = 0.01,
    seed: Annotated[int, typer.Option(metavar="N", help="Chooses those.")] = 0,
    workers: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Processes.  [default: as processors]"),
    ] = None,
    strict: Strict = False,
    progress: Bar = True,
    debug: Debug = False,
) -> None:
    """Make a corpus of texts.

    It is memory-mapped shards of tokens, the tokenizer, and a manifest. Text files have a blank
    line between documents; the records of other formats are documents.

    What is wrong with a text is repaired or left out, counted, and named in the manifest. A literal
    [MASK] or [SEP] stays text. The same files and options give the same bytes.
    """
    from bert_fast.data.prepare import prepare
    from bert_fast.data.readers import total_size
    from bert_fast.progress import Progress
    from bert_fast.tokenizer import BertTokenizer

    total = total_size(inputs)
    with Progress(total, progress, "prepare", "tokens") as bar:

        def show(position: int, documents: int, tokens: int) -> None:
            bar.update(position, tokens, f"{documents:,} documents, {_size(position, total)}")

        done = prepare(
            inputs,
            output,
            BertTokenizer.from_pretrained(tokenizer),
            format=format and format.value,
            column=column,
            lines=lines.value,
            documents=documents.value,
            held_out=held_out,
            seed=seed,
            workers=workers,
            strict=strict,
            note=lambda message: bar.note(f"bert-fast: {message}"),
            progress=show,
        )
    note_prepared(done)


@data.command(
    epilog=example(
        "bert-fast data inspect corpus",
        "bert-fast data inspect corpus --check --json",
    )
)
def inspect(
    corpus: Annotated[str, typer.Argument(metavar="CORPUS", help="Directory of a corpus.")],
    texts: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Documents whose beginning to show."),
    ] = 2,
    split: Annotated[Split, typer.Option(help="Where those are from.")] = Split.train,
    check: Annotated[
        bool, typer.Option("--check", help="Compare every file with its SHA-256.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Say what a corpus holds, and what was wrong with its sources."""
    from bert_fast.data.inspect import first_documents, inspect_corpus
    from bert_fast.tokenizer import BertTokenizer

    found = inspect_corpus(corpus, verify=check)
    if texts and split.value in found["splits"]:
        tokenizer = BertTokenizer.from_pretrained(corpus)
        found["texts"] = first_documents(corpus, tokenizer, texts, split=split.value)
    if json:
        print_json(found)
    else:
        print_corpus(found)


def _size(position: int, total: int | None) -> str:
    """Return how much of the files was read."""
    of = "" if total is None else f" of {total / 1e6:,.1f}"
    return f"{position / 1e6:,.1f}{of} MB"
