"""Padding changes nothing: not its side, its amount, its content, nor the texts in the batch."""

import random

import pytest
import torch
from against_transformers import gradients, largest, outside, pair, projection
from padded_texts import LAYOUTS, Text, lay_out, make_text, packed, padded

LENGTHS = (*range(1, 21), 63, 64, 65, 127, 128, 129)


def forward(model, inputs: dict, real: torch.Tensor) -> dict[str, torch.Tensor]:
    """Hidden states of the real tokens, text after text, and one pooled row per text."""
    with torch.no_grad():
        out = model(**inputs)
    assert not out.last_hidden_state[~real].any()
    return {"hidden": out.last_hidden_state[real], "pooled": out.pooler_output}


def forward_and_backward(model, inputs: dict, real: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same, and the gradients of a random projection of all of it."""
    model.zero_grad()
    out = model(**inputs)
    found = {"hidden": out.last_hidden_state[real], "pooled": out.pooler_output}
    projection(found.values()).backward()
    found = {name: value.detach() for name, value in found.items()}
    return found | gradients(dict(model.named_parameters()))


def each_alone(model, texts: list[Text]) -> dict[str, torch.Tensor]:
    """What `forward` should give for a batch of these texts: each run by itself, unpadded."""
    parts = [forward(model, *padded([text], "right")) for text in texts]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def assert_same_bits(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), f"{name}: {largest(got[name] - value):.2e}"


@pytest.fixture
def model():
    return pair(max_position_embeddings=129)[1]


def random_batch(seed: int) -> list[Text]:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    longest = chance.choice((3, 9, 20, 40))
    return [make_text(chance.randint(1, longest)) for _ in range(chance.randint(1, 6))]


def check_random_batch(model, seed: int) -> None:
    """All layouts of a batch agree to the bit, and each text with itself alone and elsewhere."""
    texts = random_batch(seed)
    longest = max(text.length for text in texts)
    expected = forward(model, *padded(texts, "right"))
    for layout in LAYOUTS:
        assert_same_bits(forward(model, *lay_out(texts, layout, longest + seed % 4)), expected)
    assert outside(expected, each_alone(model, texts)) == {}
    order = torch.randperm(len(texts)).tolist()
    shuffled = forward(model, *padded([texts[index] for index in order], "left"))
    hidden = shuffled["hidden"].split([texts[index].length for index in order])
    back = {
        "hidden": torch.cat([hidden[order.index(index)] for index in range(len(texts))]),
        "pooled": shuffled["pooled"][torch.tensor(order).argsort()],
    }
    assert outside(back, expected) == {}


@pytest.mark.parametrize("block", range(10))
def test_random_batches(model, block):
    for seed in range(30 * block, 30 * block + 30):
        check_random_batch(model, seed)


@pytest.mark.long
@pytest.mark.parametrize("block", range(10, 100))
def test_many_random_batches(model, block):
    for seed in range(30 * block, 30 * block + 30):
        check_random_batch(model, seed)


@pytest.mark.parametrize("seed", range(20))
def test_gradients_of_random_batches(seed):
    """To the bit between layouts; the sum of the texts' own within the bound."""
    model = pair(dtype=torch.float64, max_position_embeddings=40)[1]
    texts = random_batch(seed)
    expected = forward_and_backward(model, *padded(texts, "right"))
    for layout in LAYOUTS:
        assert_same_bits(forward_and_backward(model, *lay_out(texts, layout, 40)), expected)
    model.zero_grad()
    outs = [model(**padded([text], "right")[0]) for text in texts]
    hidden = torch.cat([out.last_hidden_state[0] for out in outs])
    projection([hidden, torch.cat([out.pooler_output for out in outs])]).backward()
    summed = gradients(dict(model.named_parameters()))
    assert outside(expected, summed) == {}


def test_dropout_does_not_see_padding():
    """From the same seed, each layout drops the same numbers of each text."""
    probabilities = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.3)
    model = pair(**probabilities)[1].train()
    texts = [make_text(length) for length in (7, 1, 12, 4)]
    steps = []
    for layout in LAYOUTS:
        inputs, real = lay_out(texts, layout, 15)
        torch.manual_seed(3)
        steps.append(forward_and_backward(model, inputs, real))
    for step in steps[1:]:
        assert_same_bits(step, steps[0])
    inputs, real = padded(texts, "right")
    again = forward_and_backward(model, inputs, real)
    assert largest(again["hidden"] - steps[0]["hidden"]) > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lengths_against_transformers(layout):
    """Texts of every length around the tiles' borders, up to the last position there is."""
    theirs, ours = pair(max_position_embeddings=129)
    texts = [make_text(length) for length in LENGTHS]
    got = forward(ours, *lay_out(texts, layout))
    assert outside(got, each_alone(theirs, texts)) == {}


