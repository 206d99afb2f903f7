"""`bert-fast pretrain` and `bert-fast plot`: what they call, print and return."""

import json
import shlex

import pytest
from cli_cases import call

from bert_fast import BertForPreTraining
from bert_fast.train import pretrain as module
from bert_fast.train.config_file import parse_yaml
from bert_fast.train.metrics import METRICS, read_records
from bert_fast.train.plot import CURVES
from bert_fast.train.settings import load

SMALL = (
    "model={size: tiny, config: {num_hidden_layers: 1, hidden_size: 16, intermediate_size: 32}}",
    *("phases.0.steps=4", "phases.0.tokens=256", "data.vocab_size=200", "data.workers=0"),
)


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """The settings of the runs that were asked for; none takes place."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def run(settings):
        asked.append(settings)
        return settings.seed

    monkeypatch.setattr(module, "run", run)
    return asked


@pytest.mark.parametrize("status", [0, 65, 74, 143])
def test_the_status_is_that_of_the_run(status, runs, capfd):
    assert call(capfd, "pretrain", "tiny", f"seed={status}", "optimizer.lr=1e-3")[0] == status
    assert runs == [load("tiny", [f"seed={status}", "optimizer.lr=1e-3"])]


def test_an_interrupt_is_named(runs, capfd):
    assert call(capfd, "pretrain", "tiny", "seed=130") == (
        130,
        "",
        "bert-fast: error: interrupted\n",
    )


@pytest.mark.parametrize("value", ["no", "auto", "runs/a: b/step-1", "1e5", "null"])
def test_resume_is_a_text(value, runs, capfd):
    assert call(capfd, "pretrain", "tiny", "--resume", value, "save.keep=7")[0] == 0
    assert runs[0].save.resume == value and runs[0].save.keep == 7


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["tiney"], 1, "tiney: want a file, or one of tiny, mini, base, large, adapt, thro"),
        (["tiny", "seed"], 1, "tiny: 'seed': want name=value, as optimizer.lr=1e-4"),
        (["tiny", "sed=1"], 1, "tiny: sed: want the name of a setting (did you mean seed?)"),
        (["tiny", "seed=x", "compile=1"], 1, "compile: want true or false, got 1"),
        ([], 2, "Missing argument 'CONFIG'. See bert-fast pretrain --help"),
        (["tiny", "--dry-run"], 1, "corpus/manifest.json: want a plain file, got nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors(arguments, status, message, runs, capfd):
    got, out, err = call(capfd, "pretrain", *arguments)
    assert (got, out, runs) == (status, "", [])
    assert err.startswith("bert-fast: error: ") and message in err and err.count("\n") == 1


def test_a_dry_run_prints_settings_and_sizes(runs, capfd, tmp_path):
    status, out, err = call(capfd, "pretrain", "throughput", *SMALL, "--dry-run")
    assert (status, err, runs, [*tmp_path.iterdir()]) == (0, "", [], [])
    wanted = load("throughput", SMALL)
    assert parse_yaml(out, "it").keys() == wanted.to_dict().keys()
    (tmp_path / "again.yaml").write_text(out)
    assert load(tmp_path / "again.yaml") == wanted  # the sizes are comments
    model = BertForPreTraining(wanted.model.bert_config(200))
    parameters = sum(p.numel() for p in model.parameters())
    assert out.startswith(f"# {parameters:,} parameters, 3,200 of them word embeddings; ")
    assert "phase 0: 4 steps of 1 x 256 tokens in sequences of at most 128: 256 tokens, " in out
    assert ", layers = 1, D = 16, F = 32, V = 200\n" in out


def test_a_run_and_its_curves(capfd, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="draws with matplotlib")
    monkeypatch.chdir(tmp_path)
    status, out, err = call(capfd, "pretrain", "throughput", *SMALL, "log.every=2")
    assert (status, out) == (0, ""), err
    run = tmp_path / "runs" / "throughput"
    kinds = [record["kind"] for record in read_records(run / METRICS)]
    assert kinds == ["start", "train", "train", "stop"]
    assert "step 4/4, loss " in err and "MFU" in err and not (run / CURVES).exists()
    assert load(run / "settings.yaml") == load("throughput", [*SMALL, "log.every=2"])
    assert call(capfd, "plot", run, "-o", "both.png") == (0, "", "bert-fast: curves in both.png\n")
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("verb", ["pretrain", "plot"])
def test_help_is_readable(verb, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = call(capfd, verb, "--help")
    assert (status, err) == (0, "") and max(map(len, out.splitlines())) <= 80
    assert out.startswith(f"Usage: bert-fast {verb} ")


def test_the_examples_of_the_help_work(capfd, tmp_path, monkeypatch):
    """In their order: the picture is of the run before."""
    pytest.importorskip("matplotlib", reason="draws with matplotlib")
    monkeypatch.chdir(tmp_path)
    for verb in ("pretrain", "plot"):
        text = call(capfd, verb, "--help")[1].partition("Example:")[2]
        lines = [shlex.split(line) for line in text.splitlines() if line.strip()]
        assert lines and all(line[:2] == ["bert-fast", verb] for line in lines)
        for _, *arguments in lines:
            assert call(capfd, *arguments)[0] == 0, arguments
    assert (tmp_path / "curves.png").is_file()


def test_curves_of_nothing(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = call(capfd, "plot", "none")
    assert (status, out) == (1, "") and err.startswith("bert-fast: error: none: ")
    (tmp_path / METRICS).write_text(json.dumps({"kind": "start", "step": 0}) + "\n")
    status, out, err = call(capfd, "plot", ".")
    assert (status, out) == (1, "") and "want records of training, got none" in err
