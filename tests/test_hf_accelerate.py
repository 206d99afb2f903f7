"""A model of transformers, accelerated in place, has its original's outputs and gradients.

Every comparison goes through `hf_cases.check` or counts attentions, so that none of them can hold
because the original code ran.
"""

import copy
import gc
import inspect
import io
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from against_transformers import PADDINGS, above_twice_the_baseline, largest, outside
from hf_cases import BASES, LAYERS, MODELS, at_real_tokens, check, form, labels, measured, packed
from hf_cases import plain, structure
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
    for seed in range(8):
        torch.manual_seed(seed)
        B, L = (2 * (seed + 1), 3 * seed + 1)
        inputs, real = form(name, model, padding=padding, B=B, L=L)
        check(model, inputs | EVERYTHING, real)


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
    assert outside(
        {"": out.last_hidden_state[real]}, {"": expected.last_hidden_state[real]}
    ) == {}
    if "pooler_output" in out:
        assert largest(out.pooler_output[2]) == 0


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


@pytest.mark.xfail(raises=AssertionError, strict=True, reason="known by its name alone")
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


CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize(
    "context",
    [
        "no_grad",
        pytest.param(
            "inference_mode",
            marks=pytest.mark.xfail(
                raises=RuntimeError, strict=True, reason="run reads the version of its output"
            ),
        ),
    ],
)
@every_class
def test_without_gradients(name, context):
    model = plain(name)
    inputs, real = form(name, model)
    with CONTEXTS[context]():
        expected = at_real_tokens(model(**inputs), real)
        bert_fast.accelerate(model, strict=True)
        for _ in range(3):  # what is made of weights is kept from the second time on
            with packed() as rows:
                found = at_real_tokens(model(**inputs), real)
            assert len(rows) == LAYERS and outside(found, expected) == {}


# --- the model stays what it is ------------------------------------------------------------------


@every_class
def test_nothing_is_replaced(name, tmp_path):
    """Parameters, keys, class, configuration, signature, files; and back to the bit."""
    model = plain(name)
    inputs, _ = form(name, model)
    expected = model(**inputs)
    attributes = {key: set(vars(m)) for key, m in model.named_modules()}

    def now():
        return {
            "parameters": [(key, id(p), p.data_ptr()) for key, p in model.named_parameters()],
            "buffers": [(key, id(b)) for key, b in model.named_buffers()],
            "keys": [*model.state_dict()],
            "modules": [(key, id(m), type(m)) for key, m in model.named_modules()],
            "config": model.config.to_dict(),
            "signature": inspect.signature(model.forward),
            "repr": repr(model),
        }

    model.save_pretrained(tmp_path)  # which writes into the configuration
    before = now()
    assert bert_fast.accelerate(model, strict=True) is model and now() == before
    model(**inputs)
    assert now() == before
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    back = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert back.config.to_diff_dict() | UNSAVED == model.config.to_diff_dict() | UNSAVED
    with packed() as rows:
        assert same_bits(back(**inputs), expected) and not rows
    assert bert_fast.restore(model) is model and now() == before
    assert {key: set(vars(m)) for key, m in model.named_modules()} == attributes
    with packed() as rows:
        assert same_bits(model(**inputs), expected) and not rows


def forwards():
    """The forward of every class that may be replaced, by name."""
    found = {}
    for family in ("bert", "roberta", "xlm_roberta", "distilbert", "electra"):
        module = getattr(transformers.models, family)
        module = sys.modules[f"{module.__name__}.modeling_{family}"]
        for name, cls in vars(module).items():
            if isinstance(cls, type) and issubclass(cls, nn.Module):
                found[f"{family}.{name}"] = cls.__dict__.get("forward")
    return found


@pytest.fixture
def _untouched():
    """No model of another test keeps a class' method replaced."""
    gc.collect()


@pytest.mark.usefixtures("_untouched")
@pytest.mark.parametrize("name", [*BASES, "BertForPreTraining", "XLMRobertaForMaskedLM"])
def test_classes_have_their_own_methods_again(name):
    model, twin = plain(name), plain(name)
    before = forwards()
    bert_fast.accelerate(bert_fast.accelerate(model))
    assert forwards() != before
    bert_fast.accelerate(twin)
    bert_fast.restore(model)
    inputs, _ = form(name, model)
    with packed() as rows:
        model(**inputs)
        assert not rows
        twin(**inputs)
        assert len(rows) == LAYERS
    bert_fast.restore(twin)
    assert forwards() == before
    bert_fast.restore(bert_fast.restore(twin))
    assert forwards() == before


