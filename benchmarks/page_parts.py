"""The parts of docs/performance.md that show whole models, and which run each of them shows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from goals import CPU, OURS, Place, Rows
from ledger import Kept
from targets import CLASSES


@dataclass(frozen=True)
class Part:
    """A part of the page.

    Attributes:
        title: its heading.
        place: rows of other devices and dtypes do not count.
        rows: its cases, with what the table calls them.
        words: what its rows are.
        against: the columns of ratios: what they are called, and whose names belong to it.
    """

    title: str
    place: Place
    rows: dict[str, str]
    words: str
    against: dict[str, Callable[[str], bool]]

    @property
    def dtype(self) -> str:
        """Of its rows."""
        return self.place.dtype


_TRANSFORMERS, _ONNX, _NESTED = (
    {name: CLASSES[name]} for name in ("transformers SDPA", "ONNX Runtime", "nn.TransformerEncoder")
)
_ALL = _TRANSFORMERS | _ONNX | _NESTED
_FULL, _SHARE = "{}, full", "{}, {} % filled"
PARTS = (
    Part(
        "Encoder, BERT-base in fp32",
        CPU,
        {
            "cpu 1x128": _FULL.format("1 x 128"),
            "cpu 8x128": _FULL.format("8 x 128"),
            "cpu 2x512": _FULL.format("2 x 512"),
            "cpu 16x128 33%": _SHARE.format("16 x 128", 33),
            "cpu 8x512 46%": _SHARE.format("8 x 512", 46),
        },
        "One forward of a padded batch with its mask, to hidden states. `onnxruntime` is the graph"
        " through ONNX Runtime's optimizer for transformers, `onnxruntime plain` the exported one"
        " with what a session optimizes by itself. `nn.TransformerEncoder` is PyTorch's own encoder"
        " in its fast path, whose layers work on nested tensors, without padding.",
        _ALL,
    ),
    Part(
        "One sequence, by length",
        CPU,
        {f"cpu 1x{n}": _FULL.format(f"1 x {n}") for n in (32, 64, 128, 256, 512)},
        "BERT-base in fp32, a batch of one.",
        _ALL,
    ),
    Part(
        "By fill",
        CPU,
        {f"cpu 8x128 {n}%": _SHARE.format("8 x 128", n) for n in (25, 50, 75)}
        | {"cpu 8x128": _FULL.format("8 x 128")},
        "BERT-base in fp32: the same shape with less and less padding.",
        _ALL,
    ),
    Part(
        "Lengths as in real data",
        CPU,
        {
            "cpu glue": "32 of GLUE",
            "cpu squad": "8 of SQuAD",
            "cpu wikipedia": "4 of Wikipedia",
            "cpu normal": "8 of N(256, 64)",
            "cpu lognormal": "16 of a lognormal",
        },
        "BERT-base in fp32, a batch of sequences with lengths drawn from those of the data, padded"
        " to the longest; the tokens are random. GLUE: sentences and pairs of three of its tasks;"
        " SQuAD: questions with their paragraphs; Wikipedia: pairs for pre-training, at most 512"
        " tokens.",
        _ALL,
    ),
    Part(
        "Text in",
        CPU,
        {"cpu text": "128 texts, lengths of GLUE"},
        "BERT-base in fp32, from texts to embeddings: tokenizing and batching are inside the time.",
        {"sentence-transformers": lambda name: name.startswith("sentence-transformers")},
    ),
    Part(
        "Encoder, BERT-base in bf16",
        Place("cpu", "bf16"),
        {
            "cpu 8x128 bf16": _FULL.format("8 x 128"),
            "cpu 16x128 33% bf16": _SHARE.format("16 x 128", 33),
        },
        "The same with the model in bf16, which is never the default on a CPU. A candidate may be"
        " off fp64 by twice what transformers' own bf16 is off, and by a fixed bound.",
        _TRANSFORMERS | _NESTED,
    ),
    Part(
        "Pre-training of small models in fp32",
        CPU,
        {
            "cpu mini 32x128": "BERT-mini, 32 x 128",
            "cpu small 32x128": "BERT-small, 32 x 128",
            "cpu mini wikipedia": "BERT-mini, 16 of Wikipedia, LAMB",
        },
        "One step: forward with dropout 0.1, masked-LM and next-sentence loss, backward, AdamW."
        " transformers computes the masked-LM head at every token, bert_fast at the masked ones,"
        " 15 %. Checked are loss and gradients without dropout; the difference is that of the"
        " output that comes nearest to its bound. The row of 16 sequences has Wikipedia's"
        " lengths, at most 512; ours takes LAMB there, its peers AdamW, as PyTorch has no LAMB.",
        _TRANSFORMERS | {"the fastest peer": CLASSES["best peer"]},
    ),
)


@dataclass(frozen=True)
class Shown:
    """A part and the run that it shows."""

    part: Part
    run: Kept
    rows: Rows

    @classmethod
    def of(cls, part: Part, runs: Sequence[Kept]) -> "Shown | None":
        """Choose the newest of the runs with most rows of ours."""
        able = [cls(part, run, Rows(run.data, part.place)) for run in runs]

        def rank(one: "Shown") -> tuple[int, str, str]:
            return len(one.cases()), one.run.data["started"], one.run.name

        best = max(able, key=rank, default=None)
        return best if best is not None and best.cases() else None

    def cases(self) -> list[str]:
        """Return the cases in which ours was measured."""
        return [case for case in self.part.rows if self.rows.measured(case) is not None]

    def candidates(self) -> list[str]:
        """Return ours and all others that were measured somewhere, in the order of their rows."""
        found = dict.fromkeys([OURS])
        for case in self.cases():
            found |= dict.fromkeys(self.rows.peers(case))
        return list(found)

    def ratios(self, case: str) -> list[tuple[float, str]]:
        """Return each peer's time divided by ours, the fastest first."""
        return sorted((self.rows.over(case, p, case, OURS), p) for p in self.rows.peers(case))
