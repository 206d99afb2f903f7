"""Which runs the ledger counts, which of them it shows, and its command."""

import json
import re

import ledger
import pytest
import targets
from ledger import Kept
from ledger_runs import HOST, TARGETS, cells, row, run


def write(results, name, data):
    path = results / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), "utf-8")
    return path


def test_best_of_two():
    """Both reach the goal; the slower one is newer."""
    slow = run({"case 1": [row("bert_fast", 0.31)]}, started="2025-03-01T00:00:00Z")
    quick = run({"case 1": [row("bert_fast", 0.3)]})
    for i, runs in enumerate(((quick, slow), (slow, quick))):
        own, _, file = cells("case 1", *runs)
        assert own == "0.300 ms, met" and file == f"[x/{i}](x/{i}.json)"
    slow = run({"case 1": [row("bert_fast", 0.4)]})
    assert cells("case 1", slow)[0] == "0.400 ms, **missed**"
    assert cells("case 1", run({"case 1": [row("bert_fast", 0.25)]}))[0].endswith(
        "met, stretch too"
    )
    few, many = (
        run({"case 9": [row("bert_fast", 1, rate={"sequences_per_s": n})]}) for n in (700, 812.3)
    )
    assert cells("case 9", many, few)[0] == "812 seq/s, met"


def test_a_run_with_more_figures_or_goals_met_is_better():
    times = {"attention s128, large": 100, "attention s128 dropout, large": 110}
    half = run({name: [row("bert_fast", ms)] for name, ms in times.items()})
    times |= {"attention s512, large": 100, "attention s512 dropout, large": 170}
    times["attention s128 dropout, large"] = 112
    whole = run({name: [row("bert_fast", ms)] for name, ms in times.items()})
    times |= {"attention s512 dropout, large": 150, "attention s128 dropout, large": 115}
    both_met = run({name: [row("bert_fast", ms)] for name, ms in times.items()})
    assert cells("attention dropout", half, whole)[0].startswith("s 128: 12.0 %")
    assert cells("attention dropout", half, whole, both_met)[0].startswith("s 128: 15.0 %")


@pytest.mark.parametrize("state", ["refused", "failed", "absent", "checked", "started", "passed"])
def test_only_measured_rows_count(state):
    """Times may stand in a row that was cut short; they are no evidence."""
    ours = run({"case 3": [row("bert_fast", 1.0, state), row("transformers sdpa", 9)]})
    own, against, file = cells("case 3", ours)
    assert against == "not measured yet" and file == ""
    if state in ("refused", "failed", "absent"):
        assert own == f"**{state}** in [x/0](x/0.json)"
    else:
        assert own == "not measured yet"
    peer = run({"case 3": [row("bert_fast", 5), row("transformers sdpa", 1, state)]})
    assert cells("case 3", peer)[:2] == ("5.00 ms, met, stretch too", "not measured yet")


def test_the_newest_run_refused_is_said():
    right = run({"case 3": [row("bert_fast", 5)]})
    wrong = run({"case 3": [row("bert_fast", state="refused")]}, started="2025-02-01T00:00:00Z")
    assert cells("case 3", wrong, right)[0] == (
        "5.00 ms, met, stretch too<br>**refused** in [x/0](x/0.json)"
    )
    later = run({"case 3": [row("bert_fast", 6)]}, started="2025-03-01T00:00:00Z")
    assert "refused" not in cells("case 3", wrong, right, later)[0]


def test_a_rehearsal_never_counts(tmp_path):
    data = run({"case 1": [row("bert_fast", 0.1)]}, rehearsal=True)
    assert cells("case 1", data)[0] == "not measured yet"
    write(tmp_path, "nvidia-h200/a.json", data)
    assert ledger.render(ledger.load(tmp_path)) == ledger.render([])


