"""benchmarks/compare.py: what it calls a regression, what it prints, and what it refuses."""

import copy
import json

import changes
import compare
import pytest
from compare_runs import (
    FLOOR,
    files,
    made,
    noise,
    pulsed,
    slower,
    timed,
    times,
    two_cases,
    verdicts,
)
from ledger import RESULTS, load
from ledger_runs import HOST, row, run

KEPT = [kept.data for kept in load(RESULTS)]


@pytest.fixture
def cli(tmp_path, capsys):
    """Give what main returns and prints for two runs."""

    def call(before, after, *options):
        status = compare.main([*files(tmp_path, before, after), *options])
        captured = capsys.readouterr()
        assert all(len(line) <= 100 for line in captured.out.split("\n\n", 1)[-1].splitlines())
        return status, captured.out, captured.err

    return call


# --- what is kept in the repository ---------------------------------------------------------------


@pytest.mark.parametrize("data", KEPT, ids=lambda data: data["environment"]["commit"][:7])
@pytest.mark.parametrize("rates", [True, False])
@pytest.mark.parametrize("ours_only", [True, False])
def test_a_fifth_more_is_caught_in_what_was_really_measured(data, ours_only, rates, cli):
    now = slower(data, 1.2, ours_only, rates)
    found, of = verdicts(data, now), noise(data, now)
    assert found and found == {
        case: "REGRESSION" if of[case] < 0.2 else "within noise" for case in found
    }
    caught = list(found.values()).count("REGRESSION")
    assert caught > 0.9 * len(found)
    status, out, _ = cli(data, now)
    assert status == 1 and out.count("REGRESSION\n") == caught
    machine = "the peers are 20.0 % slower, too: the machine more likely than the code"
    assert (machine in out) is not ours_only


def test_two_runs_of_one_commit_agree(cli):
    """On two cores that others share, twelve minutes apart."""
    first, second = (d for d in KEPT if d["environment"]["commit"].startswith("dffe732"))
    before, after = sorted((first, second), key=lambda data: data["started"])
    status, out, _ = cli(before, after)
    assert status == 0 and out.rstrip().endswith("103 cases: 46 same, 57 within noise")
    whole = [found for case, found in verdicts(before, after).items() if case.startswith("cpu ")]
    assert whole == ["same"] * 5
    assert cli(before, slower(after, 1.2))[0] == 1


@pytest.mark.parametrize("data", KEPT, ids=lambda data: data["environment"]["commit"][:7])
def test_what_is_within_noise_is_not(data, cli):
    for now in (data, slower(data, 1.02), slower(data, 0.98)):
        status, out, _ = cli(data, now)
        assert status == 0 and "REGRESSION" not in out
    assert set(verdicts(data, data).values()) == {"same"}
    for share, regressed in ((0.8, False), (1.25, True)):
        now = copy.deepcopy(data)
        for one in now["rows"]:
            if (one["candidate"], one["state"]) == ("bert_fast", "measured"):
                of = {name: 1 + share * value for name, value in noise(data).items()}
                for name in ("p20", "p50", "p80"):
                    one["wall"][name] *= of[one["case"]]
        assert any(v == "REGRESSION" for v in verdicts(data, now, 0.1).values()) is regressed
        assert set(verdicts(data, now, 0.1).values()) == {
            "REGRESSION" if regressed else "within noise"
        }


@pytest.mark.parametrize("data", KEPT, ids=lambda data: data["environment"]["commit"][:7])
def test_the_other_way_round_it_is_faster(data, cli):
    status, out, _ = cli(slower(data, 1.2), data)
    assert status == 0 and set(verdicts(slower(data, 1.2), data).values()) <= {
        "faster",
        "within noise",
    }
    assert " faster\n" in out and "REGRESSION" not in out


