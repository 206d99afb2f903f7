"""The verbs of `bert-fast`."""

import os
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from bert_fast.cli.bench import bench
from bert_fast.cli.data import data
from bert_fast.cli.options import (
    Debug,
    Device,
    Dtype,
    Errors,
    Format,
    Model,
    Overwrite,
    Pooling,
    Precision,
    Source,
    Target,
    example,
)
from bert_fast.cli.pretrain import plot, pretrain
from bert_fast.cli.show import note_summary, print_conversion, print_json, print_masks

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def _set_version(value: bool) -> None:
    if value:
        print(f"bert-fast {sys.modules['bert_fast'].__version__}")
        raise typer.Exit


app = typer.Typer(
    help="BERT on packed sequences: embeddings, filled masks, conversions, diagnosis.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    context_settings=_SETTINGS,
)
convert = typer.Typer(
    help="Convert a model's files between forms.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(convert, name="convert")
app.add_typer(data, name="data")
app.add_typer(bench, name="bench")


@app.callback()
def _all(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_set_version, is_eager=True, help="Print the version."),
    ] = False,
    debug: Debug = False,
) -> None:
    pass


@app.command(epilog=example("bert-fast doctor", "bert-fast doctor --json"))
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Say what this machine offers and try every op.

    The exit status is 1 if something that is promised does not work.
    """
    from bert_fast.doctor import diagnose

    found = diagnose()
    print_json(found.to_dict()) if json else print(found)
    if not found.healthy:
        raise typer.Exit(1)


@app.command(
    epilog=example(
        "bert-fast encode model texts.txt -o vectors.npy",
        "bert-fast encode model reviews.csv --column body -o vectors.parquet",
        "cat texts.txt | bert-fast encode model - -o vectors.jsonl --keep-text",
    )
)
def encode(
    model: Model,
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="Files of texts; - is the standard input."),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="OUTPUT", help="A .npy, .jsonl or .parquet file."),
    ],
    format: Annotated[
        Format | None, typer.Option(help="Of the inputs.  [default: by their suffix]")
    ] = None,
    column: Annotated[
        str, typer.Option(metavar="NAME", help="Field of a JSON line, column of a CSV file.")
    ] = "text",
    errors: Annotated[
        Errors,
        typer.Option(
            help="At a line without a text: stop, leave its row empty (NaN, null), or put U+FFFD"
            " for bytes that are not UTF-8, NUL and half surrogate pairs."
        ),
    ] = Errors.strict,
    pooling: Annotated[
        Pooling | None, typer.Option(help="[default: what the model's files say, or mean]")
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(
            "--normalize/--no-normalize",
            help="Vectors of length 1.  [default: what the model's files say]",
        ),
    ] = None,
    max_seq_length: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens that are kept of a text.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What goes before each text.")
    ] = None,
    prompt_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The same, by its name in the model's files.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Texts of full length in a batch.")
    ] = 32,
    chunk: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Texts encoded together: what a kill can cost."),
    ] = 1024,
    device: Device = None,
    dtype: Annotated[Dtype | None, typer.Option(help="[default: as stored]")] = None,
    precision: Annotated[Precision, typer.Option(help="Of the output.")] = Precision.float32,
    keep_text: Annotated[
        bool, typer.Option("--keep-text", help="Write the texts too (.jsonl, .parquet).")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace OUTPUT, discard another run's OUTPUT.parts."),
    ] = False,
    progress: Annotated[
        bool, typer.Option("--progress/--no-progress", help="Show how far it is.")
    ] = True,
    debug: Debug = False,
) -> None:
    """Write a vector for each text of the inputs, in their order.

    Every line of a text file is a text, also an empty one; of .jsonl and .csv files every record.
    Files may be compressed (.gz, .xz).
    Of a text only the first 1,000,000 characters are read. Files of any size take the same memory.

    Finished chunks are kept in OUTPUT.parts until all are done: after a kill the same command goes
    on where it stopped, and gives the same file. Under torchrun each process takes a share:
    torchrun --nproc-per-node 2 -m bert_fast encode ...
    """
    from bert_fast.data.readers import total_size
    from bert_fast.encode.stream import check_files, encode_file, ranks
    from bert_fast.progress import Progress

    output_options = {
        "precision": precision.value,
        "keep_text": keep_text,
        "overwrite": overwrite,
    }
    check_files(inputs, output, **output_options)
    rank, world = ranks()
    encoder = _encoder(
        model,
        _device(device, world),
        dtype=dtype and dtype.value,
        pooling=pooling and pooling.value,
        normalize=normalize,
        max_seq_length=max_seq_length,
    )
    total = total_size(inputs)
    with Progress(total, progress and rank == 0) as bar:

        def show(position: int, rows: int, encoded: int) -> None:
            size = f"{position / 1e6:,.1f}"
            if total is not None:
                size += f" of {total / 1e6:,.1f}"
            bar.update(position, encoded, f"{rows:,} rows, {size} MB")

        done = encode_file(
            encoder,
            inputs,
            output,
            format=format and format.value,
            column=column,
            errors=errors.value,
            batch_size=batch_size,
            prompt=prompt,
            prompt_name=prompt_name,
            chunk=chunk,
            note=lambda message: bar.note(f"bert-fast: {message}"),
            progress=show,
            **output_options,
        )
    if rank == 0:
        note_summary(done)


@app.command(
    "fill-mask",
    epilog=example(
        'bert-fast fill-mask "He was born in the [MASK] of London."',
        'bert-fast fill-mask model "Paris is the [MASK] of France."',
        'echo "The [MASK] is blue." | bert-fast fill-mask - --top-k 3 --json',
    ),
)
def fill_mask(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] TEXT",
            help="Directory of a model, or its id on the hub; without it the small English one that"
            " comes along. A text with [MASK]; - reads a text a line from stdin.",
        ),
    ],
    top_k: Annotated[int, typer.Option(min=1, metavar="K", help="How many tokens to show.")] = 5,
    json: Annotated[bool, typer.Option("--json", help="Print a line of JSON a text.")] = False,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Print the likeliest tokens where a text has [MASK]."""
    from bert_fast.shipped import ENGLISH_MINI

    *model, text = words
    if len(model) > 1:
        raise typer.BadParameter(f"want [MODEL] TEXT, got {len(words)} arguments")
    if model:
        encoder = _encoder(model[0], device)
    else:  # its 16 bits are for being small, not for computing
        encoder = _encoder(ENGLISH_MINI, device, dtype="float32")
    for line in _texts(text):
        found = encoder.fill_mask(line, top_k=top_k)
        if json:
            print_json(found, indent=None)
        else:
            print_masks(found)


