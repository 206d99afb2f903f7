"""benchmarks/tune.py and tunables.py: other entries for the launch rules, in force and restored."""

import ast
import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import harness
import pytest
import stages
import torch
import tunables
import tune
from bench_cases import CPU, planted, start
from tunables import TUNABLES, Timed, Tunable, title

ALL = pytest.mark.parametrize("tunable", TUNABLES, ids=lambda t: t.name)
GELU = tunables.of("gelu.FWD_TILES")[0]
SMALL = Timed("bias_gelu", sizes={"T": 8, "F": 64})


def begun(folder: Path, *tables: str, rehearsal: bool = False):
    """Begin the run of a tuning, on a GPU of that name."""
    run = start(folder)
    run.data["rehearsal"] = rehearsal
    run.set("environment", {"device": "NVIDIA H200"})
    run.set("tune", {"asked": list(tables)})
    return run


def snapshot():
    """Return what all tables hold."""
    return {table: dict(tune.rules_of(table)) for table in tunables.tables()}


# --- what there is to try ------------------------------------------------------------------------


@ALL
def test_alternatives_have_the_form_of_the_entry_in_force(tunable):
    for whole in tune.rules_of(tunable.table).values():
        now = tune.part(whole, tunable.key)
        shapes = {len(e) if isinstance(e, tuple) else tuple(e) for e in tunable.entries if e}
        assert shapes == {len(now) if isinstance(now, tuple) else tuple(now)}
    found = tune.entries(tunable, CPU)
    assert next(iter(found)) == tune.IN_FORCE
    assert len({title(e) for e in found.values()}) == len(found)
    assert len(found) >= 5 and len({repr(e) for e in tunable.entries}) == len(tunable.entries)


@ALL
def test_rows_are_there_and_meet_the_entry(tunable):
    assert tunable.timed
    for timed in tunable.timed:
        row = tune.row_of(timed)
        for sizes in (row.sizes["large"], row.sizes["small"]):
            if isinstance(tunable.key, tuple):
                assert sizes["K"] == tunable.key[1]
            elif "TILES" in tunable.table and tunable.key is not None:
                assert tunable.key // 2 < sizes["D"] <= tunable.key
        assert ("dropout" in timed.name) == (row.p > 0)
        heart = f"{tune.name_of(tunable, timed)}\t{max(map(title, tunable.entries), key=len)}\t1.5"
        assert len(heart) < 200


def test_names_of_cases_are_unique():
    names = [tune.name_of(tunable, timed) for tunable in TUNABLES for timed in tunable.timed]
    assert len(set(names)) == len(names)
    with pytest.raises(ValueError, match=r"tune: want one of attention.SHORT, .*, got 'gelu'"):
        tunables.of("gelu")


# --- in force, and restored ----------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, harness.TooSlowError])
@ALL
def test_an_entry_is_in_force_meanwhile_and_at_no_other_time(tunable, error):
    before = snapshot()
    for entry in tunable.entries:
        with nullcontext() if error is None else pytest.raises(error):
            with tune.in_force(tunable, entry, CPU):
                whole = tune.held(tunable.table, CPU)
                assert tune.part(whole, tunable.key) == entry
                others = tune.rules_of(tunable.table).items()
                assert {g: e for g, e in others if g != 90} == {
                    g: e for g, e in before[tunable.table].items() if g != 90
                }
                if error is not None:
                    raise error
        assert snapshot() == before


@pytest.mark.parametrize("rules", [{80: (1, 2)}, {80: (1, 2), 90: (3, 4)}, {100: (1, 2)}])
def test_generations_with_and_without_an_entry_of_their_own(monkeypatch, rules):
    monkeypatch.setattr(tune.importlib.import_module("bert_fast.kernels.gelu"), "FWD_TILES", rules)
    before = dict(rules)
    with tune.in_force(GELU, (5, 6), CPU):
        assert tune.held("gelu.FWD_TILES", CPU) == (5, 6) and rules == before | {90: (5, 6)}
    assert rules == before


# --- in the interpreter: other launches, the same answers -----------------------------------------

