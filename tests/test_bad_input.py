"""Wrong input is refused with a typed error that names the argument, what is wanted and what came.

Labels have test_bad_labels.py, files test_checkpoint.py, borders of packed input test_padding.py.
"""

import copy

import pytest
import torch
import transformers
from against_transformers import pair
from bad_input import check, message
from head_cases import HEADS, in_both_modes

import bert_fast

B, L, D, POSITIONS, WORDS = 3, 11, 32, 40, 101


@pytest.fixture(scope="module")
def model():
    return pair()[1]


def ids(*shape, fill=None):
    shape = shape or (B, L)
    if fill is not None:
        return torch.full(shape, fill)
    return torch.randint(0, WORDS, shape)


def with_value(value, row=1, column=4):
    changed = ids()
    changed[row, column] = value
    return changed


# --- ids -----------------------------------------------------------------------------------------


@in_both_modes
@pytest.mark.parametrize(
    ("name", "size"), [("input_ids", WORDS), ("token_type_ids", 2), ("position_ids", POSITIONS)]
)
@pytest.mark.parametrize("value", ["size", -1, -100, 2**31, 2**40, -(2**63)])
def test_id_out_of_range(model, name, size, value, training):
    value = size if value == "size" else value
    inputs = {"input_ids": ids()} | {name: torch.zeros(B, L, dtype=torch.int64)}
    inputs[name][1, 4] = value
    model.train(training)
    check(ValueError, f"{name} {size - 1} {value}", model, **inputs)


def test_largest_ids_are_taken(model):
    positions = ids(fill=POSITIONS - 1)
    out = model.eval()(ids(fill=WORDS - 1), token_type_ids=ids(fill=1), position_ids=positions)
    assert out.last_hidden_state.isfinite().all()


def test_id_out_of_range_at_padding(model):
    """What stands at padding is never looked at."""
    mask = torch.ones(B, L)
    mask[1, 4] = 0
    odd, even = (model.eval()(with_value(value), mask) for value in (10**6, 0))
    assert odd.last_hidden_state.shape == even.last_hidden_state.shape


@pytest.mark.parametrize("form", ["ids", "embeds", "masked", "packed"])
def test_length_over_the_positions(form):
    """512 positions, 513 tokens: said before anything is computed."""
    model = pair(max_position_embeddings=512)[1]
    inputs = {"input_ids": ids(1, 513)}
    if form == "embeds":
        inputs = {"inputs_embeds": torch.zeros(1, 513, D)}
    elif form == "masked":
        inputs["attention_mask"] = torch.arange(513)[None] < 10
    elif form == "packed":
        inputs["cu_seq_lens_q"] = torch.tensor([0, 513], dtype=torch.int32)
    check(ValueError, "length max_position_embeddings 512 513", model, **inputs)
    shorter = {k: v[:, :512] for k, v in inputs.items() if k != "cu_seq_lens_q"}
    assert model(**shorter).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("shape", [(), (L,), (1, B, L)], ids=str)
def test_rank_of_ids(model, shape):
    given = torch.zeros(shape, dtype=torch.int64)
    check(ValueError, f"input_ids (B, L) {[*shape]}", model, given)


@pytest.mark.parametrize("name", ["token_type_ids", "position_ids"])
@pytest.mark.parametrize("shape", [(B, L - 1), (B, L + 1), (2, L), (L,), (B, 1), (B, L, 1), ()])
def test_shape_of_ids(model, name, shape):
    given = torch.zeros(shape, dtype=torch.int64)
    words = f"{name} {[B, L]} {[*shape]}"
    check(ValueError, words, model, ids(), **{name: given})


@pytest.mark.parametrize("name", ["input_ids", "token_type_ids", "position_ids"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool, torch.complex64])
def test_dtype_of_ids(model, name, dtype):
    inputs = {"input_ids": ids()} | {name: torch.zeros(B, L, dtype=dtype)}
    check(TypeError, f"{name} int {dtype}", model, **inputs)


# --- inputs_embeds -------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["both", "neither", "mask alone"])
def test_both_or_neither(model, given):
    inputs = {
        "both": {"input_ids": ids(), "inputs_embeds": torch.zeros(B, L, D)},
        "neither": {},
        "mask alone": {"attention_mask": torch.ones(B, L)},
    }[given]
    got = "both" if given == "both" else "neither"
    check(ValueError, f"one input_ids inputs_embeds {got}", model, **inputs)


