"""What a forward returns: a dict, a tuple and an object at once, as transformers' outputs are."""

import copy
import operator
import pickle

import pytest
import torch
import torch.utils._pytree as pytree
import transformers
from accelerate.utils import concatenate, convert_outputs_to_fp32, recursively_apply, send_to_device
from against_transformers import batch, pair
from transformers import modeling_outputs

from bert_fast.outputs import (
    BertModelOutput,
    LogitsOutput,
    PreTrainingOutput,
    QuestionAnsweringOutput,
)

THEIRS = {
    BertModelOutput: modeling_outputs.BaseModelOutputWithPoolingAndCrossAttentions,
    LogitsOutput: modeling_outputs.MaskedLMOutput,
    PreTrainingOutput: transformers.models.bert.modeling_bert.BertForPreTrainingOutput,
    QuestionAnsweringOutput: modeling_outputs.QuestionAnsweringModelOutput,
}
both_packages = pytest.mark.parametrize(
    "cls", [LogitsOutput, modeling_outputs.MaskedLMOutput], ids=["ours", "transformers"]
)
every_class = pytest.mark.parametrize("cls", THEIRS, ids=lambda cls: cls.__name__)


def example(cls=LogitsOutput):
    """Every field present, in an order that is not the fields'."""
    return cls(**{name: torch.full((2, 3), float(i)) for i, name in enumerate(names(cls))})


def names(cls):
    return tuple(reversed(cls.fields))


@every_class
def test_fields_are_transformers(cls):
    theirs = THEIRS[cls]
    assert cls.fields == tuple(theirs.__dataclass_fields__)
    assert list(example(cls)) == list(theirs(**example(cls)))


@every_class
def test_access(cls):
    """By name, attribute and place: the same object."""
    out = example(cls)
    assert isinstance(out, dict) and len(out) == len(cls.fields)
    for index, name in enumerate(cls.fields):
        assert out[name] is getattr(out, name) is out[index] is out.to_tuple()[index]
    assert out[-1] is out[cls.fields[-1]]
    assert out[:2] == (out[0], out[1]) and out[1:] == out.to_tuple()[1:]
    assert type(out.to_tuple()) is tuple
    with pytest.raises(IndexError):
        out[len(cls.fields)]


@both_packages
def test_absent_fields(cls):
    """A field that is None is neither key nor item, and still an attribute."""
    out = cls(logits=torch.ones(2))
    assert list(out) == ["logits"] and len(out) == len(out.to_tuple()) == 1
    assert out[0] is out.logits
    assert out.loss is None and hasattr(out, "loss") and "loss" not in out
    assert out.get("loss", 5) == 5
    with pytest.raises(KeyError):
        out["loss"]


@both_packages
def test_unknown_names(cls):
    with pytest.raises(TypeError, match="score"):
        cls(score=torch.ones(2))
    out = cls(logits=torch.ones(2))
    with pytest.raises(KeyError, match="score"):
        out["score"]
    with pytest.raises(AttributeError, match="score"):
        out.score  # noqa: B018 - the access is the test
    assert not hasattr(out, "score")


def test_unknown_names_are_named_with_the_known():
    with pytest.raises(TypeError, match=r"LogitsOutput.*loss, logits.*'score'"):
        LogitsOutput(score=1)
    with pytest.raises(TypeError, match="score"):
        LogitsOutput({"logits": 1, "score": 1})
    with pytest.raises(AttributeError, match="score"):
        LogitsOutput(logits=1).score = 1


@pytest.mark.parametrize("set_it", [setattr, operator.setitem], ids=["attribute", "item"])
def test_setting(set_it):
    """What is set is seen by every kind of access."""
    out = LogitsOutput(loss=torch.zeros(()), logits=torch.ones(2))
    scores = torch.zeros(3)
    set_it(out, "logits", scores)
    assert out.logits is out["logits"] is out[1] is scores
    assert list(out) == ["loss", "logits"]


def test_setting_attributes_keeps_the_order():
    out = LogitsOutput(attentions=(), logits=torch.ones(2))
    out.loss = torch.zeros(())
    assert list(out) == ["loss", "logits", "attentions"] and out[0] is out.loss
    out.logits = None
    assert list(out) == ["loss", "attentions"] and out.logits is None