# --- facts and states -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fact", "was", "is_now"),
    [
        ("tokens", 128, 256),
        ("dtype", "fp32", "bf16"),
        ("model", "base", "large"),
        ("flops", 1e9, 2e9),
        ("lengths", "glue", "squad"),
        ("flushed", False, True),
        ("seed", 1, 2),
        ("sizes", {"T": 1}, {"T": 2}),
    ],
)
def test_a_case_made_otherwise_is_another(fact, was, is_now, cli):
    before, after = two_cases(), slower(two_cases(), 2)
    before["cases"]["cpu 8x128"][fact], after["cases"]["cpu 8x128"][fact] = was, is_now
    status, out, _ = cli(before, after)
    assert status == 1 and f"not compared: cpu 8x128: another case: not compared: {fact} " in out
    assert verdicts(before, after) == {"cpu 1x128": "REGRESSION"}
    del before["cases"]["cpu 8x128"][fact]  # nobody said so then
    if fact != "dtype":
        assert verdicts(before, after).keys() == before["cases"].keys()


def test_what_does_not_say_what_was_done_may_differ():
    before, after = two_cases(), two_cases()
    case = {"bytes": 0, "fill": 0.1 + 0.2, "baseline": "a", "clocks": {"mhz": 1}}
    before["cases"]["cpu 1x128"] |= case
    after["cases"]["cpu 1x128"] |= {"bytes": None, "fill": 0.3, "baseline": "b", "clocks": {}}
    pulsed(before, [0.2, 0.2])
    pulsed(after, [0.21, 0.2])
    assert verdicts(before, after).keys() == before["cases"].keys()


def test_another_number_of_threads_is_another_case():
    before, after = two_cases(), two_cases()
    before["environment"] |= {"threads": 2}
    after["environment"] = after["environment"] | {"threads": 1}
    with pytest.raises(ValueError, match="threads 2 before, 1 after"):
        changes.compare(before, after, 0.05)


@pytest.mark.parametrize(
    "state", ["refused", "failed", "absent", "unfinished", "started", "checked", None]
)
def test_ours_that_is_not_measured_any_more_is_lost(state, cli):
    before, after = two_cases(), two_cases()
    gone = after["rows"].pop()
    if state:
        after["rows"].append({"case": gone["case"]} | row("bert_fast", state=state, why="so it is"))
    status, out, _ = cli(before, after)
    why = f"{state}: so it is" if state else "no row"
    assert status == 1 and f"\nLOST: cpu 8x128: bert_fast: {why}\n" in out
    assert out.endswith("2 cases: 1 same, 1 LOST\n")
    status, out, _ = cli(after, before)  # it came back
    assert status == 0 and f"bert_fast: {state}" in out if state else status == 0


def test_all_of_ours_lost_is_still_said(cli):
    before, after = made(timed("bert_fast", 10)), made(row("bert_fast", state="failed"))
    status, out, _ = cli(before, after)
    assert status == 1 and out.endswith("1 case: 1 LOST\n")
    assert cli(after, before)[0] == 2  # nothing to compare with


def test_what_passed_without_being_timed_is_not_lost(cli):
    before, after = two_cases(), two_cases()
    after["rows"][1] = {"case": "cpu 8x128"} | row("bert_fast", state="passed")
    status, out, _ = cli(before, after)
    assert status == 0 and "cpu 8x128: bert_fast: right, but not timed in B" in out


def test_a_subset_of_the_cases_is_compared(cli):
    before, after = two_cases(), made(timed("bert_fast", 10))
    status, out, _ = cli(before, after)
    assert status == 0 and "not compared: cpu 8x128: not in B\n" in out and "1 case: 1 same" in out
    status, out, _ = cli(after, before)
    assert status == 0 and "not compared: cpu 8x128: not in A\n" in out


# --- peers, memory, versions ----------------------------------------------------------------------


def with_peers(ours=10, peers=(10, 10, 10)):
    names = ("transformers sdpa", "onnxruntime", "torch")
    theirs = [timed(name, ms) for name, ms in zip(names, peers, strict=True)]
    return made(timed("bert_fast", ours), *theirs)


def test_peers_never_fail(cli):
    status, out, _ = cli(with_peers(), with_peers(peers=(10, 10, 20)))
    assert status == 0 and "Peers that moved:" in out
    assert "cpu 1x128: torch" in out and "onnxruntime" not in out and "the peers are" not in out
    status, out, _ = cli(with_peers(), with_peers(peers=(10, 10, 20)), "--all")
    assert status == 0 and "cpu 1x128: onnxruntime" in out
    assert "1 case: 1 same" in out


