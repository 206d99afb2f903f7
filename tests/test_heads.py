"""Each head gives transformers' logits, losses and gradients."""

import dataclasses
import inspect

import pytest
import torch
import transformers
from against_transformers import (
    CLASSES,
    PADDINGS,
    batch,
    differences,
    flatten,
    gradients,
    outside,
    pair,
    run,
)
from head_cases import HEADS, in_both_modes, some, with_head
from torch.nn.functional import cross_entropy

import bert_fast

DECODING = ("encoder_hidden_states", "encoder_attention_mask", "past_key_values", "use_cache")
OF_TOKENS = ("masked_lm", "untied_masked_lm", "tokens", "questions")
# transformers pools the first column, a padding token where padding is on the left, and lets
# padding into the loss of the questions: the rest of those rules is checked text by text.
COMPARABLE = [
    pytest.param(head, padding, id=f"{key}-{padding}")
    for key, head in HEADS.items()
    for padding in PADDINGS
    if padding != "left" or key in OF_TOKENS
]
WITH_LOSS = [case for case in COMPARABLE if "questions" not in case.id or "none" in case.id]
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@both_dtypes
@pytest.mark.parametrize(("head", "padding"), COMPARABLE)
def test_logits(head, padding, dtype):
    """Logits without labels, and the gradients of a random projection of them."""
    theirs, ours = head.pair(dtype)
    inputs, _, real = head.inputs(theirs.config, padding=padding)
    assert differences(theirs, ours, inputs, real) == {}


@in_both_modes
@both_dtypes
@pytest.mark.parametrize(("head", "padding"), WITH_LOSS)
def test_loss(head, padding, dtype, training):
    """The loss and its gradients; in evaluation the logits beside it."""
    theirs, ours = (model.train(training) for model in head.pair(dtype))
    inputs, labels, real = head.inputs(theirs.config, dtype, padding=padding)
    only = ("loss",) if training else ()
    assert differences(theirs, ours, inputs | labels, real, only) == {}


