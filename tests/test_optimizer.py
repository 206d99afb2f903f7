"""The optimizers' ops: on the CPU by csrc or PyTorch, on a GPU by csrc's CUDA or PyTorch."""

import pytest
import torch
from optimizer_cases import (
    BF16,
    CASES,
    FP16,
    FP64,
    OPS,
    Case,
    Shape,
    assert_agrees,
    assert_same_bits,
)
from torch import Tensor, library

from bert_fast import ops, reference_optimizer
from bert_fast.ops import optimizer

by_torch = {"adamw_": optimizer._adamw, "lamb_": optimizer._lamb}
every_op = pytest.mark.parametrize("op", OPS)
every_case = pytest.mark.parametrize("name", CASES)


@every_case
@every_op
def test_step(op, name, device):
    call = CASES[name].draw()
    truth, got = call.truth(op), call.to(device)
    getattr(optimizer, op)(*got.args(op))
    assert_agrees(got, truth, call)


@every_case
@every_op
def test_step_by_pytorch(op, name, device):
    """What serves where csrc is not built."""
    call = CASES[name].draw()
    truth, got = call.truth(op), call.to(device)
    by_torch[op](*got.args(op))
    assert_agrees(got, truth, call)


@pytest.mark.parametrize("clip", [False, True])
@every_op
def test_step_in_float64(op, clip):
    shapes = [Shape(1, FP64), Shape(20001, FP64), Shape(7, FP64, group=1), Shape(9)]
    call = Case(shapes, clip=clip, always_adapt=True).draw()
    truth, got, other = call.truth(op), call.clone(), call.clone()
    getattr(optimizer, op)(*got.args(op))
    by_torch[op](*other.args(op))
    assert_agrees(got, truth, call)
    assert_agrees(other, truth, call)


@every_op
def test_found_inf_changes_nothing(op, device):
    for number in (1.0, 2.0):  # of two devices
        call = Case(CASES["mixed"].shapes, found_inf=number, clip=True).draw().to(device)
        for run in (getattr(optimizer, op), by_torch[op]):
            got = call.clone()
            run(*got.args(op))
            assert_same_bits(got, call)


@every_op
def test_250_steps_give_the_same_bits(op, device):
    call = Case(CASES["mixed"].shapes, clip=True).draw().to(device)
    first = call.clone()
    getattr(optimizer, op)(*first.args(op))
    for _ in range(250 if device == "cuda" else 5):
        again = call.clone()
        getattr(optimizer, op)(*again.args(op))
        assert_same_bits(again, first)


@every_op
def test_any_number_of_threads_gives_the_same_bits(op):
    call = Case(CASES["mixed"].shapes, clip=True, always_adapt=True).draw()
    grads = call.lists[1]
    before, found, norms = torch.get_num_threads(), [], []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            norms.append(float(optimizer.grad_norm(grads, None)))
            found.append(call.clone())
            getattr(optimizer, op)(*found[-1].args(op))
    finally:
        torch.set_num_threads(before)
    if ops.implementations()[op]["cpu"].name != "csrc":
        pytest.skip("extension not built; PyTorch's operators promise nothing of the kind")
    assert len(set(norms)) == 1
    for other in found[1:]:
        assert_same_bits(other, found[0])


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16, FP64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("scale", [None, 64.0])
def test_grad_norm(scale, dtype, device):
    if device == "cuda" and dtype == FP64:
        pytest.skip("no kernel takes float64")
    grads = [(torch.randn(n) + 0.5).to(dtype) for n in (0, 1, 5, 1023, 1025, 16385, 100_003)]
    grads = [*grads, torch.randn(6, 10).to(dtype).t(), torch.randn(40).to(dtype)[::2]]
    scale = None if scale is None else torch.tensor(scale)
    expected = reference_optimizer.grad_norm(grads, scale)
    grads, scale = [g.to(device) for g in grads], None if scale is None else scale.to(device)
    built = ops.implementations()["grad_norm"][device].name == "csrc"
    norms = optimizer.grad_norm(grads, scale), optimizer._grad_norm(grads, scale)
    for norm, ours in zip(norms, (built, False), strict=True):
        assert norm.shape == () and norm.dtype == torch.float32 and norm.device.type == device
        torch.testing.assert_close(norm.cpu(), expected, rtol=1e-6 if ours else 1e-5, atol=0)