@pytest.mark.parametrize(
    ("shape", "dtype", "error"),
    [
        ((B, L), torch.float32, ValueError),
        ((1, B, L, D), torch.float32, ValueError),
        ((B, L, D - 1), torch.float32, ValueError),
        ((B, L, D), torch.int64, TypeError),
        ((B, L, D), torch.complex64, TypeError),
        ((B, L, D), torch.float64, TypeError),
    ],
    ids=str,
)
def test_embeds(model, shape, dtype, error):
    given = torch.zeros(shape, dtype=dtype)
    got = str([*shape]) if error is ValueError else str(dtype)
    check(error, f"inputs_embeds {got}", model, inputs_embeds=given)


# --- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(B, L - 1), (B, L + 1), (2, L), (1, L), (B, 1), (L, B), (L,), ()], ids=str
)
def test_shape_of_mask(model, shape):
    words = f"attention_mask {[B, L]} {[*shape]}"
    check(ValueError, words, model, ids(), torch.ones(shape))


@pytest.mark.parametrize(
    "shape", [(B, 1, L), (B, L, L), (B, L, 1), (B, 1, 1, L), (B, 1, L, L), (B, 4, L, L)], ids=str
)
def test_mask_by_query_and_key(model, shape):
    words = f"attention_mask (B, L) {[*shape]}"
    check(NotImplementedError, words, model, ids(), torch.ones(shape))


@pytest.mark.parametrize("low", [-1e4, -1e9, -float("inf"), torch.finfo(torch.float32).min, -1])
def test_additive_mask(model, low):
    """Zeros at the tokens would otherwise be read as padding everywhere."""
    mask = torch.zeros(B, L)
    mask[1, 5:] = low
    check(ValueError, "attention_mask 1 0 negative", model, ids(), mask)


def test_mask_that_is_not_a_number(model):
    mask = torch.ones(B, L)
    mask[1, 4] = float("nan")
    check(ValueError, "attention_mask", model, ids(), mask)


# --- things that are not tensors -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "token_type_ids", "position_ids"])
@pytest.mark.parametrize("form", [torch.Tensor.tolist, torch.Tensor.numpy], ids=["list", "array"])
def test_not_a_tensor(model, name, form):
    inputs = {"input_ids": ids()} | {name: form(ids(fill=1))}
    kind = type(inputs[name]).__name__
    check(TypeError, f"{name} Tensor {kind}", model, **inputs)


def test_text_instead_of_ids(model):
    check(TypeError, "input_ids Tensor str", model, "Once upon a time")


# --- unknown arguments, a decoder's arguments ----------------------------------------------------


@pytest.mark.parametrize("name", ["attention_masks", "labels", "cache_position", "return_dicts"])
def test_unknown_argument(model, name):
    check(TypeError, f"unknown {name}", model, ids(), **{name: torch.ones(B, L)})
    check(TypeError, f"unknown {name}", model, ids(), **{name: None})


def test_unknown_argument_of_a_head():
    head = HEADS["masked_lm"].pair()[1]
    check(TypeError, "unknown label", head, ids(), label=ids())
    for name in ("next_sentence", "one_class", "questions"):
        head = HEADS[name].pair()[1]
        check(TypeError, "skip_logits", head, ids(), skip_logits=True)


DECODING = {
    "encoder_hidden_states": torch.zeros(B, 4, D),
    "encoder_attention_mask": torch.ones(B, 4),
    "past_key_values": ((),),
    "head_mask": torch.ones(2, 4),
}


@pytest.mark.parametrize("name", DECODING)
@pytest.mark.parametrize("head", ["BertModel", "BertForMaskedLM", "BertForQuestionAnswering"])
def test_decoder_argument(head, name):
    ours = pair(head)[1]
    words = f"{name} None encoder"
    check(NotImplementedError, words, ours, ids(), **{name: DECODING[name]})
    given = ids()
    assert torch.equal(ours(given, **{name: None})[0], ours(given)[0])


# --- packed input --------------------------------------------------------------------------------