@pytest.mark.parametrize("length", LENGTHS)
def test_length_alone_and_among_others(model, length):
    texts = [make_text(5), make_text(length), make_text(129)]
    among = forward(model, *padded(texts, "left"))
    alone = each_alone(model, texts[1:2])
    got = {"hidden": among["hidden"][5 : 5 + length], "pooled": among["pooled"][1:2]}
    assert outside(got, alone) == {}


@pytest.mark.parametrize("layout", ["right", "packed"])
def test_longer_than_the_positions(model, layout):
    with pytest.raises(ValueError, match=r"(?s)129.*130|130.*129"):
        inputs, _ = lay_out([make_text(130)], layout)
        model(input_ids=inputs["input_ids"])


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e38])
@pytest.mark.parametrize("layout", ["right", "left", "holes"])
def test_poisoned_padding(model, layout, number):
    """What stands at padding reaches no text and no gradient."""
    inputs, real = padded([make_text(length) for length in (7, 1, 4)], layout, 9)
    embeds = torch.randn(3, 9, 32)
    del inputs["input_ids"]

    def step(embeds):
        leaf = embeds.clone().requires_grad_()
        found = forward_and_backward(model, inputs | {"inputs_embeds": leaf}, real)
        return found | {"grad inputs_embeds": leaf.grad}

    clean = step(embeds)
    assert_same_bits(step(embeds.masked_fill(~real[..., None], number)), clean)
    assert not clean["grad inputs_embeds"][~real].any()


