"""README's table of what was measured on CPUs, between two marks."""

import textwrap
from collections.abc import Sequence

from goals import OURS
from ledger import NOTHING, Kept, commit_of, figure
from page_parts import PARTS, Part, Shown

BEGIN = "<!-- measured: begin, made by benchmarks/performance.py -->"
END = "<!-- measured: end -->"
_WIDTH = 120
_PARTS = tuple(p for p in PARTS if p.title.startswith("Encoder, BERT-base"))  # fp32 first
_PEERS = tuple(_PARTS[0].against)
_HEAD = (
    f"| batch x length | {' | '.join(_PEERS)} | bert_fast"
    f"{''.join(f' | against {name}' for name in _PEERS)} |\n{'|---' * (2 + 2 * len(_PEERS))}|\n"
)
_NO_GPU = f"| anything on a GPU | {NOTHING} | | | {NOTHING} | | | |\n"


def replace(text: str, runs: Sequence[Kept]) -> str:
    """Return the text with what the runs say between the marks.

    Raises:
        ValueError: the marks are not there once each, in their order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise ValueError(f"README.md: want {BEGIN} and {END} once each, in this order")
    return f"{before}{BEGIN}\n{render(runs)}{END}{after}"


def render(runs: Sequence[Kept]) -> str:
    """Return what stands between the marks."""
    found = [(part, Shown.of(part, runs)) for part in _PARTS]
    shown = [one for _, one in found if one is not None]
    rows = [_row(one, case) for one in shown for case in one.cases()]
    rows += [] if any(_on_gpu(run) for run in runs) else [_NO_GPU]
    words = _words(shown) if shown else f"{NOTHING.capitalize()}."
    wrapped = textwrap.fill(words, _WIDTH, break_long_words=False, break_on_hyphens=False)
    return f"{wrapped}\n\n{_HEAD}{''.join(rows)}"


def _words(shown: Sequence[Shown]) -> str:
    """Return what the table is of."""
    first = shown[0]
    of, dtype = first.run.data["environment"], first.part.dtype
    rate = (first.run.data["ceilings"].get("matmul_tflop_per_s") or {}).get(dtype)
    reach = f", whose {dtype} products reach {rate:.2f} TFLOP/s" if rate else ""
    packages = ("torch", "transformers", "onnxruntime")
    versions = ", ".join(f"{name} {of.get(name) or 'absent'}" for name in packages)
    others = [one for one in shown[1:] if one.run != first.run]
    sources = [_source(first), *(f"rows in {one.part.dtype}: {_source(one)}" for one in others)]
    least = min(
        one.rows.measured(case, name)["wall"]["n"]
        for one in shown
        for case in one.cases()
        for name in (OURS, *one.rows.peers(case))
    )
    return (
        f"BERT-base in {dtype}, unless a row says otherwise, on {of['device']}{reach}. With"
        f" {versions}; {'; '.join(sources)}. Medians of {least} calls or more, all candidates in"
        " turn, each checked against fp64 before and after. ONNX Runtime is the faster of two: with"
        " and without its optimizer for transformers. `nn.TransformerEncoder`, PyTorch's own,"
        " skips padding in its layers, too. Another processor has other ratios."
    )


def _source(shown: Shown) -> str:
    data = shown.run.data
    return f"{data['started'][:10]}, `{data['command']}` at commit {commit_of(data['environment'])}"


def _row(shown: Shown, case: str) -> str:
    part = shown.part
    label = part.rows[case] + ("" if part is _PARTS[0] else f", {part.dtype}")
    ours = shown.rows.measured(case)["wall"]["p50"]
    times, ratios = [], []
    for name in _PEERS:
        ratio = next((r for r, p in shown.ratios(case) if _PARTS[0].against[name](p)), None)
        times.append(_none(part, name) if ratio is None else f"{figure(1e3 * ratio * ours)} ms")
        ratios.append("" if ratio is None else f"{figure(ratio)}x")
    cells = [label, *times, f"{figure(1e3 * ours)} ms", *ratios]
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|\n"


def _none(part: Part, name: str) -> str:
    """Return what stands where no peer of a kind has a time: some kinds have no such dtype."""
    return NOTHING if name in part.against else "has none"


def _on_gpu(run: Kept) -> bool:
    cases = run.data["cases"]
    return any(
        row["state"] == "measured" and cases.get(row["case"], {}).get("device") == "cuda"
        for row in run.data["rows"]
    )