BORDERS = torch.tensor([0, 5, 12], dtype=torch.int32)
PACKED = {
    "several rows": ({"input_ids": ids(2, 12)}, ValueError, "(1, T) [2, 12]"),
    "mask": ({"attention_mask": torch.ones(1, 12)}, ValueError, "attention_mask None mask"),
    "other keys": (
        {"cu_seq_lens_k": torch.tensor([0, 6, 12], dtype=torch.int32)},
        ValueError,
        "cu_seq_lens_k cu_seq_lens_q",
    ),
    "no queries": (
        {"cu_seq_lens_q": None, "cu_seq_lens_k": BORDERS},
        ValueError,
        "cu_seq_lens_k cu_seq_lens_q None",
    ),
    "max too small": ({"max_length_q": 6}, ValueError, "cu_seq_lens_q 6 [0, 5, 12]"),
    "max negative": ({"max_length_q": -1}, ValueError, "-1"),
    "max too large": ({"max_length_q": 41}, ValueError, "max_position_embeddings 40 41"),
    "max not an integer": ({"max_length_q": 7.5}, TypeError, "max_length_q 7.5"),
    "other max of keys": (
        {"max_length_q": 7, "max_length_k": 8},
        ValueError,
        "max_length_k max_length_q 7 8",
    ),
    "no borders": ({"cu_seq_lens_q": None, "max_length_q": 7}, ValueError, "max_length_q"),
    "list": ({"cu_seq_lens_q": [0, 5, 12]}, TypeError, "cu_seq_lens_q Tensor list"),
    "empty": ({"cu_seq_lens_q": BORDERS[:0]}, ValueError, "cu_seq_lens_q [0]"),
    "wraps": ({"cu_seq_lens_q": torch.tensor([0, 2**32 + 5, 12])}, ValueError, str(2**32)[:4]),
    "attentions": ({"output_attentions": True}, NotImplementedError, "output_attentions packed"),
}


@pytest.mark.parametrize("case", PACKED)
def test_packed(model, case):
    changes, error, words = PACKED[case]
    inputs = {"input_ids": ids(1, 12), "cu_seq_lens_q": BORDERS} | changes
    words = words.replace("packed", "cu_seq_lens_q")
    check(error, words, model, **inputs)


def test_packed_questions_have_no_loss():
    """Columns of one long row are not columns of its texts."""
    ours = HEADS["questions"].pair()[1]
    inputs = {"input_ids": ids(1, 12), "cu_seq_lens_q": BORDERS}
    assert ours(**inputs).start_logits.shape == (1, 12)
    labels = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([2, 2])}
    words = "start_positions cu_seq_lens_q"
    check(NotImplementedError, words, ours, **inputs, **labels)


# --- configuration -------------------------------------------------------------------------------

CONFIG = {  # what `validate` refuses is test_config.py's; here, that models ask it
    "vocab_size": 0,
    "hidden_size": 32.0,
    "num_attention_heads": 5,
    "hidden_act": "silu",
    "hidden_dropout_prob": float("nan"),
    "layer_norm_eps": -1.0,
    "pad_token_id": 101,
    "problem_type": "classification",
}
REFUSED = {
    "is_decoder": True,
    "add_cross_attention": True,
    "is_encoder_decoder": True,
    "position_embedding_type": "relative_key",
}


@pytest.mark.parametrize("name", CONFIG)
def test_configuration(model, name):
    """Refused when a model is built from it, and when a model runs whose field was changed."""
    config, value = copy.deepcopy(model.config), CONFIG[name]
    setattr(config, name, value)
    said = message(ValueError, bert_fast.BertModel, config)
    assert name in said and repr(value) in said
    changed = copy.deepcopy(model)
    setattr(changed.config, name, value)
    assert message(ValueError, changed, ids()) == said


@pytest.mark.parametrize("name", REFUSED)
def test_configuration_that_would_be_computed_wrongly(model, name):
    config = copy.deepcopy(model.config)
    setattr(config, name, REFUSED[name])
    words = f"{name} {REFUSED[name]} here"
    check(NotImplementedError, words, bert_fast.BertModel, config)
    changed = copy.deepcopy(model)
    setattr(changed.config, name, REFUSED[name])
    check(NotImplementedError, words, changed, ids())


@pytest.mark.parametrize("given", [{}, None, "bert-base-uncased", transformers.BertConfig()])
def test_configuration_of_another_class(given):
    kind = type(given).__name__
    check(TypeError, f"config bert_fast.BertConfig {kind}", bert_fast.BertModel, given)
