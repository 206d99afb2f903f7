"""`verify` passes what is right, fails what is wrong by little, and leaves no trace."""

import warnings
from functools import partial

import pytest
import torch
import transformers
from against_transformers import hf_config, perturb
from cli_cases import call, work_in

import bert_fast
from bert_fast import functional, ops
from bert_fast.hf import VerificationError, verify
from bert_fast.hf.marks import MARK


def bert(name="BertForSequenceClassification", dtype=torch.float32, attn="eager", **fields):
    made = getattr(transformers, name)._from_config(hf_config(**fields), attn_implementation=attn)
    return perturb(made).to(dtype)


def inputs(name="BertForSequenceClassification", B=4, L=13):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 101, (B, L), generator=generator)
    real = torch.arange(L) < torch.tensor([[L], [5], [1], [9]])
    batch = {"input_ids": ids, "attention_mask": real.long(), "token_type_ids": ids % 2}
    if name == "BertForSequenceClassification":
        batch["labels"] = torch.arange(B) % 2
    if name == "BertForMaskedLM":
        batch["labels"] = torch.where(real & (ids % 3 == 0), ids, -100)
    return batch


# --- what is right -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_the_same_answers(name, dtype):
    """Outputs, loss and every gradient; a table whose first line says so."""
    model = bert(name, dtype)
    batch = inputs(name) | {"output_hidden_states": True, "output_attentions": True}
    found = verify(model, batch)
    assert found.passed and found.notes == () and "the same answers" in str(found)
    names = {d.name for d in found.differences}
    assert {f"grad {n}" for n, p in model.named_parameters() if "pooler" not in n} <= names
    assert {"attentions.1", "hidden_states.2"} <= names and ("loss" in names) == ("labels" in batch)
    assert max(d.share for d in found.differences) == found.differences[0].share > 0
    assert not any(d.name.startswith("grad") for d in verify(model, batch, grads=False).differences)


@pytest.mark.parametrize("accelerated", [False, True])
def test_leaves_no_trace(accelerated):
    """Of mode, gradients, generators or marks; a model in training is verified without dropout."""
    model = bert(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).train()
    model.dropout.eval()
    if accelerated:
        bert_fast.accelerate(model)
    weight = model.classifier.weight
    weight.grad = torch.ones_like(weight)
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    assert verify(model, inputs()).passed
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and not model.dropout.training and (weight.grad == 1).all()
    assert all(p.grad is None for p in model.parameters() if p is not weight)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert (MARK in model.bert.__dict__) == accelerated


def test_attentions_that_the_original_does_not_give():
    found = verify(bert(attn="sdpa"), inputs() | {"output_attentions": True})
    assert found.passed and any("no attentions" in note for note in found.notes)


def test_choices():
    """(B, C, L): the mask of the encoder's rows."""
    model = bert("BertForMultipleChoice")
    batch = {k: v.view(2, 2, -1) for k, v in inputs("").items()}
    assert verify(model, batch | {"output_hidden_states": True, "labels": torch.tensor([0, 1])})


def test_what_runs_the_original_code_is_said():
    """It is right, but nothing is proved of packed rows."""
    batch = inputs()
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = verify(bert(), batch)
    assert found.passed and any("begins with padding" in note for note in found.notes)
    assert "begins with padding" in str(found)


def test_nothing_to_verify():
    with pytest.raises(ValueError, match="want a BERT of transformers"):
        verify(torch.nn.Linear(2, 2), {})


# --- what is wrong -------------------------------------------------------------------------------


def scaled(function, factor, **_):
    """The function, whose result is off by a factor."""

    def run(*args, **kwargs):
        result = function(*args, **kwargs)
        return factor * result if isinstance(result, torch.Tensor) else result

    return run


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return 1.001 * dy


def wrong_gradient(function):
    return lambda *args, **kwargs: _ScaledGradient.apply(function(*args, **kwargs))


def without(function, name):
    return lambda *args, **kwargs: function(*args, **{**kwargs, name: None})


def other_position(function):
    def run(ids, positions, *args, **kwargs):
        return function(
            ids, positions.clone().index_fill_(0, torch.tensor([3]), 0), *args, **kwargs
        )

    return run


FAULTS = {
    "attention off by 1e-3": (ops, "attention", partial(scaled, factor=1.001)),
    "embeddings off by 1e-4": (ops, "embed", partial(scaled, factor=1.0001)),
    "one token at another position": (ops, "embed", other_position),
    "no bias before a LayerNorm": (ops, "add_layer_norm", partial(without, name="bias")),
    "gradient of GELU off by 1e-3": (ops, "linear_gelu", wrong_gradient),
    "gradient of attention off by 1e-3": (ops, "attention", wrong_gradient),
    "pooler off by 1e-3": (functional, "pool", partial(scaled, factor=1.001)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, monkeypatch):
    """And named: the worst tensor is in the message, all of them in the report."""
    owner, name, plant = FAULTS[fault]
    monkeypatch.setattr(owner, name, plant(getattr(owner, name)))
    with pytest.raises(VerificationError) as error:
        verify(bert(), inputs() | {"output_hidden_states": True})
    report = error.value.report
    worst = report.differences[0]
    assert not report.passed and worst.share > 1 and worst.name in str(error.value)
    assert "NOT the same answers" in str(report) and worst.name in str(report)
    if "gradient" in fault:
        assert all(d.name.startswith("grad") for d in report.differences if d.share > 1)
        assert verify(bert(), inputs(), grads=False).passed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fault_in_low_precision(dtype, monkeypatch):
    """What is seen there is larger: rounding hides less than 1 %, by construction."""
    monkeypatch.setattr(ops, "attention", scaled(ops.attention, 1.2))
    with pytest.raises(VerificationError):
        verify(bert(dtype=dtype), inputs())


def test_a_shape_or_a_name_that_is_missing(monkeypatch):
    from bert_fast.hf import forward

    run = forward.run
    monkeypatch.setattr(forward, "run", lambda *a, **k: run(*a, **k)[:1])
    with pytest.raises((VerificationError, IndexError)):
        verify(bert("BertModel"), inputs("BertModel"))


# --- command line --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return work_in(tmp_path, monkeypatch)


def test_command(folder, capfd, monkeypatch):
    status, out, _ = call(capfd, "verify", "model", "--text", "texts.txt", "--most", "3")
    assert status == 0 and "the same answers" in out and "grad" in out
    monkeypatch.setattr(ops, "attention", scaled(ops.attention, 1.001))
    status, out, err = call(capfd, "verify", "model", "--text", "texts.txt", "--no-grads")
    assert status == 1 and "NOT the same answers" in out and "not the original's answers" in err
    (folder / "empty.txt").write_text("\n")
    status, _, err = call(capfd, "verify", "model", "--text", "empty.txt")
    assert status == 1 and "want a text, got none" in err
