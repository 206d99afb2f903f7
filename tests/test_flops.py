"""The operations that MFU counts, against the goals' formula and the benchmarks', and the peaks."""

import time

import pretraining
import pytest
import torch
from encoder import forward_flops as benchmark_forward
from torch.utils.flop_counter import FlopCounterMode

from bert_fast import BertConfig, BertForPreTraining
from bert_fast.train import flops

LENGTHS = (128, 37, 512, 1, 20, 102)  # 800 tokens, of which 15 % are 120
SQUARES = sum(n * n for n in LENGTHS)


@pytest.mark.parametrize("size", ["tiny", "base", "large"])
def test_agrees_with_the_benchmarks(size):
    config = BertConfig.named(size)
    assert flops.forward_flops(config, 800, SQUARES) == benchmark_forward(config, LENGTHS)
    assert flops.training_flops(config, 800, SQUARES, 120) == pretraining.step_flops(
        config, LENGTHS
    )


def test_agrees_with_the_goals_formula():
    """Per token 3 (24 h^2 L + 4 s h L + p (2 h^2 + 2 h V)), for F = 4 h and full sequences."""
    h, L, s, V, p, n = 768, 12, 128, 30522, 0.15625, 6
    per_token = 3 * (24 * h * h * L + 4 * s * h * L + p * (2 * h * h + 2 * h * V))
    config = BertConfig.named("base")
    got = flops.training_flops(config, n * s, n * s * s, int(p * n * s))
    assert got == per_token * n * s


def test_agrees_with_a_count_of_the_forward():
    """torch counts the products of the plain layers; attention and the head are added by hand."""
    config = BertConfig.named("tiny", intermediate_size=200, vocab_size=100)
    model = BertForPreTraining(config)
    rows = torch.randn(50, config.hidden_size)
    with FlopCounterMode(display=False) as counter:
        for layer in model.bert.encoder.layer:
            for linear in (m for m in layer.modules() if isinstance(m, torch.nn.Linear)):
                linear(rows.new_zeros(50, linear.in_features))
    attention = 2 * 2 * 50 * 50 * config.hidden_size  # scores and their sum over the values
    want = counter.get_total_flops() + config.num_hidden_layers * attention
    assert flops.forward_flops(config, 50, 50 * 50) == want


def test_formula_names_the_sizes():
    assert flops.formula(BertConfig.named("base")) == (
        f"{flops.FORMULA}, layers = 12, D = 768, F = 3072, V = 30522"
    )


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_vendors_figures(name, tera):
    want = None if tera is None else tera * 1e12
    assert flops.vendor_peak(name, torch.bfloat16) == want
    assert flops.vendor_peak(name, torch.float32) is None


def test_measured_peak_is_a_rate():
    """No less than a product of ours takes, and quick."""
    before, started = torch.random.get_rng_state(), time.perf_counter()
    found = flops.peak("cpu", torch.float32)
    assert time.perf_counter() - started < 10
    assert torch.equal(torch.random.get_rng_state(), before)
    assert "TFLOP/s of this CPU in fp32, measured" in found.source
    assert 1e8 < found.flops < 1e14


@pytest.mark.parametrize(
    ("seconds", "sizes"),
    [
        (lambda n: n**3 / 1e14, [256, 512, 1024, 2048, 4096, 8192]),  # a GPU
        (lambda n: n**3 / 5e10, [256, 512, 1024, 2048]),  # some cores
        (lambda n: n**3 / 1e9, [256, 512, 1024]),
        (lambda n: n**3 / 1e8, [256]),  # a dtype without instructions for it
        (lambda n: n**3 / (1e9 if n == 512 else 4e10), [256, 512, 1024]),  # once disturbed
    ],
)
def test_measured_peak_is_the_best_of_what_there_is_time_for(seconds, sizes, monkeypatch):
    """With a clock of our own, and two operations for each of n^3."""
    seen = []
    monkeypatch.setattr(flops, "_product", lambda a, b: seen.append(len(a)))
    monkeypatch.setattr(torch, "randn", lambda n, m, **_: torch.empty(n, m, device="meta"))
    monkeypatch.setattr(flops, "_seconds", lambda a, b: seconds(len(a)))
    got = flops.measured_peak("cpu", torch.float32)
    assert seen == sizes and got == pytest.approx(max(2 * n**3 / seconds(n) for n in sizes))
