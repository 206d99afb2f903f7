"""What README.md and the docs say is run, or compared with what is."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from encoder_models import save_for

from bert_fast import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

RUN_ELSEWHERE = {  # command -> (file, what it must contain) that runs it
    "make demo": (".ci/run", "make demo"),
    "make test": (".ci/run", "make test"),
    "make gpu": (".ci/run", "make gpu"),
    "pip install .": (".ci/run", 'pip install --no-deps --target "$work/plain" .'),
    "pip install --no-build-isolation .": (
        ".ci/run",
        'pip install --no-build-isolation --no-deps --target "$work/built" .',
    ),
}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A directory with a model, where the README says path-or-hub-id."""
    return save_for(README, tmp_path_factory.mktemp("readme") / "model")


@pytest.mark.parametrize("code", blocks("python"))
@pytest.mark.filterwarnings("ignore:.*(initialised|not used by)")
def test_python_runs(code, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {
        "input_ids": torch.randint(5, 200, (2, 7)),
        "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
        "token_type_ids": torch.zeros(2, 7, dtype=torch.int64),
        "labels": torch.tensor([0, 2]),
    }
    exec(compile(code.replace("path-or-hub-id", str(checkpoint)), "README.md", "exec"), scope)


def commands():
    return [line for block in blocks("sh") for line in block.splitlines() if line]


TRAINING = [c for c in commands() if c.startswith(("bert-fast data ", "bert-fast pretrain "))]


@pytest.mark.filterwarnings("ignore:.*held.out.*got 0")  # of so few chapters
def test_pretraining_runs(tmp_path, monkeypatch, capsys):
    """One line after the other, on a book of a few chapters, for a few steps."""
    monkeypatch.chdir(tmp_path)
    pages = (ROOT / "benchmarks" / "texts" / "pride_and_prejudice.txt").read_text(encoding="utf-8")
    chapters = "\n\n".join(["\n".join(pages.splitlines()[i : i + 10]) for i in range(0, 100, 10)])
    Path("book.txt").write_text(chapters, encoding="utf-8")
    fewer = "phases.0.steps=3 phases.0.tokens=512 data.workers=0"
    assert len(TRAINING) == 3
    for command in TRAINING:
        arguments = shlex.split(command)[1:]
        arguments += shlex.split(fewer) if arguments[0] == "pretrain" else []
        assert cli.main(arguments) == 0, capsys.readouterr().err
    from_pretrained = transformers.BertForPreTraining.from_pretrained
    assert from_pretrained("runs/tiny/checkpoints/step-00000003").num_parameters() > 5e5


BENCH = [c for c in commands() if c.startswith("bert-fast bench ")]


@pytest.mark.parametrize("command", BENCH)
def test_measuring_runs(command, tmp_path, monkeypatch, capfd):
    """In small, and on what the repository has of results."""
    monkeypatch.chdir(tmp_path)
    results = ROOT / "benchmarks" / "results"
    shutil.copytree(results, "build/benchmarks", ignore=shutil.ignore_patterns("pre*", "report"))
    for name in ("before.json", "after.json"):
        shutil.copy(max(results.glob("*/*.json")), name)
    small = ["--small", "--out", "runs"] if "--case" in command else []
    assert cli.main([*shlex.split(command)[1:], *small]) == 0, capfd.readouterr().err
    assert len([*Path().glob("runs/*.json")]) == len(small) // 3


ALONE = [c for c in commands() if c.startswith("bert-fast ") and c not in TRAINING + BENCH]


@pytest.mark.parametrize("command", ALONE)
def test_bert_fast_runs(command, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("The sea is calm.\nWaves, none.\n", encoding="utf-8")
    arguments = shlex.split(command.replace("path-or-hub-id", str(checkpoint)))[1:]
    assert cli.main(arguments) == 0, capsys.readouterr().err


def test_every_other_command_is_run_elsewhere():
    others = [c for c in commands() if not c.startswith("bert-fast ")]
    assert {shlex.join(shlex.split(c)) for c in others} == set(RUN_ELSEWHERE)
    for file, evidence in RUN_ELSEWHERE.values():
        assert evidence in (ROOT / file).read_text(encoding="utf-8"), file


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_files_named_in_the_docs_exist():
    for page in ROOT.glob("docs/*.md"):
        for name in re.findall(r"`((?:tests/)?test_\w+\.py)`", page.read_text(encoding="utf-8")):
            assert (ROOT / "tests" / Path(name).name).exists(), f"{page.name}: {name}"


def test_number_of_differences():
    """README counts what numerics.md lists."""
    numerics = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\d+\. ", numerics, re.MULTILINE)
    assert "and seventeen more" in README
    assert len(listed) == 18