def test_peers_that_move_together_speak_for_the_machine(cli):
    status, out, _ = cli(with_peers(), with_peers(12, (11, 11, 10)))
    assert status == 1
    assert "the peers are 10.0 % slower, too: the machine more likely than the code\n" in out
    status, out, _ = cli(with_peers(), with_peers(10, (11, 11, 10)))
    assert status == 0 and "the peers are 10.0 % slower: the machine more likely" in out
    status, out, _ = cli(with_peers(), with_peers(12, (9, 9, 9)))
    assert status == 1 and "the peers are 10.0 % faster: the machine" in out
    other = with_peers(12, (11, 11, 11))
    other["environment"] = other["environment"] | {"torch": "2.12"}
    status, out, _ = cli(with_peers(), other)
    assert "other versions: torch 2.11 before, 2.12 after\n" in out
    assert "slower, too: the machine, or other versions more likely than the code" in out


@pytest.mark.parametrize(
    ("was", "is_now"), [({"peak": 2**30}, {"peak": 2**31}), ({"held": 1, "call": 2**29},
                                                             {"held": 2**29, "call": 2**30})]
)  # fmt: skip
def test_more_memory_is_said_and_does_not_fail(was, is_now, cli):
    before = made(timed("bert_fast", 10, memory=was), timed("torch", 10, memory=was))
    after = made(timed("bert_fast", 10, memory=is_now), timed("torch", 10, memory=is_now))
    status, out, _ = cli(before, after)
    assert status == 0 and out.count("more memory: cpu 1x128: ") == 1 and " MiB" in out
    assert "more memory" not in cli(after, before)[1]


# --- what is printed ------------------------------------------------------------------------------


def test_the_table(cli):
    names = [f"case {i}" for i in range(5)]
    before = run({n: [timed("bert_fast", 10, 0.02)] for n in names}, HOST, "fp32")
    after = copy.deepcopy(before)
    for one, ms in zip(after["rows"], (10, 12, 10 + 20 * FLOOR, 8, 10 + 6 * FLOOR), strict=True):
        one["wall"] = times(ms, 0.0)
    status, out, _ = cli(before, after, "--fail-over", "10")
    lines = out.splitlines()
    assert status == 1 and lines[0].startswith("A  2025-01-02T03:04, commit 0123456, made up: ")
    assert lines[1].startswith("B  ") and lines[3].split()[:3] == ["case", "A", "ms"]
    cells = [line.split() for line in lines[4:9]]
    assert [line[1] for line in cells] == ["1", "2", "0", "3", "4"]  # regressions first
    assert [line[-1] for line in cells] == ["REGRESSION", "slower", "same", "faster", "same"]
    assert (
        cells[0][2:5] == ["10", "12", "+20.0"]
        and cells[0][5] == f"+-{100 * noise(before, after)['case 1']:.1f}"
    )
    assert out.endswith(
        "\n5 cases: 2 same, 1 faster, 1 slower, 1 regression (> 10 % and beyond noise)\n"
    )


def test_a_long_name_has_a_line_of_its_own(cli):
    name = "a case whose name is longer than any that there is, by far"
    rows = [timed("bert_fast", 10), timed("torch compile max-autotune of all", 10)]
    status, out, _ = cli(*[run({name: rows}, HOST, "fp32")] * 2, "--all")
    assert status == 0 and f"\n{name}\n  " in out
    assert f"\n{name}: torch compile max-autotune of all\n  " in out
    after = made(row("bert_fast", state="failed", why="a word and " * 30))
    assert cli(made(timed("bert_fast", 10)), after)[0] == 1


# --- what cannot be compared ----------------------------------------------------------------------


def test_another_machine(cli):
    for key, other in (("slug", "nvidia-h200"), ("device", "Intel Xeon")):
        after = two_cases()
        after["environment"] = after["environment"] | {key: other}
        status, out, err = cli(two_cases(), after)
        assert (status, out) == (2, "") and err.startswith("compare: want two runs of one machine")
        assert f"want {key} {HOST[key]} as in A, got {other}" in err


