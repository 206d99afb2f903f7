"""The cases of encoder.py and pretraining.py: what each is made of.

Cases 1 to 10 are those of the targets, on a GPU; `cpu` cases run on a CPU. The others, `gpu` and
`cpu` with a shape or the name of a distribution, show how time grows with length, and throughput
with fill.
"""

from dataclasses import dataclass

from lengths import Lengths


@dataclass(frozen=True)
class Spec:
    """What a case is made of.

    Attributes:
        model: "base", "large", ...: a named size.
        lengths: of the sequences.
        small: the same for a rehearsal, in which the model is small too.
        dtype: of weights and arithmetic on a CPU; on a GPU it is bf16.
        kind: what goes in: a padded "batch", token "ids" of many sequences in host memory, or
            "texts" there.
        optimizer: of a step of pre-training.
        few: only the peers that differ most are timed unless others are asked for.
    """

    model: str
    lengths: Lengths
    small: Lengths
    dtype: str = "fp32"
    kind: str = "batch"
    optimizer: str = "adamw"
    few: bool = False


def _full(model: str, n: int, length: int, **fields: object) -> Spec:
    small = Lengths("full", min(n, 4), max(16, length // 16))
    return Spec(model, Lengths("full", n, length), small, **fields)


def _share(model: str, n: int, high: int, fill: float, **fields: object) -> Spec:
    return Spec(model, Lengths("normal", n, high, fill), Lengths("normal", 6, 32, fill), **fields)


def _named(model: str, name: str, n: int, longest: int = 0, **fields: object) -> Spec:
    small = Lengths(name, min(n, 24) if fields.get("kind") else 4, 24)
    return Spec(model, Lengths(name, n, longest), small, **fields)


_FEW = {"few": True}
_SHARES = {"25%": 0.25, "50%": 0.5, "75%": 0.75}
_LENGTHS = (32, 64, 128, 256, 512)

ENCODER = {
    "case 1": _full("base", 1, 128),
    "case 2 s128": _full("large", 1, 128),
    "case 2 s384": _full("large", 1, 384),
    "case 3": _full("base", 128, 128),
    "case 4": _full("large", 128, 384),
    "case 5": _named("base", "normal", 8192, kind="ids"),
    "case 5 text": _named("base", "normal", 8192, kind="texts"),
    "case 6": _named("large", "squad", 4096, kind="ids"),
    "case 7 s64": _share("base", 16, 64, 0.6),
    "case 7": _share("base", 16, 512, 0.6),
    "case 7 s1024": _share("base", 16, 1024, 0.6),
    **{f"gpu 32x{n}": _full("base", 32, n, **_FEW) for n in _LENGTHS},
    **{f"gpu 32x512 {of}": _share("base", 32, 512, share, **_FEW) for of, share in _SHARES.items()},
    "gpu glue": _named("base", "glue", 512, **_FEW),
    "gpu squad": _named("base", "squad", 128, **_FEW),
    "gpu wikipedia": _named("base", "wikipedia", 64, **_FEW),
    "gpu normal": _named("base", "normal", 64, **_FEW),
    "gpu lognormal": _named("base", "lognormal", 256, **_FEW),
    "cpu 1x128": _full("base", 1, 128),
    "cpu 8x128": _full("base", 8, 128),
    "cpu 2x512": _full("base", 2, 512),
    "cpu 16x128 33%": _share("base", 16, 128, 0.33),
    "cpu 8x512 46%": _share("base", 8, 512, 0.46),
    "cpu 8x128 bf16": _full("base", 8, 128, dtype="bf16"),
    "cpu 16x128 33% bf16": _share("base", 16, 128, 0.33, dtype="bf16"),
    **{f"cpu 1x{n}": _full("base", 1, n, **_FEW) for n in _LENGTHS if n != 128},
    **{f"cpu 8x128 {of}": _share("base", 8, 128, share, **_FEW) for of, share in _SHARES.items()},
    "cpu glue": _named("base", "glue", 32, **_FEW),
    "cpu squad": _named("base", "squad", 8, **_FEW),
    "cpu wikipedia": _named("base", "wikipedia", 4, **_FEW),
    "cpu normal": _named("base", "normal", 8, **_FEW),
    "cpu lognormal": _named("base", "lognormal", 16, **_FEW),
    "cpu text": _named("base", "glue", 128, kind="texts", **_FEW),
}

PRETRAINING = {
    "case 8": _full("large", 64, 128),
    "case 9": _share("large", 32, 512, 254 / 512, optimizer="lamb"),
    "case 10 s128": _full("base", 256, 128),
    "case 10 s512": _full("base", 64, 512),
    "cpu mini 32x128": _full("mini", 32, 128),
    "cpu small 32x128": _full("small", 32, 128),
    "cpu mini wikipedia": _named("mini", "wikipedia", 16, optimizer="lamb"),
}


def of_device(specs: dict[str, Spec], device: str) -> list[str]:
    """Return the names of the cases for a "cpu" or for "cuda"."""
    return [name for name in specs if name.startswith("cpu ") is (device == "cpu")]