@pytest.mark.parametrize("form", [dict, lambda values: list(values.items()), iter, None])
def test_construction(form):
    """From a mapping, from pairs, from another output, by keywords: the fields' order."""
    values = {"attentions": 3, "loss": None, "logits": 2}
    if form is None:
        out = LogitsOutput(**values)
    elif form is iter:
        out = LogitsOutput(iter(values.items()))
    else:
        out = LogitsOutput(form(values))
    assert out == {"logits": 2, "attentions": 3} and list(out) == ["logits", "attentions"]
    assert LogitsOutput(out) == out and LogitsOutput(out, loss=1)[0] == 1
    assert LogitsOutput() == {} and LogitsOutput().to_tuple() == ()


@every_class
@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda out: pickle.loads(pickle.dumps(out))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies(copied, cls):
    out = example(cls)
    twin = copied(out)
    assert type(twin) is cls and list(twin) == list(out)
    for name, value in out.items():
        assert torch.equal(getattr(twin, name), value)
    twin.hidden_states = None
    assert out.hidden_states is not None


@both_packages
def test_unpacking_gives_names(cls):
    """As of any dict; `to_tuple` is for values."""
    out = cls(loss=1, logits=2)
    assert [*out] == ["loss", "logits"] and {**out} == {"loss": 1, "logits": 2}
    loss, logits = out.to_tuple()
    assert (loss, logits) == (1, 2)


def test_tuples_of_a_model():
    """`return_dict=False` and `to_tuple` are the same, layer by layer."""
    _, ours = pair()
    inputs, _ = batch(ours.config)
    with torch.no_grad():
        out = ours(**inputs, output_hidden_states=True)
        numbered = ours(**inputs, output_hidden_states=True, return_dict=False)
    assert len(numbered) == len(out.to_tuple()) == 3
    assert torch.equal(numbered[0], out[0]) and torch.equal(numbered[1], out[1])
    for one, two in zip(numbered[2], out.hidden_states, strict=True):
        assert torch.equal(one, two)


# --- tools that take outputs apart ---------------------------------------------------------------


@every_class
def test_pytree_sees_the_tensors(cls):
    """DDP's static graph, FSDP2 and torch.export look for tensors this way."""
    out = example(cls)
    leaves, spec = pytree.tree_flatten(out)
    assert [id(leaf) for leaf in leaves] == [id(value) for value in out.values()]
    doubled = pytree.tree_unflatten([2 * leaf for leaf in leaves], spec)
    assert type(doubled) is cls and list(doubled) == list(out)
    assert torch.equal(doubled[-1], 2 * out[-1])


def test_pytree_looks_into_layers():
    out = BertModelOutput(last_hidden_state=torch.ones(1), hidden_states=(torch.ones(1),) * 3)
    assert len(pytree.tree_leaves(out)) == 4
    mapped = pytree.tree_map(lambda tensor: tensor + 1, out)
    assert type(mapped) is BertModelOutput and mapped.hidden_states[2].item() == 2


def test_export():
    _, ours = pair()
    inputs, _ = batch(ours.config)
    exported = torch.export.export(ours, (), inputs, strict=False).module()
    out, expected = exported(**inputs), ours(**inputs)
    assert type(out) is BertModelOutput
    assert torch.equal(out.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(out.pooler_output, expected.pooler_output)


@every_class
def test_accelerate(cls):
    """Its helpers rebuild an output from what they make of the values."""
    out = example(cls)
    doubled = recursively_apply(lambda tensor: 2 * tensor, out)
    moved = send_to_device(out, "cpu")
    joined = concatenate([out, out])
    for rebuilt in (doubled, moved, joined):
        assert type(rebuilt) is cls and list(rebuilt) == list(out)
    assert torch.equal(doubled[1], 2 * out[1]) and torch.equal(moved[1], out[1])
    assert joined[1].shape == (4, 3)
    half = recursively_apply(torch.Tensor.half, out)
    assert convert_outputs_to_fp32(lambda: half)()[1].dtype == torch.float32