def test_twice():
    """The second call changes nothing but `strict`, and one restore undoes both."""
    model = plain("BertForMaskedLM")
    inputs, real = form("BertForMaskedLM", model)
    expected = model(**inputs)
    bert_fast.accelerate(bert_fast.accelerate(model, strict=True), strict=True)
    with packed() as rows:
        model(**inputs)
    assert len(rows) == LAYERS
    bert_fast.restore(model)
    assert same_bits(model(**inputs), expected)


def test_part_of_a_larger_module():
    """Two encoders in one module, one of them used twice."""

    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.towers = nn.ModuleDict({"one": plain(), "two": plain("RobertaModel")})
            self.towers["again"] = self.towers["one"]
            self.score = nn.Linear(32, 1)

        def forward(self, **inputs):
            rows = [tower(**inputs).last_hidden_state[:, 0] for tower in self.towers.values()]
            return {"scores": self.score(sum(rows))}

    torch.manual_seed(1)
    model = Towers()
    inputs, real = form("BertModel", model.towers["one"])
    check(model, inputs, real, layers=3 * LAYERS)


def test_another_model_of_the_class_is_plain():
    one, other = plain(), plain()
    inputs, _ = form("BertModel", one)
    bert_fast.accelerate(one)
    with packed() as rows:
        other(**inputs)
        assert not rows
        one(**inputs)
        assert len(rows) == LAYERS


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["BertForMaskedLM", "DistilBertForMultipleChoice"])
def test_copies(name, how):
    """A copy is accelerated by itself: restoring either leaves the other as it is."""
    model = plain(name)
    inputs, _ = form(name, model)
    bert_fast.accelerate(model, strict=True)
    expected = model(**inputs)
    made = COPIES[how](model)
    assert type(made) is type(model)
    with packed() as rows:
        assert same_bits(made(**inputs), expected) and len(rows) == LAYERS
    if how == "copy":  # shares every module that is in it
        return
    bert_fast.restore(model)
    with packed() as rows:
        model(**inputs)
        assert not rows
        assert same_bits(made(**inputs), expected) and len(rows) == LAYERS
    bert_fast.restore(made)
    with packed() as rows:
        made(**inputs)
        assert not rows


ELSEWHERE = """
import sys
import torch
model, inputs = torch.load("model.pt", weights_only=False)
from bert_fast import functional
rows, original = [], functional.self_attention
def counted(*args, **options):
    rows.append(len(args[3]))
    return original(*args, **options)
functional.self_attention = counted
torch.save((model(**inputs)[0], rows), "found.pt")
"""


def test_pickle_in_a_fresh_process(tmp_path):
    """It keeps working, accelerated, where nobody has called accelerate."""
    model = plain("BertForMaskedLM")
    inputs, real = form("BertForMaskedLM", model)
    bert_fast.accelerate(model, strict=True)
    torch.save((model, inputs), tmp_path / "model.pt")
    run = [sys.executable, "-c", ELSEWHERE]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found, rows = torch.load(tmp_path / "found.pt")
    assert rows == [int(real.sum())] * LAYERS
    torch.testing.assert_close(found, model(**inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["to", "half", "bfloat16", "double"])
@every_base
def test_other_dtypes_while_active(name, how):
    """Weights that change their dtype, with what was kept of them."""
    model = bert_fast.accelerate(plain(name), strict=True)
    inputs, real = form(name, model)
    with torch.no_grad():
        for _ in range(3):
            model(**inputs)
        model.to(torch.float64) if how == "to" else getattr(model, how)()
        with packed() as rows:
            found = model(**inputs).last_hidden_state
        assert len(rows) == LAYERS
        expected = copy.deepcopy(bert_fast.restore(model)).double()(**inputs).last_hidden_state
    assert found.dtype == next(model.parameters()).dtype
    bound = {torch.float64: 1e-10, torch.float16: 2e-2, torch.bfloat16: 2e-1}[found.dtype]
    assert largest(found[real].double() - expected[real]) <= bound


def test_train_and_eval():
    """Dropout follows the mode, as often as it changes."""
    model = plain(hidden_dropout_prob=0.5)
    inputs, real = form("BertModel", model)
    expected = model(**inputs).last_hidden_state[real]
    bert_fast.accelerate(model, strict=True)
    for _ in range(2):
        assert largest(model.train()(**inputs).last_hidden_state[real] - expected) > 0.1
        assert largest(model.eval()(**inputs).last_hidden_state[real] - expected) < 1e-5


def test_report():
    """It does not say that nothing is accelerated."""
    model = plain("BertForMaskedLM")
    assert any("nothing is accelerated" in note for note in bert_fast.report(model).notes)
    bert_fast.accelerate(model)
    assert not any("nothing is accelerated" in note for note in bert_fast.report(model).notes)
    bert_fast.restore(model)
    assert any("nothing is accelerated" in note for note in bert_fast.report(model).notes)
