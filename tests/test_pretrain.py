"""A whole run on a toy language: what it leaves, tells and learns, and what may not change it."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from training_cases import (
    SIZES,
    TOPICS,
    VOCABULARY,
    assert_same,
    checkpoints,
    corpus,
    folder,
    last,
    one_thread,
    padded,
    records,
    run,
    settings,
)

import bert_fast
from bert_fast.data.batches import Position, steps
from bert_fast.data.shards import Corpus
from bert_fast.ops.products import fixed_cpu_library
from bert_fast.train import pretrain
from bert_fast.train.build import Texts, build, build_model
from bert_fast.train.distributed import Ranks
from bert_fast.train.flops import training_flops
from bert_fast.train.metrics import METRICS, read_records
from bert_fast.train.settings import load

STEPS, EVERY = 240, 30
LARGER = {
    "hidden_size": 64,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TRAIN = {
    *("kind", "step", "epoch", "lr", "loss", "mlm_loss", "nsp_loss", "mlm_accuracy"),
    *("nsp_accuracy", "grad_norm", "tokens", "sequences", "labels", "seconds", "tokens_per_second"),
    *("sequences_per_second", "mfu", "data_wait", "memory", "scale", "skipped", "tokens_total"),
    "left",
}
EVALUATION = {
    *("kind", "step", "mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy"),
    *("unigram_entropy", "labels", "sequences"),
}


@pytest.fixture(scope="module")
def memory():
    with folder() as path:
        corpus(path / "corpus", documents=200, held_out=40)
        yield path


@pytest.fixture(scope="module")
def learned(memory):
    """The settings of a run that learns the language, and its output."""
    given = settings(
        *(memory / "corpus", memory / "learned"),
        phases=[{"steps": STEPS, "max_length": 32, "tokens": 512}],
        model__config={**SIZES, **LARGER},
        optimizer__lr=5e-3,
        save__every=EVERY,
        evaluate={"every": EVERY, "batches": 4},
        log={"every": 20, "plot": True},
    )
    assert run(given) == 0
    return given


@pytest.fixture
def output():
    with folder() as path:
        yield path / "run"


def everything(given):
    return read_records(Path(given.output) / METRICS)


def told(given, kind):
    return [record for record in everything(given) if record["kind"] == kind]


# --- what it leaves and tells ---------------------------------------------------------------------


def test_files(learned):
    here = Path(learned.output)
    names = {path.name for path in here.iterdir()}
    curves = {"curves.png"} if _has_matplotlib() else set()
    assert names == {METRICS, "settings.yaml", "checkpoints", "lock"} | curves
    assert load(here / "settings.yaml") == learned
    kept = [path.name for path in checkpoints(here)]
    assert kept == [f"step-{step:08}" for step in (STEPS - 2 * EVERY, STEPS - EVERY, STEPS)]


def _has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def test_records_of_training(learned):
    made = told(learned, "train")
    assert [record["step"] for record in made] == [*range(20, STEPS + 1, 20)]
    for record in made:
        assert record.keys() == TRAIN
        assert record["loss"] == pytest.approx(record["mlm_loss"] + record["nsp_loss"])
        assert record["lr"] == learned.learning_rate(record["step"] - 1)
        assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["seconds"])
        assert record["data_wait"] < record["seconds"] and record["memory"] > 10**7
        assert record["scale"] is None and record["skipped"] == 0 and record["left"] >= 0
        assert 0 <= record["mlm_accuracy"] <= 1 and 0 <= record["nsp_accuracy"] <= 1
    assert made[-1]["left"] == made[-1]["lr"] == 0
    first, end = everything(learned)[0], everything(learned)[-1]
    assert (first["kind"], first["step"]) == ("start", 0)
    assert (end["kind"], end["step"], end["status"]) == ("stop", STEPS, 0)
    assert first["torch"] == torch.__version__ and first["world"] == first["threads"] == 1
    assert first["cpu_library"] == "blas" and first["peak"] == "not measured"
    assert first["corpus"] == Corpus(learned.data.corpus).digest
    model = bert_fast.BertForPreTraining(learned.model.bert_config(len(VOCABULARY)))
    assert first["parameters"] == sum(p.numel() for p in model.parameters())


def test_counts_are_of_real_tokens(learned):
    """Of all micro-batches, counted again; and the operations from which MFU comes."""
    batches = Texts(learned).batches(learned.phases[0])
    made = steps(batches, Position(0, 0), learned.micro_batches)
    config, total, peak = learned.model.bert_config(len(VOCABULARY)), 0, 1e12
    for record in told(learned, "train"):
        tokens = pairs = labels = flops = 0
        for _ in range(20):
            step = next(made)
            for _, batch in step.batches:
                lengths = [b - a for a, b in pairwise(batch["cu_seq_lens_q"].tolist())]
                counts = sum(lengths), sum(n * n for n in lengths), len(batch["masked_labels"])
                tokens, pairs = tokens + counts[0], pairs + len(lengths)
                labels, flops = labels + counts[2], flops + training_flops(config, *counts)
        total += tokens
        assert (record["tokens"], record["sequences"], record["labels"]) == (tokens, pairs, labels)
        assert record["tokens_total"] == total and record["epoch"] == step.after.epoch
        assert record["mfu"] == pytest.approx(flops / record["seconds"] / peak)
        assert 0.9 * 512 * 20 < tokens <= 512 * 20


def test_evaluations(learned):
    """Each is of the same pairs, and says what the model of that step finds."""
    made = told(learned, "evaluation")
    assert [record["step"] for record in made] == [*range(EVERY, STEPS + 1, EVERY)]
    texts = Texts(learned)
    manifest = texts.corpus.manifest
    assert all(EVALUATION <= record.keys() for record in made)
    assert {r["unigram_entropy"] for r in made} == {manifest["unigram_entropy"]}
    assert len({(r["labels"], r["sequences"]) for r in made}) == 1
    (held_out,) = texts.held_out(learned.phases[0], 0, 1)
    assert len(held_out.batches) == 4
    path = checkpoints(Path(learned.output))[-1]
    model = transformers.BertForPreTraining.from_pretrained(path).eval()
    mlm = nsp = labels = pairs = 0
    for batch in (padded(batch) for batch, counted in held_out.batches if counted):
        with torch.no_grad():
            out = model(**{k: v for k, v in batch.items() if "label" not in k})
        want, follows = batch["labels"], batch["next_sentence_label"]
        entropy = torch.nn.functional.cross_entropy
        logits = out.prediction_logits.flatten(0, 1)
        mlm += entropy(logits, want.flatten(), reduction="sum").item()
        nsp += entropy(out.seq_relationship_logits, follows, reduction="sum").item()
        labels, pairs = labels + int((want != -100).sum()), pairs + len(follows)
    assert made[-1]["mlm_loss"] == pytest.approx(mlm / labels, abs=1e-5)
    assert made[-1]["nsp_loss"] == pytest.approx(nsp / pairs, abs=1e-5)


def test_held_out_documents_are_not_trained_on(output):
    """They have words of their own, which stand in no other batch but where one is drawn."""
    with folder() as path:
        corpus(path / "corpus", documents=60, apart=True)
        given = settings(path / "corpus", output)
        texts = Texts(given)
        (held_out,) = texts.held_out(given.phases[0], 0, 1)
        batches = texts.batches(given.phases[0])
        made = [batches[epoch, n] for epoch in range(3) for n in range(batches.count(epoch))]
    theirs = {i for i, word in enumerate(VOCABULARY) if word[0] in TOPICS[-2:]}
    special = {*range(VOCABULARY.index(".") + 1)}
    for kind, found in (("train", made), ("held_out", [batch for batch, _ in held_out.batches])):
        assert found
        for batch in found:
            ids = batch["input_ids"][0].clone()
            ids[batch["masked_positions"]] = batch["masked_labels"]
            words = {*ids.tolist()} - special
            assert not words & theirs if kind == "train" else words <= theirs


@pytest.mark.parametrize("documents", [0, 1])
def test_too_few_held_out_documents(output, documents):
    """A pair may need a second document: the run goes on without evaluations, and says so."""
    with folder() as path:
        corpus(path / "corpus", held_out=documents)
        given = settings(path / "corpus", output, evaluate__every=4)
        with pytest.warns(UserWarning, match=f"want 2 documents or more .* got {documents}: "):
            assert run(given) == 0
    assert told(given, "train") and not told(given, "evaluation")


# --- what it learns -------------------------------------------------------------------------------


def test_it_learns(learned):
    """Far below what the frequencies of words tell; and which sentence goes on with which."""
    first, end = told(learned, "evaluation")[0], told(learned, "evaluation")[-1]
    assert end["mlm_loss"] < end["unigram_entropy"] - 1.5 < first["mlm_loss"]
    assert end["nsp_accuracy"] > 0.75 > first["nsp_accuracy"]
    curve = [record["loss"] for record in told(learned, "train")]
    assert curve[-1] < curve[0] - 1.5


def test_the_checkpoint_opens_in_transformers(learned):
    """With the logits of ours, and its tokenizer, which cuts to what the model takes."""
    path = checkpoints(Path(learned.output))[-1]
    theirs, loading = transformers.BertForPreTraining.from_pretrained(
        path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), loading
    ours = bert_fast.BertForPreTraining.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert len(tokenizer("ba " * 50, truncation=True)["input_ids"]) == 32
    batch = tokenizer(["ba be bi [MASK] bu", "ka ke"], ["bo bu by", "di"], padding=True)
    inputs = {name: torch.tensor(value) for name, value in batch.items()}
    assert inputs["input_ids"][0, 4] == VOCABULARY.index("[MASK]")
    with torch.no_grad():
        found, expected = ours.eval()(**inputs), theirs.eval()(**inputs)
    real = inputs["attention_mask"].bool()
    for name, rows in (("prediction_logits", real), ("seq_relationship_logits", ...)):
        torch.testing.assert_close(found[name][rows], expected[name][rows], rtol=1e-5, atol=1e-5)
    top = expected.prediction_logits[0, 4].topk(4).indices.tolist()
    assert sum(VOCABULARY[i].startswith("b") for i in top) >= 3


def test_adaptation_begins_where_a_checkpoint_is(learned, memory, output):
    """model.init: the loss of the first step is what the other run ended with."""
    source = checkpoints(Path(learned.output))[-1]
    given = settings(
        *(memory / "corpus", output),
        phases=[{"steps": 12, "max_length": 32, "tokens": 512}],
        model={"init": str(source)},
        optimizer__lr=1e-4,
        evaluate={"every": 6, "batches": 4},
    )
    assert run(given) == 0
    start, *later = told(given, "evaluation")
    before = told(learned, "evaluation")[-1]
    assert (start["step"], [r["step"] for r in later]) == (0, [6, 12])
    for name in ("mlm_loss", "nsp_loss"):
        assert start[name] == pytest.approx(before[name], rel=1e-5)
    ended = told(learned, "train")[-1]["loss"]
    assert abs(records(output)[0]["loss"] - ended) < 0.5
    assert json.loads((checkpoints(output)[-1] / "config.json").read_text())["hidden_size"] == 64
    assert last(output)["model.safetensors"] != (source / "model.safetensors").read_bytes()


# --- what may not change it -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(memory):
    """The output of a short run."""
    assert run(settings(memory / "corpus", memory / "plain")) == 0
    return memory / "plain"


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_checkpointing": True},
        {"data__workers": 2},
        {"save__every": 1},
        {"evaluate__every": 1},
        {"save__keep": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_same_bits(memory, plain, output, changes):
    """Dropout is on: layers that run again draw the same bits, evaluations draw none."""
    assert run(settings(memory / "corpus", output, **changes)) == 0
    assert last(output) == last(plain)
    assert records(output) == records(plain)


@pytest.mark.long  # a minute of compiling
@pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": True}], ids=str)
def test_compiled(memory, plain, output, changes):
    """The same losses to rounding, dropout's bits being the same."""
    torch._dynamo.reset()
    assert run(settings(memory / "corpus", output, compile=True, **changes)) == 0
    for a, b in zip(records(output), records(plain), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-4 and a["labels"] == b["labels"]


def test_another_seed_is_another_run(memory, plain, output):
    assert run(settings(memory / "corpus", output, seed=1)) == 0
    assert not {r["loss"] for r in records(output)} & {r["loss"] for r in records(plain)}


@pytest.mark.parametrize("log_every", [5, 12])
def test_intervals_do_not_change_sums(memory, plain, output, log_every):
    assert run(settings(memory / "corpus", output, log__every=log_every)) == 0
    single, begun = records(plain), 0
    for record in records(output):
        part = single[begun : record["step"]]
        begun = record["step"]
        for name in ("tokens", "labels", "sequences"):
            assert record[name] == sum(r[name] for r in part)
        total = sum(r["mlm_loss"] * r["labels"] for r in part)
        assert record["mlm_loss"] == pytest.approx(total / record["labels"])
    assert begun == 12
    assert last(output)["model.safetensors"] == last(plain)["model.safetensors"]


# --- precisions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits(memory, plain, output, precision):
    """Close to fp32; what is saved are the masters."""
    assert run(settings(memory / "corpus", output, precision=precision)) == 0
    for a, b in zip(records(plain), records(output), strict=True):
        assert abs(a["loss"] - b["loss"]) < 0.03
    saved = load_file(checkpoints(output)[-1] / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    dtype = getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[precision])
    assert any((t.to(dtype).float() != t).any() for t in saved.values())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_masters_begin_as_what_was_not_rounded(memory, precision, optimizer):
    given = settings(memory / "corpus", "none", precision=precision, optimizer__name=optimizer)
    texts = Texts(given)
    config = given.model.bert_config(texts.vocab_size)
    start = build_model(given, config, texts)
    before = {name: p.detach().clone() for name, p in start.named_parameters()}
    trained = build(given, start, Ranks(0, 1, torch.device("cpu")))
    for p in trained.model.parameters():
        p.grad = torch.zeros_like(p)
    for group in trained.optimizer.param_groups:
        group["lr"] = 0.0
    trained.optimizer.step()
    rounded = 0
    for name, p in trained.model.named_parameters():
        master = trained.optimizer.state[p]["master"]
        assert torch.equal(master, before[name]) and torch.equal(p, before[name].to(p.dtype))
        rounded += bool((p.float() != master).any())
    assert rounded > 10


# --- without texts --------------------------------------------------------------------------------


def test_throughput(output, capfd):
    """Random ids: nothing is saved or evaluated, the rates are told."""
    given = load(
        "throughput",
        [
            "model={size: tiny, config: {hidden_size: 32, intermediate_size: 48}}",
            "log.every=2",
            *("phases.0.steps=6", "phases.0.tokens=512", "data.workers=0", "data.vocab_size=300"),
            *("data.lengths=[128, 37, 95]", f"output={output}", "device=cpu", "threads=1"),
        ],
    )
    assert run(given) == 0
    made = [r for r in read_records(output / METRICS) if r["kind"] == "train"]
    assert [record["step"] for record in made] == [2, 4, 6]
    for record in made:
        assert 512 * 2 * 0.7 < record["tokens"] <= 512 * 2
        assert record["tokens_per_second"] > 0 and record["mfu"] > 0
        assert abs(record["mlm_loss"] - math.log(300)) < 0.3
    assert not (output / pretrain.CHECKPOINTS).exists()
    assert "tokens/s" in capfd.readouterr().err


def test_the_peak_is_measured(memory, output):
    """What MFU is a share of, where the tests do not leave it out."""
    with one_thread(), fixed_cpu_library("blas"):
        assert pretrain.run(settings(memory / "corpus", output)) == 0
    start, *_ = read_records(output / METRICS)
    assert "measured" in start["peak"]
    assert all(0 < r["mfu"] < 1 for r in read_records(output / METRICS) if r["kind"] == "train")


def test_runs_are_told_apart_by_assert_same(memory, plain, output):
    """What the tests of going on rely on."""
    assert run(settings(memory / "corpus", output, optimizer__weight_decay=0.011)) == 0
    with pytest.raises(AssertionError):
        assert_same(output, plain)
