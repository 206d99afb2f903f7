"""An accelerated model stays what it is: same objects, keys, files; and so do its copies."""

import copy
import inspect
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from against_transformers import largest
from hf_cases import BASES, LAYERS, MODELS, at_real_tokens, check, form, packed, plain
from torch import nn

import bert_fast

UNSAVED = {"_name_or_path": "", "dtype": "", "architectures": []}  # set by loading and saving
every_class = pytest.mark.parametrize("name", MODELS)
every_base = pytest.mark.parametrize("name", BASES)


def same_bits(one, two):
    one, two = (at_real_tokens(out, torch.ones(0, 0)) for out in (one, two))
    return [*one] == [*two] and all(torch.equal(one[key], two[key]) for key in one)


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


METHODS = """
import gc, importlib
import torch
from hf_cases import BASES, LAYERS, form, packed, plain
import bert_fast

def forwards():
    found = {}
    for family in ("bert", "roberta", "xlm_roberta", "distilbert", "electra"):
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        for name, cls in vars(module).items():
            if isinstance(cls, type) and issubclass(cls, torch.nn.Module):
                found[f"{family}.{name}"] = cls.__dict__.get("forward")
    return found

originals = forwards()
for name in (*BASES, "BertForPreTraining", "XLMRobertaForMaskedLM"):
    model, twin = plain(name), plain(name)
    bert_fast.accelerate(bert_fast.accelerate(model))
    assert forwards() != originals, name
    bert_fast.accelerate(twin)
    bert_fast.restore(model)
    inputs, _ = form(name, model)
    with packed() as rows:
        model(**inputs)
        assert not rows, name
        twin(**inputs)
        assert len(rows) == LAYERS, name
    bert_fast.restore(twin)
    assert forwards() == originals, name
    bert_fast.restore(bert_fast.restore(twin))
    bert_fast.restore(bert_fast.accelerate(model))
    assert forwards() == originals, name
    bert_fast.accelerate(twin)  # and is never restored
    del model, twin
    gc.collect()
    bert_fast.restore(bert_fast.accelerate(plain(name)))
    assert forwards() == originals, name
"""


def test_classes_have_their_own_methods_again(tmp_path):
    """When the last of a class' models is restored; in a process where nobody else has some."""
    elsewhere(METHODS, tmp_path)


def elsewhere(code, folder):
    """Run code in a fresh process, with the helpers of the tests."""
    path = [os.environ.get("PYTHONPATH"), str(Path(__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_twice():
    """The second call changes nothing but `strict`, and one restore undoes both."""
    model = plain("BertForMaskedLM")
    inputs, _ = form("BertForMaskedLM", model)
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
    elsewhere(ELSEWHERE, tmp_path)
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
