"""The launch rules that `run.py tune` measures: other entries for each, and rows to time them by.

Of the tables in kernels/ those entries that BERT-base and -large meet in 16 bits: heads of 64, rows
of 768 and 1,024. Nothing here imports torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Entry = Any  # what a table holds: a dict, a tuple, or None


@dataclass(frozen=True)
class Timed:
    """A row of `ops.py`, or one made from it.

    Attributes:
        name: of it.
        row: which one it is made from; "": that of the same name.
        like: a row whose sizes it has; "": its own.
        sizes: which of its sizes are others.
        p: probability of dropout; None: the row's.
    """

    name: str
    row: str = ""
    like: str = ""
    sizes: Mapping[str, Any] = field(default_factory=dict)
    p: float | None = None


@dataclass(frozen=True)
class Tunable:
    """An entry of a table that has alternatives.

    Attributes:
        table: file in kernels/ and name in it, "attention.SHORT".
        key: of the entry within what the table holds for a GPU generation, an index where that is
            a tuple; None: all of it.
        entries: the alternatives; one that is in force already is not tried twice.
        timed: what is affected.
    """

    table: str
    key: Any
    entries: Sequence[Entry]
    timed: Sequence[Timed]

    @property
    def name(self) -> str:
        """As rows have it: "attention.SHORT[2, 64]"."""
        key = ", ".join(map(str, self.key)) if isinstance(self.key, tuple) else self.key
        return self.table if self.key is None else f"{self.table}[{key}]"


def title(entry: Entry) -> str:
    """Return an entry in words: the name of a candidate."""
    if isinstance(entry, Mapping):
        return ", ".join(f"{name} {value}" for name, value in entry.items())
    return str(entry)


def _named(*names: str) -> Any:
    """Return what makes dict entries of tuples."""
    return lambda *rows: [row and dict(zip(names, row, strict=True)) for row in rows]


_rows_at_once = _named("BLOCK_M", "num_warps", "num_stages")
_keys_at_once = _named("BLOCK_N", "num_warps", "num_stages")
_tiles = _named("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")

_HEAD_64 = (2, 64)  # bytes of an element, head size
_COLUMNS = 1024  # a tile's for rows of 768 and of 1,024

# --- attention -----------------------------------------------------------------------------------

_FWD_128 = Timed("attention s128"), Timed("attention s128 dropout")
_FWD_512 = Timed("attention s512"), Timed("attention s512 dropout"), Timed("attention mixed")
_BWD_128 = (
    Timed("attention_bwd s128"),
    Timed("attention_bwd s128 dropout", row="attention_bwd s128", p=0.1),
)
_BWD_512 = (
    Timed("attention_bwd s512"),
    Timed("attention_bwd s512 dropout"),
    Timed("attention_bwd mixed", row="attention_bwd s512", like="attention mixed"),
)

# Of those that need no more registers than there are (ptxas of Triton 3.7.1, sm_90): a test wants
# that none spills. None: short sequences go through the kernels that stream, as long ones do.
_SHORT = _rows_at_once(
    *((32, 4, 1), (64, 4, 1), (64, 4, 2), (64, 8, 1), (128, 8, 1), (128, 8, 2), None)
)
_LONG = _tiles(
    *((128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 4), (128, 64, 4, 3), (128, 128, 8, 2)),
    *((128, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2)),
)
_SHORT_BWD = _keys_at_once((32, 8, 1), (32, 8, 2), (64, 8, 1), (64, 8, 2), None)
_DELTA = _named("BLOCK_M", "num_warps")((16, 1), (32, 2), (32, 4), (64, 4), (64, 8), (128, 8))
_LONG_KV = _tiles(
    *((128, 64, 8, 2), (128, 64, 8, 1), (64, 64, 4, 2), (64, 64, 8, 1), (64, 64, 8, 2)),
    *((32, 128, 8, 2), (32, 64, 4, 2), (64, 32, 4, 2)),
)
_LONG_Q = _tiles(
    *((128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2)),
    *((128, 32, 8, 3), (128, 32, 4, 2), (128, 128, 8, 1)),
)

# --- rows of 768 and 1,024 -----------------------------------------------------------------------


def _both(name: str) -> list[Timed]:
    return [Timed(f"{name}, D {d}", row=name, sizes={"D": d}) for d in (768, 1024)]


_NORM = _both("add_layer_norm") + _both("add_layer_norm dropout") + _both("layer_norm")
_NORM_BWD = _both("add_layer_norm_bwd") + _both("add_layer_norm_bwd dropout")
_ONE_PASS = ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 4))  # rows, warps
_NORM_AHEAD = (  # rows, warps, stages
    *((1, 4, 3), (1, 4, 4), (1, 8, 4), (2, 4, 3), (2, 4, 4), (2, 8, 3), (2, 8, 4)),
    *((4, 8, 3), (4, 16, 3)),
)
_EMBED_AHEAD = (
    *((1, 2, 4), (1, 4, 3), (1, 4, 4), (1, 8, 4), (2, 4, 3), (2, 4, 4), (2, 8, 3), (2, 8, 4)),
)
_WORD_CHUNKS = tuple((2048, *c) for c in ((16, 4), (32, 4), (32, 8), (64, 4), (64, 8), (128, 4)))
_FEW_CHUNKS = tuple((0, *c) for c in ((64, 4), (128, 4), (128, 8), (256, 4), (256, 8), (512, 8)))

# --- columns -------------------------------------------------------------------------------------


def _wide(name: str, row: str = "") -> list[Timed]:
    return [Timed(f"{name}, F {f}", row=row or name, sizes={"F": f}) for f in (3072, 4096)]


_GELU = (  # rows, columns, warps
    *((1, 1024, 4), (2, 1024, 4), (4, 1024, 4), (8, 1024, 4), (4, 512, 2), (4, 512, 4)),
    *((2, 2048, 8), (4, 2048, 8)),
)
_SUMS = (
    *((4, 1024, 4), (8, 1024, 4), (16, 1024, 4), (8, 512, 2), (16, 512, 2), (8, 512, 4)),
    *((8, 2048, 8),),
)
_PRODUCT = _named("BLOCK_T", "BLOCK_F", "BLOCK_D", "num_warps", "num_stages")(
    *((64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (64, 64, 64, 4, 3), (64, 64, 64, 4, 4)),
    *((64, 128, 32, 4, 4), (64, 256, 64, 8, 3), (128, 64, 64, 4, 3), (128, 128, 64, 8, 3)),
)
_FEW_AND_MANY = [
    Timed(f"linear invariant, T {t}", row="linear invariant", sizes={"T": t}) for t in (128, 16384)
]
_LOSS = (Timed("linear_cross_entropy"),)
_LOSS_BLOCKS = ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16))
_GRADIENT = (  # rows, columns, warps, stages, least rows of a program
    *((4, 512, 4, 3, 64), (4, 512, 4, 4, 64), (2, 1024, 4, 4, 64), (4, 1024, 4, 3, 64)),
    *((4, 1024, 8, 3, 64), (8, 512, 4, 3, 64), (4, 512, 4, 3, 32), (4, 512, 4, 3, 128)),
)

TUNABLES = (
    Tunable("attention.SHORT", _HEAD_64, _SHORT, _FWD_128),
    Tunable("attention.LONG", _HEAD_64, _LONG, _FWD_512),
    Tunable("attention_bwd.SHORT", _HEAD_64, _SHORT_BWD, _BWD_128),
    Tunable("attention_bwd.DELTA", None, _DELTA, _BWD_512[:1]),
    Tunable("attention_bwd.LONG_KV", _HEAD_64, _LONG_KV, _BWD_512),
    Tunable("attention_bwd.LONG_Q", _HEAD_64, _LONG_Q, _BWD_512),
    Tunable("layer_norm.FWD_TILES", _COLUMNS, _ONE_PASS, _NORM),
    Tunable("layer_norm.BWD_TILES", _COLUMNS, _NORM_AHEAD, _NORM_BWD),
    Tunable("gelu.FWD_TILES", None, _GELU, _wide("bias_gelu")),
    Tunable("gelu.BWD_TILES", None, _GELU, _wide("bias_gelu_bwd")),
    Tunable("linear.COLUMN_SUM_TILES", None, _SUMS, _wide("column_sums")),
    Tunable("linear.PRODUCT", 2, _PRODUCT, _FEW_AND_MANY),
    Tunable("embedding.FWD_TILES", _COLUMNS, _ONE_PASS, _both("embed")),
    Tunable("embedding.BWD_TILES", _COLUMNS, _EMBED_AHEAD, _both("embed_bwd")),
    Tunable("embedding_tables.CHUNKS", 0, _WORD_CHUNKS, _both("embed_bwd")[:1]),
    Tunable("embedding_tables.CHUNKS", 1, _FEW_CHUNKS, _both("embed_bwd")[:1]),
    Tunable("cross_entropy.LOSS_BLOCKS", None, _LOSS_BLOCKS, _LOSS),
    Tunable("cross_entropy.GRADIENT_TILES", None, _GRADIENT, _LOSS),
)


def tables() -> list[str]:
    """Return the tables' names."""
    return [*dict.fromkeys(tunable.table for tunable in TUNABLES)]


def of(table: str) -> list[Tunable]:
    """Return what is tuned of a table.

    Raises:
        ValueError: there is no such table.
    """
    found = [tunable for tunable in TUNABLES if tunable.table == table]
    if not found:
        raise ValueError(f"tune: want one of {', '.join(tables())}, got {table!r}")
    return found
