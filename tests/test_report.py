"""`report` says what serves each op, and what of a model is not run as the rest is."""

import copy

import peft
import pytest
import torch
import transformers
from against_transformers import CLASSES, batch, hf_config, largest, pair
from torch import nn

import bert_fast
from bert_fast import ops

QUERY = "encoder.layer.1.attention.self.query"


class Halved(nn.Linear):
    """A linear layer of somebody else's, with arithmetic of its own."""

    def forward(self, x):
        return 0.5 * super().forward(x)


class HalvedEmbedding(nn.Embedding):
    def forward(self, ids):
        return 0.5 * super().forward(ids)


class HalvedNorm(nn.LayerNorm):
    def forward(self, x):
        return 0.5 * super().forward(x)


def called(model):
    """What is not read by an op, with the reason."""
    found = bert_fast.report(model).modules
    return [f"{entry.name}: {entry.reason}" for entry in found if entry.runs == "as it is"]


def test_of_this_machine():
    """Without a model: the device a model would be put on, no notes."""
    found = bert_fast.report()
    assert found.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found.notes == () and found.modules == ()


@pytest.mark.parametrize("name", CLASSES)
def test_of_a_model(name):
    """Every op once, each with a name that is known and a reason if something faster is not."""
    found = bert_fast.report(pair(name)[1])
    assert found.device == "cpu" and found.notes == ()
    assert all(entry.runs in ops.implementations() for entry in found.modules), found.modules
    assert [entry.op for entry in found.ops] == sorted(ops.implementations())
    assert {"embed", "attention", "add_layer_norm", "linear_gelu", "linear", "unpad"} <= {
        entry.op for entry in found.ops
    }
    for entry in found.ops:
        assert entry == (type(entry))(entry.op, *ops.implementations()[entry.op]["cpu"])
        assert entry.implementation in ("csrc", "pytorch", "reference")
        fastest = entry.implementation == "csrc" or entry.op in ("linear", "linear_bwd")
        assert fastest == (entry.reason == ""), entry


def test_text():
    """Printed, it is a line for each op and each note, every line with its facts."""
    model = pair()[1]
    model.gradient_checkpointing_enable()
    found = bert_fast.report(model)
    first, *lines = str(found).splitlines()
    assert found.device in first
    assert len(lines) == len(found.ops) + len(found.modules) + len(found.notes)
    for entry, line in zip(found.ops, lines, strict=False):
        assert entry.op in line and entry.implementation in line and entry.reason in line
    lines = lines[len(found.ops) :]
    for entry, line in zip(found.modules, lines, strict=False):
        assert entry.name in line and entry.runs in line
    for note, line in zip(found.notes, lines[len(found.modules) :], strict=True):
        assert note in line


def test_meta_device():
    """No op runs on a device that is neither the CPU nor CUDA, and the report says so."""
    found = bert_fast.report(pair()[1].to("meta"))
    assert found.device == "meta"
    assert any("meta" in note for note in found.notes)
    assert "meta" in str(found)


@pytest.mark.parametrize(
    "model",
    [nn.Linear(2, 2), nn.ReLU(), transformers.BertModel(hf_config())],
    ids=lambda model: type(model).__name__,
)
def test_foreign_model(model):
    """Nothing of it is accelerated, and the report does not pretend."""
    (note,) = bert_fast.report(model).notes
    assert type(model).__name__ in note and "nothing" in note


def test_inside_a_larger_model():
    """A model found in another is reported like one that stands alone."""
    model = pair()[1]
    wrapped = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"text": model}))
    assert called(wrapped) == ["0: it is no part of an encoder"]
    model.get_submodule("encoder.layer.1.attention.self").query = Halved(32, 32)
    (_, note) = called(wrapped)
    assert f"1.text.{QUERY}" in note


def test_gradient_checkpointing():
    model = pair("BertForMaskedLM")[1]
    assert bert_fast.report(model).notes == ()
    model.gradient_checkpointing_enable()
    (note,) = bert_fast.report(model).notes
    assert "gradient checkpointing" in note
    model.gradient_checkpointing_disable()
    assert bert_fast.report(model).notes == ()


# --- modules that are called as they are ---------------------------------------------------------

REPLACED = {
    "embeddings.word_embeddings": HalvedEmbedding,
    "embeddings.position_embeddings": HalvedEmbedding,
    "embeddings.token_type_embeddings": HalvedEmbedding,
    "embeddings.LayerNorm": HalvedNorm,
    "encoder.layer.0.attention.self.query": Halved,
    "encoder.layer.1.attention.self.key": Halved,
    "encoder.layer.0.attention.self.value": Halved,
    "encoder.layer.0.attention.output.dense": Halved,
    "encoder.layer.1.attention.output.LayerNorm": HalvedNorm,
    "encoder.layer.0.intermediate.dense": Halved,
    "encoder.layer.1.output.dense": Halved,
    "encoder.layer.0.output.LayerNorm": HalvedNorm,
    "pooler.dense": Halved,
}
HEADS = {
    "BertForPreTraining": (
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.decoder",
        "cls.seq_relationship",
    ),
    "BertForSequenceClassification": ("classifier",),
    "BertForQuestionAnswering": ("qa_outputs",),
}
PLACES = [("BertModel", place) for place in REPLACED]
PLACES += [(name, place) for name, places in HEADS.items() for place in places]


