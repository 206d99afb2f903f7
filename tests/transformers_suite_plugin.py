"""A pytest plugin: writes down each test's outcome, with every BERT of transformers accelerated or
as it is. `transformers_suite.py` runs a file of transformers' tests with it, once each way.

The lines of the file that --suite-records names are JSON: {"test"} before a test, {"test",
"outcome", "why", "packed", "original"} after it, {"finished"} at the end. A test with a line is
not run again, so that a run which a crash or the time limit ended can go on behind that test.
"""

import contextlib
import faulthandler
import functools
import importlib
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# The installed one, although the conftest.py of a source tree puts the tree's own in front: the
# first import counts.
import transformers  # noqa: F401

from bert_fast.hf import forward


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("suite")
    group.addoption("--suite-records", help="write the outcomes to this file")
    group.addoption("--suite-patch", default="", help="module:name of a context for all tests")
    group.addoption("--suite-timeout", type=float, default=300.0, help="seconds for a test")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--suite-records"):
        config.pluginmanager.register(Recorder(config), "suite-recorder")


class Forwards:
    """Counts what accelerated models run.

    Attributes:
        packed: how many forwards ran on packed rows to their end.
        original: how many ran the original code, by reason.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.packed, self.original = 0, Counter[str]()

    def watch(self, function: Callable[..., Any], ends: bool) -> Callable[..., Any]:
        """Return a step of a forward that is counted; `ends`: behind it nothing is refused."""

        @functools.wraps(function)
        def step(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # counting would break the graph
                return function(*args, **kwargs)
            try:
                result = function(*args, **kwargs)
            except NotImplementedError as error:
                self.original[str(error)] += 1
                raise
            self.packed += ends
            return result

        return step

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside the block all accelerated models are counted."""
        check, run = forward.check, forward.run
        forward.check, forward.run = self.watch(check, ends=False), self.watch(run, ends=True)
        try:
            yield
        finally:
            forward.check, forward.run = check, run


class Recorder:
    """The hooks."""

    def __init__(self, config: pytest.Config):
        self.path = Path(config.getoption("--suite-records"))
        self.timeout = config.getoption("--suite-timeout")
        self.forwards = Forwards()
        self.outcome, self.why = "passed", ""
        self.contexts = contextlib.ExitStack()
        self.contexts.enter_context(self.forwards.watched())
        module, _, name = config.getoption("--suite-patch").partition(":")
        if name:
            self.contexts.enter_context(getattr(importlib.import_module(module), name)())
        self.start_limit()

    def start_limit(self) -> None:
        """End the process unless this is called again in time; the collection counts as a test."""
        faulthandler.dump_traceback_later(self.timeout, exit=True, file=sys.__stderr__)

    def write(self, **line: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @pytest.hookimpl(trylast=True)  # after -m and -k
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[Any]) -> None:
        seen = set()
        if self.path.exists():
            lines = self.path.read_text("utf-8").splitlines()
            seen = {json.loads(line)["test"] for line in lines}
        items[:] = [item for item in items if item.nodeid not in seen]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.forwards.clear()
        self.outcome, self.why = "passed", ""
        self.write(test=item.nodeid)
        # the same weights and inputs both times: transformers' tests draw them without a seed
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)
        inputs = getattr(sys.modules.get("tests.test_modeling_common"), "global_rng", None)
        if inputs is not None:
            inputs.seed(0)
        self.start_limit()
        result = yield
        ran = vars(self.forwards)
        self.write(test=item.nodeid, outcome=self.outcome, why=self.why, **ran)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the first failure, of a subtest too; else the skip of the whole test."""
        if report.failed and self.outcome != "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            self.outcome = "failed"
            self.why = crash.message if crash else str(report.longrepr)
        elif report.skipped and self.outcome == "passed" and type(report) is pytest.TestReport:
            self.outcome = "skipped"
            expected = hasattr(report, "wasxfail")
            self.why = f"xfail {report.wasxfail}" if expected else report.longrepr[2]

    def pytest_sessionfinish(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.contexts.close()
        self.write(finished=True)
