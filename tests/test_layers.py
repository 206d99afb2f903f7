"""Fused query, key and value: one product gives what three give, and never with old weights."""

import copy
import io

import pytest
import torch

import bert_fast
from bert_fast import BertConfig, BertModel, functional
from bert_fast.functional import Projections
from bert_fast.layers import BertSelfAttention
from bert_fast.ops import kept

IDS = torch.arange(5, 17).view(2, 6)


@pytest.fixture
def models(monkeypatch):
    """(fused, plain) with the same weights; with gradients fusing is for GPUs: forced here."""
    plain = BertModel(BertConfig.named("tiny", vocab_size=40)).eval()
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    fused = copy.deepcopy(plain)
    ours = {id(m.query) for m in attentions(fused)}
    weights = Projections._weights

    def joined(self, x):
        return weights(self, x) if id(self.query) in ours else None

    bert_fast.cpu_library()  # its choice, at first use, ends what is kept
    monkeypatch.setattr(functional, "_joins", lambda x: True)
    monkeypatch.setattr(Projections, "_weights", joined)
    return fused, plain


def attentions(model):
    return [m for m in model.modules() if isinstance(m, BertSelfAttention)]


def joined(model):
    """Whether the weights of each layer are kept in one."""
    return [m.query.weight in kept._joined for m in attentions(model)]


def project(attention, x):
    return Projections(attention.query, attention.key, attention.value)(x)


def assert_equal(models):
    with torch.no_grad():
        fused, plain = (model(IDS).last_hidden_state for model in models)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


def test_fused_is_kept_without_gradients_only(models):
    fused, plain = models
    assert_equal(models)
    assert joined(fused) == [True, True] and joined(plain) == [False, False]
    bert_fast.forget_weights()
    torch.testing.assert_close(fused(IDS)[0], plain(IDS)[0], rtol=1e-5, atol=1e-5)
    assert joined(fused) == [False, False]


def test_gradients(models):
    for model in models:
        model(IDS)[0].square().sum().backward()
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-4, msg=name)


def in_place(model):
    with torch.no_grad():
        for m in attentions(model):
            m.key.weight.mul_(-1)
            m.value.bias.add_(1)


def fused_adamw(model):
    """It does not count as a write, but its step ends what is kept."""
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.1)
    versions = [p._version for p in model.parameters()]
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()
    assert versions == [p._version for p in model.parameters()]


def load(model):
    model.load_state_dict({name: -t for name, t in model.state_dict().items()})


def replace(model):
    for m in attentions(model):
        m.query.weight = torch.nn.Parameter(-m.query.weight.detach())


def through_data(model):
    """PyTorch does not count it; on the CPU the numbers betray it."""
    for m in attentions(model):
        m.query.weight.data.neg_()


def little_through_data(model):
    """What nothing betrays, forget_weights is for."""
    for m in attentions(model):
        m.key.weight.data[:, 1] += 1
    bert_fast.forget_weights()


def train_and_back(model):
    for m in attentions(model):
        m.query.weight.data.neg_()
    model.train().eval()


CHANGES = [in_place, fused_adamw, load, replace, through_data, little_through_data, train_and_back]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_weights_are_seen(models, change):
    assert_equal(models)
    with torch.no_grad():
        before = models[1](IDS)[0]
    for model in models:
        change(model)
    assert_equal(models)
    with torch.no_grad():
        assert not torch.allclose(models[1](IDS)[0], before)


def test_a_fused_optimizer_where_no_number_is_looked_at(models, monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(kept, "_SAMPLES", 2**62)
    test_changed_weights_are_seen(models, fused_adamw)


def test_cast_and_copy(models):
    assert_equal(models)
    fused = models[0]
    assert joined(copy.deepcopy(fused)) == [False, False]
    before = [*fused.state_dict()]
    file = io.BytesIO()
    torch.save(fused, file)
    assert file.tell() < 1.2 * sum(t.nbytes for t in fused.state_dict().values())
    assert [*fused.double().state_dict()] == before
    assert_equal((fused.float(), models[1]))


def test_weights_made_in_inference_mode(models):
    """They have no version to compare: nothing is kept."""
    with torch.inference_mode():
        model = BertModel(BertConfig.named("tiny", vocab_size=40)).eval()
        attention = attentions(model)[0]
        x = torch.randn(3, 128)
        parts = attention.query, attention.key, attention.value
        expected = torch.stack([part(x) for part in parts], 1)
        torch.testing.assert_close(project(attention, x), expected)
        assert not joined(model)[0]


def test_dropout_alone_in_training():
    """Monte-Carlo dropout: a model in evaluation whose dropouts are not."""
    model = BertModel(BertConfig.named("tiny", vocab_size=40)).eval()
    assert torch.equal(model(IDS)[0], model(IDS)[0])
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.train()
    assert not torch.equal(model(IDS)[0], model(IDS)[0])


@pytest.mark.parametrize("device_type", ["cpu", "cuda's way"])
@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_a_projection_without_bias(part, device_type, monkeypatch):
    """It cannot be fused, and is called beside the two others."""
    monkeypatch.setattr(functional, "_joins", lambda x: device_type != "cpu")
    attention = BertSelfAttention(BertConfig.named("tiny", vocab_size=40), 0)
    setattr(attention, part, torch.nn.Linear(128, 128, bias=False))
    parts, x = (attention.query, attention.key, attention.value), torch.randn(3, 128)
    expected = torch.stack([one(x) for one in parts], 1)
    torch.testing.assert_close(project(attention, x), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(project(attention, x), expected, rtol=1e-5, atol=1e-5)


def test_a_projection_in_another_dtype(models):
    """Refused, and not promoted in silence."""
    attention = attentions(models[0])[0]
    attention.key.half()
    with torch.no_grad(), pytest.raises(TypeError, match="want one dtype for all"):
        project(attention, torch.randn(3, 128))


def test_a_dropout_of_another_class_drops():
    """In a model in training whose other dropouts are gone."""

    class Dropout(torch.nn.Dropout):
        pass

    model = BertModel(BertConfig.named("tiny", vocab_size=40)).train()
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if type(child) is torch.nn.Dropout:
                setattr(module, name, torch.nn.Identity())
    for attention in attentions(model):
        attention.dropout = Dropout(0.5)
    assert not torch.equal(model(IDS)[0], model(IDS)[0])


def test_a_model_that_holds_itself():
    """As some wrappers register their parent: the look for dropouts ends."""
    model = BertModel(BertConfig.named("tiny", vocab_size=40)).eval()
    model.encoder.register_module("owner", model)
    assert not functional.drops(model)
    model.encoder.layer[1].output.dropout.train()
    assert functional.drops(model)
