"""The heads with the labels each of them takes: what the tests of the heads go through."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from against_transformers import batch, pair

CLASSIFIER = "BertForSequenceClassification"


def token_labels(real: torch.Tensor, classes: int, share: float = 0.5) -> torch.Tensor:
    """(B, L) int64: a class on a share of the real tokens and on the first, -100 elsewhere."""
    labels = torch.randint(0, classes, real.shape)
    labelled = (torch.rand(real.shape) < share) & real
    labelled[0, int(real[0].nonzero()[0])] = True
    return labels.masked_fill(~labelled, -100)


@dataclasses.dataclass(frozen=True)
class Head:
    """A class, its configuration, and labels for a batch whose real tokens are given."""

    name: str
    labels: Callable[[torch.Tensor, torch.dtype], dict[str, torch.Tensor]]
    fields: dict = dataclasses.field(default_factory=dict)
    choices: int = 0

    def pair(self, dtype=torch.float32):
        return pair(self.name, dtype, **self.fields)

    def inputs(self, config, dtype=torch.float32, B=4, **form):
        """Inputs, labels, and where the real tokens are."""
        inputs, real = batch(config, B=B, **form)
        labels = self.labels(real, dtype)
        if self.choices:
            inputs = {key: value.unflatten(0, (-1, self.choices)) for key, value in inputs.items()}
        return inputs, labels, real


def classes(real, dtype):
    return {"labels": torch.arange(len(real)) % 3}


def pretraining(real, dtype):
    next_sentence = torch.arange(len(real)) % 2
    return {"labels": token_labels(real, 101), "next_sentence_label": next_sentence}


def spans(real, dtype):
    """A start and an end on real tokens of each row, one row's start beyond the text."""
    L = real.shape[1]
    last = [int(row.nonzero()[-1]) for row in real]
    first = [int(row.nonzero()[0]) for row in real]
    return {
        "start_positions": torch.tensor([L + 5, *first[1:]]),
        "end_positions": torch.tensor(last),
    }


def regression(real, dtype):
    return {"labels": torch.randn(len(real), dtype=dtype)}


def three_numbers(real, dtype):
    return {"labels": torch.randn(len(real), 3, dtype=dtype)}


def multi_label(real, dtype):
    return {"labels": torch.randint(0, 2, (len(real), 3)).to(dtype)}


TYPE, LABELS = "problem_type", "num_labels"
HEADS = {
    "pretraining": Head("BertForPreTraining", pretraining),
    "masked_lm": Head("BertForMaskedLM", lambda real, _: {"labels": token_labels(real, 101)}),
    "untied_masked_lm": Head(
        "BertForMaskedLM",
        lambda real, _: {"labels": token_labels(real, 101)},
        {"tie_word_embeddings": False, "hidden_act": "relu"},
    ),
    "next_sentence": Head(
        "BertForNextSentencePrediction", lambda real, _: {"labels": torch.arange(len(real)) % 2}
    ),
    "one_class": Head(CLASSIFIER, classes, {LABELS: 3}),
    "one_class_declared": Head(
        CLASSIFIER, classes, {LABELS: 3, TYPE: "single_label_classification"}
    ),
    "regression": Head(CLASSIFIER, regression, {LABELS: 1}),
    "regression_column": Head(
        CLASSIFIER, lambda *a: {"labels": regression(*a)["labels"][:, None]}, {LABELS: 1}
    ),
    "regression_declared": Head(CLASSIFIER, three_numbers, {LABELS: 3, TYPE: "regression"}),
    "multi_label": Head(CLASSIFIER, multi_label, {LABELS: 3}),
    "multi_label_declared": Head(
        CLASSIFIER, multi_label, {LABELS: 3, TYPE: "multi_label_classification"}
    ),
    "tokens": Head(
        "BertForTokenClassification",
        lambda real, _: {"labels": token_labels(real, 5, share=0.9)},
        {LABELS: 5, "classifier_dropout": 0.0},
    ),
    "questions": Head("BertForQuestionAnswering", spans),
    "choices": Head(
        "BertForMultipleChoice",
        lambda real, _: {"labels": torch.arange(len(real) // 2) % 2},
        choices=2,
    ),
}


with_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
in_both_modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def some(*keys: str) -> pytest.MarkDecorator:
    """The test runs for these heads."""
    return pytest.mark.parametrize("head", [HEADS[key] for key in keys], ids=keys)
