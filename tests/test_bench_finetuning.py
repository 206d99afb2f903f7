"""The Trainer's benchmark in small: the same losses, and what it reads."""

import gzip
import sys

import finetuning
import pytest
from toy_text import sentences


@pytest.fixture
def table(tmp_path):
    rows = [f"{text}\t{i % 2}" for i, text in enumerate(sentences(40))]
    with gzip.open(tmp_path / "train.tsv.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(["sentence\tlabel", *rows]) + "\n")
    return tmp_path / "train.tsv.gz"


def test_reads_texts_and_labels(table):
    texts, labels = finetuning.read_table(table, 3)
    assert texts == sentences(3) and labels == [0, 1, 0]


def test_prints_both_and_compares_losses(table, capsys, monkeypatch):
    arguments = ["--data", str(table), "--size", "tiny", "--steps", "3", "--batch", "4"]
    monkeypatch.setattr(sys, "argv", ["finetuning.py", *arguments, "--rounds", "1"])
    assert finetuning.main() == 0
    out = capsys.readouterr().out
    assert "accelerated" in out and "losses differ by" in out
    monkeypatch.setattr(finetuning, "LOSS", -1.0)
    assert finetuning.main() == 1
