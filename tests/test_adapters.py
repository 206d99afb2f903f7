"""PEFT wraps our models as transformers': same names, same outputs, same gradients."""

import copy
import warnings

import peft
import pytest
import torch
import transformers
from against_transformers import batch, outside, pair
from toy_text import VOCABULARY, examples, tokenizer

NAME = "BertForSequenceClassification"
CONFIGS = {
    "default targets": {},
    "task": {"task_type": "SEQ_CLS"},
    "head beside it": {"modules_to_save": ["classifier"]},
    "query and value": {"target_modules": ["query", "value"]},
    "all linear": {"target_modules": "all-linear"},
    "dense": {"target_modules": ["dense", "key"], "lora_alpha": 32, "rank_pattern": {"key": 5}},
    "embeddings": {"target_modules": ["word_embeddings", "query"]},
    "one layer": {"target_modules": ["query"], "layers_to_transform": [1]},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "bias": "lora_only"},
}
with_config = pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)


@torch.no_grad()
def fill(adapted):
    """Adapter weights that are not zero, the same for each model."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora" in name or "modules_to_save" in name:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def adapted(options, name=NAME, **fields):
    """transformers' model and ours, each under an adapter of its own with equal weights."""
    theirs, ours = pair(name, **{"num_labels": 3} | fields)
    made = []
    for model in (theirs, ours):
        torch.manual_seed(7)
        made.append(peft.get_peft_model(model, peft.LoraConfig(r=4, **options)).eval())
        fill(made[-1])
    return made


def labelled(config):
    inputs, real = batch(config)
    return inputs | {"labels": torch.tensor([0, 2, 1])}, real


