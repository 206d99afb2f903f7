"""What only a GPU can show of the kernels: races, streams, graphs, sizes past 2**31.

Everything else of them is shown on the CPU too, in Triton's interpreter, by the other files.
"""

from collections.abc import Callable
from typing import Any

import op_cases
import pytest
import torch
from against_transformers import pair
from op_cases import assert_same_bits, attention_case, gradients, layer_norm_case
from torch import Tensor

from bert_fast import ops

BF16 = torch.bfloat16


@pytest.fixture
def gpu(device) -> str:
    if device != "cuda":
        pytest.skip("needs an NVIDIA GPU, and there is none")
    return device


def on_gpu(make: Callable[[], op_cases.Case], dtype: torch.dtype = BF16) -> op_cases.Case:
    return make().to(dtype, "cuda")


LARGE = {  # of each op a call that fills the GPU
    "attention": lambda: attention_case((512, 3, 130, 64, 1, 256) * 8, H=12, K=64, p=0.1),
    "add_layer_norm": lambda: layer_norm_case(8192, 768, p=0.1),
    "embed": lambda: op_cases.embed_case(8192, 768, sizes=(500, 512, 2), pad_id=0, p=0.1),
    "gelu": lambda: op_cases.gelu_case(4096, 3072),
    "linear-invariant": lambda: op_cases.linear_case(2048, 768, 3072, invariant=True),
    "linear_gelu": lambda: op_cases.linear_case(2048, 768, 3072, activation="gelu"),
    "linear_cross_entropy": lambda: op_cases.cross_entropy_case(600, 768, 30522),
}
each = pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)


@each
def test_250_runs_give_the_same_bits(make, gpu):
    case = on_gpu(make)
    dy = torch.randn_like(case.call())
    first = gradients(case, case.call, dy)
    for _ in range(250):
        assert_same_bits(gradients(case, case.call, dy), first)


@each
def test_a_second_stream(make, gpu):
    """Launched where the caller is: behind what this stream still waits for, not before it."""
    case = on_gpu(make)
    dy = torch.randn_like(case.call())
    expected = gradients(case, case.call, dy)
    name = case.leaves[0]
    right = case.inputs[name].clone()
    late = case.with_inputs(**{name: torch.zeros_like(right)})
    stream = torch.cuda.Stream()
    for _ in range(20):
        late.inputs[name].zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            late.inputs[name].copy_(right)
            got = gradients(late, late.call, dy)
        stream.synchronize()
        assert_same_bits(got, expected)