def test_rehearsals_are_never_evidence(cli):
    for pair, name in (((True, False), "A"), ((False, True), "B")):
        status, out, err = cli(*(two_cases(rehearsal=flag) for flag in pair))
        assert (status, out) == (2, "") and f"{name}: want a run, got a rehearsal" in err


def test_nothing_in_common(cli):
    status, out, err = cli(made(timed("bert_fast", 1)), made(timed("bert_fast", 1), case="other"))
    assert (status, out) == (2, "") and "want a case in which bert_fast was measured in both" in err
    assert "(cpu 1x128: not in B; other: not in A)" in err
    status, _, err = cli(made(timed("torch", 1)), made(timed("torch", 1)))
    assert status == 2 and err.endswith("got none\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "b.json: want JSON"),
        ("[]", "b.json: want a run of format 1, got list"),
        ('{"format": 2}', "b.json: want a run of format 1, got 2"),
        ('{"format": 1}', "environment"),
        ({"p20": 1, "p50": 2, "p80": 1.5, "n": 3}, "bert_fast: wall: want p20 <= p50 <= p80"),
        ({"p50": 2}, "bert_fast: wall: want p20 <= p50 <= p80 of n calls, got"),
        ({"p20": 1, "p50": 2, "p80": 3, "n": 0}, "of n calls"),
        ({"p20": -1, "p50": 2, "p80": 3, "n": 3}, "of n calls"),
        ({"p20": "1", "p50": 2, "p80": 3, "n": 3}, "of n calls"),
        ("pulse", "cpu 1x128: pulse: want a p50 above 0"),
        (None, "b.json: want a run or a directory of runs, got nothing"),
    ],
)
def test_broken_files(text, message, tmp_path, capsys):
    after = two_cases()
    if isinstance(text, dict):
        after["rows"][0]["wall"] = text
    if text == "pulse":
        pulsed(after, [0.0, 0.1])
    paths = files(tmp_path, two_cases(), after)
    if isinstance(text, str) and text != "pulse":
        (tmp_path / "b.json").write_text(text, "utf-8")
    if text is None:
        (tmp_path / "b.json").unlink()
    assert compare.main(paths) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("compare: ") and message in captured.err
    assert captured.err.count("\n") == 1


def test_of_a_directory_the_newest_run_counts(tmp_path, capsys):
    """Rehearsals and what is no run are passed over, the latter is said."""
    (tmp_path / "runs").mkdir()
    for name, started, rehearsal in (
        ("b", "2025-01-01T00:00:00Z", False),
        ("a", "2025-02-01T00:00:00Z", False),
        ("c", "2025-03-01T00:00:00Z", True),
    ):
        data = two_cases(started=started, rehearsal=rehearsal)
        (tmp_path / "runs" / f"{name}.json").write_text(json.dumps(data), "utf-8")
    (tmp_path / "runs" / "d.json").write_text("{}", "utf-8")
    (path,) = files(tmp_path, slower(two_cases(), 2))
    assert compare.main([path, str(tmp_path / "runs")]) == 0
    captured = capsys.readouterr()
    assert f"B  2025-02-01T00:00, commit 0123456, made up: {tmp_path}/runs/a.json" in captured.out
    assert captured.err.count("left out: ") == 1 and "d.json" in captured.err
    (tmp_path / "empty").mkdir()
    assert compare.main([path, str(tmp_path / "empty")]) == 2
    assert "want a directory with a run, got no .json file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fail-over", "nan"], "want a percentage above 0, got nan"),
        (["--fail-over", "inf"], "want a percentage above 0, got inf"),
        (["--fail-over", "0"], "want a percentage above 0, got 0"),
        (["--fail-over=-5"], "want a percentage above 0, got -5"),
        (["--fail-over", "x"], "--fail-over"),
        (["--nope"], "--nope"),
        (["third"], "third"),
    ],
)
def test_wrong_command_lines(options, message, tmp_path, capsys):
    paths = files(tmp_path, two_cases(), two_cases())
    with pytest.raises(SystemExit) as end:
        compare.main([*paths, *options])
    assert end.value.code == 2 and message in capsys.readouterr().err
