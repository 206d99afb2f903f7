"""A whole model with the extension, without it, and with any number of threads."""

import os
import subprocess
import sys

import pytest
import torch

import bert_fast
from bert_fast import extension

LENGTHS = 40, 7, 1, 23, 33
CONFIG = bert_fast.BertConfig(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=256,
    vocab_size=300,
    hidden_dropout_prob=0.2,
    attention_probs_dropout_prob=0.2,
)
# Answers of a model: hidden states, then in training with dropout the loss and every gradient.
SCRIPT = f"""
import sys, torch
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_extension_model as here
torch.save(here.answers(), sys.argv[1])
"""


def answers() -> dict[str, torch.Tensor]:
    """What the model answers in this process."""
    torch.manual_seed(0)
    model = bert_fast.BertForMaskedLM(CONFIG)
    L = max(LENGTHS)
    ids = torch.randint(5, 300, (len(LENGTHS), L))
    mask = (torch.arange(L) < torch.tensor(LENGTHS)[:, None]).long()
    labels = torch.where(torch.rand(ids.shape) < 0.2, ids, -100)
    with torch.no_grad():
        found = {"hidden": model.eval().bert(ids, mask).last_hidden_state}
    torch.manual_seed(1)
    loss = model.train()(ids, mask, labels=labels).loss
    loss.backward()
    grads = {f"d_{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()} | grads


def elsewhere(tmp_path, **variables: str) -> dict[str, torch.Tensor]:
    """The same from another process."""
    path = tmp_path / "answers.pt"
    env = os.environ | variables
    subprocess.run([sys.executable, "-c", SCRIPT, str(path)], check=True, env=env)
    return torch.load(path)


def assert_equal_within(got, want, bound=1e-5):
    assert got.keys() == want.keys()
    for name, value in want.items():
        error = (got[name] - value).abs().max() / value.abs().max().clamp(min=1)
        assert error <= bound, f"{name}: {error:.1e}"


@pytest.fixture(autouse=True)
def compiled():
    if extension.load()[0] is None:
        pytest.skip(f"without the extension: {extension.load()[1]}")


def test_without_the_extension(tmp_path):
    """The same answers, dropout's masks included, and other bits: so it was another code."""
    ours, theirs = answers(), elsewhere(tmp_path, BERT_FAST_EXT="0")
    assert_equal_within(theirs, ours)
    assert not torch.equal(theirs["hidden"], ours["hidden"])


@pytest.mark.parametrize("name", ["avx2", "default"])
def test_with_an_older_instruction_set(tmp_path, name):
    assert_equal_within(elsewhere(tmp_path, ATEN_CPU_CAPABILITY=name), answers())


@pytest.mark.parametrize("library", bert_fast.ops.products.LIBRARIES)
def test_with_any_number_of_threads(library):
    """Within the bound; and with one number the same bits every time."""
    before = torch.get_num_threads()
    try:
        with bert_fast.ops.products.fixed_cpu_library(library):
            torch.set_num_threads(1)
            want = answers()
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                once, twice = answers(), answers()
                assert_equal_within(once, want)
                assert all(torch.equal(once[name], twice[name]) for name in once), threads
    finally:
        torch.set_num_threads(before)
