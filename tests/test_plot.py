"""The curves of a run: what is drawn, from whatever records there are."""

import json
import sys

import numpy as np
import pytest

from bert_fast.train import plot as module
from bert_fast.train.metrics import METRICS
from bert_fast.train.plot import CURVES, draw, plot

ENTROPY = 6.9


def run(directory, *, evaluations=True, count=20, corpora=("to/en",)):
    """A run whose losses fall, with a half line at its end."""
    directory.mkdir(parents=True, exist_ok=True)
    records = [{"kind": "start", "step": 0, "formula": "3 (...)"}]
    for i in range(1, count + 1):
        records.append(
            {
                **{"kind": "train", "step": 10 * i, "mlm_loss": 7 - i / 10},
                **{"nsp_accuracy": 0.5 + i / 100, "tokens_per_second": 1e4 + i},
            }
        )
    records[1]["mlm_loss"] = None  # was NaN
    if evaluations:
        more = {"mlm_loss": 6.5, "nsp_accuracy": 0.55, "unigram_entropy": ENTROPY}
        for step in (100, 200):
            for corpus in corpora:
                records.append({"kind": "evaluation", "step": step, "corpus": corpus, **more})
                more = more | {"unigram_entropy": ENTROPY + 1}  # of the second, not drawn
            more["unigram_entropy"] = ENTROPY
    lines = "".join(f"{json.dumps(record)}\n" for record in records)
    (directory / METRICS).write_text(lines + '{"kind": "tra')
    return directory


@pytest.fixture
def drawn(monkeypatch):
    """The panels as they are drawn into."""
    pytest.importorskip("matplotlib", reason="draws with matplotlib")
    found, draw_run = [], module._draw_run

    def keep(panels, *rest):
        found.append(panels)
        draw_run(panels, *rest)

    monkeypatch.setattr(module, "_draw_run", keep)
    return found


def lines_of(panel):
    return {line.get_label(): line for line in panel.get_lines()}


def test_losses_accuracies_and_throughput(tmp_path, drawn):
    target = tmp_path / CURVES
    assert plot(run(tmp_path), target) == f"curves in {target}"
    assert target.read_bytes().startswith(b"\x89PNG") and target.stat().st_size > 10_000
    assert {p.name for p in tmp_path.iterdir()} == {METRICS, CURVES}
    loss, accuracy, rate = drawn[0]
    curves = lines_of(loss)
    assert [*curves] == ["training", "held out", "unigram entropy"]
    steps, values = curves["training"].get_data()
    assert [*steps] == [*range(20, 210, 10)]  # step 10 has no loss
    assert np.allclose(values, 7 - np.arange(2, 21) / 10)
    entropy = curves["unigram entropy"]
    assert entropy.get_linestyle() == "--" and {*entropy.get_ydata()} == {ENTROPY}
    assert [*lines_of(accuracy)] == ["training", "held out"]
    assert rate.get_lines()[0].get_ydata()[-1] == 1e4 + 20
    labels = [panel.get_ylabel() for panel in drawn[0]]
    assert "nats" in labels[0] and "tokens per second" in labels[2]
    assert rate.get_xlabel() == "steps"


def test_a_second_corpus_beside_the_own(tmp_path, drawn):
    draw(run(tmp_path, corpora=("to/en", "old/books")), tmp_path / CURVES)
    curves = lines_of(drawn[0][0])
    assert [*curves] == ["training", "held out, en", "held out, books", "unigram entropy"]
    assert [curves[f"held out, {name}"].get_linestyle() for name in ("en", "books")] == ["-", ":"]
    assert {*curves["unigram entropy"].get_ydata()} == {ENTROPY}


def test_a_corpus_that_was_moved_is_the_same(tmp_path, drawn):
    """It is known by its digest; by its name in older records."""
    run(tmp_path)
    path = tmp_path / METRICS
    records = [json.loads(line) for line in path.read_text().splitlines()[:-1]]
    for i, record in enumerate(r for r in records if r["kind"] == "evaluation"):
        record |= {"digest": "one", "corpus": f"place {i}"}
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    draw(tmp_path, tmp_path / CURVES)
    loss = lines_of(drawn[0][0])
    assert {*loss} == {"training", "held out", "unigram entropy"}
    assert len(loss["held out"].get_xdata()) == 2


def test_several_runs_side_by_side(tmp_path, drawn):
    runs = [run(tmp_path / "a"), run(tmp_path / "b" / "x", evaluations=False)]
    runs.append(run(tmp_path / "c" / "x") / METRICS)
    draw(runs, tmp_path / "both.png")
    names = {label.rpartition(": ")[0] for label in lines_of(drawn[0][0])}
    assert names == {"a", *(str(tmp_path / d / "x" / METRICS) for d in "bc")}
    colors = {line.get_color() for line in drawn[0][2].get_lines()}
    assert len(colors) == 3


def test_without_records(tmp_path):
    (tmp_path / METRICS).write_text('{"kind": "start", "step": 0}\n')
    with pytest.raises(ValueError, match="want records of training"):
        draw(tmp_path, tmp_path / CURVES)
    with pytest.raises(FileNotFoundError):
        draw(tmp_path / "none", tmp_path / CURVES)
    with pytest.raises(FileNotFoundError, match=r"x\.png: want a file in a directory"):
        draw(tmp_path, tmp_path / "no" / "x.png")
    (tmp_path / METRICS).write_text('{"step": 3}\n')
    with pytest.raises(ValueError, match="want records of training"):
        draw(tmp_path, tmp_path / CURVES)
    assert plot(tmp_path / "none", tmp_path / CURVES).startswith("no curves: ")
    assert not (tmp_path / CURVES).exists()


def test_without_matplotlib_a_note(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install"):
        draw(run(tmp_path), tmp_path / CURVES)
    assert "want matplotlib" in plot(tmp_path, tmp_path / CURVES)
    assert not (tmp_path / CURVES).exists()


def test_a_curve_that_is_not_written_leaves_the_old_one(tmp_path, monkeypatch, drawn):
    target = tmp_path / CURVES
    target.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        draw(run(tmp_path), target)
    assert target.read_bytes() == b"old"
