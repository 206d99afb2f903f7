"""Labels that do not fit are refused: a wrong number, shape, dtype or value, for every head."""

import dataclasses

import pytest
import torch
from bad_input import check, message
from head_cases import HEADS, in_both_modes

L, WORDS = 11, 101
IDS = torch.zeros(2, 5, dtype=torch.int64)
OF_TOKENS = {"masked_lm": WORDS, "pretraining": WORDS, "tokens": 5}
OF_SEQUENCES = {"next_sentence": 2, "one_class": 3, "choices": 2, "one_class_declared": 3}
SEVERAL_CLASSES = {**OF_TOKENS, **OF_SEQUENCES}
with_mask = pytest.mark.parametrize("padding", ["none", "right"])


def prepared(key, padding="right", training=False):
    head = HEADS[key]
    ours = head.pair()[1].train(training)
    inputs, labels, real = head.inputs(ours.config, padding=padding)
    return ours, inputs, labels, real


@in_both_modes
@with_mask
@pytest.mark.parametrize("key", OF_TOKENS)
def test_shape_of_token_labels(key, padding, training):
    ours, inputs, labels, _ = prepared(key, padding, training)
    good = labels["labels"]
    for bad in (good[:-1], good[:, :-1], good.flatten(), good[None], good[0], good.t(), good[:1]):
        words = f"labels {[4, L]} {[*bad.shape]}"
        check(ValueError, words, ours, **inputs, **labels | {"labels": bad})


@in_both_modes
@with_mask
@pytest.mark.parametrize("key", OF_SEQUENCES)
def test_number_of_sequence_labels(key, padding, training):
    """One label is not spread over the batch."""
    ours, inputs, labels, _ = prepared(key, padding, training)
    good = labels["labels"]
    for bad in (good[:1], good[:-1], good[0], torch.cat([good, good]), good[:0]):
        check(ValueError, f"labels {len(good)}", ours, **inputs, labels=bad)


@in_both_modes
@with_mask
def test_number_of_next_sentence_labels(padding, training):
    ours, inputs, labels, _ = prepared("pretraining", padding, training)
    good = labels.pop("next_sentence_label")
    for bad in (good[:1], good[:-1], good[0], torch.cat([good, good])):
        given = labels | {"next_sentence_label": bad}
        check(ValueError, "next_sentence_label 4", ours, **inputs, **given)


@in_both_modes
@pytest.mark.parametrize("key", ["multi_label", "multi_label_declared", "regression_declared"])
def test_shape_of_number_labels(key, training):
    ours, inputs, labels, _ = prepared(key, "right", training)
    good = labels["labels"]
    for bad in (good[:-1], good[:, :-1], good[0], good.t().contiguous()):
        words = f"labels {[4, 3]} {[*bad.shape]}"
        check(ValueError, words, ours, **inputs, labels=bad)


@in_both_modes
@pytest.mark.parametrize("value", ["size", -1, -99, 2**33])
@pytest.mark.parametrize("key", SEVERAL_CLASSES)
def test_label_out_of_range(key, value, training):
    ours, inputs, labels, real = prepared(key, "right", training)
    value = SEVERAL_CLASSES[key] if value == "size" else value
    bad = labels["labels"].clone()
    bad[tuple(real.nonzero()[0]) if bad.dim() == 2 else 0] = value
    words = f"labels {SEVERAL_CLASSES[key] - 1} -100 {value}"
    check(ValueError, words, ours, **inputs, **labels | {"labels": bad})


@pytest.mark.parametrize("value", [2, -1])
def test_next_sentence_label_out_of_range(value):
    ours, inputs, labels, _ = prepared("pretraining")
    labels["next_sentence_label"][2] = value
    check(ValueError, f"next_sentence_label 1 {value}", ours, **inputs, **labels)


@pytest.mark.parametrize("name", ["start_positions", "end_positions"])
def test_question_positions(name):
    ours, inputs, labels, _ = prepared("questions", "none")
    good = labels[name]
    for bad in (good[:1], good[:-1], good[0], torch.cat([good, good])):
        words = f"{name} 4 {[*bad.shape]}"
        check(ValueError, words, ours, **inputs, **labels | {name: bad})
    for dtype in (torch.float32, torch.bool):
        given = labels | {name: good.to(dtype)}
        check(TypeError, f"{name} {dtype}", ours, **inputs, **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
@pytest.mark.parametrize("key", [key for key in SEVERAL_CLASSES if key != "one_class"])
def test_dtype_of_labels(key, dtype):
    """Classes are integers. (With an undeclared problem floats mean several labels.)"""
    ours, inputs, labels, _ = prepared(key)
    bad = labels | {"labels": labels["labels"].clamp(min=0).to(dtype)}
    check(TypeError, f"labels int {dtype}", ours, **inputs, **bad)


@pytest.mark.parametrize("key", ["masked_lm", "one_class", "questions"])
def test_labels_are_not_a_tensor(key):
    ours, inputs, labels, _ = prepared(key)
    name = next(iter(labels))
    bad = labels | {name: labels[name].tolist()}
    check(TypeError, f"{name} Tensor list", ours, **inputs, **bad)


def test_refused_labels_leave_the_problem_open():
    """The kind of problem is kept from labels that were used, not from a mistake."""
    ours, inputs, labels, _ = prepared("one_class")
    message(ValueError, ours, **inputs, labels=labels["labels"].float())
    assert ours(**inputs, **labels).loss.isfinite()
    assert ours.config.problem_type == "single_label_classification"


def test_skipped_logits_need_labels():
    ours = HEADS["masked_lm"].pair()[1]
    check(ValueError, "skip_logits labels None", ours, IDS, skip_logits=True)


def test_question_answering_wants_two_labels():
    ours = dataclasses.replace(HEADS["questions"], fields={"num_labels": 3}).pair()[1]
    check(ValueError, "num_labels 2 3", ours, IDS)


def test_shape_of_choices():
    ours, inputs, _, _ = prepared("choices")
    flat = inputs["input_ids"].flatten(0, 1)
    check(ValueError, f"input_ids (B, C, L) {[*flat.shape]}", ours, flat)
    check(ValueError, "input_ids inputs_embeds None", ours)
    mask = inputs["attention_mask"]
    check(ValueError, "attention_mask", ours, inputs["input_ids"], mask[:, :1])
