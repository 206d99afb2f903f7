"""benchmarks/record.py: one JSON file per run, whole at every moment and without paths."""

import json
import os
import tempfile
import threading
from pathlib import Path

import pytest
import record
from record import FORMAT, ROOT, Run, clean


@pytest.fixture
def run(tmp_path):
    return Run.start(tmp_path / "out" / "gpu.json", "gpu", "python benchmarks/run.py gpu", True)


def read(run):
    return json.loads(run.path.read_text(encoding="utf-8"))


def test_what_a_new_run_says(run):
    data = read(run)
    assert data.pop("started").endswith("Z")
    assert data == {
        "format": FORMAT,
        "suite": "gpu",
        "command": "python benchmarks/run.py gpu",
        "rehearsal": True,
        "finished": None,
        "ended": None,
        "environment": {},
        "ceilings": {},
        "stages": [],
        "cases": {},
        "rows": [],
    }
    assert read(Run.start(run.path, "cpu", "x"))["rehearsal"] is False


def test_what_was_put_can_be_read(run):
    run.put("case 1", "a", state="started", why="")
    run.put("case 1", "b", state="checked")
    run.put("case 1", "a", state="failed", why="≥ 3 GPUs")
    run.set("environment", {"device": "x"})
    again = Run.open(run.path)
    assert again.data == run.data and len(again.data["rows"]) == 2
    assert again.row("case 1", "a")["why"] == "≥ 3 GPUs"
    assert again.row("case 2", "a") is None and again.row("case 1", "c") is None
    assert again.unsettled("case 1", "b") and not again.unsettled("case 1", "a")
    assert not again.unsettled("", "")


@pytest.mark.parametrize("where", ["replace", "write_text"])
def test_a_crash_while_saving_leaves_the_old_file(run, monkeypatch, where):
    run.put("case 1", "a", state="checked")
    before = run.path.read_bytes()

    def crash(path, text="", *_):
        if where == "write_text":
            Path(path).write_bytes(text[: len(text) // 2].encode())
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        if where == "replace":
            patch.setattr(os, "replace", crash)
        else:
            patch.setattr(Path, "write_text", crash)
        with pytest.raises(OSError, match="no space"):
            run.put("case 1", "a", state="measured")
    assert run.path.read_bytes() == before
    run.save()
    assert Run.open(run.path).row("case 1", "a")["state"] == "measured"
    assert [path.name for path in run.path.parent.iterdir()] == ["gpu.json"]


def test_readers_always_see_a_whole_file(run):
    done, seen = threading.Event(), set()

    def look():
        while not done.is_set():
            rows = json.loads(run.path.read_text(encoding="utf-8"))["rows"]
            seen.add(len(rows))

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for i in range(200):
            run.put("case 1", f"candidate {i}", state="failed", why="x" * 300)
    finally:
        done.set()
        reader.join()
    assert len(seen) > 5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1}, Path("x")])
def test_what_is_no_json_is_refused_and_later_saves_work(run, value):
    run.put("case 1", "a", state="checked", why="")
    before = run.path.read_bytes()
    with pytest.raises((ValueError, TypeError)):
        run.put("case 1", "a", state="measured", notes={"deep": [value]})
    with pytest.raises((ValueError, TypeError)):
        run.put("case 1", "b", wall=value)
    with pytest.raises((ValueError, TypeError)):
        run.set("ceilings", value)
    run.save()
    assert run.path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 0}', f"run.json: want a run of format {FORMAT}, got 0"),
        ("{}", f"run.json: want a run of format {FORMAT}, got None"),
        ("[]", f"run.json: want a run of format {FORMAT}, got list"),
        ('{"format": 1, "rows": [', "run.json: want JSON, got"),
        ("", "run.json: want JSON, got"),
    ],
)
def test_files_that_are_no_run_are_named(tmp_path, text, message):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Run.open(path)


