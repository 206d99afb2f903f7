"""The heads' rules at padding, where transformers gives numbers without meaning."""

import pytest
import torch
from against_transformers import PADDINGS, alone, differences, gradients, outside, run
from head_cases import HEADS, in_both_modes, some, with_head
from torch.nn.functional import cross_entropy


@pytest.mark.parametrize("padding", ["right", "left", "holes"])
@some("pretraining", "masked_lm", "tokens")
def test_padding_of_token_heads(head, padding):
    """Logits at padding are 0, and a label there takes no part in the loss."""
    _, ours = head.pair()
    inputs, labels, real = head.inputs(ours.config, padding=padding)
    strewn = labels["labels"].where(real, torch.randint(0, 5, real.shape))
    out = ours(**inputs)
    logits = out.get("prediction_logits", out.get("logits"))
    assert not logits[~real].any()
    for training in (False, True):
        ours.train(training)
        expected = run(ours, inputs | labels, real, ("loss",))
        got = run(ours, inputs | labels | {"labels": strewn}, real, ("loss",))
        for name, value in expected.items():
            assert torch.equal(got[name], value), name


@pytest.mark.parametrize("padding", PADDINGS)
def test_questions_leave_padding_out(padding):
    """Logits, loss and gradients are those of transformers on each text without its padding."""
    theirs, ours = HEADS["questions"].pair(torch.float64)
    inputs, labels, real = HEADS["questions"].inputs(ours.config, padding=padding)
    texts = [theirs(**alone(inputs, real, row)) for row in range(len(real))]
    expected, loss = {}, 0
    for kind in ("start", "end"):
        expected[f"{kind}_logits"] = torch.cat([text[f"{kind}_logits"][0] for text in texts])
        terms = [
            cross_entropy(text[f"{kind}_logits"], row[:column].sum()[None])
            for text, row, column in zip(texts, real, labels[f"{kind}_positions"], strict=True)
            if column < real.shape[1]
        ]
        loss = loss + sum(terms) / len(terms) / 2
    loss.backward()
    expected |= {"loss": loss} | gradients(dict(theirs.named_parameters()))
    expected = {name: value.detach() for name, value in expected.items()}
    assert outside(run(ours, inputs | labels, real), expected) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_question_logits_at_padding(dtype):
    """The lowest number of the dtype, and neither loss nor gradients overflow for it."""
    _, ours = HEADS["questions"].pair(dtype)
    inputs, labels, real = HEADS["questions"].inputs(ours.config)
    out = ours(**inputs, **labels)
    for logits in (out.start_logits, out.end_logits):
        assert logits.dtype == dtype
        assert (logits[~real] == torch.finfo(dtype).min).all()
        assert (logits[real] > torch.finfo(dtype).min / 2).all()
    for name, value in run(ours, inputs | labels, real).items():
        assert value.isfinite().all(), name


def test_question_positions():
    """As in transformers: below 0 counts as 0, L or more is ignored, a column is one row."""
    theirs, ours = HEADS["questions"].pair()
    inputs, _, real = HEADS["questions"].inputs(theirs.config, padding="none")
    labels = {
        "start_positions": torch.tensor([[-3], [11], [0], [10]]),
        "end_positions": torch.tensor([[200], [11], [10], [12]]),
    }
    assert differences(theirs, ours, inputs | labels, real) == {}
    one = {"start_positions": labels["start_positions"]}
    assert ours(**inputs, **one).loss is theirs(**inputs, **one).loss is None


@pytest.mark.parametrize("argument", ["start_positions", "end_positions"])
@pytest.mark.parametrize("padding", ["right", "left", "holes"])
def test_question_label_on_padding(padding, argument):
    _, ours = HEADS["questions"].pair()
    inputs, labels, real = HEADS["questions"].inputs(ours.config, padding=padding)
    row = int((~real).any(1).nonzero()[0])
    labels[argument][row] = int((~real[row]).nonzero()[0])
    with pytest.raises(ValueError, match=argument):
        ours(**inputs, **labels)


def to_the_left(tensor: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Rows padded on the right, padded on the left instead."""
    shifts = (~real).sum(1).tolist()
    return torch.stack([row.roll(shift) for row, shift in zip(tensor, shifts, strict=True)])


@in_both_modes
@with_head
def test_side_of_the_padding(head, training):
    """Padding moved from the right to the left changes no bit of loss and gradients."""
    _, ours = head.pair()
    ours.train(training)
    inputs, labels, real = head.inputs(ours.config, positions="each")
    shape = inputs["input_ids"].shape
    rows = {key: value.flatten(0, -2) for key, value in inputs.items()}
    moved = {key: to_the_left(value, real).view(shape) for key, value in rows.items()}
    other = dict(labels)
    if head.name == "BertForQuestionAnswering":
        other = {key: value + (~real).sum(1) for key, value in labels.items()}
    elif labels["labels"].shape == real.shape:
        other["labels"] = to_the_left(labels["labels"], real)
    expected = run(ours, inputs | labels, real, ("loss",))
    got = run(ours, moved | other, to_the_left(real, real), ("loss",))
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@in_both_modes
@with_head
def test_row_of_padding(head, training):
    """A row without a token gives 0 and takes no part in the loss, whatever its label."""
    _, ours = head.pair(torch.float64)
    ours.train(training)
    inputs, labels, real = head.inputs(ours.config, torch.float64, B=6)
    step = max(head.choices, 1)
    kept = torch.tensor([example for example in range(6 // step) if example != 1])
    inputs["attention_mask"][1] = 0
    real = inputs["attention_mask"].bool()
    if head.name == "BertForQuestionAnswering":
        labels = {key: value.index_fill(0, torch.tensor(1), 99) for key, value in labels.items()}
    fewer = {key: value[kept] for key, value in (inputs | labels).items()}
    expected = run(ours, fewer, real[kept], ("loss",))
    assert outside(run(ours, inputs | labels, real, ("loss",)), expected) == {}
    empty = torch.finfo(torch.float64).min if head.name == "BertForQuestionAnswering" else 0.0
    for name, value in ours.eval()(**inputs).items():
        assert (value[1] == empty).all(), name


@with_head
def test_nothing_but_padding(head):
    """A batch without a token: loss 0 and gradients of 0."""
    _, ours = head.pair()
    inputs, labels, real = head.inputs(ours.config)
    inputs["attention_mask"].zero_()
    if head.name == "BertForQuestionAnswering":
        labels = {key: torch.full_like(value, 99) for key, value in labels.items()}
    for training in (False, True):
        for name, value in run(ours.train(training), inputs | labels, real, ("loss",)).items():
            assert torch.equal(value, torch.zeros_like(value)), name


@pytest.mark.parametrize(("B", "L"), [(0, 5), (0, 0), (2, 0)])
@with_head
def test_empty_batch(head, B, L):
    """Without texts or without columns: the shapes of any other batch."""
    theirs, ours = head.pair()
    sample, _, _ = head.inputs(theirs.config, B=2 * max(head.choices, 1), L=3, padding="none")
    expected = theirs(**sample)
    ids = torch.zeros((B, head.choices, L) if head.choices else (B, L), dtype=torch.int64)
    for name, value in ours(ids).items():
        shape = [B, *expected[name].shape[1:]]
        if name in ("start_logits", "end_logits") or value.dim() == 3:
            shape[1] = L
        assert list(value.shape) == shape, name
