"""Curves of training runs as a PNG: losses, accuracies and throughput."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bert_fast.files import staged
from bert_fast.train.metrics import METRICS, read_records

CURVES = "curves.png"


def draw(runs: Path | Sequence[Path], target: Path) -> None:
    """Draw the curves of one run, or of several in one picture.

    Args:
        runs: directories of runs, or their metrics.jsonl.
        target: a .png file, which is replaced.

    Raises:
        FileNotFoundError: a run has no records.
        ValueError: no run has a record of training.
        ImportError: matplotlib is not installed.
        OSError: the picture cannot be written.
    """
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target}: want a file in a directory, got no directory")
    paths = [runs] if isinstance(runs, Path) else runs
    files = [path / METRICS if path.is_dir() else path for path in paths]
    records = {_name(file, files): read_records(file) for file in files}
    if not any(record["kind"] == "train" for found in records.values() for record in found):
        raise ValueError(f"{files[0]}: want records of training, got none")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        want = "want matplotlib for curves, got nothing"
        raise ImportError(f"{want}: pip install 'bert-fast[train]'") from error
    figure = Figure(figsize=(7, 9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot, which would ask for a screen and keep the figure
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
    for i, (name, found) in enumerate(records.items()):
        _draw_run(panels, found, f"C{i}", f"{name}: " if len(records) > 1 else "")
    loss, accuracy, rate = panels
    loss.set_ylabel("cross entropy of masked tokens (nats)")
    accuracy.set_ylabel("share of pairs judged rightly")
    rate.set_ylabel("real tokens per second")
    rate.set_xlabel("steps")
    rate.set_ylim(bottom=0)
    accuracy.set_ylim(top=1.02)
    for panel in panels:
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    with staged(target.parent) as write:
        write(target.name, [picture.getbuffer()])


def plot(runs: Path | Sequence[Path], target: Path) -> str:
    """Draw curves if that is possible, as the end of a run, which should not fail by it.

    Args:
        runs: as for `draw`.
        target: as for `draw`.

    Returns:
        Where the picture is, or why there is none.
    """
    try:
        draw(runs, target)
    except (ImportError, OSError, ValueError) as error:
        return f"no curves: {error}"
    return f"curves in {target}"


def _name(file: Path, files: Sequence[Path]) -> str:
    """Return what to call a run: its directory's name, or its path where two are the same."""
    name = file.resolve().parent.name
    return name if sum(f.resolve().parent.name == name for f in files) == 1 else str(file)


def _draw_run(panels: Any, records: list[dict[str, Any]], color: str, name: str) -> None:
    """Draw one run's curves into the panels."""
    loss, accuracy, rate = panels
    train = [record for record in records if record["kind"] == "train"]
    held_out = [record for record in records if record["kind"] == "evaluation"]
    faint = {"color": color, "alpha": 0.5, "linewidth": 1}
    marked = {"color": color, "marker": "o", "markersize": 3, "linewidth": 1.5}
    loss.plot(*_curve(train, "mlm_loss"), **faint, label=f"{name}training")
    accuracy.plot(*_curve(train, "nsp_accuracy"), **faint, label=f"{name}training")
    rate.plot(*_curve(train, "tokens_per_second"), color=color, label=name.removesuffix(": "))
    corpora = {_corpus(record): record["corpus"] for record in held_out}
    for (digest, corpus), line in zip(corpora.items(), ("-", ":"), strict=False):  # own first
        of = [record for record in held_out if _corpus(record) == digest]
        label = f"{name}held out" + (f", {Path(corpus).name}" if len(corpora) > 1 else "")
        loss.plot(*_curve(of, "mlm_loss"), **marked, linestyle=line, label=label)
        accuracy.plot(*_curve(of, "nsp_accuracy"), **marked, linestyle=line, label=label)
    if held_out and (entropy := held_out[0].get("unigram_entropy")) is not None:
        label = f"{name}unigram entropy"
        loss.axhline(entropy, color=color, linestyle="--", linewidth=1, label=label)


def _corpus(record: Mapping[str, Any]) -> str:
    """Return what a corpus is known by, whatever it was called; older records know the name."""
    return record.get("digest", record["corpus"])


def _curve(records: list[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return steps and values, without those that are null."""
    points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]
