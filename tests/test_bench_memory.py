"""benchmarks/memory.py, and the stages of a CPU's run that choose whom to measure."""

import json
import os
from types import SimpleNamespace

import memory
import pytest
import stages
import suites
from bench_cases import CPU, start
from record import ROOT

PARTS = {"imported", "held", "peak", "lifetime"}
LINUX = pytest.mark.skipif(
    not memory._RESET.exists() or not os.access(memory._RESET, os.W_OK),
    reason="this system does not reset the peak of resident memory",
)


def context(run, small=True, until=float("inf")):
    return stages.Context(run, CPU, small, until)


@LINUX
def test_a_process_measures_one_candidate():
    found = memory.of("cpu 8x128", "bert_fast", True, 120.0)
    assert set(found) == PARTS and 2**26 < found["imported"] <= found["held"]
    assert found["held"] <= found["peak"] <= found["lifetime"]


@LINUX
def test_the_peak_is_that_of_one_call(monkeypatch):
    """Neither what was freed before it nor what comes after it is part of it."""
    calls, pinned = [], []

    def run(inputs):
        calls.append(bytearray(b"x") * (2**27 if calls else 2**25))
        calls[-1] = None

    def alone(case, candidate, small):
        bytearray(b"x") * 2**28
        small = [bytearray(b"x") * 2**16 for _ in range(2**11)]
        pinned.append(small[-1])  # what lies below it stays with the process until it is trimmed
        return SimpleNamespace(run=run), None

    monkeypatch.setattr(memory, "alone", alone)
    found = memory.measure("cpu 8x128", "bert_fast")
    assert len(calls) == 2
    assert abs(found["peak"] - found["held"] - 2**27) < 2**24
    assert found["lifetime"] >= found["imported"] + 2**28 - 2**24
    assert found["held"] < found["imported"] + 2**24


def test_a_process_that_fails_is_told():
    with pytest.raises(RuntimeError, match=r"with 1: AbsentError: needs CUDA"):
        memory.of("cpu 8x128", "transformers sdpa cudnn", True, 120.0)
    with pytest.raises(RuntimeError, match="not measured after 0 s"):
        memory.of("cpu 8x128", "bert_fast", True, 0.0)


def test_what_was_measured_gets_its_memory_and_the_rest_none(monkeypatch, tmp_path, capsys):
    one = start(tmp_path)
    for i, (name, state) in enumerate(
        [("bert_fast", "measured"), ("slow", "measured"), ("wrong", "refused"), ("b", "measured")]
    ):
        one.put("cpu 8x128", name, state=state, why="", wall={"p50": i + 1.0})
    one.put("cpu glue", "bert_fast", state="measured", why="", wall={"p50": 1.0})  # a trend
    asked = []

    def of(case, candidate, small, seconds):
        asked.append((case, candidate, small))
        if candidate == "slow":
            raise RuntimeError("memory: not measured after 3 s")
        return dict.fromkeys(PARTS, 2**20)

    monkeypatch.setattr(memory, "of", of)
    stages.perform("memory", context(one))
    assert sorted(asked) == [("cpu 8x128", name, True) for name in ("b", "bert_fast", "slow")]
    rows = json.loads(one.path.read_text())["rows"]
    assert "memory" not in rows[-1]
    rows = {row["candidate"]: row for row in rows[:-1]}
    got = {name: row.get("memory") for name, row in rows.items()}
    assert got["bert_fast"] == got["b"] == dict.fromkeys(PARTS, 2**20)
    assert got["slow"] is None and got["wrong"] is None
    assert rows["bert_fast"]["wall"] == {"p50": 1.0} and rows["slow"]["state"] == "measured"
    said = capsys.readouterr().out
    assert "slow: memory: not measured after 3 s" in said and "1 MiB, 1 before the call" in said


@pytest.mark.parametrize("row", ["cpu 1x128", "cpu 8x128 bf16", "cpu mini 32x128"])
def test_a_row_of_the_table_has_the_peers_it_names(monkeypatch, tmp_path, row):
    seen = {}

    def measure(case, candidates, run, **how):
        seen.update(names=[c.name for c in candidates], case=case.name, **how)

    monkeypatch.setattr(stages.harness, "measure", measure)
    one = start(tmp_path)
    one.data["suite"] = "all"
    stages.perform(row, context(one))
    module = suites.MODULES[suites.family_of(row)]
    peers = set(module.CPU_PEERS) - {"sentence-transformers"}
    assert seen["names"][0] == "bert_fast" and set(seen["names"][1:]) == peers
    assert seen["case"] == row and (seen["rounds"], seen["least"]) == (3, 1)
    assert str(ROOT) not in (tmp_path / "run.json").read_text()
