"""transformers' Trainer, data collators and pipelines take our models for its own."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from against_transformers import outside, pair
from toy_text import VOCABULARY, examples, sentences, tokenizer
from transformers import TrainingArguments

import bert_fast

ROOT = Path(__file__).resolve().parents[1]
# Class, kind of examples, collator, and options of the collator.
TASKS = {
    "masked_lm": (
        "BertForMaskedLM",
        transformers.DataCollatorForLanguageModeling,
        {"mlm_probability": 0.3, "seed": 0},
    ),
    "sequence": ("BertForSequenceClassification", transformers.DataCollatorWithPadding, {}),
    "tokens": ("BertForTokenClassification", transformers.DataCollatorForTokenClassification, {}),
}
every_task = pytest.mark.parametrize("task", TASKS)


class KeepConfiguration(transformers.TrainerCallback):
    """The Trainer writes the config.json of transformers' own classes only."""

    def on_save(self, args, state, control, model=None, **kwargs):
        model.config.save_pretrained(f"{args.output_dir}/checkpoint-{state.global_step}")


def models(task, **fields):
    """transformers' model and ours, with the same weights at each call."""
    torch.manual_seed(0)
    return pair(TASKS[task][0], vocab_size=len(VOCABULARY), num_labels=2, **fields)


def collator(task, side="right"):
    _, cls, options = TASKS[task]
    return cls(tokenizer(side), **options)


def accuracy(prediction):
    logits, labels = prediction.predictions, prediction.label_ids
    counted = labels != -100
    return {"accuracy": float((logits.argmax(-1) == labels)[counted].mean())}


def trainer(task, model, folder, **options):
    options = {
        "max_steps": 20,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
        "data_seed": 1,
    } | options
    return transformers.Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **options),
        train_dataset=examples(task, 64),
        eval_dataset=examples(task, 13, seed=1),
        data_collator=collator(task),
        compute_metrics=accuracy,
        callbacks=[KeepConfiguration()],
    )


def losses(trained):
    found = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    assert np.isfinite(found).all()
    return np.array(found)


def distance(one, two):
    return max(
        (p - q).abs().max().item() for p, q in zip(one.parameters(), two.parameters(), strict=True)
    )


# --- Trainer -------------------------------------------------------------------------------------


