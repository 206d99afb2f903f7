"""Writes docs/transformers-tests.md: transformers' own tests of its models, run accelerated.

python tests/transformers_suite.py TREE [--models bert roberta ...] [--out FILE] [--note TEXT]

TREE is a source tree of transformers, of the version that is installed: its wheel has no tests.
They need `parameterized`. The note goes into the table's head, as for a tree that is not whole.
Each model's tests run twice, plain and inside `bert_fast.patch_transformers()`. Exit status 1: a
test fails only accelerated and `transformers_suite_reasons.py` has no reason for it, a reason's
test passes, or no accelerated forward ran at all; 2: the tests could not be run.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from transformers_suite_reasons import REASONS

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("bert", "roberta", "xlm_roberta", "distilbert", "electra")
PATCH = "bert_fast:patch_transformers"
COLUMNS = {  # what a case can be, in the order of the table
    "passes": "passes",
    "skipped": "skipped",
    "fails": "fails in both",
    "reason": "does not apply",
    "unexplained": "fails only accelerated",
}
HEAD = """\
# transformers' own tests, with accelerated models

Made by `python tests/transformers_suite.py`; not to be edited, and no test is copied. Each file of
tests runs twice, with the same seeds: plain, and inside `bert_fast.patch_transformers()`. What
was accelerated is counted: a forward of a base model is *accelerated* when it ran on packed rows to
its end, and *original* when a model that is accelerated ran transformers' own code, as it does for
what packed rows cannot do. Inside `torch.compile` nothing is counted.
"""


class SuiteError(Exception):
    """The tests could not be run; the message is for who asked."""


@dataclass(frozen=True)
class Outcome:
    """How a test ended.

    Attributes:
        outcome: "passed", "skipped" or "failed".
        why: what the skip or the failure says.
        packed: how many accelerated forwards ran in it.
        original: how many forwards of accelerated models ran the original code, by reason.
    """

    outcome: str
    why: str = ""
    packed: int = 0
    original: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A test of a model, run both ways."""

    model: str
    name: str
    plain: Outcome
    accelerated: Outcome
    reason: str | None

    @property
    def kind(self) -> str:
        """Which of COLUMNS it is."""
        before, after = self.plain.outcome, self.accelerated.outcome
        if after == "passed":
            return "passes"
        if before == after:
            return {"skipped": "skipped", "failed": "fails"}[after]
        return "unexplained" if self.reason is None else "reason"

    def __str__(self) -> str:
        return f"{self.model}::{self.name}"

    def why(self) -> str:
        """Why it does not pass, for one cell of a table."""
        plain, accelerated = one_line(self.plain), one_line(self.accelerated)
        if self.kind == "reason":
            return self.reason or ""
        if self.kind == "fails" and plain != accelerated:  # what is hidden behind the plain failure
            return f"{plain}; accelerated: {accelerated}"
        return accelerated


def source_files(tree: Path, models: Iterable[str]) -> dict[str, Path]:
    """Return each model's file of tests.

    Raises:
        SuiteError: one is not there.
    """
    files = {model: tree / f"tests/models/{model}/test_modeling_{model}.py" for model in models}
    missing = [str(path.relative_to(tree)) for path in files.values() if not path.is_file()]
    if missing:
        raise SuiteError(
            f"TREE: want a source tree of transformers with its tests, got {tree} without"
            f" {', '.join(missing)}; the wheel and the sdist leave them out, the repository at the"
            f" tag v{importlib.metadata.version('transformers')} has them"
        )
    return files


def tree_version(tree: Path) -> str:
    """Return the __version__ in a source tree, "unknown" where there is none."""
    path = tree / "src/transformers/__init__.py"
    text = path.read_text("utf-8") if path.is_file() else ""
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    return found[1] if found else "unknown"


