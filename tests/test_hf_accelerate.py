"""A model of transformers, accelerated in place, has its original's outputs and gradients.

Every comparison goes through `hf_cases.check` or counts attentions, so that none of them can hold
because the original code ran.
"""

import copy

import pytest
import torch
from against_transformers import PADDINGS, above_twice_the_baseline, largest, outside
from hf_cases import (
    BASES,
    LAYERS,
    MODELS,
    V5,
    at_real_tokens,
    check,
    form,
    labels,
    measured,
    packed,
    plain,
    structure,
)
from torch import nn

import bert_fast

EVERYTHING = {"output_hidden_states": True, "output_attentions": True}
UNSAVED = {"_name_or_path": "", "dtype": "", "architectures": []}  # set by loading and saving
FORMS = {  # options of hf_cases.form, then what is given beside
    "no padding": ({"padding": "none"}, {}),
    "right": ({"padding": "right"}, {}),
    "holes": ({"padding": "holes"}, {}),
    "all outputs": ({"padding": "holes"}, EVERYTHING),
    "tuple": ({}, {"return_dict": False}),
    "tuple of all": ({"padding": "none"}, {"return_dict": False} | EVERYTHING),
    "embeds": ({"embeds_dtype": torch.float32}, {}),
    "positions": ({"positions": "all rows", "padding": "holes"}, {}),
    "no types": ({"token_types": False}, {}),
    "boolean mask": ({"mask_dtype": torch.bool}, {}),
    "labels": ({}, {"labels": True}),
}
every_class = pytest.mark.parametrize("name", MODELS)
every_base = pytest.mark.parametrize("name", BASES)


def given(name, model, key, dtype=torch.float32):
    """The inputs of a form, and where the real tokens are."""
    options, more = FORMS[key]
    if "embeds_dtype" in options:
        options = options | {"embeds_dtype": dtype}
    inputs, real = form(name, model, **options)
    more = dict(more)
    if more.pop("labels", False):
        if name.endswith("QuestionAnswering"):  # padding competes with the text in its loss
            inputs, real = form(name, model, padding="none")
        more |= labels(name, model, real)
    return inputs | more, real


def same_bits(one, two):
    one, two = (at_real_tokens(out, torch.ones(0, 0)) for out in (one, two))
    return [*one] == [*two] and all(torch.equal(one[key], two[key]) for key in one)


# --- outputs and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("key", FORMS)
@every_class
def test_equals_its_original(name, key):
    if (name, key) == ("DistilBertForMultipleChoice", "positions"):
        pytest.skip("the original takes no positions by choice")
    if key == "positions" and name.startswith("DistilBert") and not V5:
        pytest.skip("the original takes no positions")
    model = plain(name)
    inputs, real = given(name, model, key)
    found = check(model, inputs, real)
    assert len([n for n in found if n.startswith("grad ")]) > 20
    if "output_attentions" in inputs:
        assert sum(largest(value) > 0 for n, value in found.items() if value.dim() == 3) >= LAYERS


@every_class
def test_equals_its_original_in_float64(name):
    model = plain(name, torch.float64)
    for key in ("all outputs", "embeds", "labels"):
        check(model, *given(name, model, key, torch.float64))


