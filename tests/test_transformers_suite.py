"""The script that runs transformers' own tests, on a tree of toy tests, which run once."""

from pathlib import Path

import pytest
import transformers_suite
from transformers_suite import Outcome

TESTS = """
import os
import unittest

import torch
from transformers import BertConfig, BertModel, PreTrainedModel

MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


def states(**inputs):
    sizes = dict(vocab_size=9, hidden_size=8, num_attention_heads=2, intermediate_size=8)
    model = BertModel(BertConfig(**sizes, num_hidden_layers=1)).eval()
    return model(torch.ones_like(MASK), **inputs).last_hidden_state


class BertModelTest(unittest.TestCase):
    def test_states(self):
        assert states(attention_mask=MASK)[0].all()

    def test_by_query_and_key(self):
        pairs = (MASK[:, None, None] * MASK[:, None, :, None]).bool()
        assert states(attention_mask=pairs).shape == (2, 3, 8)

    def test_padding(self):
        for row in range(2):
            with self.subTest(row=row):
                assert states(attention_mask=MASK)[row].all(), "padding"

    def test_exits(self):
        if hasattr(PreTrainedModel.post_init, "__wrapped__"):
            os._exit(0)

    def test_broken(self):
        raise FileNotFoundError(f"{__file__} is not right, see https://example.org/a/b")

    def test_of_a_third_kind(self):
        self.skipTest(f"`{type(self)}` is not in BertModelTest")
"""
TEST = "bert::BertModelTest::test_"
REASONS = {"bert::*::test_padding": "the reason", "*::test_exits": "the other one"}


def write_tree(folder: Path, tests: str) -> Path:
    own = folder / "tests/models/bert"
    own.mkdir(parents=True)
    for package in (own, own.parent, own.parent.parent):
        (package / "__init__.py").touch()
    (own / "test_modeling_bert.py").write_text(tests)
    (folder / "src/transformers").mkdir(parents=True)
    (folder / "src/transformers/__init__.py").write_text('__version__ = "0.0.0"\n')
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return write_tree(tmp_path_factory.mktemp("tree"), TESTS)


@pytest.fixture(scope="module")
def outcomes(tree) -> tuple[dict[str, Outcome], ...]:
    file = tree / "tests/models/bert/test_modeling_bert.py"
    return transformers_suite.run_both(tree, file, timeout=120)


@pytest.fixture
def suite(tree, outcomes, monkeypatch, tmp_path, capsys):
    """Runs the script, but not the tests again; returns the exit status, the table, the errors."""

    def run(reasons, outcomes=outcomes):
        monkeypatch.setattr(transformers_suite, "run_both", lambda *_: outcomes)
        out = tmp_path / "table.md"
        status = transformers_suite.main(
            [str(tree), "--models", "bert", "--out", str(out), "--note", "a | b"], reasons
        )
        return status, out.read_text("utf-8"), capsys.readouterr().err

    return run


def test_a_failure_without_a_reason_is_named(suite):
    status, table, errors = suite({})
    assert status == 1
    faults = errors.splitlines()
    assert [fault.split(": ")[0] for fault in faults] == [f"{TEST}exits", f"{TEST}padding"]
    assert faults[1].endswith("without a reason: AssertionError: padding")
    assert f"| {TEST}exits | ended the process, or took over 120 s |" in table
    assert all(f"- {fault}" in table for fault in faults)


def test_the_table(suite, tree):
    status, table, errors = suite(REASONS)
    assert (status, errors) == (0, "")
    assert "| bert | 6 | 2 | 1 | 1 | 2 | 0 | 2 | 3 | 1 |" in table
    assert f"| {TEST}padding | the reason |" in table
    broken = "FileNotFoundError: test_modeling_bert.py is not right, see https://example.org/a/b"
    assert f"| {TEST}broken | {broken} |" in table
    assert "| its attention_mask is not (B, L) | 1 |" in table
    assert "| `...` is not in `...` | 1 |" in table
    assert "**the tests are those of 0.0.0**" in table
    assert "python tests/transformers_suite.py TREE --models bert`" in table
    assert "| note | a \\| b |" in table
    assert str(tree) not in table


def test_a_reason_whose_test_passes_is_stale(suite):
    status, _, errors = suite(REASONS | {"*::test_states": "none"})
    assert status == 1
    assert errors == f"{TEST}states: passes accelerated, but has a reason why not\n"


def test_nothing_accelerated_is_no_success(suite, outcomes):
    status, _, errors = suite({}, (outcomes[0], outcomes[0]))
    assert (status, errors) == (1, "bert: no accelerated forward ran\n")
    status, _, errors = suite({}, (outcomes[1], outcomes[1]))
    assert (status, errors) == (1, "bert: accelerated forwards ran in the plain run\n")


def test_a_tree_without_tests_or_with_broken_ones_is_refused(tmp_path, capsys):
    assert transformers_suite.main([str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("TREE: want a source tree of transformers with its tests, got ")
    assert "tests/models/electra/test_modeling_electra.py" in message
    broken = write_tree(tmp_path / "broken", "import not_there\n")
    assert transformers_suite.main([str(broken), "--models", "bert"]) == 2
    assert "No module named 'not_there'" in capsys.readouterr().err