def run(tree: Path, file: Path, records: Path, patch: str, timeout: float) -> dict[str, Outcome]:
    """Return how each test of a file ended, by "Class::test".

    Args:
        tree: the source tree.
        file: the tests.
        records: where the plugin writes; no file yet.
        patch: "module:name" of a context that all tests run in; "" for none.
        timeout: seconds that a test may take.

    Raises:
        SuiteError: pytest cannot collect the tests, or there are none.
    """
    command = [sys.executable, "-m", "pytest", "-p", "transformers_suite_plugin", "-q"]
    command += ["-p", "no:cacheprovider", "--rootdir", str(tree), f"--suite-records={records}"]
    command += [f"--suite-patch={patch}", f"--suite-timeout={timeout}", str(file)]
    paths = [tree, Path(__file__).parent, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    lines: list[dict] = []
    while True:  # once more after each test that ended the process
        ended = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, check=False
        )
        known = {line.get("test") for line in lines}
        if records.exists():
            lines = [json.loads(line) for line in records.read_text("utf-8").splitlines()]
        finished = bool(lines) and "finished" in lines[-1]
        stuck = known == {line.get("test") for line in lines}
        if ended.returncode > 1 if finished else stuck:
            output = (ended.stdout + ended.stderr).strip().splitlines()
            raise SuiteError(f"{file.name}: pytest could not run it\n" + "\n".join(output[-25:]))
        if finished:
            break
    outcomes = {}
    for line in lines[:-1]:
        name = line.pop("test").split("::", 1)[1]
        ended_it = {"outcome": "failed", "why": f"ended the process, or took over {timeout:g} s"}
        outcomes[name] = Outcome(**(line or ended_it))
    if not outcomes:
        raise SuiteError(f"{file.name}: it has no tests")
    return outcomes


def run_both(tree: Path, file: Path, timeout: float) -> tuple[dict[str, Outcome], ...]:
    """Return how each test of a file ended, plain and accelerated."""
    with tempfile.TemporaryDirectory() as folder:
        return tuple(
            run(tree, file, Path(folder, f"{name}.jsonl"), patch, timeout)
            for name, patch in (("plain", ""), ("accelerated", PATCH))
        )


def compare(
    model: str,
    plain: Mapping[str, Outcome],
    accelerated: Mapping[str, Outcome],
    reasons: Mapping[str, str],
) -> list[Case]:
    """Return the tests of a model, in the order in which they ran."""
    missing = Outcome("failed", "was not collected")
    cases = []
    for name in dict.fromkeys([*plain, *accelerated]):
        fitting = [
            why for pattern, why in reasons.items() if fnmatchcase(f"{model}::{name}", pattern)
        ]
        both = plain.get(name, missing), accelerated.get(name, missing)
        cases.append(Case(model, name, *both, fitting[0] if fitting else None))
    return cases


def faults(cases: Sequence[Case]) -> Iterator[str]:
    """Yield what makes the suite fail."""
    for case in cases:
        if case.kind == "unexplained":
            yield f"{case}: fails only accelerated, without a reason: {one_line(case.accelerated)}"
        if case.kind == "passes" and case.reason is not None:
            yield f"{case}: passes accelerated, but has a reason why not"
    for model in dict.fromkeys(case.model for case in cases):
        if not any(case.accelerated.packed for case in cases if case.model == model):
            yield f"{model}: no accelerated forward ran"
        if any(case.plain.packed for case in cases if case.model == model):
            yield f"{model}: accelerated forwards ran in the plain run"


def unused(cases: Sequence[Case], reasons: Iterable[str]) -> list[str]:
    """Return the patterns of reasons that are no test's."""
    return [p for p in reasons if not any(fnmatchcase(str(case), p) for case in cases)]


def one_line(ended: Outcome) -> str:
    """Return what a failure or a skip says, without what belongs to a machine or a process."""
    text = ended.why.strip().splitlines()[0] if ended.why.strip() else ended.outcome
    text = re.sub(r"(?<![\w:/])/(?:[\w.+@-]+/)+", "", text)  # folders
    return re.sub(r"0x[0-9a-f]{6,}", "0x...", text)


def skip_reason(case: Case) -> str:
    """Return why a test is skipped, without the names that differ from test to test."""
    text = one_line(case.accelerated).removeprefix("Skipped: ")
    text = re.sub(r"^\S+::\S+ is skipped: ", "", text)
    text = re.sub(r"<class '[^']*'>|\b[A-Z]\w*(Model|ModelTest)\b", "...", text)
    return re.sub(r"(`)?\.\.\.(?(1)`)|`[^`]*`", "`...`", text)


