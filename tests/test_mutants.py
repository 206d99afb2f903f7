"""The faults of mutants.py still fit the sources, and mutate.py tells what became of each.

That each makes a test fail takes `make mutants`.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import mutate
import pytest
from mutant import Mutant
from mutants import MUTANTS

# --- the list ------------------------------------------------------------------------------------


def test_every_fault_applies_once():
    problems = []
    for mutant in MUTANTS:
        source = (mutate.ROOT / mutant.file).read_text("utf-8")
        try:
            changed = compile(mutant.apply(source), mutant.file, "exec")
        except (ValueError, SyntaxError) as error:
            problems.append(f"{mutant.name}: {error}")
            continue
        if changed == compile(source, mutant.file, "exec"):
            problems.append(f"{mutant.name}: changes nothing")
    assert not problems, "\n".join(problems)


def test_names_are_unique_and_enough():
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names) >= 40


def test_every_fault_names_tests_that_exist():
    for mutant in MUTANTS:
        text = (mutate.ROOT / mutant.tests).read_text("utf-8")
        wanted = re.findall(r"test_\w+", mutant.chosen)
        assert wanted, mutant.name
        for name in wanted:
            assert f"def {name}" in text, f"{mutant.name}: no {name} in {mutant.tests}"


def test_every_kernel_file_has_faults_and_every_kernel_test_sees_one():
    kernels = {path.name for path in (mutate.ROOT / "kernels").glob("*.py")} - {"__init__.py"}
    assert kernels <= {Path(mutant.file).name for mutant in MUTANTS}
    tests = {path.name for path in (mutate.ROOT / "tests").glob("test_*kernel*.py")}
    assert tests <= {Path(mutant.tests).name for mutant in MUTANTS}


# --- one fault -----------------------------------------------------------------------------------

SOURCE = '''"""Halves and thirds."""


def half(x):
    return x / 2


def third(x):
    return x / 3
'''
TESTS = """from thing import half, third


def test_half():
    assert half(6) == 3


def test_third():
    assert third(6) == 2


def test_of_nothing():
    assert third(0) == 0
"""
fault = partial(Mutant, file="thing.py", tests="test_thing.py")
KILLED = fault("half of a half", "x / 2", "x / 4", "test_half")
SURVIVED = fault("a third is a fourth", "x / 3", "x / 4", "test_of_nothing")


@pytest.fixture
def tree(tmp_path) -> Path:
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "thing.py").write_text(SOURCE)
    (folder / "test_thing.py").write_text(TESTS)
    return folder


@pytest.fixture(scope="module")
def worker() -> Iterator[mutate.Worker]:
    """Without modules: the toy needs none."""
    worker = mutate.Worker(modules=())
    yield worker
    worker.close()


def test_apply():
    assert KILLED.apply(SOURCE) == SOURCE.replace("x / 2", "x / 4")
    inside = fault("a third", "return x", "return -x", "test_third", within="third")
    assert inside.apply(SOURCE) == SOURCE.replace("x / 3", "-x / 3")
    last = fault("a half", "return x", "return -x", "test_half", within="half")
    assert last.apply(SOURCE) == SOURCE.replace("x / 2", "-x / 2")


@pytest.mark.parametrize(
    ("text", "within", "got"),
    [
        ("x / 5", "", "thing.py: want 'x / 5' once, got it 0 times"),
        ("return x", "", "got it 2 times"),
        ("x / 2", "third", "thing.py third: want 'x / 2' once, got it 0 times"),
        ("x / 2", "fourth", "want 'def fourth(' once, got it 0 times"),
    ],
)
def test_what_does_not_apply(text, within, got, tree, worker):
    verdict = mutate.judge(worker, fault("f", text, "", "test_half", within=within), tree, 60)
    assert verdict.outcome == "did not apply" and got in verdict.detail


@pytest.mark.parametrize(
    ("mutant", "outcome", "detail"),
    [
        (KILLED, "killed", "test_half - "),
        (SURVIVED, "survived", "test_thing.py -k 'test_of_nothing'"),
        (fault("dies", "x / 2", "__import__('os').abort()", "test_half"), "killed", "SIGABRT"),
        (fault("no test", "x / 2", "x", "test_fourth"), "no verdict", "exit status 5"),
    ],
    ids=lambda value: value.name if isinstance(value, Mutant) else "",
)
def test_verdicts(mutant, outcome, detail, tree, worker):
    verdict = mutate.judge(worker, mutant, tree, 60)
    assert verdict.outcome == outcome and detail in verdict.detail, verdict
    assert (tree / "thing.py").read_text() == SOURCE  # the fault was in a copy


def test_a_fault_that_hangs(tree, worker):
    hangs = fault("hangs", "return x / 2", "while True: pass", "test_half")
    verdict = mutate.judge(worker, hangs, tree, 2)
    assert verdict.outcome == "killed" and verdict.detail == "not done within 2 s"


# --- all of them ---------------------------------------------------------------------------------


@pytest.fixture
def checkout(tree, monkeypatch) -> Path:
    """The toy as a checkout, which `main` takes for its own."""
    for folder in ("bert_fast", "kernels"):
        (tree / folder).mkdir()
        (tree / folder / "__init__.py").write_text("")
    (tree / ".gitignore").write_text("secret\n")
    (tree / "secret").write_text("")
    subprocess.run(["git", "init", "--quiet", str(tree)], check=True)
    monkeypatch.setattr(mutate, "ROOT", tree)
    monkeypatch.setattr(mutate, "MUTANTS", (KILLED, SURVIVED))
    monkeypatch.setattr(mutate.Worker.__init__, "__defaults__", ((),))  # no modules
    return tree


def test_a_copy_is_what_python_imports(checkout, tmp_path):
    """Its kernels too, though an installed bert_fast has kernels of its own."""
    copy = tmp_path / "copy"
    mutate.copy_checkout(checkout, copy)
    assert (copy / "thing.py").read_text() == SOURCE and not (copy / "secret").exists()
    code = "import bert_fast, bert_fast.kernels as k; print(bert_fast.__file__, k.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(copy)}, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    files = [copy / "bert_fast" / "__init__.py", copy / "bert_fast" / "kernels" / "__init__.py"]
    assert found.stdout.split() == [str(file) for file in files]


def test_main(checkout, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mutate.py", "--jobs", "2"])
    assert mutate.main() == 1
    said = capsys.readouterr().out
    assert "the tests pass without a fault" in said and "2 mutants, 1 killed" in said
    assert re.search(r"survived .* a third is a fourth", said)
    monkeypatch.setattr(sys, "argv", ["mutate.py", "half*"])
    assert mutate.main() == 0
    assert "1 mutants, 1 killed" in capsys.readouterr().out


def test_main_wants_tests_that_pass(checkout, monkeypatch, capsys):
    (checkout / "thing.py").write_text(SOURCE.replace("x / 2", "x"))
    monkeypatch.setattr(sys, "argv", ["mutate.py"])
    assert mutate.main() == 1
    said = capsys.readouterr().out
    assert "fails without a fault: test_thing.py" in said and "killed" not in said


def test_main_refuses_a_name_of_none(checkout, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mutate.py", "quarter"])
    with pytest.raises(SystemExit):
        mutate.main()
    assert "want a mutant of tests/mutants.py, got quarter" in capsys.readouterr().err
