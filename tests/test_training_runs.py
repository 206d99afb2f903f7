"""The training runs kept in the repository: what their records show, and what is said of them."""

from pathlib import Path

import pytest

from bert_fast.train.metrics import METRICS, read_records
from bert_fast.train.settings import load

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores"
DOCS = (ROOT / "docs" / "pretraining.md").read_text("utf-8")
ENGLISH, KOREAN, ADAPTED = "pretraining-english", "pretraining-korean", "pretraining-adapted"


def of(name, kind):
    return [record for record in read_records(KEPT / name / METRICS) if record["kind"] == kind]


@pytest.mark.parametrize("name", [ENGLISH, KOREAN, ADAPTED])
def test_whole(name):
    """One process from the start to the end, with its settings and curves."""
    assert (KEPT / name / "curves.png").stat().st_size > 10_000
    given, trained = load(KEPT / name / "settings.yaml"), of(name, "train")
    assert trained[-1]["step"] == given.steps and len(of(name, "start")) == 1
    assert [record["status"] for record in of(name, "stop")] == [0] and not of(name, "resume")
    assert not Path(given.data.corpus).is_absolute() and not Path(given.output).is_absolute()


@pytest.mark.parametrize("name", [ENGLISH, KOREAN])
def test_goals(name):
    """Within 90 minutes of two cores, on documents that were held out."""
    trained, evaluated = of(name, "train"), of(name, "evaluation")
    assert trained[0]["seconds"] > 1 and of(name, "start")[0]["threads"] == 2
    assert sum(record["seconds"] for record in trained) < 90 * 60
    last = evaluated[-1]
    assert last["step"] == trained[-1]["step"] and last["sequences"] > 200
    assert last["mlm_loss"] <= last["unigram_entropy"] - 1.5
    assert last["nsp_accuracy"] >= 0.70


def test_adaptation():
    """The loss on the book falls, and what the model knew before is told beside it."""
    book, before = {}, {}
    for record in of(ADAPTED, "evaluation"):
        kept = book if record["corpus"].endswith("book") else before
        kept[record["step"]] = record["mlm_loss"]
    steps = sorted(book)
    assert steps == sorted(before) and len(steps) > 3
    assert book[steps[-1]] < book[steps[0]] - 0.05


def row(name, what, corpus=None):
    """The line of the table in the docs."""
    trained = of(name, "train")
    evaluated = [r for r in of(name, "evaluation") if corpus in (None, r["corpus"])]
    first, last = evaluated[0], evaluated[-1]
    minutes = sum(record["seconds"] for record in trained) / 60
    return (
        f"| {what} | {trained[-1]['step']:,} | {trained[-1]['tokens_total'] / 1e6:.1f} M |"
        f" {minutes:.0f} min | {last['unigram_entropy']:.2f} |"
        f" {first['mlm_loss']:.2f} to {last['mlm_loss']:.2f} | {last['mlm_accuracy']:.0%} |"
        f" {last['nsp_accuracy']:.0%} |"
    )


@pytest.mark.parametrize(
    ("name", "what"), [(ENGLISH, "English, `mini`"), (KOREAN, "Korean"), (ADAPTED, "a novel")]
)
def test_what_is_said(name, what):
    corpora = dict.fromkeys(record["corpus"] for record in of(name, "evaluation"))
    lines = [row(name, what, next(iter(corpora)))]
    lines += [row(name, "beside it, the first corpus", corpus) for corpus in [*corpora][1:]]
    assert [line for line in lines if line not in DOCS.splitlines()] == []