@every_task
def test_trains_as_transformers(task, tmp_path):
    """20 steps: the loss of each is transformers', and falls; so are evaluation and prediction."""
    runs = []
    for model in models(task):
        trained = trainer(task, model, tmp_path)
        trained.model_accepts_loss_kwargs = False  # transformers' BERT leaves the count unused
        trained.train()
        runs.append((losses(trained), trained.evaluate(), trained.predict(examples(task, 9, 2))))
    (expected, metrics, outputs), (found, our_metrics, our_outputs) = runs
    assert len(found) == 20 and found[-5:].mean() < found[:5].mean() - 0.2
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert our_metrics["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=2e-3)
    assert our_metrics["eval_accuracy"] == pytest.approx(metrics["eval_accuracy"], abs=0.05)
    if task == "masked_lm":  # the collator draws other masks each time
        assert our_outputs.predictions.shape == outputs.predictions.shape
    else:
        assert our_outputs.predictions.shape == outputs.predictions.shape
        assert (our_outputs.label_ids == outputs.label_ids).all()
        assert our_outputs.metrics["test_accuracy"] > 0.7


@every_task
def test_trains_as_it_comes(task, tmp_path):
    """Dropout, the count of labels where the loss wants it, a falling loss."""
    _, ours = models(task, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    trained = trainer(task, ours, tmp_path)
    trained.train()
    assert trained.model_accepts_loss_kwargs == (task != "sequence")
    assert trained.label_names == ["labels"]
    found = losses(trained)
    assert len(found) == 20 and found[-5:].mean() < found[:5].mean() - 0.1


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("task", ["masked_lm", "tokens"])
def test_accumulation(task, counted, tmp_path):
    """Two batches of 4 are one batch of 8, if the labels of both are counted together."""
    trained = []
    for parts in (1, 2):
        _, model = models(task)
        run = trainer(
            task,
            model,
            tmp_path,
            gradient_accumulation_steps=parts,
            per_device_train_batch_size=8 // parts,
            optim="sgd",
            learning_rate=0.3,
            max_steps=6,
        )
        run.data_collator = prepared(task)
        run.train_dataset = [*map(dict, ragged(task))]
        run.model_accepts_loss_kwargs = counted
        run.train()
        trained.append(model)
    if counted:
        assert distance(*trained) < 1e-5
    else:  # means of means: what goes wrong without the count
        assert distance(*trained) > 1e-3


def ragged(task):
    """Labelled examples with very unlike numbers of labels."""
    chance = random.Random(5)
    for example in examples("tokens", 48):
        if task == "masked_lm":
            example["labels"] = list(example["input_ids"])
        share = chance.choice([0.1, 0.9])
        labels = [label if chance.random() < share else -100 for label in example["labels"]]
        yield example | {"labels": labels}


def prepared(task):
    """Of examples that have their labels, whichever the task."""
    return transformers.DataCollatorForTokenClassification(tokenizer())


@every_task
def test_checkpoint_and_resume(task, tmp_path):
    """A run that is taken up again ends with the weights of one that was not interrupted."""
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    ends = []
    for resumed in (False, True):
        _, ours = models(task, **rates)
        run = trainer(task, ours, tmp_path, save_strategy="steps", save_steps=5, max_steps=10)
        if task == "masked_lm":
            run.data_collator = prepared(task)
            run.train_dataset = [*ragged(task)]
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5") if resumed else None)
        ends.append(ours)
    assert distance(*ends) == 0
    saved = tmp_path / "checkpoint-10"
    name = TASKS[task][0]
    back = getattr(bert_fast, name).from_pretrained(saved, strict=True)
    assert distance(back, ends[0]) == 0
    theirs = getattr(transformers, f"Auto{name.replace('Bert', 'Model')}").from_pretrained(saved)
    assert type(theirs) is getattr(transformers, name)
    batch = collator(task)(examples(task, 5))
    batch.pop("labels")
    with torch.no_grad():
        expected = theirs(**batch).logits
        found = ends[0].eval()(**batch).logits
    real = batch["attention_mask"].bool() if found.dim() == 3 else slice(None)
    assert outside({"logits": found[real]}, {"logits": expected[real]}) == {}


@every_task
def test_takes_up_a_run_of_transformers(task, tmp_path):
    """A checkpoint of transformers' model, with its optimizer, goes on with ours, and back."""
    options = {"save_strategy": "steps", "save_steps": 5, "max_steps": 10, "adam_epsilon": 1e-3}
    ends = []
    for first, second in ((0, 0), (0, 1), (1, 0)):
        folder = tmp_path / f"{first}{second}"
        for index, checkpoint in ((first, None), (second, str(folder / "checkpoint-5"))):
            run = trainer(task, models(task)[index], folder, **options)
            if task == "masked_lm":
                run.train_dataset, run.data_collator = [*ragged(task)], prepared(task)
            run.model_accepts_loss_kwargs = False
            run.train(resume_from_checkpoint=checkpoint)
        ends.append(run.model)
    assert max(distance(ends[0], ends[1]), distance(ends[0], ends[2])) < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"label_smoothing_factor": 0.1},
        {"auto_find_batch_size": True},
        {"bf16_full_eval": True},
        {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 2},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_options(options, tmp_path):
    _, ours = models("masked_lm")
    run = trainer("masked_lm", ours, tmp_path, **{"max_steps": 5, **options})
    run.train()
    assert len(losses(run)) == run.args.max_steps
    assert np.isfinite(run.evaluate()["eval_loss"])


def test_best_model(tmp_path):
    """The best checkpoint is found and loaded at the end."""
    _, ours = models("sequence")
    steps = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    run = trainer("sequence", ours, tmp_path, **steps, **best)
    run.train()
    best = bert_fast.BertForSequenceClassification.from_pretrained(run.state.best_model_checkpoint)
    assert distance(ours, best) == 0


# --- collators -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@every_task
def test_collators(task, side):
    """What they make is taken as it is, and gives transformers' loss."""
    theirs, ours = models(task)
    batch = collator(task, side)(examples(task, 6))
    assert batch["attention_mask"].min() == 0
    if side == "left":  # positions by column are another text's; ours pools the first token
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    found = ours(**batch).loss
    if side == "right" or task != "sequence":
        torch.testing.assert_close(found, theirs(**batch).loss, rtol=1e-5, atol=1e-5)
    else:
        right = collator(task)(examples(task, 6))
        torch.testing.assert_close(found, theirs(**right).loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForTokenClassification"])
def test_flattening_collator(name):
    """Packed by transformers' collator: each text as if alone, and the loss over all of them."""
    theirs, ours = pair(name, vocab_size=len(VOCABULARY), num_labels=2)
    flatten = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    texts = examples("tokens", 5)
    packed = flatten(texts)
    assert packed["input_ids"].shape == (1, sum(len(text["input_ids"]) for text in texts))
    logits, first = ours(**packed).logits[0], 0
    total = 0.0
    for text in texts:
        count = len(text["input_ids"])
        alone = theirs(torch.tensor([text["input_ids"]])).logits[0]
        found = logits[first : first + count]
        assert outside({"logits": found}, {"logits": alone}) == {}
        labels = packed["labels"][0, first : first + count]
        total += torch.nn.functional.cross_entropy(alone, labels, reduction="sum")
        first += count
    mean = total / (packed["labels"] != -100).sum()
    torch.testing.assert_close(ours(**packed).loss, mean, rtol=1e-5, atol=1e-5)


def test_trains_on_packed_texts(tmp_path):
    """The Trainer with the flattening collator: no padding from the data to the loss."""
    _, ours = models("tokens")
    run = trainer("tokens", ours, tmp_path)
    run.data_collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    run.train()
    found = losses(run)
    assert found[-5:].mean() < found[:5].mean() - 0.2


# --- pipelines -----------------------------------------------------------------------------------

INPUTS = {
    "fill-mask": (
        "BertForMaskedLM",
        ["the cat saw a [MASK].", "the [MASK] met a dog on the mat."],
    ),
    "text-classification": ("BertForSequenceClassification", sentences(5)),
    "token-classification": ("BertForTokenClassification", sentences(5)),
    "feature-extraction": ("BertModel", sentences(3)),
}


def close(one, two):
    """The same answers, scores and numbers to five digits."""
    if isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(close, one, two))
    if isinstance(two, dict):
        return list(one) == list(two) and all(close(one[key], two[key]) for key in two)
    if isinstance(two, float | np.floating):
        return float(one) == pytest.approx(float(two), rel=1e-4, abs=1e-5)
    return one == two


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("task", INPUTS)
def test_pipelines(task, batch_size):
    name, texts = INPUTS[task]
    theirs, ours = pair(name, vocab_size=len(VOCABULARY), num_labels=3)
    if task == "feature-extraction":  # it takes outputs that are not transformers' for plain dicts
        ours.config.return_dict = False
    answers = [
        transformers.pipeline(task, model=model, tokenizer=tokenizer())(
            texts, batch_size=batch_size if task != "feature-extraction" else 1
        )
        for model in (theirs, ours)
    ]
    assert len(answers[1]) == len(texts) and close(answers[1], answers[0])


def test_pipeline_of_entities():
    """Labels of the configuration, with words and places in the text."""
    names = {0: "O", 1: "B-ANIMAL", 2: "I-ANIMAL"}
    theirs, ours = pair("BertForTokenClassification", vocab_size=len(VOCABULARY), id2label=names)
    found = [
        transformers.pipeline(
            "token-classification",
            model=model,
            tokenizer=tokenizer(),
            aggregation_strategy="simple",
        )(sentences(8))
        for model in (theirs, ours)
    ]
    assert any(found[0]) and close(found[1], found[0])


def test_answers_to_questions():
    """transformers 5 has no pipeline for it; the best span of each text is transformers'."""
    theirs, ours = pair("BertForQuestionAnswering", vocab_size=len(VOCABULARY))
    questions = ["who saw a cat?"] * 6
    batch = tokenizer()(questions, sentences(6), padding=True, return_tensors="pt")
    assert batch["attention_mask"].min() == 0
    spans = []
    for model in (theirs, ours):
        with torch.no_grad():
            out = model(**batch)
        second = (batch["token_type_ids"] == 1) & batch["attention_mask"].bool()
        start, end = (
            logits.masked_fill(~second, torch.finfo(logits.dtype).min)
            for logits in (out.start_logits, out.end_logits)
        )
        scores = start.softmax(1)[:, :, None] * end.softmax(1)[:, None]
        best, at = scores.triu().flatten(1).max(1)
        spans.append((best, at))
    torch.testing.assert_close(spans[1][0], spans[0][0], rtol=1e-4, atol=1e-6)
    assert torch.equal(spans[1][1], spans[0][1])


# --- one interpreter -----------------------------------------------------------------------------

THEIR_KERNELS = """
from unittest.mock import MagicMock
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock()
"""
BOTH_RUN = """
import sys
import torch
import bert_fast, transformers
sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
             intermediate_size=8)
theirs = transformers.BertModel(transformers.BertConfig(**sizes)).eval()
ours = bert_fast.BertModel(bert_fast.BertConfig(**sizes)).eval()
ours.load_state_dict(theirs.state_dict())
ids = torch.arange(9)[None]
print(torch.allclose(ours(ids)[0], theirs(ids)[0], atol=1e-5), "bert_fast.kernels" in sys.modules)
"""


@pytest.mark.parametrize("kernels", ["absent", "installed"])
def test_imported_before_transformers(tmp_path, kernels):
    """From the root, where a folder has the name of Hugging Face's package; both models run.

    The other order is in test_packaging.py.
    """
    if kernels == "installed":
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text(THEIR_KERNELS)
    done = subprocess.run(
        [sys.executable, "-c", BOTH_RUN],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False"]