def environment(tree: Path, arguments: Sequence[str], note: str) -> Iterator[tuple[str, str]]:
    """Yield what the tests ran with: name and value."""
    installed, of_tree = importlib.metadata.version("transformers"), tree_version(tree)
    other = "" if of_tree == installed else f"; **the tests are those of {of_tree}**"
    spec = importlib.util.find_spec("bert_fast")
    where = Path(spec.origin).parents[1] if spec and spec.origin else ROOT
    git = ["git", "-C", str(where), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    yield "transformers", installed + other
    yield "torch", importlib.metadata.version("torch")
    yield "Python", platform.python_version()
    yield "bert_fast", f"{importlib.metadata.version('bert-fast')}, commit {commit or 'unknown'}"
    yield "command", f"`{' '.join(['python tests/transformers_suite.py TREE', *arguments])}`"
    yield "date", datetime.date.today().isoformat()
    if note:
        yield "note", note


def rows(header: Sequence[str], lines: Iterable[Sequence[object]]) -> Iterator[str]:
    """Yield a table of Markdown."""
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for line in lines:
        yield "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |"
    yield ""


def table(cases: Sequence[Case], facts: Iterable[tuple[str, str]], found: Sequence[str]) -> str:
    """Return the text of the file.

    Args:
        cases: every test of every model.
        facts: what they ran with.
        found: what is wrong, if anything.
    """
    models = list(dict.fromkeys(case.model for case in cases))
    of_model = {model: [case for case in cases if case.model == model] for model in models}
    lines = [HEAD, *rows(("", ""), facts)]
    if found:
        lines += ["**Not as it should be:**", "", *(f"- {fault}" for fault in found), ""]
    counts = []
    for model, own in of_model.items():
        kinds = Counter(case.kind for case in own)
        packed = [case.accelerated.packed for case in own]
        original = sum(sum(case.accelerated.original.values()) for case in own)
        ran = sum(n > 0 for n in packed), sum(packed), original
        counts.append((model, len(own), *(kinds[kind] for kind in COLUMNS), *ran))
    header = ("model", "tests", *COLUMNS.values(), "tests with an accelerated forward")
    header += ("accelerated forwards", "original forwards")
    lines += ["## Counts", "", *rows(header, counts)]
    for kind in ("unexplained", "reason", "fails"):
        chosen = sorted((case for case in cases if case.kind == kind), key=Case.why)
        if chosen:
            title = COLUMNS[kind].capitalize()
            lines += [f"## {title}", "", *rows(("test", "why"), ((c, c.why()) for c in chosen))]
    surplus = [c for c in cases if c.kind == "passes" and c.plain.outcome != "passed"]
    if surplus:
        plain = ((case, one_line(case.plain)) for case in surplus)
        lines += ["## Passes only accelerated", "", *rows(("test", "plain"), plain)]
    skips, originals = defaultdict(Counter), defaultdict(Counter)
    for case in cases:
        if case.kind == "skipped":
            skips[skip_reason(case)][case.model] += 1
        for why, count in case.accelerated.original.items():
            originals[why][case.model] += count
    for title, tally in (("Original forwards", originals), ("Skipped in both", skips)):
        if tally:
            lines += [f"## {title}", ""]
            order = sorted(tally.items(), key=lambda item: (-item[1].total(), item[0]))
            lines += rows(("why", *models), ((why, *(n[m] for m in models)) for why, n in order))
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None, reasons: Mapping[str, str] = REASONS) -> int:
    """Run the tests and write the table; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tree", type=Path, metavar="TREE", help="a source tree of transformers")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/transformers-tests.md")
    parser.add_argument("--note", default="", help="what a reader of the table must know")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for a test")
    options = parser.parse_args(arguments)
    tree, cases = options.tree.resolve(), []
    try:
        for model, file in source_files(tree, options.models).items():
            print(f"{model}: plain, then accelerated", flush=True)
            cases += compare(model, *run_both(tree, file, options.timeout), reasons)
    except SuiteError as error:
        print(error, file=sys.stderr)
        return 2
    found = [*faults(cases)]
    chosen = () if options.models == MODELS else ("--models", *options.models)
    options.out.write_text(table(cases, environment(tree, chosen, options.note), found), "utf-8")
    for pattern in unused(cases, reasons):
        print(f"{pattern}: a reason, but no test of these models has that name")
    for fault in found:
        print(fault, file=sys.stderr)
    print(options.out)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
