"""What surrounds the forward: files, copies, changed weights, resized vocabularies."""

import contextlib
import copy
import json
import pickle

import pytest
import torch
import transformers
from against_transformers import (
    CLASSES,
    batch,
    differences,
    hf_config,
    largest,
    outside,
    pair,
    run,
)
from torch import nn

import bert_fast

WRITTEN_BY_SAVING = {"architectures", "dtype", "transformers_version", "_name_or_path"}


def stored(folder):
    """The inputs and the expected outputs kept beside a checkpoint; which tokens are real."""
    expected = json.loads((folder / "expected_outputs.json").read_text())
    tensors = {key: torch.tensor(value) for key, value in expected.items() if type(value) is list}
    inputs = {key: tensors[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    return inputs, inputs["attention_mask"].bool(), expected, tensors


@pytest.mark.parametrize("extension", ["safetensors", "bin"])
def test_stored_pretraining_checkpoint(shared, tmp_path, extension):
    """Outputs, loss and gradient norms that transformers 4.57 wrote down."""
    source = shared / "data/ckpt/hf_tiny_generated"
    kept = "model.safetensors" if extension == "safetensors" else "pytorch_model.bin"
    for name in ("config.json", kept):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    model = bert_fast.BertForPreTraining.from_pretrained(tmp_path)
    assert not model.training
    inputs, real, expected, tensors = stored(source)
    out = model(
        **inputs,
        labels=tensors["labels"],
        next_sentence_label=tensors["next_sentence_label"],
        output_hidden_states=True,
    )
    found = {
        "sequence_output": out.hidden_states[-1][real],
        "mlm_logits": out.prediction_logits[real],
        "pooled_output": model.bert(**inputs).pooler_output,
        "nsp_logits": out.seq_relationship_logits,
    }
    for key in ("sequence_output", "mlm_logits"):
        tensors[key] = tensors[key][real]
    assert outside(found, {key: tensors[key] for key in found}) == {}
    assert out.loss.item() == pytest.approx(expected["pretraining_loss"], abs=1e-5)
    out.loss.backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert norms == pytest.approx(expected["grad_norms"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("", "BertModel"),
        ("qa", "BertForQuestionAnswering"),
        ("seqcls", "BertForSequenceClassification"),
        ("tokcls", "BertForTokenClassification"),
    ],
)
def test_stored_checkpoint(shared, folder, name):
    source = shared / "data/ckpt/hf_tiny_generated" / folder
    inputs, real, _, tensors = stored(source)
    unused_heads = contextlib.nullcontext() if folder else pytest.warns(UserWarning, match="cls")
    with unused_heads:
        model = getattr(bert_fast, name).from_pretrained(source)
    with torch.no_grad():
        out = model(**inputs)
    names = {"last_hidden_state": "sequence_output", "pooler_output": "pooled_output"}
    for key, value in out.items():
        expected = tensors[names.get(key, key)]
        if expected.shape[:2] == real.shape:
            value, expected = value[real], expected[real]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_round_trip(name, tmp_path):
    """Ours -> files -> transformers -> files -> ours: every tensor and output equal to the bit."""
    _, ours = pair(name, num_labels=2 if name == "BertForQuestionAnswering" else 3)
    ours.save_pretrained(tmp_path / "ours")
    theirs, info = getattr(transformers, name).from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    theirs.save_pretrained(tmp_path / "theirs")
    back = getattr(bert_fast, name).from_pretrained(tmp_path / "theirs", strict=True)
    states = [model.state_dict() for model in (ours, theirs, back)]
    assert list(states[0]) == list(states[1]) == list(states[2])
    for key in states[0]:
        assert torch.equal(states[0][key], states[1][key]), key
        assert torch.equal(states[0][key], states[2][key]), key
    configs = [vars(model.config) for model in (ours, back)]
    for key in hf_config().to_dict().keys() & configs[0].keys() - WRITTEN_BY_SAVING:
        assert configs[0][key] == configs[1][key], key
    inputs, _ = batch(theirs.config)
    if name == "BertForMultipleChoice":
        inputs = {key: value[None] for key, value in inputs.items()}
    with torch.no_grad():
        for one, two in zip(ours(**inputs).to_tuple(), back(**inputs).to_tuple(), strict=True):
            assert torch.equal(one, two)


def test_auto_model_opens_our_files(tmp_path):
    _, ours = pair("BertForPreTraining")
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(theirs) is transformers.BertModel
    inputs, real = batch(theirs.config)
    assert differences(theirs.eval(), ours.bert, inputs, real) == {}


def shifted(parameter):
    return parameter.detach() + 0.1 * torch.randn_like(parameter)


def add_in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def add_to_data(model):
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))


