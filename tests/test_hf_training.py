"""Accelerated models of transformers in training: as their originals, whoever trains them."""

import copy
import gc
import tracemalloc

import hf_distributed_worker as worker
import numpy as np
import pytest
import torch
import transformers
from against_transformers import largest, outside
from distributed_worker import RANKS
from hf_cases import (
    BASES,
    LAYERS,
    check,
    form,
    labels,
    measured,
    packed,
    plain,
    structure,
)
from run_ranks import run_ranks
from torch import nn
from toy_text import VOCABULARY, examples, tokenizer

import bert_fast
from bert_fast.hf import forward
from bert_fast.ops import kept

DROPOUT = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
every_base = pytest.mark.parametrize("name", BASES)


# --- dropout -------------------------------------------------------------------------------------


@every_base
def test_dropout_rates(name):
    """Of the embeddings and of the probabilities 0.3 are dropped, others each time."""
    model = plain(name, **DROPOUT)
    inputs, real = form(name, model, B=8, L=20)
    asked = {"output_hidden_states": True, "output_attentions": True}
    kept_all = model(**inputs, **asked)
    bert_fast.accelerate(model.train(), strict=True)
    with packed() as rows:
        one, two = (model(**inputs, **asked) for _ in range(2))
    assert rows == [int(real.sum())] * 2 * LAYERS
    pair = real[:, None, :, None] & real[:, None, None, :]
    for key, where in (("hidden_states", real), ("attentions", pair.expand(-1, 4, -1, -1))):
        found, other, full = (getattr(out, key)[0][where] for out in (one, two, kept_all))
        if key == "hidden_states" and name == "ElectraModel":
            continue  # they are projected after the dropout
        dropped = found == 0
        share = 0.3 + torch.tensor([-5, 5]) * (0.21 / dropped.numel()) ** 0.5
        assert share[0] < dropped.double().mean() < share[1]
        assert 0.3 < (dropped != (other == 0)).double().mean() < 0.54  # 2 * 0.3 * 0.7
        if key == "attentions":
            second = one.attentions[1][where] == 0
            assert 0.3 < (dropped != second).double().mean() < 0.54  # each layer has its own
        if key == "hidden_states":
            torch.testing.assert_close(found[~dropped] * 0.7, full[~dropped], rtol=1e-4, atol=1e-5)


@every_base
def test_distribution_under_dropout(name):
    """Mean and deviation of each output over many masks are the original's."""
    model = plain(name, num_hidden_layers=1, **DROPOUT).train()
    inputs, _ = form(name, model, B=1, L=5, padding="none")
    many = {key: value.expand(4000, -1) for key, value in inputs.items()}
    with torch.no_grad():
        expected = model(**many).last_hidden_state
        bert_fast.accelerate(model, strict=True)
        with packed() as rows:
            found = model(**many).last_hidden_state
    assert rows == [20000]
    error = (expected.var(0) / 4000 + found.var(0) / 4000).sqrt()
    assert largest((found.mean(0) - expected.mean(0)) / error) < 5
    assert largest(found.std(0) / expected.std(0) - 1) < 0.15


def test_masks_come_from_the_default_generator():
    model = bert_fast.accelerate(plain(**DROPOUT).train(), strict=True)
    inputs, _ = form("BertModel", model)

    def drawn(seed):
        torch.manual_seed(seed)
        return model(**inputs).last_hidden_state

    one, same, other = drawn(1), drawn(1), drawn(2)
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("name", ["BertModel", "DistilBertModel"])
def test_dropout_of_a_frozen_part(name):
    """A layer in evaluation within a model in training drops nothing, as the original's."""
    model = plain(name, **DROPOUT).train()
    inputs, real = form(name, model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    if name == "BertModel":
        for layer in model.encoder.layer:
            layer.attention.self.eval()
    else:
        for layer in model.transformer.layer:
            layer.attention.eval()
    check(model, inputs, real)


def test_dropout_modules_alone_in_training():
    """Monte Carlo dropout: transformers 5 asks attention, not its dropout, for its mode."""
    model = plain(attention_probs_dropout_prob=0.5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    check(model, *form("BertModel", model))


CHECKPOINTING = [{"use_reentrant": False}, {"use_reentrant": True}]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("options", CHECKPOINTING, ids=["new", "reentrant"])
@pytest.mark.parametrize("name", ["BertForMaskedLM", "DistilBertForMaskedLM", "RobertaForMaskedLM"])
def test_gradient_checkpointing(name, options):
    """With a seed the same bits, from layers that run twice."""
    model = bert_fast.accelerate(plain(name, **DROPOUT).train(), strict=True)
    inputs, real = form(name, model)
    inputs |= labels(name, model, real)
    found = []
    for runs in (1, 2):
        if runs == 2:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        torch.manual_seed(7)
        with packed() as rows:
            found.append(measured(model, inputs, real))
        assert len(rows) == runs * LAYERS
    assert [*found[0]] == [*found[1]]
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    model.eval()
    with packed() as rows:
        measured(model, inputs, real)
    assert len(rows) == LAYERS


# --- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["BertForMaskedLM", "DistilBertForSequenceClassification",
    "RobertaForTokenClassification", "ElectraForQuestionAnswering"])  # fmt: skip
