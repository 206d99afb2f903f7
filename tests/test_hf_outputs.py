"""Hidden states of accelerated models: those that are asked for, and on the way of gradients."""

import pytest
import torch
import transformers
from hf_cases import V5, form, packed, plain

import bert_fast

NAMES = ("BertModel", "RobertaModel", "DistilBertModel", "ElectraModel")


@pytest.mark.parametrize("padding", ["right", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_through_hidden_states(name, padding):
    """As through the original's: what explains a prediction looks at these."""
    model = plain(name).double()
    inputs, real = form(name, model, padding=padding)

    def gradients():
        out = model(**inputs, output_hidden_states=True)
        weight = torch.randn(
            out[0][real].shape, generator=torch.Generator().manual_seed(0)
        ).double()
        return torch.autograd.grad((out[0][real] * weight).sum(), out.hidden_states)

    expected = gradients()
    bert_fast.accelerate(model, strict=True)
    with packed() as rows:
        found = gradients()
    assert rows and len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one[real], other[real], rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(not V5, reason="transformers 4 takes True and False alone")
@pytest.mark.parametrize("asked", [0, 1, -1, [0, 2], [-2], [1, 9], []], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_some_hidden_states(name, asked):
    """By their places: None where one is not asked for."""
    model = plain(name)
    inputs, real = form(name, model)
    expected = model(**inputs, output_hidden_states=asked).get("hidden_states")
    bert_fast.accelerate(model, strict=True)
    with packed() as rows:
        found = model(**inputs, output_hidden_states=asked).get("hidden_states")
    assert rows and (found is None) == (expected is None)
    for one, other in zip(found or (), expected or (), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one[real], other[real], rtol=1e-5, atol=1e-5)
            assert (one[~real] == 0).all()


def test_the_configuration_asks():
    model = plain("BertForSequenceClassification", output_hidden_states=True)
    inputs, _ = form("BertForSequenceClassification", model)
    assert isinstance(model, transformers.PreTrainedModel)
    bert_fast.accelerate(model, strict=True)
    assert len(model(**inputs).hidden_states) == 3
    assert model(**inputs, output_hidden_states=False).get("hidden_states") is None
