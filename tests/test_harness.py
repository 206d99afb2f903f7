"""benchmarks/harness.py: who is timed, in which order, and what its row says."""

import json
import random
import time
from dataclasses import replace
from types import SimpleNamespace

import harness
import pytest
import timing
import torch
from bench_cases import CPU, Fake, candidates, case, exact, in_blocks, plain, start
from gate import AbsentError
from harness import DeviceLostError, measure, prove

TIMES = {"wall", "device", "rate"}


@pytest.fixture
def run(tmp_path):
    return start(tmp_path)


def wrong(x_TD):
    answer = in_blocks(x_TD)
    return answer | {"y": answer["y"] * 1.05}


def raises(error, at=1):
    """A call that raises from its `at`-th time on."""
    calls = []

    def call(*_):
        calls.append(1)
        if len(calls) >= at:
            raise error

    return call


def answers(*of_each_call):
    """One answer after the other; the last one for all further calls."""
    queue = list(of_each_call)
    return lambda x_TD: (queue.pop(0) if len(queue) > 1 else queue[0])(x_TD)


def in_file(run):
    """The rows as the file has them, by candidate."""
    rows = json.loads(run.path.read_text())["rows"]
    assert len({row["candidate"] for row in rows}) == len(rows)
    return {row["candidate"]: row for row in rows}