def test_autocast(name, dtype):
    """Outputs have the original's dtypes, gradients the parameters'; errors as in its autocast."""
    model = plain(name)
    exact = copy.deepcopy(model).double()
    inputs, real = form(name, model, padding="none")
    inputs |= labels(name, model, real) | {"output_hidden_states": True}
    truth = measured(exact, inputs, real)
    with torch.autocast("cpu", dtype):
        baseline, shape = measured(model, inputs, real), structure(model(**inputs))
        bert_fast.accelerate(model, strict=True)
        with packed() as rows:
            found = measured(model, inputs, real)
        assert rows == [real.numel()] * LAYERS
        assert structure(model(**inputs)) == shape
    assert {key: value.dtype for key, value in found.items()} == {
        key: value.dtype for key, value in baseline.items()
    }
    for key, value in truth.items():  # in norm, with the unit of 16 bits for what is nearly 0
        ulp = torch.finfo(dtype).eps * max(largest(value), 0.02)
        allowed = 3 * (baseline[key].double() - value).norm() + ulp * value.numel() ** 0.5
        assert (found[key].double() - value).norm() <= allowed, key


# --- Trainer -------------------------------------------------------------------------------------


def windows(count):
    """Questions with windows that are full, so that nothing is padded."""
    chance = np.random.default_rng(0)
    made = []
    for _ in range(count):
        ids = chance.integers(5, len(VOCABULARY), 12)
        start = int(ids[1:8].argmax()) + 1
        made.append({"input_ids": ids.tolist(), "attention_mask": [1] * 12,
            "start_positions": start, "end_positions": start + 2})  # fmt: skip
    return made


def trainer(name, folder, fast, **options):
    options = {
        "max_steps": 30, "per_device_train_batch_size": 8, "learning_rate": 1e-3,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "use_cpu": True, "seed": 1, "data_seed": 1,
    } | options  # fmt: skip
    model = plain(name, vocab_size=len(VOCABULARY), pad_token_id=0).train()
    if fast:
        bert_fast.accelerate(model, strict=True)
    questions = name.endswith("QuestionAnswering")
    collate = transformers.DataCollatorWithPadding(tokenizer())
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(folder), **options),
        train_dataset=windows(64) if questions else examples("sequence", 64),
        eval_dataset=windows(9) if questions else examples("sequence", 9, seed=1),
        data_collator=transformers.default_data_collator if questions else collate,
    )


def losses(run):
    found = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert np.isfinite(found).all()
    return np.array(found)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForQuestionAnswering",
    "DistilBertForSequenceClassification", "ElectraForQuestionAnswering"])  # fmt: skip
def test_trainer(name, tmp_path):
    """30 steps: every loss is the original's, and so are evaluation and prediction."""
    ends = []
    for fast in (False, True):
        run = trainer(name, tmp_path, fast)
        with packed() as rows:
            run.train()
            metrics = run.evaluate()
        assert (len(rows) > 30 * LAYERS) == fast
        if name == "BertForSequenceClassification":
            assert not fast or max(rows) < 8 * max(len(e["input_ids"]) for e in run.train_dataset)
        ends.append((losses(run), metrics["eval_loss"], run.predict(run.eval_dataset).predictions))
    (expected, value, predicted), (found, our_value, ours) = ends
    assert len(found) == 30 and found[-5:].mean() < found[:5].mean()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert our_value == pytest.approx(value, abs=1e-4)
    for one, two in zip(np.atleast_3d(ours), np.atleast_3d(predicted), strict=True):
        # a bias that no loss depends on goes where rounding drives it
        np.testing.assert_allclose(one - one.mean(0), two - two.mean(0), atol=1e-3)


def test_trainer_with_accumulation(tmp_path):
    options = {"gradient_accumulation_steps": 3, "max_steps": 5, "per_device_train_batch_size": 3}
    found = []
    for fast in (False, True):
        run = trainer("BertForSequenceClassification", tmp_path, fast, **options)
        with packed() as rows:
            run.train()
        assert len(rows) == fast * 15 * LAYERS
        found.append(losses(run))
    np.testing.assert_allclose(*found, atol=1e-4)