@app.command(epilog=example("bert-fast verify model --text texts.txt"))
def verify(
    model: Model,
    text: Annotated[
        str, typer.Option("--text", metavar="FILE", help="A text a line; - is the standard input.")
    ],
    most: Annotated[int, typer.Option(min=1, metavar="N", help="Texts that are read.")] = 32,
    grads: Annotated[
        bool, typer.Option("--grads/--no-grads", help="Compare the gradients, too.")
    ] = True,
    device: Device = None,
    dtype: Annotated[Dtype | None, typer.Option(help="[default: float32]")] = None,
    debug: Debug = False,
) -> None:
    """Compare an accelerated model with its original code.

    A model of transformers, that is. The texts are one batch. The exit status is 1 if an error is
    above what is allowed: twice the original's own in that dtype, and what rounding may add.
    """
    from bert_fast.data.readers import Reader
    from bert_fast.hf.verify import VerificationError, verify_pretrained

    texts = [row.text for row in islice(Reader(text), most) if row.text]
    if not texts:
        raise ValueError(f"{text}: want a text, got none")
    try:
        found = verify_pretrained(
            model, texts, dtype=dtype and dtype.value, device=device, grads=grads
        )
    except VerificationError as error:
        print(error.report)
        raise
    print(found)


@convert.command(
    "from-tf", epilog=example("bert-fast convert from-tf uncased_L-12_H-768_A-12 model")
)
def from_tf(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Directory with bert_config.json and a checkpoint, or its prefix.",
        ),
    ],
    target: Target,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="none, pretraining, masked-lm, next-sentence, sequence-classification,"
            " token-classification, multiple-choice or question-answering.  [default: the one"
            " whose weights there are]",
        ),
    ] = None,
    lower_case: Annotated[
        bool | None,
        typer.Option("--lower-case/--cased", help="For the tokenizer.  [default: by vocab.txt]"),
    ] = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Make a model of Google's TensorFlow checkpoint.

    It opens in Hugging Face's transformers and here. TensorFlow is not needed.
    """
    from bert_fast import convert

    options = {"head": head, "do_lower_case": lower_case, "overwrite": overwrite}
    print_conversion(convert.from_tf(source, target, **options))


@convert.command("to-hf", epilog=example("bert-fast convert to-hf model converted"))
def to_hf(
    source: Source,
    target: Target,
    dtype: Annotated[Dtype | None, typer.Option(help="[default: as stored]")] = None,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Weights are split above this.")
    ] = "5GB",
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Write a model as transformers does now, as safetensors."""
    import torch

    from bert_fast import convert

    options = {"max_shard_size": max_shard_size, "overwrite": overwrite}
    wanted = None if dtype is None else getattr(torch, dtype.value)
    print_conversion(convert.to_hf(source, target, dtype=wanted, **options))


@convert.command("legacy-names", epilog=example("bert-fast convert legacy-names model renamed"))
def legacy_names(
    source: Source,
    target: Target,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Weights are split above this.")
    ] = "5GB",
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Give weights of old names (gamma, beta) those of today.

    Values, other tensors and config.json stay as they are.
    """
    from bert_fast import convert

    options = {"max_shard_size": max_shard_size, "overwrite": overwrite}
    print_conversion(convert.legacy_names(source, target, **options))


app.command(
    epilog=example(
        "bert-fast pretrain throughput model.size=tiny phases.0.steps=3",
        "bert-fast pretrain throughput model.size=large --dry-run",
    )
)(pretrain)
app.command(epilog=example("bert-fast plot runs/throughput -o curves.png"))(plot)


# --- what the verbs share ------------------------------------------------------------------------


def _encoder(model: str | Path, device: str | None, **options: Any) -> Any:
    from bert_fast.encode.encoder import Encoder

    return Encoder.from_pretrained(model, device=device, **options)


def _device(wanted: str | None, world: int) -> str | None:
    """Return the device: of several processes on a machine each has a GPU of its own."""
    if wanted is None and world > 1:
        import torch

        if torch.cuda.is_available():
            return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    return wanted


def _texts(text: str) -> Iterable[str]:
    if text != "-":
        return [text]
    from bert_fast.data.readers import Reader

    return (row.text for row in Reader("-") if row.text)