@every_op
def test_layouts(op, device):
    """Parameters that are transposed, gradients that lie otherwise: each element is its own."""
    call = Case([Shape(12 * 35), Shape(12 * 35, master=True, dtype=BF16)]).draw()
    plain = call.map(lambda t: t.view(12, 35) if t.numel() == 420 else t)
    turned = plain.map(lambda t: t.t().contiguous().t() if t.ndim == 2 else t)
    turned.lists[1][0] = turned.lists[1][0].contiguous()  # not as its parameter
    wide = torch.empty(12, 70, dtype=BF16)
    wide[:, ::2] = plain.lists[1][1]
    turned.lists[1][1] = wide[:, ::2]
    assert turned.lists[0][0].stride() == (1, 12)
    plain, turned = plain.to(device), turned.map(lambda t: t.to(device))
    other = turned.clone()
    assert other.lists[0][0].stride() == (1, 12)
    getattr(optimizer, op)(*plain.args(op))
    getattr(optimizer, op)(*turned.args(op))
    by_torch[op](*other.args(op))
    assert_agrees(turned, plain, plain)
    assert_agrees(other, plain, plain)
    if op == "adamw_" and ops.implementations()[op][device].name == "csrc":
        assert_same_bits(turned, plain)  # in LAMB sums have another order


def refused(change, op="adamw_"):
    call = Case([Shape(4), Shape(6, BF16, master=True), Shape(3, group=1)]).draw()
    change(call)
    return call.args(op)


def put(which: int, i: int, t: Tensor):
    return lambda call: call.lists[which].__setitem__(i, t)


REFUSED = {
    "exp_avgs: want 3": lambda call: call.lists[2].pop(),
    "masters: want 3": lambda call: call.lists[5].pop(),
    "sizes: want the sum 3": lambda call: call.groups[0].__setitem__(0, 1),
    "lrs: want 2": lambda call: call.groups[1].pop(),
    "weight_decays: want 2": lambda call: call.groups[2].pop(),
    "lr_tensors: want 2": lambda call: call.groups[3].append(torch.tensor(0.1)),
    "grads[0]: want [4]": put(1, 0, torch.ones(5)),
    "exp_avgs[1]: want ": put(2, 1, torch.ones(6, dtype=BF16)),
    "exp_avg_sqs[0]: want": put(3, 0, torch.ones(2, 2)),
    "masters[1]: want": put(5, 1, torch.ones(6, dtype=FP64)),
    "steps[2]: want": put(4, 2, torch.tensor(1)),
    "params[0]: want fp32": put(0, 0, torch.ones(4, dtype=torch.int32)),
    "grads[2]: want fp32": put(1, 2, torch.ones(3, dtype=torch.int64)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_lists_that_do_not_fit_are_refused(message):
    for run in (optimizer.adamw_, optimizer._adamw):
        with pytest.raises((ValueError, TypeError)) as caught:
            run(*refused(REFUSED[message]))
        text = str(caught.value)
        assert text.startswith("adamw_: ") and message.rstrip() in text and "got " in text, text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(0, 0, torch.ones(1).expand(4)), "params[0]: want memory without gaps"),
        (put(2, 0, torch.ones(8)[::2]), "exp_avgs[0]: want the parameter's [4]"),
        (put(1, 0, torch.ones(4, dtype=FP64)), "grads[0]: want fp64 where"),
        (put(4, 0, torch.ones(2)), "steps[0]: want one number"),
    ],
)
def test_memory_that_does_not_fit_is_refused(change, message):
    if ops.implementations()["adamw_"]["cpu"].name != "csrc":
        pytest.skip("extension not built; PyTorch's operators check for themselves")
    for op in OPS:
        with pytest.raises((ValueError, TypeError)) as caught:
            getattr(optimizer, op)(*refused(change, op))
        assert str(caught.value).startswith(f"{op}: {message}"), caught.value


def test_opcheck():
    tests = "test_schema", "test_faketensor"
    for op in OPS:
        call = Case([Shape(5), Shape(4, BF16, master=True, group=1)], clip=True).draw()
        library.opcheck(getattr(optimizer, op), call.args(op), test_utils=tests)
    library.opcheck(optimizer.grad_norm, (call.lists[1], None), test_utils=tests)


def test_reference_is_torch_optim_adamw():
    """The truth itself, in float64."""
    shapes = [Shape(7, FP64), Shape(5, FP64, group=1)]
    call = Case(shapes, options={"eps": 1e-8}).draw()
    for tensors, value in zip(call.lists[2:5], (0.0, 0.0, 0.0), strict=True):
        for t in tensors:
            t.fill_(value)
    params = [p.clone().requires_grad_() for p in call.lists[0]]
    groups = [{"params": [p], "lr": call.groups[1][i], "weight_decay": call.groups[2][i]}
              for i, p in enumerate(params)]  # fmt: skip
    theirs = torch.optim.AdamW(groups, eps=1e-8, foreach=False)
    for _ in range(20):
        for p, g in zip(params, call.lists[1], strict=True):
            g.copy_(torch.randn_like(g))
            p.grad = g.clone()
        theirs.step()
        reference_optimizer.adamw_(*call.args("adamw_"))
    for p, ours in zip(params, call.lists[0], strict=True):
        torch.testing.assert_close(ours, p.detach(), rtol=1e-12, atol=1e-12)


