"""A real model of sentence-transformers on real sentences: the same vectors, the same score."""

import csv
import gzip

import numpy as np
import pytest
from encoder_models import minilm

import bert_fast


def pairs(file, most):
    """The first sentence pairs of a file of STS-b, and what people scored them."""
    with gzip.open(file, "rt", encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))[:most]
    return [row[5] for row in rows], [row[6] for row in rows], [float(row[4]) for row in rows]


@pytest.mark.parametrize("most", [200, pytest.param(1000, marks=pytest.mark.long)])
def test_sts(shared, most):
    """Pairs of sentences in fp32: vectors within 1e-5, Spearman's correlation to four digits."""
    transformer = pytest.importorskip("sentence_transformers").SentenceTransformer
    spearman = pytest.importorskip("scipy.stats").spearmanr
    first, second, scores = pairs(shared / "data" / "stsb" / "sts-train.csv.gz", most)
    model = transformer(str(minilm()), device="cpu")
    found = []
    for change in (bert_fast.restore, bert_fast.accelerate):
        vectors = change(model).encode([*first, *second])
        cosines = (vectors[:most] * vectors[most:]).sum(1)  # their length is 1
        found.append((vectors, spearman(cosines, scores).statistic))
    (plain, want), (fast, got) = found
    assert np.abs(fast - plain).max() < 1e-5 and (fast != plain).any()
    assert round(got, 4) == round(want, 4) and 0.7 < got < 0.97