@some("masked_lm", "next_sentence", "one_class", "tokens", "questions", "choices")
def test_comparison_sees_every_tensor(head):
    """Dropping any tensor of the head is noticed; test_model.py does the same below the head."""
    theirs, ours = head.pair()
    inputs, _, real = head.inputs(theirs.config)
    for name, parameter in ours.named_parameters():
        if name.startswith("bert.encoder"):
            continue
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.fill_(1.0 if name.endswith("LayerNorm.weight") else 0.0)
        assert differences(theirs, ours, inputs, real) != {}, name
        with torch.no_grad():
            parameter.copy_(kept)
    assert differences(theirs, ours, inputs, real) == {}


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("everything", [False, True])
@with_head
def test_fields_and_tuple(head, everything, labelled):
    """transformers' fields in its order, and the same tuple with `return_dict=False`."""
    theirs, ours = head.pair()
    inputs, labels, _ = head.inputs(theirs.config, padding="none")
    if labelled:
        inputs |= labels
    if everything:
        inputs |= {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected, got = theirs(**inputs), ours(**inputs)
        numbered = ours(**inputs, return_dict=False)
        trained = ours.train()(**inputs, return_dict=False)
    assert list(got.keys()) == list(expected.keys())
    assert outside(flatten(got), flatten(expected)) == {}
    for other in (numbered, trained):
        assert type(other) is tuple and len(other) == len(expected.to_tuple())
        named = flatten(dict(zip(expected.keys(), other, strict=True)))
        assert outside(named, flatten(expected)) == {}


@pytest.mark.parametrize("name", CLASSES)
def test_forward_takes_transformers_arguments_in_order(name):
    """Up to a decoder's arguments, where no argument of an encoder comes after them."""
    wanted, got = (
        [
            key
            for key, argument in inspect.signature(
                getattr(package, name).forward
            ).parameters.items()
            if argument.kind is argument.POSITIONAL_OR_KEYWORD
        ]
        for package in (transformers, bert_fast)
    )
    while wanted[-1] in DECODING:
        wanted.pop()
    assert got[: len(wanted)] == wanted


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM"])
def test_decoding_is_refused(name):
    """A decoder's arguments may be given as transformers' own callers do: without content."""
    theirs, ours = pair(name)
    inputs, real = batch(theirs.config)
    nothing = {"encoder_hidden_states": None, "encoder_attention_mask": None}
    assert differences(theirs, ours, inputs | nothing, real) == {}
    with pytest.raises(NotImplementedError, match="encoder_hidden_states"):
        ours(**inputs, encoder_hidden_states=torch.randn(3, 11, 32))


def test_pretraining_loss_needs_both_labels():
    head = HEADS["pretraining"]
    _, ours = head.pair()
    inputs, labels, _ = head.inputs(ours.config)
    for key, value in labels.items():
        out = ours(**inputs, **{key: value})
        assert out.loss is None
        assert out.prediction_logits.shape == (4, 11, 101)
        assert out.seq_relationship_logits.shape == (4, 2)


@pytest.mark.parametrize(
    ("training", "skip", "full"),
    [
        (True, None, False),
        (True, True, False),
        (True, False, True),
        (False, None, True),
        (False, True, False),
        (False, False, True),
    ],
)
@some("pretraining", "masked_lm")
def test_skip_logits(head, training, skip, full):
    """Logits of labelled rows alone give the loss and the gradients of all logits."""
    _, ours = head.pair(torch.float64)
    ours.train(training)
    inputs, labels, real = head.inputs(ours.config)
    whole = run(ours, inputs | labels | {"skip_logits": False}, real, ("loss",))
    part = run(ours, inputs | labels | {"skip_logits": skip}, real, ("loss",))
    assert outside(part, whole) == {}
    out = ours(**inputs, **labels, skip_logits=skip)
    name = "logits" if head.name == "BertForMaskedLM" else "prediction_logits"
    assert out[name] is not None if full else getattr(out, name) is None
    if head.name == "BertForPreTraining":
        assert out.seq_relationship_logits.shape == (4, 2)
    assert ours(**inputs, skip_logits=None)[name].shape == (4, 11, 101)


@in_both_modes
@pytest.mark.parametrize("count", [7, torch.tensor(7)], ids=["int", "tensor"])
@some("pretraining", "masked_lm", "tokens")
def test_num_items_in_batch(head, count, training):
    """The sum over the labelled tokens divided by the given count, not by their own number."""
    theirs, ours = head.pair(torch.float64)
    ours.train(training)
    inputs, labels, real = head.inputs(theirs.config)
    out = theirs(**inputs)
    logits = out.get("prediction_logits", out.get("logits"))
    loss = cross_entropy(logits.flatten(0, 1), labels["labels"].flatten(), reduction="sum") / 7
    if "next_sentence_label" in labels:
        loss = loss + cross_entropy(out.seq_relationship_logits, labels["next_sentence_label"])
    loss.backward()
    expected = {"loss": loss.detach()} | gradients(dict(theirs.named_parameters()))
    got = run(ours, inputs | labels | {"num_items_in_batch": count}, real, ("loss",))
    assert outside(got, expected) == {}


@in_both_modes
@some("pretraining", "masked_lm", "next_sentence", "one_class", "tokens", "questions", "choices")
def test_nothing_labelled(head, training):
    """A loss of 0 whose gradients are zeros, on the parameters that have one otherwise."""
    _, ours = head.pair()
    ours.train(training)
    inputs, labels, real = head.inputs(ours.config)
    run(ours, inputs | labels, real, ("loss",))
    usual = {name for name, parameter in ours.named_parameters() if parameter.grad is not None}
    ignored = 99 if head.name == "BertForQuestionAnswering" else -100
    nothing = {key: torch.full_like(value, ignored) for key, value in labels.items()}
    found = run(ours, inputs | nothing, real, ("loss",))
    assert {name for name, p in ours.named_parameters() if p.grad is not None} == usual
    for name, value in found.items():
        assert torch.equal(value, torch.zeros_like(value)), name


@some("one_class", "tokens", "choices")
def test_classifier_dropout(head):
    """`classifier_dropout` acts in training alone, and stands before the classifier."""
    _, ours = dataclasses.replace(head, fields=head.fields | {"classifier_dropout": 0.5}).pair()
    inputs, _, _ = head.inputs(ours.config)
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, ours(**inputs).logits)
        ours.train()
        assert not torch.equal(ours(**inputs).logits, ours(**inputs).logits)