@pytest.mark.long
@pytest.mark.parametrize("padding", [padding for padding in PADDINGS if padding != "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_class
def test_equals_its_original_on_many_batches(name, dtype, padding):
    model = plain(name, dtype)
    # of float32 no attentions: their part of the key's bias' gradient, which is 0, is rounding
    asked = EVERYTHING if dtype == torch.float64 else {"output_hidden_states": True}
    for seed in range(8):
        torch.manual_seed(seed)
        B, L = 2 * (seed % 4 + 1), 3 * seed + 1
        inputs, real = form(name, model, padding=padding, B=B, L=L)
        check(model, inputs | asked, real)


@every_class
def test_structure_of_the_output(name):
    """Classes, fields, their order, shapes and dtypes, of an output and of a tuple."""
    model = plain(name)
    inputs, _ = form(name, model)
    variants = [{}, {"return_dict": False}]
    variants += [variant | EVERYTHING for variant in variants]
    expected = [structure(model(**inputs, **variant)) for variant in variants]
    bert_fast.accelerate(model, strict=True)
    with packed() as rows:
        found = [structure(model(**inputs, **variant)) for variant in variants]
    assert found == expected and len(rows) == LAYERS * len(variants)


@pytest.mark.parametrize("fields", [{"output_hidden_states": True}, EVERYTHING], ids="+".join)
@every_base
def test_outputs_that_the_configuration_asks_for(name, fields):
    model = plain(name, **fields)
    found = check(model, *form(name, model))
    assert f"hidden_states.{LAYERS}" in found
    assert (f"attentions.{LAYERS - 1}" in found) == ("output_attentions" in fields)


@every_base
def test_attentions_without_eager_attention(name):
    """They are filled whatever computes attention in the original."""
    model = plain(name)
    inputs, real = form(name, model)
    expected = at_real_tokens(model(**inputs, output_attentions=True), real)
    other = plain(name, attention="sdpa")
    bert_fast.accelerate(other, strict=True)
    assert outside(at_real_tokens(other(**inputs, output_attentions=True), real), expected) == {}


@every_base
def test_padding_is_zero(name):
    """As docs/numerics.md says; a row that is all padding too, which changes no other row."""
    model = plain(name)
    inputs, real = form(name, model, padding="holes")
    inputs["attention_mask"][2] = 0
    real[2] = False
    expected = model(**inputs, **EVERYTHING)
    bert_fast.accelerate(model, strict=True)
    with packed() as rows:
        out = model(**inputs, **EVERYTHING)
    assert rows == [int(real.sum())] * LAYERS
    for value in (out.last_hidden_state, *out.hidden_states):
        assert largest(value[~real]) == 0 and largest(value[real]) > 0
    for value in out.attentions:
        assert largest(value.transpose(1, 2)[~real]) == 0
        assert largest(value.permute(0, 3, 1, 2)[~real]) == 0
    assert outside({"": out.last_hidden_state[real]}, {"": expected.last_hidden_state[real]}) == {}
    if "pooler_output" in out:
        assert largest(out.pooler_output[2]) == 0


TOKEN_HEADS = [n for n in MODELS if n.endswith(("MaskedLM", "PreTraining", "TokenClassification"))]
PACKED_HEADS = {f"{family}ForMaskedLM" for family in ("Bert", "Roberta", "XLMRoberta")}
PACKED_HEADS.add("BertForPreTraining")


@pytest.mark.parametrize("name", TOKEN_HEADS)
def test_heads_at_padding(name):
    """Those that run packed give 0, the others what they make of a row of zeros."""
    model = bert_fast.accelerate(plain(name), strict=True)
    inputs, real = form(name, model, padding="holes")
    with torch.no_grad():
        (logits,) = (t for t in model(**inputs).values() if t.shape[:2] == real.shape)
    found = logits[~real]
    assert (largest(found) == 0) == (name in PACKED_HEADS)
    assert largest(found - found[:1]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*BASES, "BertForMaskedLM", "RobertaForMaskedLM"])
def test_low_precision(name, dtype):
    """An error of at most twice that of the original in the same dtype, against float64."""
    model = plain(name, dtype)
    exact, got, truth = copy.deepcopy(model).double(), [], []
    others = [model, plain(name, dtype, attention="sdpa")]
    baselines = [[], []]
    bert_fast.accelerate(fast := copy.deepcopy(model), strict=True)
    for seed in range(6):
        torch.manual_seed(seed)
        inputs, real = form(name, model)
        with packed() as rows:
            got.append(measured(fast, inputs, real))
        assert rows == [int(real.sum())] * LAYERS
        for other, baseline in zip(others, baselines, strict=True):
            baseline.append(measured(other, inputs, real))
        truth.append(measured(exact, inputs, real))
    assert [*got[0]] == [*truth[0]]
    assert {value.dtype for value in got[0].values()} == {dtype}
    assert above_twice_the_baseline(got, baselines, truth) == {}


@pytest.mark.parametrize(
    "act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "gelu_10", "quick_gelu"]
)
@pytest.mark.parametrize("name", ["BertForMaskedLM", "DistilBertModel", "ElectraForMaskedLM"])
def test_activations(name, act):
    """Those that are not ours are called as they are."""
    model = plain(name, hidden_act=act)
    check(model, *form(name, model))


@pytest.mark.parametrize("kind", ["ReLU", "GELUActivation"])
def test_activation_of_the_same_name(kind):
    """A class of somebody else's is called, whatever its name."""
    model = plain()
    foreign = type(kind, (nn.Module,), {"forward": lambda self, x: -x.tanh()})()
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = foreign
    check(model, *form("BertModel", model))


@pytest.mark.parametrize("size", [1, 3, 80])
def test_head_sizes(size):
    model = plain("BertModel", hidden_size=4 * size)
    check(model, *form("BertModel", model))


def test_one_column_and_one_row():
    for name in BASES:
        model = plain(name)
        for B, L in ((1, 1), (1, 7), (4, 1)):
            check(model, *form(name, model, B=B, L=L))


def test_arguments_by_position():
    model = plain()
    inputs, real = form("BertModel", model)
    order = [inputs[key] for key in ("input_ids", "attention_mask", "token_type_ids")]
    expected = model(*order).last_hidden_state
    bert_fast.accelerate(model, strict=True)
    with packed() as rows:
        found = model(*order).last_hidden_state
    assert len(rows) == LAYERS
    assert outside({"": found[real]}, {"": expected[real]}) == {}


@pytest.mark.parametrize("name", ["BertModel", "BertForTokenClassification", "ElectraModel"])
def test_packed_inputs(name):
    """As the flattening collator makes them: each text as if it were alone."""
    if name == "BertForTokenClassification" and not V5:
        pytest.skip("the original's head does not hand them on")
    model = plain(name)
    texts = [torch.randint(2, 101, (1, length)) for length in (5, 1, 9)]
    expected = torch.cat([model(text)[0][0] for text in texts])
    ends = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    borders = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 9, "max_length_k": 9}
    positions = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    bert_fast.accelerate(model, strict=True)
    with packed() as rows:
        found = model(torch.cat(texts, 1), position_ids=positions, **borders)[0]
    assert rows == [15] * LAYERS
    assert outside({"": found[0]}, {"": expected}) == {}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__)
@every_class
def test_without_gradients(name, context):
    model = plain(name)
    inputs, real = form(name, model)
    with context():
        expected = at_real_tokens(model(**inputs), real)
        bert_fast.accelerate(model, strict=True)
        for _ in range(3):  # what is made of weights is kept from the second time on
            with packed() as rows:
                found = at_real_tokens(model(**inputs), real)
            assert len(rows) == LAYERS and outside(found, expected) == {}
