"""The unpadded BERT of PyTorch's parts: its arithmetic on a CPU, its attention on a GPU."""

from collections.abc import Iterator
from itertools import pairwise

import gate
import peer_cases
import peers
import pytest
import torch
import training_peers
import varlen_bert
import workload
from peer_cases import (
    CONFIG,
    CPU,
    FP32,
    LENGTHS,
    by_name,
    hidden,
    outside,
    plain_attention,
    training_answers,
)
from torch import Tensor, library

import bert_fast

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: FlashAttention")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return peer_cases.state()


@pytest.fixture(scope="module")
def ours(state) -> bert_fast.BertForPreTraining:
    return peer_cases.ours(state)


def flash_forward(q, k, v, cu_seqlens, cu_seqlens_k, max_len, max_len_k, p, causal, debug, **_):
    """aten::_flash_attention_forward in plain arithmetic."""
    assert torch.equal(cu_seqlens, cu_seqlens_k) and max_len == max_len_k
    assert not causal and not debug
    out = plain_attention(q, k, v, cu_seqlens, max_len, p).contiguous()
    sums = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return out, sums, torch.zeros(2, dtype=torch.uint64), q.new_empty(0), q.new_empty(0)


def flash_backward(grad, q, k, v, out, sums, cu_seqlens, cu_seqlens_k, *_, **__):
    """aten::_flash_attention_backward without dropout in plain arithmetic."""
    scale, parts = q.shape[2] ** -0.5, []
    for a, b in pairwise(cu_seqlens.tolist()):
        probs = (torch.einsum("qhk,shk->hqs", q[a:b], k[a:b]) * scale).softmax(-1)
        dp = torch.einsum("qhk,shk->hqs", grad[a:b], v[a:b])
        ds = probs * (dp - (dp * probs).sum(-1, keepdim=True)) * scale
        dq = torch.einsum("hqs,shk->qhk", ds, k[a:b])
        dk = torch.einsum("hqs,qhk->shk", ds, q[a:b])
        parts.append((dq, dk, torch.einsum("hqs,qhk->shk", probs, grad[a:b])))
    return tuple(torch.cat(t) for t in zip(*parts, strict=True))


@pytest.fixture
def flash_on_a_cpu() -> Iterator[None]:
    """PyTorch's FlashAttention operators on CPU tensors, where they have no implementation."""
    aten = library.Library("aten", "IMPL")
    aten.impl("_flash_attention_forward", flash_forward, "CPU")
    aten.impl("_flash_attention_backward", flash_backward, "CPU")
    yield
    aten._destroy()


def test_pytorchs_attention_is_called_as_it_wants_to_be(state, ours, flash_on_a_cpu):
    batch = workload.batch(CONFIG, LENGTHS["padded"], CPU, seed=3)
    prepared = peers._varlen(state, CONFIG, CPU, FP32, varlen_bert.varlen_attention())
    assert not outside(prepared.check(batch), hidden(ours, batch))
    training = workload.pretraining_batch(CONFIG, (9, 5, 17), CPU, seed=5)
    prepared = training_peers._varlen(state, CONFIG, CPU, FP32, varlen_bert.flash_attention)
    assert not outside(prepared.check(training), training_answers(ours, training))


def test_attention_drops_in_training_alone(state):
    seen = []

    def recorded(q, k, v, cu_seqlens, max_len, p):
        seen.append(p)
        return plain_attention(q, k, v, cu_seqlens, max_len, p)

    training = workload.pretraining_batch(CONFIG, (9, 5, 17), CPU, seed=5)
    prepared = training_peers._varlen(state, CONFIG, CPU, FP32, recorded)
    prepared.check(training)
    prepared.run(training)
    layers = CONFIG.num_hidden_layers
    assert seen == [0.0] * layers + [CONFIG.attention_probs_dropout_prob] * layers
    with pytest.raises(ValueError, match="no dropout"):
        varlen_bert.varlen_attention()(None, None, None, None, 3, 0.1)


@pytest.mark.long
def test_the_compiled_unpadded_model_takes_every_length(state, ours, flash_on_a_cpu):
    attention = varlen_bert.varlen_attention()
    prepared = peers._varlen(state, CONFIG, CPU, FP32, attention, compiled=True)
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    for lengths in ((9, 1, 17), (3, 8), (5, 30, 2, 2), (6, 7)):
        batch = workload.batch(CONFIG, lengths, CPU, seed=3)
        assert not outside(prepared.check(batch), hidden(ours, batch)), lengths
    assert stats["unique_graphs"] == before + 1