@pytest.mark.parametrize(
    ("environment", "dtype"),
    [
        ({"device": "NVIDIA H100", "gpu": {"name": "NVIDIA H100"}}, "bf16"),
        ({"device": "NVIDIA GH200 480GB", "gpu": {"name": "NVIDIA GH200 480GB"}}, "bf16"),
        ({"device": "H200", "gpu": None}, "bf16"),
        ({}, "fp32"),
    ],
)
def test_other_machines_and_dtypes_do_not_fill_gpu_rows(environment, dtype):
    data = run({"case 1": [row("bert_fast", 0.1)]}, dtype=dtype)
    data["environment"] |= environment
    assert cells("case 1", data)[0] == "not measured yet"


def test_a_cpu_run_fills_cpu_rows_only():
    every = {
        key: [row("bert_fast", 5)]
        for key in (*(t.key for t in targets.END_TO_END), "attention s512, large", "cpu 1x128")
    }
    data = run(every, HOST, "fp32")
    filled = [key for key in TARGETS if cells(key, data)[0] != "not measured yet"]
    assert filled == ["cpu 1x128"]
    data = run(every)  # and a GPU's time no CPU row
    assert cells("cpu 1x128", data)[0] == "not measured yet"
    data["cases"]["cpu 1x128"] = {"device": "cpu", "dtype": "fp32"}  # beside the GPU, on its host
    assert cells("cpu 1x128", data)[0] == "5.00 ms"


def test_peers_come_from_the_run_with_most_of_them():
    """A quick run without the strongest peer does not hide it."""
    few = run({"case 3": [row("bert_fast", 5), row("transformers eager", 50)]})
    many = run(
        {"case 3": [row("bert_fast", 6), row("transformers eager", 50), row("varlen_attn", 3)]}
    )
    own, against, file = cells("case 3", few, many)
    assert own.startswith("5.00 ms") and against == "**0.500x** varlen_attn, **missed**"
    assert file == "[x/0](x/0.json)<br>peers: [x/1](x/1.json)"


def test_the_ledger_of_this_repository():
    """README.md is what the results say: after a new run, `python benchmarks/ledger.py`."""
    want = ledger.render(ledger.load(ledger.RESULTS))
    assert (ledger.RESULTS / "README.md").read_text("utf-8") == want


def test_links_lead_to_files(tmp_path):
    write(tmp_path, "nvidia-h200/a.json", run({"case 1": [row("bert_fast", 0.3)]}))
    assert ledger.main([], tmp_path) == 0
    links = re.findall(r"\]\((.*?)\)", (tmp_path / "README.md").read_text("utf-8"))
    assert len(links) == 2 and all((tmp_path / link).is_file() for link in links)


def test_check_bites(tmp_path, capsys):
    path = write(tmp_path, "nvidia-h200/a.json", run({"case 1": [row("bert_fast", 0.3)]}))
    assert ledger.main(["--check"], tmp_path) == 1  # no README yet
    assert not (tmp_path / "README.md").exists()
    assert ledger.main([], tmp_path) == 0
    capsys.readouterr()
    assert ledger.main(["--check"], tmp_path) == 0 and capsys.readouterr().out == ""
    readme = tmp_path / "README.md"
    text = readme.read_text("utf-8")
    readme.write_text(text.replace("0.300 ms", "0.200 ms"), "utf-8")
    assert ledger.main(["--check"], tmp_path) == 1
    out = capsys.readouterr().out
    assert "-| **case 1**" in out and "0.200 ms" in out and "+| **case 1**" in out
    readme.write_text(text, "utf-8")
    write(tmp_path, path.relative_to(tmp_path), run({"case 1": [row("bert_fast", 0.31)]}))
    assert ledger.main(["--check"], tmp_path) == 1