@pytest.mark.parametrize("second", [False, True], ids=["original", "accelerated"])
def test_trainer_takes_up_a_checkpoint(second, tmp_path):
    """Of an accelerated run: by another one, to the bit, or by the original."""
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    whole = trainer("BertForSequenceClassification", tmp_path, True, **options)
    whole.train()
    assert (tmp_path / "checkpoint-4" / "model.safetensors").is_file()
    run = trainer("BertForSequenceClassification", tmp_path / "second", second, **options)
    with packed() as rows:
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(rows) == second * 4 * LAYERS
    distance = max(
        largest(p - q)
        for p, q in zip(run.model.parameters(), whole.model.parameters(), strict=True)
    )
    assert distance == 0 if second else distance < 1e-3
    back = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "checkpoint-8"
    )
    assert all(map(torch.equal, back.state_dict().values(), whole.model.state_dict().values()))


COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 2}


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True},
    pytest.param(COMPILED, marks=pytest.mark.long), {"auto_find_batch_size": True},
    {"bf16_full_eval": True}], ids="-".join)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_trainer_options(options, tmp_path):
    run = trainer("BertForSequenceClassification", tmp_path, True, **{"max_steps": 4} | options)
    with packed() as rows:
        run.train()
        assert np.isfinite(run.evaluate()["eval_loss"])
    assert rows or options is COMPILED  # where tracing calls it, and strict would have raised
    assert len(losses(run)) == run.args.max_steps


# --- optimizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fused", "foreach", "sgd", "data", "replaced", "loaded"])
@pytest.mark.parametrize("name", ["BertForMaskedLM", "DistilBertModel"])
def test_new_weights_are_seen(name, how):
    """A prediction after weights were written to, without a forward with gradients in between."""
    model = bert_fast.accelerate(plain(name), strict=True)
    inputs, real = form(name, model)
    torch.manual_seed(3)
    for _ in range(2):
        before = predicted(model, inputs, real)
        for _ in range(3):
            assert torch.equal(predicted(model, inputs, real), before)
        write(model, how)
        with packed() as rows:
            found = predicted(model, inputs, real)
        assert len(rows) == LAYERS and largest(found - before) > 1e-3
        bert_fast.restore(model)
        expected = predicted(model, inputs, real)
        bert_fast.accelerate(model, strict=True)
        assert outside({"": found}, {"": expected}) == {}


def predicted(model, inputs, real):
    with torch.no_grad():
        return model(**inputs)[0][real]


def write(model, how):
    """Change every weight."""
    if how in ("fused", "foreach", "sgd"):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        options = {how: True} if how != "sgd" else {}
        kind = torch.optim.SGD if how == "sgd" else torch.optim.AdamW
        kind(model.parameters(), lr=0.01, **options).step()
        return
    if how == "loaded":
        model.load_state_dict({k: 0.9 * v for k, v in model.state_dict().items()})
        return
    for p in model.parameters():
        if how == "data":
            p.data.mul_(0.9)
        else:
            p.data = 0.9 * p.data


# --- what is kept --------------------------------------------------------------------------------


def counted():
    gc.collect()
    return len(gc.get_objects()), len(forward._unpacked), [len(table) for table in kept._tables]


def test_tables_do_not_grow():
    """Neither the rows of outputs nor what is made of weights stays behind."""
    models = [bert_fast.accelerate(plain("BertForMaskedLM"), strict=True)]
    batches = [form("BertForMaskedLM", models[0])[0] for _ in range(3)]

    def loop():
        (model,) = models
        for inputs in batches:
            with torch.no_grad():
                model(**inputs)
            model(**inputs).logits.sum().backward()
            out = model.bert(**inputs)
            assert len(forward._unpacked) >= 1
            del out

    loop()
    first = counted()
    for _ in range(10):
        loop()
    last = counted()
    assert last[1:] == first[1:] and last[0] - first[0] < 50
    assert first[1] == 0
    models.clear()
    assert sum(counted()[2]) < sum(first[2])


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_accelerating_and_restoring_leaks_nothing(count):
    model = plain("BertForMaskedLM")
    bits = {key: value.clone() for key, value in model.state_dict().items()}
    inputs, _ = form("BertForMaskedLM", model)

    def cycle():
        bert_fast.accelerate(model, strict=True)
        with torch.no_grad():
            model(**inputs)
        bert_fast.restore(model)

    for _ in range(5):
        cycle()
    first = counted()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(count):
        cycle()
    last = counted()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert last[1:] == first[1:] and last[0] - first[0] < 50
    assert grown < 20_000
    assert all(torch.equal(value, bits[key]) for key, value in model.state_dict().items())


# --- DDP -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes on the CPU ended with, by scenario."""
    return run_ranks(worker.__file__, RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("scenario", worker.SCENARIOS)
def test_data_parallel(ranks, scenario):
    """Two ranks end each step with equal weights, which are those of the originals under DDP."""
    (plain_one, none), (one, rows) = ranks[0][scenario]
    (_, (two, _)) = ranks[1][scenario]
    assert not none and len(rows) >= LAYERS * worker.STEPS
    assert len(one) == worker.STEPS
    for step in range(worker.STEPS):
        assert all(torch.equal(one[step][key], two[step][key]) for key in one[step])
        assert outside(one[step], plain_one[step]) == {}
