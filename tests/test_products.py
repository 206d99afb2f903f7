"""Products on the CPU: packed weights give what plain ones give, and never what a weight was."""

import copy
import gc
import io

import pytest
import torch

from bert_fast import BertConfig, BertModel, ops
from bert_fast.ops import kept, products

IDS = torch.arange(5, 17).view(2, 6)
MEASURED = products.packs_weights.__wrapped__  # asked anew each time

pytestmark = pytest.mark.skipif(not products._has_onednn(), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def packing(monkeypatch):
    """By oneDNN, which packs whatever a measurement says; nothing is packed yet."""
    monkeypatch.setattr(products, "packs_weights", lambda dtype: True)
    with products.fixed_cpu_library("onednn"):
        yield
    kept.forget()


def packed(w):
    found = products._packed.get(w)
    return found is not None and found.packed is not None


def met(w, times=2, rows=3):
    """The weight after so many products of inference."""
    x = torch.randn(rows, w.shape[1], dtype=w.dtype)
    with torch.no_grad():
        for _ in range(times):
            y = ops.linear(x, w)
    exact = torch.nn.functional.linear(x.double(), w.double())
    eps = torch.finfo(w.dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=4 * eps, atol=max(64, w.shape[1]) * eps)
    return w


def weight(rows=96, columns=64, dtype=torch.float32):
    return torch.nn.Parameter(torch.randn(rows, columns).to(dtype))


BF16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        not (products._has_onednn() and products._has_bf16()),
        reason="oneDNN has no bf16 on this processor",
    ),
)
in_each_dtype = pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)


@in_each_dtype
@pytest.mark.parametrize("rows", [2, 5, 64, 256, 300])
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (100, 33), (312, 1200), (2304, 768)], ids=str)
def test_what_plain_ones_give(shape, rows, dtype):
    """To the bit, where `_keeps_bits` finds so."""
    w, b, x = weight(*shape, dtype), torch.randn(shape[0]).to(dtype), torch.randn(rows, shape[1])
    x = x.to(dtype)
    plain = products.linear(x, w, b)
    for _ in range(3):
        again = products.linear(x, w, b, reuse=True)
    assert packed(w) == (dtype == torch.bfloat16 or rows <= 256 or w.numel() <= 2**20)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(again, plain, rtol=2 * eps, atol=shape[1] * eps)
    if products._keeps_bits(dtype):
        assert torch.equal(again, plain)


def test_packed_when_met_again():
    """The first time may be the only one."""
    w = weight()
    assert [packed(met(w, 1)) for _ in range(3)] == [False, True, True]


def test_few_rows_only():
    """One row's product is of another kind; many by a large weight gain too little for its memory.

    But they use what is there.
    """
    w, small, large = weight(), weight(), weight(1025, 1024)
    assert not packed(met(w, 3, rows=1))
    assert packed(met(small, 3, rows=257))
    assert not packed(met(large, 3, rows=257)) and packed(met(large, rows=256))
    found = products._packed[met(w)]
    assert products._packed[met(w, rows=1000)] is found


def in_place(w):
    with torch.no_grad():
        w.mul_(-2)


def other_data(w):
    w.data = w.data * -2


def through_data(w):
    """PyTorch does not count it; the numbers betray it."""
    w.data.mul_(-2)


def little_through_data(w):
    """What nothing betrays is for who does it to tell."""
    w.data[3, 1] += 1
    kept.forget()


def little_by_optimizer(w):
    """Nor what a fused optimizer writes, but a forward with gradients goes before it."""
    ops.linear(torch.ones(3, 64), w).sum().backward()
    w.data[3, 1] += 1


CHANGES = [in_place, other_data, through_data, little_through_data, little_by_optimizer]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_weights_are_seen(change):
    w = met(weight())
    before = products._packed[w]
    change(w)
    assert packed(met(w)) and products._packed[w].packed is not before.packed


def test_gone_with_its_weight():
    w = met(weight())
    assert len(products._packed) == 1
    del w
    gc.collect()
    assert len(products._packed) == 0


def test_not_where_gradients_are_wanted():
    w = weight()
    for _ in range(3):
        ops.linear(torch.ones(3, 64), w)
        ops.linear_gelu(torch.ones(3, 64), w)
    assert not packed(w)


def test_not_by_blas(monkeypatch):
    w = met(weight())
    products.set_cpu_library("blas")
    assert not packed(met(w))


def test_not_for_inference_tensors():
    """They have no version to tell a write by."""
    with torch.inference_mode():
        assert not packed(met(torch.randn(96, 64)))


def test_in_inference_mode():
    with torch.inference_mode():
        w = weight()  # a Parameter made here is one too
    assert not packed(met(w))
    w = weight()
    with torch.inference_mode():
        assert packed(met(w))


@pytest.mark.parametrize(
    ("plain", "wish", "packs"),
    [(1.2, "", True), (1.02, "", False), (0.5, "", False), (0.5, "1", True), (1.2, "0", False)],
)
def test_where_a_measurement_or_the_environment_says_so(monkeypatch, plain, wish, packs):
    times = {"plain": plain, "packed": 1.0}
    monkeypatch.setattr(products, "_keeps_bits", lambda dtype: True)
    monkeypatch.setattr(products, "_least_times", lambda calls: times)
    monkeypatch.setattr(products, "packs_weights", MEASURED)
    monkeypatch.setenv("BERT_FAST_CPU_PACK", wish)
    assert packed(met(weight())) == packs


def test_model_is_what_it_was():
    """Nothing of it is in a state_dict, a copy or a file, and train() drops it."""
    torch.manual_seed(0)
    model = BertModel(BertConfig.named("tiny", vocab_size=40)).eval()
    names = [*model.state_dict()]
    with torch.inference_mode():
        first, *others = (model(IDS).last_hidden_state for _ in range(3))
        assert all(torch.equal(first, other) for other in others)
        assert packed(model.encoder.layer[0].intermediate.dense.weight)
        query = model.encoder.layer[0].attention.self.query
        assert packed(kept._joined[query.weight].joined)
    assert [*model.state_dict()] == names
    copied, file = copy.deepcopy(model), io.BytesIO()
    torch.save(model, file)
    assert file.tell() < 1.2 * sum(t.nbytes for t in model.state_dict().values())
    with torch.inference_mode():
        assert torch.equal(copied(IDS).last_hidden_state, first)
    model.train()
    assert len(products._packed) == 0


@pytest.mark.parametrize(("wish", "packs"), [("", False), ("1", True)])
def test_not_where_it_would_change_bits(monkeypatch, wish, packs):
    """Else the second of two equal calls would give another answer; who asks for it has it."""
    plain = products._onednn

    def careless(x, w, b):
        return plain(x, w, b) + (1e-6 if w.layout != torch.strided else 0)

    monkeypatch.setattr(products, "_onednn", careless)
    monkeypatch.setattr(products, "_gains", lambda dtype: True)
    monkeypatch.setattr(products, "packs_weights", MEASURED)
    monkeypatch.setenv("BERT_FAST_CPU_PACK", wish)
    assert packed(met(weight())) == packs