def test_a_name_cannot_break_the_table(tmp_path):
    data = run({"case 3": [row("bert_fast", 5), row("odd | name\nof two lines", 8)]})
    data["environment"]["processor"] = "a | b"
    text = ledger.render([Kept("x/0.json", data)])
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {6, 12}


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, "2025-01-02-0123456"),
        ({"dirty": True}, "2025-01-02-0123456-dirty"),
        ({"commit": None, "dirty": None}, "2025-01-02-source-fedcba9"),
        ({"commit": "unknown"}, "2025-01-02-source-fedcba9"),
    ],
)
def test_keep_names_the_commit(tmp_path, environment, name):
    data = run({"case 1": [row("bert_fast", 0.3)]})
    data["environment"] |= environment
    path = write(tmp_path, "out.json", data)
    results = tmp_path / "results"
    assert ledger.main(["--keep", str(path)], results) == 0
    assert (results / "nvidia-h200" / f"{name}.json").read_bytes() == path.read_bytes()
    assert name in (results / "README.md").read_text("utf-8")


def test_keep_overwrites_nothing(tmp_path, capsys):
    paths = [
        write(tmp_path, f"{ms}.json", run({"case 1": [row("bert_fast", ms)]})) for ms in (1, 2, 3)
    ]
    results = tmp_path / "results"
    assert ledger.main(["--keep", *map(str, paths)], results) == 0
    names = [f"2025-01-02-0123456{end}.json" for end in ("", "-2", "-3")]
    assert ledger.main(["--keep", *map(str, paths)], results) == 0  # the same runs once more
    assert sorted(p.name for p in (results / "nvidia-h200").iterdir()) == sorted(names)
    for name, path in zip(names, paths, strict=True):
        assert (results / "nvidia-h200" / name).read_bytes() == path.read_bytes()


def test_a_run_that_was_killed_is_kept_as_far_as_it_came(tmp_path):
    half = row("transformers sdpa", 2) | {"state": "checked"}
    started = {"candidate": "varlen_attn", "state": "started"}
    rows = {"case 1": [row("bert_fast", 1), half, started]}
    path = write(tmp_path, "killed.json", run(rows) | {"finished": None, "ended": None})
    results = tmp_path / "results"
    assert ledger.main(["--keep", str(path)], results) == 0
    (kept,) = ledger.load(results)
    assert kept.data["ended"] == "killed"
    states = [(r["state"], r.get("cut", False)) for r in kept.data["rows"]]
    assert states == [("measured", False), ("measured", True), ("unfinished", False)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rehearsal": True}, "a rehearsal is never evidence"),
        ({"rehearsal": None}, "want true or false"),
        ({"format": 2}, "want a run of format 1, got 2"),
        ({"started": "yesterday"}, "want a date, got yesterday"),
        ({"environment": {"slug": "../up", "commit": "a" * 40}}, "got ../up"),
        ({"environment": {"slug": "cpu"}}, "want a commit or a source"),
        ({"environment": {"slug": "cpu", "commit": "../../x"}}, "want a commit in hexadecimal"),
        ({"rows": [row("bert_fast", 1)]}, "no 'case'"),
        ({"rows": [{"case": "case 1"} | row("bert_fast")]}, "want a p50 above 0, got None"),
        ({"rows": [{"case": "case 1"} | row("bert_fast", 0)]}, "want a p50 above 0"),
    ],
)
def test_keep_refuses(tmp_path, capsys, change, says):
    good = write(tmp_path, "good.json", run({"case 1": [row("bert_fast", 1)]}))
    bad = write(tmp_path, "bad.json", run({"case 1": [row("bert_fast", 1)]}) | change)
    results = tmp_path / "results"
    assert ledger.main(["--keep", str(good), str(bad)], results) == 1
    message = capsys.readouterr().err
    assert "bad.json: " in message and says in message and "good.json" not in message
    assert not results.exists()  # all or nothing


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 1}', '{"format": 1, "environment": 3}', "\udcff"]
)
def test_a_broken_file_is_named(tmp_path, capsys, text):
    path = tmp_path / "nvidia-h200" / "broken.json"
    path.parent.mkdir()
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    for command in ([], ["--check"]):
        assert ledger.main(command, tmp_path) == 1
        assert "nvidia-h200/broken.json: " in capsys.readouterr().err
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.31249, "0.312"), (5, "5.00"), (99.96, "100"), (1654, "1,650"), (4321987, "4,320,000")],
)
def test_figures(value, text):
    assert ledger.figure(value) == text