INTERPRETED = {
    "attention.SHORT": ("attention s128", {"lengths": (70,), "H": 1}),
    "attention.LONG": ("attention s512 dropout", {"lengths": (130,), "H": 1}),
    "attention_bwd.SHORT": ("attention_bwd s128", {"lengths": (70,), "H": 1}),
    "attention_bwd.LONG_KV": ("attention_bwd s512", {"lengths": (130,), "H": 1}),
    "layer_norm.FWD_TILES": ("add_layer_norm", {"T": 5, "D": 768}),
    "layer_norm.BWD_TILES": ("add_layer_norm_bwd", {"T": 5, "D": 768}),
    "gelu.FWD_TILES": ("bias_gelu", {"T": 5, "F": 1100}),
    "linear.COLUMN_SUM_TILES": ("column_sums", {"T": 17, "F": 1100}),
    "linear.PRODUCT": ("linear invariant", {"T": 5, "D": 70, "F": 130}),
    "embedding_tables.CHUNKS": ("embed_bwd", {"T": 20, "D": 8, "V": 2048, "P": 3}),
    "cross_entropy.GRADIENT_TILES": ("linear_cross_entropy", {"N": 5, "D": 16, "V": 530}),
}


@pytest.mark.parametrize("table", INTERPRETED)
def test_a_candidate_changes_what_is_launched_and_not_the_answers(
    table, kernel_device, tmp_path, monkeypatch
):
    """In fp16, which the interpreter knows: the entries are those of 16 bits."""
    from bert_fast.kernels import common

    monkeypatch.setitem(tune.DTYPES, "cpu", torch.float16)
    row, sizes = INTERPRETED[table]
    tunable, device = tunables.of(table)[0], torch.device(kernel_device)
    tunable = replace(tunable, entries=(tunable.entries[1], tunable.entries[-1]))
    launched, real = set(), common.launch

    def launch(kernel, grid, *args, **how):
        launched.add((kernel.__name__, frozenset(how.items())))
        real(kernel, grid, *args, **how)

    monkeypatch.setattr(common, "launch", launch)
    before, run, seen = snapshot(), begun(tmp_path, table), {}
    case, candidates = tune.case(tunable, Timed(row, sizes=sizes), device, small=True)
    for candidate in candidates:
        launched.clear()
        harness.prove(case, [candidate], run)
        seen[candidate.name] = frozenset(launched)
        assert snapshot() == before
    states = {r["candidate"]: (r["state"], r["why"]) for r in run.data["rows"]}
    assert states == dict.fromkeys(tune.entries(tunable, device), ("passed", ""))
    assert len(states) >= 2 and len(set(seen.values())) >= 2
    for name, entry in tune.entries(tunable, device).items():
        if isinstance(entry, dict):
            assert any(entry.items() <= how for _, how in seen[name])


def test_what_does_not_compile_or_is_wrong_has_a_row_that_says_so(
    kernel_device, tmp_path, monkeypatch
):
    if kernel_device == "cuda":
        pytest.skip("plants a wrong answer in the CPU's implementation")
    from bert_fast import reference

    tunable = Tunable(
        "gelu.FWD_TILES",
        None,
        ((3, 1024, 4), (1, 1024, 4), (2, 1024, 4), (8, 1024, 4), (4, 1024, 4)),
        (SMALL,),
    )
    run, before = begun(tmp_path, "gelu.FWD_TILES"), snapshot()
    run.data["tune"]["failed"] = {tune.name_of(tunable, SMALL): {"(1, 1024, 4)": "PTXASError: no"}}
    assert len(tune.case(tunable, SMALL, CPU, True)[1]) == 3
    monkeypatch.setattr(tune, "_IN_REHEARSAL", 9)
    case, candidates = tune.case(tunable, SMALL, CPU, True, run)
    harness.measure(case, candidates[:3], run, rounds=6, least=6)

    def wrong(x, b, activation):
        y = reference.bias_gelu(x, b, activation)
        return y + 1 if tune.rules_of("gelu.FWD_TILES").get(90) == (2, 1024, 4) else y

    with planted("bias_gelu", wrong):
        harness.measure(case, [c for c in candidates if c.name[:2] in ("(2", "(8")], run, rounds=1)
    rows = {row["candidate"]: row for row in run.data["rows"]}
    assert rows["bert_fast"]["state"] == rows["(8, 1024, 4)"]["state"] == "measured"
    assert rows["bert_fast"]["notes"]["entry"] == "(4, 1024, 4)"
    assert rows["(3, 1024, 4)"]["state"] == rows["(1, 1024, 4)"]["state"] == "failed"
    assert rows["(1, 1024, 4)"]["why"] == "RuntimeError: PTXASError: no"
    assert "power of 2" in rows["(3, 1024, 4)"]["why"]
    assert rows["(2, 1024, 4)"]["state"] == "refused" and "y: want" in rows["(2, 1024, 4)"]["why"]
    assert snapshot() == before