@each
def test_nothing_waits_for_the_gpu(make, gpu):
    case = on_gpu(make)
    dy = torch.randn_like(case.call())
    gradients(case, case.call, dy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(case, case.call, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("offset", [1, 3, 8])
def test_tensors_that_are_not_aligned(offset, gpu):
    """Loads of another width, the same bits; a product chooses other kernels by its addresses."""
    for name, make in LARGE.items():
        if name.startswith("linear"):
            continue
        case = on_gpu(make)
        dy = torch.randn_like(case.call())
        moved = {}
        for leaf in case.leaves:
            t = case.inputs[leaf]
            storage = torch.empty(t.numel() + offset, dtype=t.dtype, device=gpu)
            moved[leaf] = storage[offset:].view(t.shape).copy_(t)
        shifted = case.with_inputs(**moved)
        assert_same_bits(gradients(shifted, shifted.call, dy), gradients(case, case.call, dy))


def seed_of_each_replay() -> Tensor:
    return torch.randint(2**62, (1,), device="cuda")


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of the call, warmed up as PyTorch asks, and what it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


def test_each_replay_of_a_graph_draws_a_mask_of_its_own(gpu):
    """And its backward pass the mask of its forward."""
    x, dy = (torch.rand(512, 768, device=gpu, dtype=BF16) + 0.5 for _ in range(2))
    w, b = torch.randn(2, 768, device=gpu, dtype=BF16)
    op = torch.ops.bert_fast

    def call() -> tuple[Tensor, Tensor]:
        dropout = 0.5, seed_of_each_replay(), 3, BF16
        _, z, mean, rstd = op.add_layer_norm(x, None, None, w, b, 1e-12, *dropout)
        dx = op.add_layer_norm_bwd(dy, z, w, mean, rstd, False, *dropout)[0]
        return z, dx

    graph, (z, dx) = captured(call)
    masks = []
    for _ in range(10):
        graph.replay()
        assert torch.equal(z == 0, dx == 0)
        masks.append(z == 0)
    for i, mask in enumerate(masks):
        assert 0.4 < mask.float().mean() < 0.6
        assert not any(torch.equal(mask, other) for other in masks[:i])


def test_a_graph_serves_every_mix_of_lengths(gpu):
    """Captured once for 512 rows and 8 sequences; replayed for other borders, slack included."""
    H, K, T, B = 12, 64, 512, 8
    qkv = torch.randn(T, 3, H, K, device=gpu, dtype=BF16)
    cu_seqlens = torch.zeros(B + 1, dtype=torch.int32, device=gpu)

    def call() -> Tensor:
        work = ops.work_list(cu_seqlens, T)
        return ops.attention(qkv, cu_seqlens, T, work=work, slack=True)

    graph, out = captured(call)
    for lengths in ([512] + [0] * 7, [64] * 8, [1, 0, 300, 0, 5, 129, 0, 0], [128, 100] + [0] * 6):
        borders = torch.tensor([0, *lengths]).cumsum(0).int()
        cu_seqlens.copy_(borders)
        graph.replay()
        fresh = borders.to(gpu)
        expected = ops.attention(qkv, fresh, T, slack=True)
        assert torch.equal(out, expected), lengths
        assert not out[int(borders[-1]) :].any()


def test_a_training_step_in_a_graph(gpu):
    """A model's forward and backward: ten replays, ten losses, as its dropout is drawn anew."""
    model = pair(hidden_dropout_prob=0.1)[1].to(gpu, BF16).train()
    ids = torch.randint(1, model.config.vocab_size, (4, 24), device=gpu)

    def call() -> Tensor:
        model.zero_grad(set_to_none=False)
        loss = model(ids).last_hidden_state.float().square().sum()
        loss.backward()
        return loss.detach()

    graph, loss = captured(call)
    losses = set()
    for _ in range(10):
        graph.replay()
        losses.add(loss.item())
    assert len(losses) == 10


def test_more_than_2_to_the_31_elements(gpu):
    """The last rows of tensors that no int32 can address are those of a small call."""
    D = 8192
    T = 2**31 // D + 256
    x = torch.randn(T, D, device=gpu, dtype=BF16)
    w, b = torch.randn(2, D, device=gpu, dtype=BF16)
    assert torch.equal(ops.layer_norm(x, w, b)[-300:], ops.layer_norm(x[-300:].clone(), w, b))
    assert torch.equal(ops.gelu(x)[-300:], ops.gelu(x[-300:].clone()))
    del x
    H, K, n = 16, 128, 512
    T = (2**31 // (3 * H * K) // n + 2) * n
    qkv = torch.randn(T, 3, H, K, device=gpu, dtype=BF16)
    borders = torch.arange(0, T + 1, n, dtype=torch.int32, device=gpu)
    o = ops.attention(qkv, borders, n)
    alone = ops.attention(qkv[-n:].clone(), borders[:2], n)
    assert torch.equal(o[-n:], alone)


@pytest.mark.parametrize("num", [65535, 65536, 65537])
def test_more_sequences_than_a_grid_has_rows(num, gpu):
    case = on_gpu(lambda: attention_case((3,) * num, H=1, K=16))
    out = case.call()
    first = ops.attention(case.inputs["qkv"][:3].clone(), case.inputs["cu_seqlens"][:2], 3)
    last = ops.attention(case.inputs["qkv"][-3:].clone(), case.inputs["cu_seqlens"][:2], 3)
    assert torch.equal(out[:3], first) and torch.equal(out[-3:], last)
