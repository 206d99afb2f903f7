"""PEFT and quantised projections in accelerated models: called as they are, on packed rows."""

import copy
import warnings

import peft
import pytest
import torch
from against_transformers import largest, outside
from hf_cases import LAYERS, at_real_tokens, check, form, labels, measured, packed, plain
from torch import nn

import bert_fast

NAMES = (
    "BertForSequenceClassification",
    "RobertaForTokenClassification",
    "XLMRobertaForMaskedLM",
    "DistilBertForSequenceClassification",
    "ElectraForQuestionAnswering",
)
CONFIGS = {
    "default targets": {},
    "dropout": {"lora_dropout": 0.0, "use_rslora": True},
    "all linear": {"target_modules": "all-linear"},
    "dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "one layer": {"layers_to_transform": [1]},
}
with_config = pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
every_name = pytest.mark.parametrize("name", NAMES)


@torch.no_grad()
def fill(adapted):
    """Adapter weights that are not zero."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return adapted


def adapted(name, options=None, first="peft"):
    """A model with an adapter, accelerated after it got one, or before."""
    options = dict(options or {})
    if name.startswith("DistilBert"):  # PEFT knows no targets of it
        options.setdefault("target_modules", ["q_lin", "v_lin"])
    model = plain(name)
    if first == "accelerate":
        bert_fast.accelerate(model, strict=True)
    torch.manual_seed(7)
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, **options)).eval()
    if first == "peft":
        bert_fast.accelerate(made, strict=True)
    return fill(made)


def step(model, inputs, real):
    with packed() as rows:
        return measured(model, inputs, real), rows


@pytest.mark.parametrize("first", ["peft", "accelerate"])
@with_config
@every_name
def test_adapters(name, options, first):
    """Adapters alone get gradients, and they are the original's, in either order of wrapping."""
    model = adapted(name, options, first)
    inputs, real = form(name, model, padding="none" if "Question" in name else "right")
    inputs |= labels(name, model, real)
    found, rows = step(model, inputs, real)
    assert rows == [int(real.sum())] * LAYERS
    bert_fast.restore(model)
    expected, none = step(model, inputs, real)
    assert not none and [*found] == [*expected]
    trained = [key for key in found if key.startswith("grad ")]
    assert trained and all("lora" in key or "bias" in options for key in trained)
    assert {f"grad {k}" for k, p in model.named_parameters() if p.requires_grad} == {*trained}
    assert outside(found, expected) == {}
    assert max(largest(found[key]) for key in trained) > 1e-4


@pytest.mark.parametrize("first", ["peft", "accelerate"])
@every_name
def test_merging(name, first):
    """The merged model is transformers' class, accelerated still, with the adapter's outputs."""
    model = adapted(name, first=first)
    inputs, real = form(name, model)
    expected = at_real_tokens(model(**inputs), real)
    with model.disable_adapter():
        without = at_real_tokens(model(**inputs), real)
    assert outside(without, expected) != {}
    merged = model.merge_and_unload()
    assert type(merged).__name__ == name
    with packed() as rows:
        found = at_real_tokens(merged(**inputs), real)
    assert len(rows) == LAYERS and outside(found, expected) == {}
    bert_fast.restore(merged)
    assert outside(at_real_tokens(merged(**inputs), real), expected) == {}


@every_name
def test_files_of_adapters(name, tmp_path):
    """Saved while accelerated, it opens on an original, and on an accelerated one to the bit."""
    model = adapted(name)
    inputs, real = form(name, model)
    with packed() as rows:
        expected = at_real_tokens(model(**inputs), real)
    assert len(rows) == LAYERS
    model.save_pretrained(tmp_path)
    opened = peft.PeftModel.from_pretrained(plain(name), tmp_path)
    with packed() as rows:
        assert outside(at_real_tokens(opened(**inputs), real), expected) == {} and not rows
        again = peft.PeftModel.from_pretrained(bert_fast.accelerate(plain(name)), tmp_path)
        found = at_real_tokens(again(**inputs), real)
    assert len(rows) == LAYERS and all(torch.equal(found[key], expected[key]) for key in expected)


def test_several_adapters():
    """Switching switches what runs, with gradients and without."""
    model = adapted(NAMES[0])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["key", "output.dense"]))
    fill(model)
    inputs, _ = form(NAMES[0], model)
    for context in (torch.no_grad, torch.enable_grad):
        found = []
        with context():
            for name in ("default", "other", "default"):
                model.set_adapter(name)
                with packed() as rows:
                    found.append(model(**inputs).logits)
                assert len(rows) == LAYERS
        assert torch.equal(found[0], found[2]) and largest(found[0] - found[1]) > 1e-3


def test_an_adapter_for_each_row():
    """`adapter_names` goes by rows of the batch, which packed rows are not."""
    model = adapted(NAMES[0])
    model.add_adapter("other", peft.LoraConfig(r=2))
    fill(model)
    inputs, _ = form(NAMES[0], model)
    names = ["default", "other", "__base__", "default"]
    original = bert_fast.restore(copy.deepcopy(model))
    expected = original(**inputs, adapter_names=names).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bert_fast.accelerate(bert_fast.restore(model))
        found = model(**inputs, adapter_names=names).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["prompt", "p-tuning", "ia3"])
def test_other_methods(kind):
    """What PEFT puts in front of the embeddings is packed too."""
    model = plain(NAMES[0])
    task = {"task_type": "SEQ_CLS"}
    config = {
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **task),
        "p-tuning": lambda: peft.PromptEncoderConfig(
            num_virtual_tokens=3, encoder_hidden_size=8, **task
        ),
        "ia3": lambda: peft.IA3Config(**task),
    }[kind]()
    torch.manual_seed(7)
    tuned = peft.get_peft_model(model, config).eval()
    inputs, real = form(NAMES[0], model)
    inputs |= labels(NAMES[0], model, real)
    if kind != "ia3":
        inputs.pop("token_type_ids")
    expected, none = step(tuned, inputs, real)
    bert_fast.accelerate(tuned, strict=True)
    found, rows = step(tuned, inputs, real)
    more = 0 if kind == "ia3" else 3 * len(real)
    assert not none and rows == [int(real.sum()) + more] * LAYERS
    assert [*found] == [*expected] and outside(found, expected) == {}


class Int8(nn.Module):
    """A projection with weights of 8 bits, in somebody else's class."""

    def __init__(self, dense):
        super().__init__()
        scale = dense.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (dense.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = dense.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


@pytest.mark.parametrize("targets", [("query", "value"), ("dense",), ("q_lin", "v_lin", "lin1")])
def test_quantised_projections(targets):
    name = "DistilBertForSequenceClassification" if "lin1" in targets else NAMES[0]
    model = plain(name)
    for module in [*model.modules()]:
        for child, leaf in [*module.named_children()]:
            if child in targets:
                setattr(module, child, Int8(leaf))
    inputs, real = form(name, model)
    check(model, inputs, real)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_quantisation():
    """PyTorch's own, of every linear layer."""
    model = plain(NAMES[0])
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    inputs, real = form(NAMES[0], small)
    with torch.no_grad():
        expected = small(**inputs, output_hidden_states=True)
        bert_fast.accelerate(small, strict=True)
        with packed() as rows:
            found = small(**inputs, output_hidden_states=True)
    assert rows == [int(real.sum())] * LAYERS
    # one scale is drawn from all rows, padding included or not: equal to a step of 8 bits
    for one, two in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert largest((one - two)[real]) < 0.1