def swap_query_and_key(model: varlen_bert.VarlenBert) -> None:
    D = CONFIG.hidden_size
    weight = model.layers[0].qkv.weight
    weight.copy_(torch.cat([weight[D : 2 * D], weight[:D], weight[2 * D :]]))


def lose_a_bias(model: varlen_bert.VarlenBert) -> None:
    model.layers[1].down.bias.zero_()


def lose_the_types(model: varlen_bert.VarlenBert) -> None:
    model.types.weight.zero_()


@pytest.mark.parametrize("plant", [None, swap_query_and_key, lose_a_bias, lose_the_types])
def test_a_mistake_in_the_unpadded_model_is_seen(state, ours, plant, monkeypatch):
    load = varlen_bert.VarlenBert.load

    def planted(self, state):
        load(self, state)
        if plant is not None:
            with torch.no_grad():
                plant(self)
        return self

    monkeypatch.setattr(varlen_bert.VarlenBert, "load", planted)
    batch = workload.batch(CONFIG, LENGTHS["padded"], CPU, seed=3)
    found = peers._varlen(state, CONFIG, CPU, FP32, plain_attention).check(batch)
    assert bool(outside(found, hidden(ours, batch))) == (plant is not None)


def test_attention_across_two_texts_is_seen(state, ours):
    def leaky(q, k, v, cu_seqlens, max_len, p):
        ends = torch.cat([cu_seqlens[:1], cu_seqlens[2:]])
        return plain_attention(q, k, v, ends, int(ends.diff().max()), p)

    batch = workload.batch(CONFIG, LENGTHS["padded"], CPU, seed=3)
    found = peers._varlen(state, CONFIG, CPU, FP32, leaky).check(batch)
    assert outside(found, hidden(ours, batch))


def test_the_unpadded_model_holds_every_weight_once(state):
    names = varlen_bert.stock_names(CONFIG.num_hidden_layers, heads=True)
    parts = [part for held in names.values() for part in held]
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert sorted([*parts, *tied]) == sorted(state)
    with pytest.raises(ValueError, match="'relu'"):
        relu = bert_fast.BertConfig.named("tiny", hidden_act="relu")
        varlen_bert.VarlenBert(relu, plain_attention)


def test_flash_attention_has_the_arguments_and_the_gradient_that_are_used():
    schema = torch.ops.aten._flash_attention_forward.default._schema
    names = [argument.name for argument in schema.arguments[:10]]
    assert (
        names
        == (
            "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask"
        ).split()
    )
    assert schema.returns[0].name == "output"
    q = torch.randn(5, 2, 64, device="meta", requires_grad=True)
    cu_seqlens = torch.zeros(3, dtype=torch.int32, device="meta")
    out = varlen_bert.flash_attention(q, q, q, cu_seqlens, 3, 0.1)
    assert out.shape == q.shape and "FlashAttention" in type(out.grad_fn).__name__


@NEEDS_GPU
def test_unpadded_peers_pass_the_gate_on_a_gpu(state):
    gpu, dtype = torch.device("cuda"), torch.bfloat16
    what = state, CONFIG, gpu
    encoder = [workload.batch(CONFIG, LENGTHS["padded"], gpu, seed) for seed in (1, 2)]
    training = [workload.pretraining_batch(CONFIG, (9, 5, 17), gpu, seed) for seed in (1, 2)]
    for inputs, module_baseline, candidates, name in (
        (
            encoder,
            peers.baseline_encoder,
            peers.encoder_peers(*what, dtype, full=False),
            "varlen_attn",
        ),
        (
            training,
            training_peers.baseline_pretraining,
            training_peers.pretraining_peers(*what, dtype, full=False),
            "flash varlen",
        ),
    ):
        truth, (kind, baseline) = module_baseline(*what, FP32)[1], module_baseline(*what, dtype)
        case = gate.Case(name, gpu, "bf16", inputs, truth, baseline, kind, gate.Work())
        prepared = by_name(candidates, name).prepare()
        assert gate.check(case, prepared)["share"] <= 1
        prepared.run(inputs[0])  # with dropout, where it trains
