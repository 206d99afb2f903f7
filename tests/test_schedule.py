"""The learning rate of every step, beside transformers' schedule."""

import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from bert_fast.train.schedule import learning_rate


@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (100, 0), (7, 6), (1, 0), (3, 1)])
def test_is_transformers_one_step_ahead(steps, warmup):
    """Ours of step s is theirs of step s + 1: theirs begins with a step whose rate is 0."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    theirs = get_linear_schedule_with_warmup(optimizer, warmup, steps)
    for step in range(steps):
        optimizer.step()
        theirs.step()
        got = learning_rate(step, steps=steps, lr=3e-4, warmup=warmup)
        assert got == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-18)


def test_ends():
    """The first step has a share of the rate, the last of the warm-up all, the last lr_end."""
    given = {"steps": 1000, "lr": 1e-3, "warmup": 100, "lr_end": 1e-5}
    rates = [learning_rate(step, **given) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-5) and rates[99] == max(rates) == 1e-3
    assert rates[100] < 1e-3 and rates[-1] == 1e-5
    assert rates[:100] == sorted(rates[:100]) and rates[99:] == sorted(rates[99:], reverse=True)


def test_constant():
    given = {"steps": 10, "lr": 1e-3, "warmup": 4, "schedule": "constant"}
    rates = [learning_rate(step, **given) for step in range(10)]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, *[1e-3] * 7])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"step": 10}, "step: want 0 to 9, got 10"),
        ({"step": -1}, "step: want 0 to 9, got -1"),
        ({"warmup": 10}, "warmup: want 0 to 9 steps, got 10"),
        ({"schedule": "cosine"}, "schedule: want one of linear, constant, got 'cosine'"),
    ],
)
def test_refused(given, message):
    with pytest.raises(ValueError, match=message):
        learning_rate(**{"step": 0, "steps": 10, "lr": 1.0} | given)
