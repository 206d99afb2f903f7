"""The options that verbs share, and the words that options take."""

from enum import Enum
from typing import Annotated

import typer


def example(*lines: str) -> str:
    """Return text for the end of a verb's help; tests run each of its lines."""
    return "\n".join(["\b", "Example:", *(f"  {line}" for line in lines)])


Debug = Annotated[
    bool,
    typer.Option("--debug", help="Print a traceback after an error."),
]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Directory of a model, or its id on the hub.")
]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="cpu, cuda or cuda:N.  [default: a GPU if there is one]"),
]


Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="Directory of a model, or its id on the hub.")
]
Target = Annotated[str, typer.Argument(metavar="TARGET", help="A new or empty directory.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Write into a TARGET that holds files.")
]


class Dtype(str, Enum):
    """Types of a model's numbers."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Pooling(str, Enum):
    """How a text's rows become one vector."""

    cls = "cls"
    mean = "mean"
    max = "max"


class Format(str, Enum):
    """Formats of texts."""

    txt = "txt"
    jsonl = "jsonl"
    csv = "csv"
    parquet = "parquet"


class Errors(str, Enum):
    """What is done about a bad line."""

    strict = "strict"
    skip = "skip"
    replace = "replace"


class Precision(str, Enum):
    """Types of numbers in an output."""

    float32 = "float32"
    float16 = "float16"