def test_reference_of_lamb_by_hand():
    """One number: ||w|| / ||u|| |u| is |w|, so each step takes lr |w| off in u's direction."""
    w, g = torch.tensor([3.0], dtype=FP64), torch.tensor([0.5], dtype=FP64)
    m, v, t = torch.zeros(1, dtype=FP64), torch.zeros(1, dtype=FP64), torch.tensor(0.0)
    lists = [w], [g], [m], [v], [t], [torch.empty(0)]
    call = *lists, [1], [0.1], [0.01], [], 0.9, 0.999, 1e-6, 1.0, None, None, None, False
    reference_optimizer.lamb_(*call)
    assert float(w) == pytest.approx(3.0 - 0.1 * 3.0, abs=1e-12)
    assert float(m) == pytest.approx(0.05) and float(v) == pytest.approx(0.00025)
    without = *call[:8], [0.0], *call[9:]  # not adapted: u itself, which is 1 / (1 + 1e-6 / 0.5)
    w.fill_(3.0), m.zero_(), v.zero_(), t.zero_()
    reference_optimizer.lamb_(*without)
    assert float(w) == pytest.approx(3.0 - 0.1 / (1 + 2e-6), abs=1e-12)


# --- what only a GPU can show --------------------------------------------------------------------


@pytest.fixture
def gpu(device) -> str:
    if device != "cuda":
        pytest.skip("needs an NVIDIA GPU, and there is none")
    return device


LARGE = [Shape(300_000 + i, BF16, master=True, group=i % 2) for i in range(40)]


@every_op
def test_nothing_waits_for_the_gpu(op, gpu):
    for make in (Case(LARGE, clip=True), Case(LARGE, scale=8.0, lr_tensor=True, found_inf=0.0)):
        call = make.draw().to(gpu)
        for run in (getattr(optimizer, op), by_torch[op]):
            run(*call.args(op))
            torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.grad_norm(call.lists[1], call.scalars[1])
                run(*call.args(op))
            finally:
                torch.cuda.set_sync_debug_mode("default")


@every_op
def test_a_second_stream(op, gpu):
    """Launched where the caller is: behind what this stream still waits for, not before it."""
    call = Case(LARGE, clip=True).draw().to(gpu)
    expected, right = call.clone(), call.lists[1][0].clone()
    getattr(optimizer, op)(*expected.args(op))
    stream = torch.cuda.Stream()
    for _ in range(20):
        late = call.clone()
        late.lists[1][0].zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            late.lists[1][0].copy_(right)
            getattr(optimizer, op)(*late.args(op))
        stream.synchronize()
        assert_same_bits(late, expected)


@every_op
def test_steps_in_a_graph(op, gpu):
    """Captured once: each replay is the next step, at the rate that stands on the device then."""
    call = Case(LARGE, lr_tensor=True).draw().to(gpu)
    call = call.map(lambda t: t)
    expected = call.clone()

    def step(one) -> None:
        norm = optimizer.grad_norm(one.lists[1], None)
        args = list(one.args(op))
        args[14] = norm
        getattr(optimizer, op)(*args)

    step(call.clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(call)
    for i in range(3):
        for one in (call, expected):
            one.groups[3][0].fill_(0.01 * (i + 1))
        graph.replay()
        step(expected)
    torch.cuda.synchronize()
    assert_same_bits(call, expected)


def test_more_than_2_to_the_31_elements(gpu):
    """The last elements of a parameter that no int32 can address are those of a small call."""
    n, last = 2**31 + 5000, 4000
    torch.manual_seed(0)
    big = Case([Shape(1, BF16)]).draw().to(gpu)
    made = (torch.empty(n, dtype=BF16, device=gpu).normal_() for _ in range(2))
    big.lists[0][0], big.lists[1][0] = made
    for which in (2, 3):
        big.lists[which][0] = torch.full((n,), 0.01, device=gpu)
    small = big.map(lambda t: t[-last:].clone() if t.numel() == n else t.clone())
    optimizer.adamw_(*big.args("adamw_"))
    optimizer.adamw_(*small.args("adamw_"))
    for which in (0, 2, 3):
        assert torch.equal(big.lists[which][0][-last:], small.lists[which][0])