def test_settle_ends_what_was_under_way(run):
    wall = {"p20": 1.0, "p50": 1.0, "p80": 1.0, "n": 2}
    for state in (*record.FINAL, "started", "checked"):
        run.put("case 1", state, state=state, why="own words")
    run.put("case 1", "timed", state="checked", wall=wall)
    run.settle("past the deadline")
    rows = {row["candidate"]: row for row in read(run)["rows"]}
    for state in record.FINAL:
        assert rows[state]["state"] == state and rows[state]["why"] == "own words"
    for name in ("started", "checked"):
        assert (rows[name]["state"], rows[name]["why"]) == ("unfinished", "past the deadline")
        assert "cut" not in rows[name]
    assert rows["timed"]["state"] == "measured" and rows["timed"]["cut"] is True
    assert rows["timed"]["why"] == "past the deadline"


def test_times_of_no_worth_go(run):
    run.put("case 1", "a", state="refused", wall={}, device=None, rate={}, error={"own": {}})
    run.drop_times("case 1", "a")
    assert set(run.row("case 1", "a")) == {"case", "candidate", "state", "error"}


def test_the_heartbeat_says_who_runs():
    with tempfile.TemporaryFile() as heart:
        run = Run(Path("nowhere"), {}, heart.fileno())

        def said():
            heart.seek(0)
            return heart.read().decode().strip().partition("\t")

        assert said() == ("", "", "")
        run.at("case 10 s128", "transformers sdpa compile reduce-overhead")
        assert said() == ("case 10 s128", "\t", "transformers sdpa compile reduce-overhead")
        run.at("case 1", "a")
        assert said() == ("case 1", "\t", "a")
        run.at()
        assert said() == ("", "", "")
    Run(Path("nowhere"), {}).at("case 1", "a")  # nobody listens


def test_clean_takes_paths_away():
    paths = [ROOT / "benchmarks", Path.home() / "data", Path(tempfile.gettempdir()) / "abc"]
    found = clean(" and ".join(map(str, paths)))
    assert found == "./benchmarks and ~/data and tmp/abc"
    inside = "/opt/someone/env/lib/python3.12/site-packages/torch/nn/x.py"
    assert "someone" not in clean(f'File "{inside}", line 3')
    assert clean(f"see {inside}").endswith("site-packages/torch/nn/x.py")
    assert "someone" not in clean("/home/someone/.local/lib/python3.12/json/decoder.py")


def test_clean_gives_one_line_of_limited_length():
    assert clean("  one\n\n two\tthree ") == "one two three"
    assert clean("x" * 400) == "x" * 400
    assert clean("x" * 401) == "x" * 397 + "..."
    assert clean("abcdefgh", 6) == "abc..."


def test_summary_has_a_line_for_each_row(run):
    wall = {"p20": 1.0, "p50": 0.0025, "p80": 1.0, "n": 7}
    rate = {"tokens_per_s": 1234.0, "of_copy": 0.5}
    run.put("case 1", "a", state="measured", wall=wall, device=None, rate=rate, cut=True)
    run.put("case 1", "b", state="measured", wall=wall, device=wall | {"p50": 0.001}, rate={})
    run.put("case 2", "c", state="refused", why="y: want less")
    for name in ("d", "e"):
        run.put("case 2", name, state="passed", why="")
    zero, one, two, three = run.summary().splitlines()
    assert "2 checks passed" in zero and "tok/s" not in one  # a rehearsal's rates mean nothing
    run.data["rehearsal"] = False
    one = run.summary().splitlines()[1]
    for part in ("case 1", " a ", "2.500 ms", "1,234 tok/s", "0.5 of copy", "n 7 (cut short)"):
        assert part in one
    assert "device    1.0000 ms" in two and "cut" not in two
    assert three.startswith("case 2") and three.endswith("refused: y: want less")
    assert run.summary(["case 2"]).splitlines()[-1] == three