class Clock:
    """A clock that only `advance` moves, instead of time's two."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        fake = SimpleNamespace(monotonic=lambda: self.now, perf_counter=lambda: self.now)
        monkeypatch.setattr(harness, "time", fake)
        monkeypatch.setattr(timing, "time", fake)

    def advance(self, seconds=1.0):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_wrong_answers_are_never_timed_and_the_others_go_on(run):
    planted = {
        "wrong": wrong,
        "stale": answers(in_blocks, lambda x: in_blocks(case().inputs[0])),
        "NaN": lambda x: in_blocks(x) | {"y": in_blocks(x)["y"] * float("nan")},
        "shape": lambda x: in_blocks(x) | {"tiny": torch.zeros(1)},
        "names": lambda x: {"y": in_blocks(x)["y"]},
    }
    fakes = [Fake(name, answer) for name, answer in planted.items()]
    before, after = Fake("before"), Fake("after")
    measure(case(), candidates([before, *fakes, after]), run, rounds=6)
    rows = in_file(run)
    for fake in fakes:
        row = rows[fake.name]
        assert row["state"] == "refused" and "want" in row["why"]
        assert not TIMES & set(row) and fake.runs == 0 and fake.checks > 0
    error = rows["wrong"]["error"]
    assert error["own"]["l2"] == pytest.approx(0.05, rel=0.01) and error["worst"] == "y"
    assert rows["stale"]["error"]["own"]["l2"] > 0.1 > rows["stale"]["error"]["baseline"]["l2"]
    assert rows["NaN"]["error"] is None
    for fake in (before, after):
        row = rows[fake.name]
        assert row["state"] == "measured" and row["wall"]["n"] == 6 and "cut" not in row
        assert row["error"]["share"] < 1 and row["device"] is None and row["why"] == ""
        assert row["memory"] is None and row["syncs"] is None and row["recompiled"] == 0
        assert set(row["preparation"]) == {"prepare_s", "first_call_s"}
        assert fake.checks == 4  # both inputs, cold and warm
    assert set(rows) == {"before", *planted, "after"}


def test_right_when_cold_and_wrong_when_warm(run):
    turns = Fake("turns", answers(in_blocks, in_blocks, wrong))
    right = Fake("right")
    measure(case(), candidates([turns, right]), run, rounds=3)
    row = in_file(run)["turns"]
    assert row["state"] == "refused" and row["why"].startswith("after it was timed: y: want")
    assert not TIMES & set(row) and row["error"]["share"] > 1
    assert in_file(run)["right"]["state"] == "measured"


def test_a_peer_may_have_an_error_of_its_own(run):
    """Cold and warm; who is not given that is refused with the same answers."""
    rough = lambda x: plain(x) | {"y": plain(x)["y"] + (plain(x)["y"] - exact(x)["y"]) * 2}  # noqa: E731
    fakes = [Fake("bert_fast", rough), Fake("peer", rough), Fake("off", wrong)]
    ours, peer, off = candidates(fakes)
    few = [ours, replace(peer, factor=4.0), replace(off, factor=4.0)]
    measure(case("bf16"), few, run, rounds=2)
    states = {name: row["state"] for name, row in in_file(run).items()}
    assert states == {"bert_fast": "refused", "peer": "measured", "off": "refused"}
    assert fakes[1].checks == 4 and 0.5 < in_file(run)["peer"]["error"]["share"] <= 1


@pytest.mark.parametrize(
    "error", [RuntimeError("out of luck"), SystemExit(0), AbsentError("no luck")]
)
def test_a_crash_is_a_row_and_the_others_go_on(run, error):
    late = [in_blocks, in_blocks, raises(error)]
    fakes = {
        "prepare": Fake("prepare", prepare=raises(error)),
        "check": Fake("check", answers(in_blocks, raises(error))),
        "warm-up": Fake("warm-up", run=raises(error)),
        "rounds": Fake("rounds", run=raises(error, at=5)),
        "at last": Fake("at last", answers(*late)),
    }
    right = Fake("right")
    measure(case(), candidates([*fakes.values(), right]), run, rounds=8)
    rows = in_file(run)
    for name in fakes:
        early = isinstance(error, AbsentError) and name in ("prepare", "check", "warm-up")
        assert rows[name]["state"] == ("absent" if early else "failed")
        assert not TIMES & set(rows[name])
        assert str(error) in rows[name]["why"]
        assert early or type(error).__name__ in rows[name]["why"]
    assert "while it was timed" in rows["rounds"]["why"] and fakes["rounds"].runs == 5
    assert "after it was timed" in rows["at last"]["why"]
    assert rows["right"]["state"] == "measured" and rows["right"]["wall"]["n"] == 8


def test_a_slow_preparation_ends_even_where_exceptions_are_swallowed(run):
    def deaf():
        for _ in range(200):
            try:
                time.sleep(0.05)
            except Exception:
                pass

    begin = time.monotonic()
    fakes = [Fake("slow", prepare=deaf), Fake("quick")]
    measure(case(), candidates(fakes), run, rounds=2, prepare_seconds=0.3)
    rows = in_file(run)
    assert rows["slow"]["state"] == "failed" and "not ready after" in rows["slow"]["why"]
    assert rows["quick"]["state"] == "measured"
    assert time.monotonic() - begin < 5


def test_notes_that_are_no_json_do_not_spoil_the_file(run):
    fakes = [
        Fake("dtype", notes={"dtype": torch.float32}),
        Fake("NaN", notes={"loss": float("nan")}),
        Fake("right", notes={"implementation": "reference"}),
    ]
    measure(case(), candidates(fakes), run, rounds=2)
    rows = in_file(run)
    assert [rows[f.name]["state"] for f in fakes] == ["failed", "failed", "measured"]
    assert rows["right"]["notes"] == {"implementation": "reference"}


def test_a_broken_case_leaves_rows(run):
    broken = case(truth=lambda x: exact(x) | {"tiny": torch.full((3,), float("nan"))})
    fake = Fake("bert_fast")
    for do in (measure, prove):
        run.data["rows"].clear()
        with pytest.raises(ValueError, match="tiny: want finite"):
            do(broken, candidates([fake, Fake("peer")]), run)
        rows = in_file(run)
        assert {row["state"] for row in rows.values()} == {"failed"} and len(rows) == 2
        assert "truth to compare with: ValueError" in rows["peer"]["why"]
    assert fake.prepared == 0
    facts = json.loads(run.path.read_text())["cases"]["case x"]
    assert facts["tokens"] == 16 and facts["fill"] == 0.5 and facts["dtype"] == "fp32"


def orders(tmp_path, seed):
    """Measure three candidates; return for each round [(name, number of the inputs), ...]."""
    one, calls = case(), []
    number = {id(x): i for i, x in enumerate(one.inputs)}
    fakes = [
        Fake(name, run=lambda i, x, name=name: calls.append((name, number[id(x)])))
        for name in "abc"
    ]
    measure(one, candidates(fakes), start(tmp_path), rounds=12, seed=seed)
    warm_up, calls = calls[:6], calls[6:]
    assert warm_up == [(name, i) for name in "abc" for i in range(2)]
    return [calls[i : i + 3] for i in range(0, len(calls), 3)]


def test_candidates_take_turns_in_a_new_order_each_round(tmp_path):
    rounds = orders(tmp_path, seed=3)
    assert len(rounds) == 12
    for i, calls in enumerate(rounds):
        assert sorted(name for name, _ in calls) == ["a", "b", "c"]
        assert {number for _, number in calls} == {i % 2}  # inputs alternate
    assert len({tuple(name for name, _ in calls) for calls in rounds}) > 2
    assert {calls[0][0] for calls in rounds} == {"a", "b", "c"}
    assert rounds == orders(tmp_path, seed=3) != orders(tmp_path, seed=4)


def test_times_are_those_of_the_calls(run, clock):
    """By a clock that only the calls move; the warm-up does not count."""
    lasts = [100, 100, 5, 1, 4, 2, 3, 7]
    fakes = [
        Fake("a", run=lambda i, x: clock.advance(lasts[i - 1])),
        Fake("b", run=lambda i, x: clock.advance(0.25)),
    ]
    measure(case(), candidates(fakes), run, rounds=6, seconds=1e6)
    rows = in_file(run)
    assert rows["a"]["wall"] == {"p20": 2, "p50": 3.5, "p80": 5, "n": 6}
    assert rows["b"]["wall"] == {"p20": 0.25, "p50": 0.25, "p80": 0.25, "n": 6}
    assert rows["b"]["rate"]["tokens_per_s"] == 64


@pytest.mark.parametrize(
    ("how", "n", "cut"),
    [
        (dict(rounds=3, least=5, seconds=1e6), 3, False),
        (dict(rounds=20, least=5, seconds=0.5), 5, False),
        (dict(rounds=20, least=1, seconds=2.5), 2, False),
        (dict(rounds=20, least=1, seconds=4.5), 3, False),
        (dict(rounds=20, least=5, seconds=1e6, deadline=9.5), 3, True),
        (dict(rounds=20, least=5, seconds=0.5, deadline=5.5), 1, True),
    ],
)
def test_rounds_end_when_they_should(run, clock, how, n, cut):
    """Two candidates of 1 s: 4 s of warm-up, then 2 s for each round."""
    if "deadline" in how:
        how = how | {"deadline": clock.now + how["deadline"]}
    fakes = [Fake(name, run=lambda i, x: clock.advance()) for name in "ab"]
    measure(case(), candidates(fakes), run, **how)
    for row in in_file(run).values():
        assert (row["state"], row["wall"]["n"], row.get("cut", False)) == ("measured", n, cut)


def test_the_deadline_leaves_rows_of_who_had_no_turn(run, clock):
    """a and b are ready after 4 s; one of them is timed; c would be prepared too late."""
    fakes = [Fake(name, run=lambda i, x: clock.advance()) for name in "abc"]
    measure(case(), candidates(fakes), run, deadline=clock.now + 3.9)
    rows = in_file(run)
    assert {name: row["state"] for name, row in rows.items()} == dict.fromkeys("abc", "unfinished")
    assert "before it was timed" in rows["a"]["why"] and "before its turn" in rows["c"]["why"]
    run.data["rows"].clear()
    measure(case(), candidates(fakes[:2]), run, deadline=clock.now + 4.5)
    rows = in_file(run)
    assert sorted(row["state"] for row in rows.values()) == ["measured", "unfinished"]
    timed = next(row for row in rows.values() if row["state"] == "measured")
    assert timed["wall"]["n"] == 1 and timed["cut"] is True


def test_times_are_in_the_file_while_the_rounds_go_on(run, clock):
    seen = []

    def call(i, x):
        clock.advance()
        seen.append(in_file(run)["a"].get("wall", {}).get("n", 0))

    measure(case(), candidates([Fake("a", run=call)]), run, rounds=6, seconds=1e6)
    assert seen == [0, 0, 0, 0, 2, 2, 4, 4]  # more than a second after the last time


def test_times_that_were_written_go_with_who_crashes_later(run, clock):
    seen = []

    def call(i, x):
        clock.advance()
        if i == 6:
            seen.append(in_file(run)["a"]["wall"]["n"])
            raise RuntimeError

    fakes = [Fake("a", run=call), Fake("b", run=lambda i, x: clock.advance(0.1))]
    measure(case(), candidates(fakes), run, rounds=6, seconds=1e6)
    rows = in_file(run)
    assert seen == [3] and rows["a"]["state"] == "failed" and not TIMES & set(rows["a"])
    assert rows["b"]["wall"]["n"] == 6


def test_ctrl_c_in_the_rounds_leaves_times(run):
    fakes = [Fake("a"), Fake("b", run=raises(KeyboardInterrupt(), at=7))]
    with pytest.raises(KeyboardInterrupt):
        measure(case(), candidates(fakes), run, rounds=20)
    run.settle("interrupted")
    for row in in_file(run).values():
        assert (row["state"], row["cut"], row["why"]) == ("measured", True, "interrupted")
        assert row["wall"]["n"] in (4, 5)


def test_ctrl_c_in_a_preparation_leaves_rows_of_all(run):
    fakes = [Fake("a"), Fake("b", prepare=raises(KeyboardInterrupt())), Fake("c")]
    with pytest.raises(KeyboardInterrupt):
        measure(case(), candidates(fakes), run)
    run.settle("interrupted")
    rows = in_file(run)
    assert {name: row["state"] for name, row in rows.items()} == dict.fromkeys("abc", "unfinished")
    assert {row["why"] for row in rows.values()} == {"interrupted"}


def test_the_successor_of_a_process_goes_on_with_the_rest(run):
    """Who is out stays out; who was measured is measured again, beside the others."""
    for name, state in (("out", "failed"), ("wrong", "refused"), ("none", "absent")):
        run.put("case x", name, state=state, why="of old")
    old = {"wall": {"n": 99}, "device": None, "rate": {}}
    for name in ("good", "turned", "crashed"):
        run.put("case x", name, state="measured" if name == "good" else "checked", **old)
    fakes = [Fake(name) for name in ("out", "wrong", "none", "good")]
    fakes += [Fake("turned", wrong), Fake("crashed", prepare=raises(RuntimeError()))]
    measure(case(), candidates(fakes), run, rounds=3)
    rows = in_file(run)
    assert [fake.prepared for fake in fakes] == [0, 0, 0, 1, 1, 1]
    assert rows["good"]["wall"]["n"] == 3
    assert rows["turned"]["state"] == "refused" and not TIMES & set(rows["turned"])
    assert rows["crashed"]["state"] == "failed" and not TIMES & set(rows["crashed"])
    measure(case(), candidates(fakes), run, rounds=3)
    assert fakes[3].prepared == 1  # all rows are final: nothing to do


def test_training_is_checked_before_only(run):
    """Weights move: the truth of before does not hold after; the first step is timed apart."""
    fake = Fake("trains", answers(in_blocks, in_blocks, wrong), changes_state=True)
    measure(case(), candidates([fake]), run, rounds=4)
    assert in_file(run)["trains"]["state"] == "measured"
    assert (fake.checks, fake.runs) == (2, 1 + 2 + 4)


def test_prove_checks_and_times_nothing(run):
    fakes = [Fake("right"), Fake("wrong", wrong), Fake("dies", prepare=raises(ValueError("x")))]
    prove(case(), candidates(fakes), run)
    rows = in_file(run)
    assert [rows[f.name]["state"] for f in fakes] == ["passed", "refused", "failed"]
    assert not any(TIMES & set(row) for row in rows.values())
    prove(case(), candidates(fakes), run)
    assert [fake.prepared for fake in fakes] == [1, 1, 1]


@pytest.mark.parametrize("where", ["rounds", "at last"])
def test_a_lost_gpu_ends_the_process_and_rows_stay(run, monkeypatch, where):
    monkeypatch.setattr(harness, "_lost", lambda device: True)
    bad = {
        "rounds": Fake("bad", run=raises(RuntimeError("illegal access"), at=6)),
        "at last": Fake(
            "bad", answers(in_blocks, in_blocks, raises(RuntimeError("illegal access")))
        ),
    }[where]
    with pytest.raises(DeviceLostError, match="case x: bad"):
        measure(case(), candidates([bad, Fake("good")]), run, rounds=9)
    rows = in_file(run)
    assert rows["bad"]["state"] == "failed" and "illegal access" in rows["bad"]["why"]
    assert not TIMES & set(rows["bad"]) and rows["good"]["wall"]["n"] >= 3


def test_the_rounds_flush_where_the_case_says_so(run, monkeypatch):
    asked = []
    real = timing.Stopwatch
    monkeypatch.setattr(timing.Stopwatch, "_cache_bytes", lambda self: 64)
    monkeypatch.setattr(harness, "Stopwatch", lambda *a: asked.append(a[1:]) or real(*a))
    for flush in (True, False):
        run.data["rows"].clear()
        measure(case(flush=flush), candidates([Fake("a")]), run, rounds=1)
        assert asked[-1] == (flush,)


def test_waiting_for_a_gpu_is_counted(monkeypatch):
    """By torch's own warnings, which a CUDA of paper gives here."""
    import warnings

    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def call():
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert harness._syncs(SimpleNamespace(type="cuda"), call) == 2 and modes == ["warn", 0]
    with pytest.raises(RuntimeError):
        harness._syncs(SimpleNamespace(type="cuda"), raises(RuntimeError()))
    assert modes == ["warn", 0] * 2 and harness._syncs(CPU, call) is None


def test_graphs_compiled_while_timed_are_counted(run, monkeypatch):
    made = []
    monkeypatch.setattr(harness, "_graphs", lambda: len(made))
    fakes = [
        Fake("compiles", run=lambda i, x: made.append(i) if i in (1, 4, 5) else None),
        Fake("does not"),
    ]
    measure(case(), candidates(fakes), run, rounds=5)
    rows = in_file(run)
    assert rows["compiles"]["recompiled"] == 2 and rows["does not"]["recompiled"] == 0


def test_the_seed_alone_decides(run):
    """Nobody's random numbers are touched."""
    random.seed(1)
    expected = random.Random(1).random()
    measure(case(), candidates([Fake("a"), Fake("b")]), run, rounds=2)
    assert random.random() == expected