def assign_data(model):
    for parameter in model.parameters():
        parameter.data = shifted(parameter)


def assign_parameters(model):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(shifted(module.weight))
            module.bias = nn.Parameter(shifted(module.bias))


def assign_modules(model):
    for layer in model.encoder.layer:
        for name in ("query", "key", "value"):
            old = getattr(layer.attention.self, name)
            setattr(layer.attention.self, name, nn.Linear(old.in_features, old.out_features))


def load(model):
    model.load_state_dict({key: shifted(value) for key, value in model.state_dict().items()})


def load_assigning(model):
    state = {key: shifted(value) for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def load_part(model):
    part = model.encoder.layer[0].attention.self.key
    part.load_state_dict({key: shifted(value) for key, value in part.state_dict().items()})


def from_vector(model):
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(shifted(vector), model.parameters())


def optimizer_step(optimizer, **options):
    def step(model):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer(model.parameters(), lr=0.1, **options).step()

    step.__name__ = "_".join([optimizer.__name__, *options])
    return step


CHANGES = [
    add_in_place,
    add_to_data,
    assign_data,
    assign_parameters,
    assign_modules,
    load,
    load_assigning,
    load_part,
    from_vector,
    optimizer_step(torch.optim.SGD),
    optimizer_step(torch.optim.AdamW, foreach=True),
    optimizer_step(torch.optim.AdamW, fused=True),
]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights_are_used(change, context):
    """What a forward without gradients keeps of the weights never outlives them."""
    _, model = pair()
    inputs, _ = batch(model.config)

    def outputs(model):
        with context():
            return model(**inputs).last_hidden_state

    before = [outputs(model) for _ in range(2)][1]
    change(model)
    after = outputs(model)
    fresh = bert_fast.BertModel(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(after, outputs(fresh))
    assert largest(after - before) > 1e-2


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_after_a_forward_without(context):
    theirs, ours = pair()
    inputs, real = batch(theirs.config)
    with context():
        ours(**inputs)
        ours(**inputs)
    assert differences(theirs, ours, inputs, real) == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_cast(dtype):
    """A model cast after use is one loaded in that dtype; `.dtype` and `.device` say so."""
    _, model = pair()
    inputs, _ = batch(model.config)
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
        model.half() if dtype == torch.float16 else model.to(dtype)
        fresh = bert_fast.BertModel(model.config).to(dtype).eval()
        fresh.load_state_dict(model.state_dict())
        after = model(**inputs).last_hidden_state
        assert torch.equal(after, fresh(**inputs).last_hidden_state)
    assert after.dtype == model.dtype == dtype
    assert model.device == torch.device("cpu")
    allowed = 64 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(after.float(), before, rtol=0, atol=allowed)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("name", ["BertModel", "BertForPreTraining"])
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deep", "pickle"],
)
def test_copies(copied, name, used):
    """A copy computes the same, keeps its ties, and shares no weight with the original."""
    theirs, ours = pair(name)
    inputs, real = batch(theirs.config)
    with torch.no_grad():
        if used:
            ours(**inputs)
        twin = copied(ours)
        assert [key for key, _ in twin.named_parameters()] == [
            key for key, _ in ours.named_parameters()
        ]
        expected = twin(**inputs).to_tuple()
        for parameter in ours.parameters():
            parameter.zero_()
        for one, two in zip(twin(**inputs).to_tuple(), expected, strict=True):
            assert torch.equal(one, two)
    assert differences(theirs, twin, inputs, real) == {}


def saved_bytes(model, inputs):
    """The bytes autograd keeps for the backward of one forward."""
    kept = []

    def keep(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs)
    return sum(kept)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_gradient_checkpointing(reentrant, dropout):
    """The same outputs and gradients to the bit, dropout included, with less kept."""
    _, model = pair(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    model.train()
    inputs, real = batch(model.config)

    def step():
        torch.manual_seed(5)
        return run(model, inputs, real), saved_bytes(model, inputs)

    plain, plain_bytes = step()
    arguments = (
        {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    )
    model.gradient_checkpointing_enable(**arguments)
    assert model.is_gradient_checkpointing
    recomputed, recomputed_bytes = step()
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    for key, value in step()[0].items():
        assert torch.equal(recomputed[key], plain[key]), key
        assert torch.equal(value, plain[key]), key
    assert recomputed_bytes < plain_bytes / 2


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
@pytest.mark.parametrize(("size", "multiple"), [(130, None), (60, None), (101, 64), (None, 8)])
def test_resize_token_embeddings(name, size, multiple):
    """Old rows stay, shapes and ties are transformers', and the resized model runs."""
    theirs, ours = pair(name)
    theirs.resize_token_embeddings(size, pad_to_multiple_of=multiple)
    embedding = ours.resize_token_embeddings(size, pad_to_multiple_of=multiple)
    assert embedding is ours.get_input_embeddings()
    assert ours.config.vocab_size == theirs.config.vocab_size == embedding.num_embeddings
    state, old = ours.state_dict(), theirs.state_dict()
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in old.items()
    }
    rows = min(101, ours.config.vocab_size)
    for key, value in old.items():
        assert torch.equal(state[key][:rows], value[:rows]), key
    theirs.load_state_dict(state)
    inputs, real = batch(ours.config)
    assert differences(theirs, ours, inputs, real) == {}


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining"])
def test_ties(name):
    """Decoder and embeddings are one tensor, stay one, and are tied again on request."""
    theirs, ours = pair(name)
    decoder = ours.get_output_embeddings()
    assert decoder is ours.cls.predictions.decoder
    assert decoder.weight is ours.get_input_embeddings().weight
    assert decoder.bias is ours.cls.predictions.bias
    fresh = nn.Embedding(101, 32, padding_idx=0)
    ours.set_input_embeddings(fresh)
    theirs.set_input_embeddings(copy.deepcopy(fresh))
    assert ours.get_input_embeddings() is fresh
    for model in (ours, theirs):
        model.tie_weights()
    assert ours.get_output_embeddings().weight is fresh.weight
    inputs, real = batch(theirs.config)
    assert differences(theirs, ours, inputs, real) == {}


def test_untied(tmp_path):
    """With `tie_word_embeddings=False` the decoder keeps weights of its own, in files too."""
    theirs, ours = pair("BertForMaskedLM", tie_word_embeddings=False)
    decoder, embedding = ours.get_output_embeddings(), ours.get_input_embeddings()
    assert decoder.weight is not embedding.weight
    inputs, real = batch(theirs.config)
    assert differences(theirs, ours, inputs, real) == {}
    ours.save_pretrained(tmp_path)
    back = bert_fast.BertForMaskedLM.from_pretrained(tmp_path)
    assert differences(theirs, back, inputs, real) == {}


def test_input_gradients_survive_a_copy():
    """What PEFT asks for under reentrant checkpointing stays on in copies and pickles."""
    _, ours = pair()
    ours.requires_grad_(False)
    ours.enable_input_require_grads()
    inputs, _ = batch(ours.config)
    for model in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert model(**inputs).last_hidden_state.requires_grad
    ours.disable_input_require_grads()
    assert not ours(**inputs).last_hidden_state.requires_grad