def loss_and_gradient(model, name):
    """Of a forward in training: what is seen of a module if it is really called."""
    inputs, _ = batch(model.config, B=4, padding="none")
    if name == "BertForPreTraining":
        inputs["labels"] = inputs["input_ids"]
        inputs["next_sentence_label"] = torch.arange(4) % 2
    elif name == "BertForSequenceClassification":
        inputs["labels"] = torch.arange(4) % 2
    elif name == "BertForQuestionAnswering":
        inputs["start_positions"] = inputs["end_positions"] = torch.zeros(4, dtype=torch.int64)
    out = model(**inputs)
    loss = out.loss if "loss" in out else out[0].square().mean() + out[1].square().mean()
    model.zero_grad()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize(("name", "place"), PLACES, ids=lambda value: value)
def test_replaced_module(name, place):
    """A module of another class is called, as in transformers, and the report names it."""
    theirs, ours = (model.train() for model in pair(name, torch.float64, num_labels=2))
    torch.manual_seed(1)
    before = loss_and_gradient(ours, name)
    for model in (theirs, ours):
        module = model.get_submodule(place)
        subclass = REPLACED.get(place) or (HalvedNorm if "Norm" in place else Halved)
        module.__class__ = subclass
    torch.manual_seed(1)
    after = loss_and_gradient(ours, name)
    torch.manual_seed(1)
    expected = loss_and_gradient(theirs, name)
    assert largest(after - before) > 1e-4
    torch.testing.assert_close(after, expected, rtol=1e-10, atol=1e-10)
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10, msg=key)
    (note,) = called(ours)
    assert place in note and type(ours.get_submodule(place)).__name__ in note


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize(("name", "place"), PLACES, ids=lambda value: value)
def test_hook(name, place, kind):
    """Hooks fire once a step, change no bit of the result, and are reported while there."""
    ours = pair(name, num_labels=2)[1].train()
    torch.manual_seed(1)
    expected = loss_and_gradient(ours, name)
    fired = []
    register = getattr(ours.get_submodule(place), f"register_{kind}_hook")
    handle = register(lambda *arguments: fired.append(len(arguments)) and None)
    torch.manual_seed(1)
    found = loss_and_gradient(ours, name)
    assert len(fired) == 1
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    (note,) = called(ours)
    assert place in note and "hook" in note
    handle.remove()
    assert called(ours) == []


@pytest.mark.parametrize(("name", "place"), PLACES, ids=lambda value: value)
def test_forward_of_the_instance(name, place):
    """accelerate's offloading, and whoever patches one module, sets `forward` on the instance."""
    ours = pair(name, num_labels=2)[1].train()
    module = ours.get_submodule(place)
    plain, times = module.forward, []

    def forward(*arguments):
        times.append(len(arguments))
        return plain(*arguments)

    module.forward = forward
    loss_and_gradient(ours, name)
    assert times == [1]
    (note,) = called(ours)
    assert place in note


def test_hook_changes_the_result():
    """What a hook returns is used."""
    theirs, ours = pair()
    inputs, real = batch(ours.config)
    for model in (theirs, ours):
        model.get_submodule(QUERY).register_forward_hook(lambda *arguments: 2 * arguments[-1])
    expected, found = (model(**inputs).last_hidden_state[real] for model in (theirs, ours))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_adapters():
    """LoRA's modules are called, and read again when they are merged."""
    model = pair("BertForSequenceClassification")[1]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2))
    query, value = called(adapted)
    for note, name in ((query, "query"), (value, "value")):
        assert f"layer.0-1.attention.self.{name}" in note and "lora" in note
    saved = copy.deepcopy(adapted)
    assert called(adapted.merge_and_unload()) == []
    assert called(saved.unload()) == []


@pytest.mark.parametrize(
    "place", ["embeddings.dropout", "encoder.layer.0.output.dropout", "pooler.activation"]
)
def test_hook_on_a_module_without_weights(place):
    """Dropout and the pooler's tanh are modules in transformers too: a hook there fires."""
    model = pair(hidden_dropout_prob=0.2)[1].train()
    fired = []
    model.get_submodule(place).register_forward_hook(lambda *arguments: fired.append(1))
    loss_and_gradient(model, "BertModel")
    assert fired == [1]


@pytest.mark.parametrize(
    "place",
    [
        "embeddings.dropout",
        "encoder.layer.0.attention.output.dropout",
        "encoder.layer.1.output.dropout",
    ],
)
def test_dropout_replaced(place):
    """An Identity in the place of a dropout drops nothing there, and the rest drops as before."""
    model = pair(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)[1].train()
    module = model.get_submodule(place)
    owner, _, name = place.rpartition(".")

    def step():
        torch.manual_seed(1)
        return loss_and_gradient(model, "BertModel")

    with_it = step()
    module.p = 0.0
    without = step()
    setattr(model.get_submodule(owner), name, nn.Identity())
    assert torch.equal(step(), without)
    assert not torch.allclose(with_it, without, rtol=1e-4)