# --- compiling beforehand ------------------------------------------------------------------------


def test_what_does_not_compile_is_kept_and_other_errors_are_not(monkeypatch, tmp_path, capsys):
    from concurrent.futures import Future
    from concurrent.futures.process import BrokenProcessPool

    says = {"(1, 1024, 4)": (True, "OutOfResources: shared memory"), "(2, 1024, 4)": (False, "x")}
    asked = []

    class Pool:
        def __init__(self, workers, mp_context):
            assert workers >= 1

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

        def submit(self, call, tunable, timed, name):
            asked.append((tunable.name, timed.name, name))
            future = Future()
            if name == "(8, 1024, 4)":
                future.set_exception(BrokenProcessPool("terminated abruptly"))
            else:
                future.set_result(says.get(name, (False, "")))
            return future

    monkeypatch.setattr(tune, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(tune, "entries", lambda t, d, real=tune.entries: real(t, CPU))
    run = begun(tmp_path, "gelu.FWD_TILES")
    tune.compile_all(run, torch.device("cuda"), 10.0)
    found = json.loads(run.path.read_text())["tune"]
    cases = [tune.name_of(GELU, timed) for timed in GELU.timed]
    why = {"(1, 1024, 4)": "OutOfResources: shared memory"}
    assert found["failed"] == dict.fromkeys(cases, why) and found["asked"] == ["gelu.FWD_TILES"]
    assert (found["compiled"], found["of"]) == (len(asked) - 6, len(asked)) == (10, 16)
    assert "(8, 1024, 4): BrokenProcessPool: terminated abruptly" in capsys.readouterr().out
    tune.compile_all(run, CPU, 10.0)
    assert "no GPU" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_an_error_that_is_not_the_compilers_is_not_final():
    final, why = tune.compile_one(GELU, SMALL, "(1, 1024, 4)")
    assert final is False and why


# --- what came of it -----------------------------------------------------------------------------


def put(run, case, candidate, p50, spread=0.01, **fields):
    """Leave a row as the harness does, timed on a GPU."""
    times = {"p20": p50 * (1 - spread / 2), "p50": p50, "p80": p50 * (1 + spread / 2), "n": 30}
    wall = {"p20": 1.0, "p50": 1.0, "p80": 1.0, "n": fields.pop("n", 30)}
    fields = {"state": "measured", "wall": wall, "device": times} | fields
    run.put(case, candidate, **fields)


@pytest.mark.parametrize(
    ("first", "second", "winner", "why"),
    [
        ((0.9, {}), (0.95, {}), True, "7.5% less time, in the mean over 2 rows"),
        ((0.995, {}), (0.995, {}), False, "no other is faster by more than the spread"),
        ((0.9, {"spread": 0.3}), (0.95, {}), False, "no other is faster by more"),
        ((0.8, {}), (1.05, {}), False, "no other is faster by more"),  # slower in a row
        ((0.8, {}), (0.8, {"state": "failed"}), False, "none of the others has times in every"),
        ((0.8, {}), (0.8, {"n": 3}), False, "none of the others has times in every row"),
    ],
)
def test_an_entry_is_replaced_only_by_one_that_is_faster(tmp_path, first, second, winner, why):
    run, (one, two) = begun(tmp_path, GELU.table), [tune.name_of(GELU, t) for t in GELU.timed]
    for case, (p50, fields) in ((one, first), (two, second)):
        put(run, case, tune.IN_FORCE, 1.0)
        put(run, case, "(1, 1024, 4)", p50, **dict(fields))
        put(run, case, "(2, 1024, 4)", 2.0, state="refused")
    found = tune.verdict(run, GELU, [*tune.entries(GELU, CPU)])
    assert found["winner"] == ("(1, 1024, 4)" if winner else tune.IN_FORCE)
    assert why in found["why"]


def test_the_best_of_several_wins_and_without_the_entry_in_force_none(tmp_path):
    run, names = begun(tmp_path, GELU.table), [tune.IN_FORCE, "(1, 1024, 4)", "(2, 1024, 4)"]
    for case in (tune.name_of(GELU, timed) for timed in GELU.timed):
        for name, p50 in zip(names, (1.0, 0.9, 0.8), strict=True):
            put(run, case, name, p50)
    assert tune.verdict(run, GELU, names)["winner"] == "(2, 1024, 4)"
    run.put(case, tune.IN_FORCE, state="unfinished")
    found = tune.verdict(run, GELU, names)
    assert found["winner"] == tune.IN_FORCE
    assert found["why"] == "gelu.FWD_TILES: bias_gelu, F 4096: the entry in force: unfinished"
    run.data["rows"].clear()
    assert tune.verdict(run, GELU, names)["why"].endswith(
        "bias_gelu, F 3072: the entry in force: not run"
    )


@pytest.mark.parametrize("table", tunables.tables())
def test_better_entries_are_printed_as_lines_of_python(table, tmp_path, capsys):
    run, winners, before = begun(tmp_path, table), {}, snapshot()
    for tunable in tunables.of(table):
        found = tune.entries(tunable, CPU)
        names = [name for name, entry in found.items() if entry is not None]
        winners[tunable.key] = found[names[-1]]
        for timed in tunable.timed:
            for name in names:
                p50 = 0.5 if name == names[-1] else 1.0
                put(run, tune.name_of(tunable, timed), name, p50)
    tune.conclude(run, table, CPU)
    said, result = (
        capsys.readouterr().out,
        json.loads(run.path.read_text())["tune"]["tables"][table],
    )
    assert result["lines"] in said and "50.0% less time" in said
    assert f"for {table.split('.')[1]} in kernels/{table.split('.')[0]}.py:" in said
    lines = result["lines"].splitlines()
    assert max(map(len, lines)) <= 100 and all(line.startswith("    ") for line in lines)
    date = run.data["started"][:10]
    assert lines[0].startswith(f"    # NVIDIA H200, {date}")
    (read,) = ast.literal_eval("{" + result["lines"] + "\n}").items()
    want = tune.held(table, CPU)
    for key, entry in winners.items():
        want = tune.having(want, key, entry)
    assert read == (90, want) and want != tune.held(table, CPU)
    assert snapshot() == before


def test_an_entry_that_stays_is_said(tmp_path, capsys):
    run = begun(tmp_path, GELU.table)
    for timed in GELU.timed:
        for name in tune.entries(GELU, CPU):
            put(run, tune.name_of(GELU, timed), name, 1.0)
    tune.conclude(run, GELU.table, CPU)
    said = capsys.readouterr().out
    assert "gelu.FWD_TILES: (4, 1024, 4) stays: no other is faster" in said
    assert re.search(r"for the comment of FWD_TILES in kernels/gelu.py: NVIDIA H200, 20..-", said)
    assert json.loads(run.path.read_text())["tune"]["tables"][GELU.table]["lines"] == ""


# --- the stage -----------------------------------------------------------------------------------


def test_a_rehearsal_shows_that_the_parts_work(tmp_path, capsys, monkeypatch):
    run, before = begun(tmp_path, GELU.table, rehearsal=True), snapshot()
    seen, real = [], tune.in_force
    monkeypatch.setattr(tune, "in_force", lambda *a: seen.append(a[1]) or real(*a))
    context = stages.Context(run, CPU, True, float("inf"))
    context = context.within(60)
    stages.perform("tune compile", context)
    stages.perform("tune gelu.FWD_TILES", context)
    rows = {row["candidate"]: row for row in run.data["rows"]}
    assert [row["state"] for row in rows.values()] == ["measured"] * 3
    assert all(row["notes"]["implementation"] in ("csrc", "reference") for row in rows.values())
    assert {title(entry) for entry in seen} == {row["notes"]["entry"] for row in rows.values()}
    found = run.data["tune"]["tables"]["gelu.FWD_TILES"]
    assert found["lines"] == "" and found["entries"]["gelu.FWD_TILES"]["winner"] == tune.IN_FORCE
    assert "a rehearsal: nothing is chosen" in capsys.readouterr().out
    assert snapshot() == before


def test_without_triton_there_is_nothing_to_tune(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune, "find_spec", lambda name: None)
    run = begun(tmp_path, GELU.table)
    stages.perform("tune gelu.FWD_TILES", stages.Context(run, CPU, True, float("inf")))
    assert "Triton is not installed" in capsys.readouterr().out and not run.data["rows"]
