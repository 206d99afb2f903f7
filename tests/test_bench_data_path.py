"""benchmarks/data_path.py: it runs, and refuses steps whose bits are not the reference's."""

import sys

import data_path
import pytest
from data_cases import implementation

from bert_fast.data import reference, steps


@pytest.fixture
def run(monkeypatch, capsys):
    """Run it on few texts; return its exit status and what it printed."""
    monkeypatch.setattr(data_path, "LEAST", 1e-6)
    monkeypatch.setattr(sys, "argv", ["data_path.py", "--most", "30", "--rounds", "1"])
    monkeypatch.setattr(data_path.torch, "set_num_threads", lambda n: None)
    return lambda: (data_path.main(), capsys.readouterr().out)


def test_a_table_for_each_form_of_the_texts(run):
    status, printed = run()
    assert status == 0
    assert "30 texts" in printed and "blocks of 512" in printed
    rows = [line for line in printed.splitlines() if "│" in line]
    assert sum("x plain Python" in row for row in rows) == 2 * 3
    assert sum("x transformers" in row for row in rows) == 2 * 3


def test_other_bits_than_the_reference_are_refused(run, monkeypatch):
    implementation("csrc")  # else the reference is compared with itself

    def other(ids, cu_seqlens, special, index, seed, *rest):
        return reference.mask(ids, cu_seqlens, special, index, seed ^ 1, *rest)

    monkeypatch.setattr(steps, "mask", other)
    status, printed = run()
    assert status == 1 and "labels under {'sampling': 'exact'" in printed.replace("\n", "")