def test_poisoned_gradient_at_padding(model):
    """What a loss makes of the zeros at padding reaches no weight."""
    inputs, real = padded([make_text(length) for length in (7, 1, 4)], "left", 9)
    weights = torch.randn(3, 9, 32)

    def step(weights):
        model.zero_grad()
        model(**inputs).last_hidden_state.backward(weights)
        return gradients(dict(model.named_parameters()))

    poisoned = weights.masked_fill(~real[..., None], float("nan"))
    assert_same_bits(step(poisoned), step(weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_large_scores(dtype):
    """Scores of tens of thousands: still finite, and padding has a probability of exactly 0."""
    model = pair(dtype=dtype)[1]
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.attention.self.query.weight.mul_(80)
            layer.attention.self.key.weight.mul_(80)
    texts = [make_text(length) for length in (7, 1, 4)]
    inputs, real = padded(texts, "holes", 9)
    # Gradients through such weights exceed float16's range in eager attention as well.
    step = forward if dtype == torch.float16 else forward_and_backward
    found = step(model, inputs, real)
    for name, value in found.items():
        assert value.isfinite().all(), name
    assert_same_bits(step(model, *padded(texts, "right", 9)), found)
    for probabilities in model(**inputs, output_attentions=True).attentions:
        rows = probabilities.transpose(1, 2)[real]
        keys = real[:, None].expand(-1, 9, -1)[real]
        assert not rows.masked_select(~keys[:, None].expand_as(rows)).any()
        torch.testing.assert_close(rows.float().sum(-1), torch.ones(12, 4), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int32, torch.float32, torch.bfloat16, torch.float64],
    ids=str,
)
def test_mask_dtypes(model, dtype):
    inputs, real = padded([make_text(length) for length in (7, 1, 4)], "holes", 9)
    expected = forward(model, inputs, real)
    mask = inputs["attention_mask"].to(dtype)
    assert_same_bits(forward(model, inputs | {"attention_mask": mask}, real), expected)


def test_any_strides(model):
    """Transposed, sliced and expanded inputs are read as what they are."""
    inputs, real = padded([make_text(length) for length in (7, 1, 4)], "holes", 9)
    expected = forward(model, inputs, real)
    for strided in (
        {key: value.t().contiguous().t() for key, value in inputs.items()},
        {key: torch.stack([value, value + 1], 2)[:, :, 0] for key, value in inputs.items()},
    ):
        assert not any(value.is_contiguous() for value in strided.values())
        assert_same_bits(forward(model, strided, real), expected)
    text = make_text(6)
    once, _ = padded([text], "right", 8)
    thrice = {key: value.expand(3, -1) for key, value in once.items()}
    same, three = padded([text] * 3, "right", 8)
    assert_same_bits(forward(model, thrice, three), forward(model, same, three))


@pytest.mark.parametrize("layout", ["right", "left", "holes"])
def test_rows_of_padding(model, layout):
    """Rows without a token give zeros and change no other row and no gradient."""
    texts = [make_text(length) for length in (5, 3)]
    inputs, _ = padded(texts, layout, 9)
    more = {key: value[torch.tensor([0, 0, 1, 1])] for key, value in inputs.items()}
    more["attention_mask"] = inputs["attention_mask"].new_zeros(4, 9)
    more["attention_mask"][1::2] = inputs["attention_mask"]

    def step(inputs, rows):
        model.zero_grad()
        out = model(**inputs, output_hidden_states=True)
        for tensor in (out.pooler_output, *out.hidden_states, out.last_hidden_state):
            empty = torch.ones(len(tensor), dtype=torch.bool).index_fill(0, rows, False)
            assert not tensor[empty].any()
        found = {"hidden": out.last_hidden_state[rows], "pooled": out.pooler_output[rows]}
        projection(found.values()).backward()
        return found | gradients(dict(model.named_parameters()))

    got, expected = step(more, torch.tensor([1, 3])), step(inputs, torch.tensor([0, 1]))
    assert torch.equal(got["hidden"], expected["hidden"])
    assert outside(got, expected) == {}  # the pooler multiplies another number of rows


@pytest.mark.parametrize(("B", "L"), [(0, 5), (0, 0), (3, 0), (2, 4)])
def test_no_token(model, B, L):
    """An empty batch, rows without columns, nothing but padding: zeros, and zero gradients."""
    inputs = {
        "input_ids": torch.zeros(B, L, dtype=torch.int64),
        "attention_mask": torch.zeros(B, L, dtype=torch.int64),
    }
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2
    out = model(**inputs)
    assert out.last_hidden_state.shape == (B, L, 32) and out.pooler_output.shape == (B, 32)
    assert not out.last_hidden_state.any() and not out.pooler_output.any()
    model.zero_grad()
    (out.last_hidden_state.sum() + out.pooler_output.sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name


@pytest.mark.parametrize("lengths", [(0, 4, 2), (4, 0, 0, 2), (4, 2, 0), (0, 0), ()], ids=str)
def test_packed_with_empty_texts(model, lengths):
    """A text of length 0 between the borders pools to zeros; the others are as without it."""
    texts = [make_text(length) for length in lengths]
    inputs, _ = packed(texts)
    out = model(**inputs)
    there = torch.tensor(lengths) > 0
    assert out.last_hidden_state.shape == (1, sum(lengths), 32)
    assert out.pooler_output.shape == (len(lengths), 32)
    assert not out.pooler_output[~there].any()
    if there.any():
        expected, _ = packed([text for text in texts if text.length])
        expected = model(**expected)
        assert torch.equal(out.last_hidden_state, expected.last_hidden_state)
        got = {"pooled": out.pooler_output[there]}  # of another number of rows
        assert outside(got, {"pooled": expected.pooler_output}) == {}


@pytest.mark.parametrize("form", ["ids", "embeds"])
def test_packed_gradients(model, form):
    """Packed by the caller or by us: equal bits, the embeddings' gradients included."""
    texts = [make_text(length) for length in (7, 1, 4)]
    steps = []
    for layout in ("right", "packed"):
        inputs, real = lay_out(texts, layout)
        leaf = torch.zeros(0)
        if form == "embeds":
            ids = inputs.pop("input_ids")
            leaf = model.get_input_embeddings().weight.detach()[ids].requires_grad_()
            inputs["inputs_embeds"] = leaf
        found = forward_and_backward(model, inputs, real)
        steps.append(found | ({"grad leaf": leaf.grad[real]} if form == "embeds" else {}))
    assert_same_bits(steps[1], steps[0])


def test_packed_hidden_states_and_attentions(model):
    """Each layer's rows in packing order, equal to those of the padded run."""
    texts = [make_text(length) for length in (7, 1, 4)]
    inputs, real = padded(texts, "right")
    expected = model(**inputs, output_hidden_states=True).hidden_states
    got = model(**packed(texts)[0], output_hidden_states=True).hidden_states
    for one, two in zip(got, expected, strict=True):
        assert torch.equal(one[0], two[real])


@pytest.mark.parametrize(
    ("borders", "error"),
    [
        (torch.tensor([0, 7, 8, 11], dtype=torch.int32), ValueError),  # a token too few
        (torch.tensor([0, 7, 8, 13], dtype=torch.int32), ValueError),  # one too many
        (torch.tensor([1, 7, 8, 12], dtype=torch.int32), ValueError),  # not from 0
        (torch.tensor([0, 8, 7, 12], dtype=torch.int32), ValueError),  # going back
        (torch.tensor([[0, 7, 8, 12]], dtype=torch.int32), ValueError),
        (torch.tensor([0.0, 7.0, 8.0, 12.0]), TypeError),
    ],
    ids=["short", "long", "offset", "descending", "2-D", "float"],
)
def test_packed_with_wrong_borders(model, borders, error):
    inputs, _ = packed([make_text(length) for length in (7, 1, 4)])
    with pytest.raises(error, match="cu_seq_lens_q"):
        model(**inputs | {"cu_seq_lens_q": borders})