def step(model, inputs):
    """Loss, logits, and the gradient of each parameter that has one."""
    model.zero_grad(set_to_none=True)
    out = model(**inputs)
    out.loss.backward()
    found = {"loss": out.loss.detach(), "logits": out.logits.detach()}
    return found | {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


@with_config
@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers:UserWarning")
def test_outputs_and_gradients(options):
    """The adapter's parameters have the same names; each has transformers' gradient."""
    theirs, ours = adapted(options)
    trainable = [
        [key for key, p in model.named_parameters() if p.requires_grad] for model in (theirs, ours)
    ]
    assert trainable[0] == trainable[1] and trainable[0]
    inputs, _ = labelled(ours.config)
    expected, found = step(theirs, inputs), step(ours, inputs)
    assert set(found) == set(expected) == {"loss", "logits", *trainable[0]}
    assert outside(found, expected) == {}
    without = ours.get_base_model()
    with ours.disable_adapter():
        assert not torch.allclose(without(**inputs).logits, found["logits"], atol=1e-3)


@with_config
def test_merging(options):
    """The merged model is the adapted one, without a module of PEFT's in it."""
    _, ours = adapted(options)
    inputs, _ = labelled(ours.config)
    before = ours(**inputs).logits.detach()
    merged = ours.merge_and_unload()
    assert type(merged).__name__ == NAME
    assert not [key for key, _ in merged.named_modules() if "lora" in key]
    torch.testing.assert_close(merged(**inputs).logits, before, rtol=1e-5, atol=1e-5)


@with_config
def test_files(options, tmp_path):
    """An adapter saved from our model opens on ours, to the bit, and on transformers'."""
    theirs, ours = (model for model in pair(NAME, num_labels=3))
    bare = copy.deepcopy(ours)
    trained = peft.get_peft_model(ours, peft.LoraConfig(r=4, **options)).eval()
    fill(trained)
    trained.save_pretrained(tmp_path)
    inputs, _ = labelled(bare.config)
    expected = trained(**inputs).logits
    assert torch.equal(peft.PeftModel.from_pretrained(bare, tmp_path)(**inputs).logits, expected)
    opened = peft.PeftModel.from_pretrained(theirs, tmp_path)
    torch.testing.assert_close(opened(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


def test_several_adapters():
    """Switching between adapters switches what runs, with and without gradients."""
    _, ours = adapted({})
    ours.add_adapter("other", peft.LoraConfig(r=2, target_modules=["key", "value"]))
    fill(ours)
    inputs, _ = labelled(ours.config)
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            found = []
            for name in ("default", "other", "default"):
                ours.set_adapter(name)
                found.append(ours(**inputs).logits)
        assert torch.equal(found[0], found[2])
        assert not torch.allclose(found[0], found[1], atol=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    """Layers that are computed again, under an adapter with dropout: the same gradients."""
    rates = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    _, ours = adapted({"lora_dropout": 0.3}, **rates)
    ours.train()
    inputs, _ = labelled(ours.config)
    torch.manual_seed(5)
    plain = step(ours, inputs)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    torch.manual_seed(5)
    recomputed = step(ours, inputs)
    assert set(recomputed) == set(plain)
    for name, value in plain.items():
        assert torch.equal(recomputed[name], value), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapter_in_another_precision(dtype):
    """Weights in 16 bits under an adapter in 32, which PEFT makes for training."""
    theirs, ours = pair(NAME, dtype, num_labels=3)
    made = []
    for model in (theirs, ours):
        torch.manual_seed(7)
        made.append(peft.get_peft_model(model, peft.LoraConfig(r=4)))
        fill(made[-1])
    theirs, ours = made
    dtypes = [{k: p.dtype for k, p in model.named_parameters()} for model in made]
    assert dtypes[0] == dtypes[1] and set(dtypes[0].values()) == {dtype, torch.float32}
    inputs, _ = labelled(ours.config)
    expected, found = step(theirs, inputs), step(ours, inputs)
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in expected.items()}
    allowed = 30 * torch.finfo(dtype).eps
    for name, value in expected.items():
        scale = max(1.0, value.abs().max().item())
        assert (found[name] - value).abs().max().item() < allowed * scale, name


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForTokenClassification"])
def test_heads_of_tokens(name):
    """The loss on labelled rows alone sees the adapter too, one on the decoder included."""
    theirs, ours = adapted({"target_modules": ["query", "decoder", "classifier"]}, name)
    inputs, real = batch(ours.config)
    inputs["labels"] = torch.where(real, inputs["input_ids"] % 3, -100)
    expected, found = step(theirs, inputs), step(ours, inputs)
    for answer in (expected, found):
        answer["logits"] = answer["logits"][real]
    assert outside(found, expected) == {}
    ours.train()
    ours.zero_grad()
    ours(**inputs).loss.backward()
    trained = {k: p.grad for k, p in ours.named_parameters() if p.grad is not None}
    assert outside(trained, {k: v for k, v in expected.items() if k in trained}) == {}
    assert len(trained) == len(expected) - 2


def test_trainer(tmp_path):
    """The Trainer trains an adapter, saves it alone, and takes up its checkpoint."""
    ends = []
    for resumed in (False, True):
        torch.manual_seed(0)
        _, ours = adapted({}, vocab_size=len(VOCABULARY), num_labels=2)
        frozen = copy.deepcopy(ours.get_base_model().bert.embeddings.state_dict())
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=20,
            save_steps=10,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        run = transformers.Trainer(
            model=ours,
            args=args,
            train_dataset=examples("sequence", 64),
            data_collator=transformers.DataCollatorWithPadding(tokenizer()),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10") if resumed else None)
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        assert sum(losses[-5:]) < sum(losses[:5])
        for name, value in ours.get_base_model().bert.embeddings.state_dict().items():
            assert torch.equal(value, frozen[name]), name
        ends.append({k: p.detach() for k, p in ours.named_parameters() if p.requires_grad})
    saved = {path.name for path in (tmp_path / "checkpoint-20").iterdir()}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved
    for name, value in ends[0].items():
        assert torch.equal(ends[1][name], value), name


def test_prompts():
    """Prompt tuning gives embeddings in place of ids, and a mask that is longer."""
    theirs, ours = pair(NAME, num_labels=3)
    made = []
    for model in (theirs, ours):
        torch.manual_seed(7)
        config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
        made.append(peft.get_peft_model(model, config).eval())
    inputs, _ = labelled(ours.config)
    del inputs["token_type_ids"]
    expected, found = (step(model, inputs) for model in made)
    assert outside(found, expected) == {}
