"""Encoder.encode beside sentence-transformers, in small; the demo's nearest sentences."""

import gzip

import demo
import pytest
import sentences
import torch
from encoder_models import TEXTS, save_tiny

from bert_fast import Encoder


def test_both_are_checked_and_timed(tmp_path):
    pytest.importorskip("sentence_transformers")
    save_tiny(tmp_path / "model")
    case, candidates = sentences.sentence_case(tmp_path / "model", TEXTS, torch.device("cpu"))
    assert case.work.sequences == len(TEXTS)
    run = sentences.Run.start(tmp_path / "run.json", "sentences", "")
    sentences.harness.measure(case, candidates, run, rounds=1)
    rows = {row["candidate"]: row for row in run.data["rows"]}
    assert set(rows) == {"sentence-transformers", "accelerated", "bert_fast"}
    assert {row["state"] for row in rows.values()} == {"measured"}
    assert rows["bert_fast"]["rate"]["tokens_per_s"] > 0
    ours = next(c for c in candidates if c.name == "bert_fast")
    wrong = sentences._candidate("wrong", lambda: _Halved(ours.prepare()))
    sentences.harness.measure(case, [wrong], run, rounds=1)
    assert run.row(case.name, "wrong")["state"] == "refused"


class _Halved:
    """An encoder that is wrong."""

    def __init__(self, right):
        self.encode = lambda texts, **_: 0.5 * right.check(texts)["vectors"]


def test_texts_of_a_file(tmp_path):
    with gzip.open(tmp_path / "texts.gz", "wt", encoding="utf-8") as file:
        file.write("one\n\n  \ntwo\nthree\n")
    assert sentences.read_texts(tmp_path / "texts.gz", 2) == ["one", "two"]
    (tmp_path / "texts.txt").write_text("one\n", encoding="utf-8")
    assert sentences.read_texts(tmp_path / "texts.txt", 9) == ["one"]


def test_the_demo_names_the_nearest(tmp_path, monkeypatch):
    """Each query's sentence stands first where it is itself among the sentences."""
    monkeypatch.setattr(demo, "QUERIES", TEXTS[3:5])
    encoder = Encoder.from_pretrained(save_tiny(tmp_path), device="cpu")
    table = demo.nearest("a model", encoder, TEXTS)
    query, found, cosine = ([*column.cells] for column in table.columns)
    assert query == [TEXTS[3], "", TEXTS[4], ""]
    assert found[::2] == TEXTS[3:5] and cosine[::2] == ["1.00", "1.00"]
