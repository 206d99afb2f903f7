"""Measures other entries for the launch rules in kernels/, and prints the better ones.

Each entry of `tunables.py` is a candidate in a case like those of `ops.py`: put in force for its
own calls alone, checked before it is timed and after, timed in turns with the others. Candidate
bert_fast is the entry that is in force. It stays unless another is faster by more than the spread
of their times. No file is written but the run's: what to change in kernels/ is printed.
"""

import functools
import importlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as NotInTime
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

import checkout  # noqa: F401
import ops
import torch
import tunables
from gate import Candidate, Case, Prepared
from op_rows import Inputs, Row, build
from record import Run, clean
from tunables import Entry, Timed, Tunable, title

IN_FORCE = "bert_fast"  # the candidate; that it is wrong or fails is this project's fault
_FEW = 5  # rounds: fewer tell nothing
_IN_REHEARSAL = 2  # alternatives, in the first row of an entry
_ENOUGH_ROOM = 16  # processes that compile at most: each holds a context on the GPU
_ABSENT = object()
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}  # of the rows

# --- entries in force ----------------------------------------------------------------------------


def rules_of(table: str) -> dict[int, Any]:
    """Return a table of kernels/, by GPU generation."""
    file, name = table.split(".")
    return getattr(importlib.import_module(f"bert_fast.kernels.{file}"), name)


def generation(device: torch.device) -> int:
    """Return the GPU generation whose entries serve a device."""
    from bert_fast.kernels import common

    return common.generation(torch.empty(0, device=device))


def held(table: str, device: torch.device) -> Any:
    """Return all that a table holds for a device."""
    from bert_fast.kernels import common

    return common.by_generation(rules_of(table), torch.empty(0, device=device))


def part(whole: Any, key: Any) -> Entry:
    """Return the entry in what a table holds for a generation."""
    return whole if key is None else whole[key]


def having(whole: Any, key: Any, entry: Entry) -> Any:
    """Return what a table holds for a generation with one entry replaced."""
    if key is None:
        return entry
    if isinstance(whole, tuple):
        return (*whole[:key], entry, *whole[key + 1 :])
    return {**whole, key: entry}


@contextmanager
def in_force(tunable: Tunable, entry: Entry, device: torch.device) -> Iterator[None]:
    """Put an entry into its table meanwhile, for the generation of the device."""
    rules, mine = rules_of(tunable.table), generation(device)
    before = rules.get(mine, _ABSENT)
    try:
        rules[mine] = having(held(tunable.table, device), tunable.key, entry)
        yield
    finally:
        if before is _ABSENT:
            rules.pop(mine, None)
        else:
            rules[mine] = before


# --- cases ---------------------------------------------------------------------------------------


def row_of(timed: Timed) -> Row:
    """Return the row by which an entry is timed."""
    row = ops.ROWS[timed.row or timed.name]
    sizes = ops.ROWS[timed.like].sizes if timed.like else row.sizes
    sizes = {name: {**values, **timed.sizes} for name, values in sizes.items()}
    return replace(row, sizes=sizes, p=row.p if timed.p is None else timed.p)


def entries(tunable: Tunable, device: torch.device) -> dict[str, Entry]:
    """Return the entry in force and the others, by the names of their candidates."""
    now = part(held(tunable.table, device), tunable.key)
    return {IN_FORCE: now} | {title(e): e for e in tunable.entries if e != now}


def name_of(tunable: Tunable, timed: Timed) -> str:
    """Return the name of a case."""
    return f"{tunable.name}: {timed.name}"


def case(
    tunable: Tunable, timed: Timed, device: torch.device, small: bool, run: Run | None = None
) -> tuple[Case, list[Candidate]]:
    """Return a case and the entries as its candidates.

    Args:
        tunable: an entry and its alternatives.
        timed: one of its rows.
        device: where it runs.
        small: a rehearsal's sizes and a few of the candidates.
        run: knows which candidates do not compile.
    """
    dtype, size = DTYPES[device.type], "small" if small else "large"
    name = name_of(tunable, timed)
    whole, (ours, *_) = build(name, row_of(timed), device, dtype, size)
    whole = replace(whole, name=name)
    known = {} if run is None else run.data["tune"].get("failed", {})
    failed, found = known.get(whole.name, {}), entries(tunable, device)
    if small:
        found = dict([*found.items()][: 1 + _IN_REHEARSAL])
    return whole, [
        Candidate(
            name,
            functools.partial(_prepare, ours, tunable, entry, device, failed.get(name, "")),
            ours.factor,
        )
        for name, entry in found.items()
    ]


def _prepare(
    ours: Candidate, tunable: Tunable, entry: Entry, device: torch.device, why: str
) -> Prepared:
    """Return the op under an entry, which is in force while the op runs and at no other time."""
    if why:
        raise RuntimeError(why)

    def under(call: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
        def run(v: Inputs) -> Any:
            with in_force(tunable, entry, device):
                return call(v)

        return run

    with in_force(tunable, entry, device):
        prepared = ours.prepare()
    notes = {**prepared.notes, "entry": title(entry)}
    return replace(prepared, run=under(prepared.run), check=under(prepared.check), notes=notes)


def cases(table: str, small: bool) -> list[tuple[Tunable, Timed]]:
    """Return what a table is tuned by; in a rehearsal one row for each entry."""
    rows = [(tunable, tunable.timed) for tunable in tunables.of(table)]
    return [(tunable, timed) for tunable, all_ in rows for timed in (all_[:1] if small else all_)]


def why_not() -> str:
    """Return why nothing can be tuned here; "" if it can."""
    return "" if find_spec("triton") else "Triton is not installed: there are no launch rules"


# --- compiling -----------------------------------------------------------------------------------


def compile_all(run: Run, device: torch.device, seconds: float) -> None:
    """Run every candidate once, side by side, so that Triton's cache holds it; say what does not.

    Why an entry does not compile or fit goes into the run's "tune", and its row will say so. Of
    other errors nothing is kept: they may be due to those beside it, and the row will show.
    """
    if device.type != "cuda":
        print("no GPU: kernels are compiled for the one that runs them")
        return
    tasks = [
        (tunable, timed, name)
        for table in run.data["tune"]["asked"]
        for tunable, timed in cases(table, small=False)
        for name in entries(tunable, device)
    ]
    failed: dict[str, dict[str, str]] = {}
    done, known = 0, run.data["tune"]
    workers = min(len(tasks), os.cpu_count() or 1, _ENOUGH_ROOM)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(compile_one, *task): task for task in tasks}
        try:
            for future in as_completed(futures, timeout=seconds):
                tunable, timed, name = futures[future]
                try:
                    final, why = future.result()
                except BrokenProcessPool as error:
                    final, why = False, clean(f"{type(error).__name__}: {error}")
                done += not why
                if why:
                    print(f"  {name_of(tunable, timed)}: {name}: {why}", flush=True)
                if why and final:
                    failed.setdefault(name_of(tunable, timed), {})[name] = why
                    run.set("tune", known | {"failed": failed})
        except NotInTime:
            pool.shutdown(wait=False, cancel_futures=True)
            print("  the time was over: the others are compiled when they are measured")
    run.set("tune", known | {"failed": failed, "compiled": done, "of": len(tasks)})
    print(f"  {done} of {len(tasks)} compiled", flush=True)


def compile_one(tunable: Tunable, timed: Timed, name: str) -> tuple[bool, str]:
    """Run a candidate once on CUDA; return whether it never will compile, and what went wrong."""
    from triton.errors import TritonError

    device = torch.device("cuda")
    try:
        whole, candidates = case(tunable, timed, device, small=False)
        prepared = next(c for c in candidates if c.name == name).prepare()
        prepared.run(whole.inputs[0])
        torch.cuda.synchronize()
    except Exception as error:
        return isinstance(error, TritonError), clean(f"{type(error).__name__}: {error}")
    return False, ""


# --- what came of it -----------------------------------------------------------------------------


def _seconds(row: Mapping[str, Any]) -> Mapping[str, float]:
    """Return the times by which a row counts: those of the device, where it has a clock."""
    return row["device"] or row["wall"]


def _spread(row: Mapping[str, Any]) -> float:
    """Return how far the times of a row lie apart, from the 20th percentile to the 80th."""
    times = _seconds(row)
    return (times["p80"] - times["p20"]) / times["p50"]


def _without_times(row: Mapping[str, Any] | None) -> str:
    """Return why a row has no times to go by; "" if it has."""
    if row is None or row["state"] != "measured":
        return "not run" if row is None else row["state"]
    return f"{row['wall']['n']} rounds" if row["wall"]["n"] < _FEW else ""


def verdict(run: Run, tunable: Tunable, names: Sequence[str]) -> dict[str, Any]:
    """Return what the run says of an entry and its alternatives.

    Returns:
        "winner": name of the candidate to take, `IN_FORCE` if none is better; "why"; "ratios": by
        candidate its time over that of the entry in force in each row; "spread": of them.
    """
    at = [name_of(tunable, timed) for timed in tunable.timed]
    rows = {name: [run.row(case, name) for case in at] for name in names}
    found: dict[str, Any] = {"winner": IN_FORCE, "why": "", "ratios": {}, "spread": {}}
    for case, row in zip(at, rows[IN_FORCE], strict=True):
        if why := _without_times(row):
            return found | {"why": f"{case}: the entry in force: {why}"}
    best, shown = 1.0, "none of the others has times in every row"
    for name in names:
        if name == IN_FORCE or any(_without_times(row) for row in rows[name]):
            continue
        pairs = [*zip(rows[name], rows[IN_FORCE], strict=True)]
        ratios = [_seconds(own)["p50"] / _seconds(now)["p50"] for own, now in pairs]
        spread = [max(_spread(own), _spread(now)) for own, now in pairs]
        found["ratios"][name], found["spread"][name] = ratios, spread
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        shown = "no other is faster by more than the spread of the times"
        by_more = mean < 1 - sum(spread) / len(spread)
        nowhere_slower = all(r <= 1 + s for r, s in zip(ratios, spread, strict=True))
        if by_more and nowhere_slower and mean < best:
            best, found["winner"] = mean, name
    if found["winner"] != IN_FORCE:
        shown = f"{1 - best:.1%} less time, in the mean over {len(at)} row{'s' * (len(at) > 1)}"
    return found | {"why": shown}


def conclude(run: Run, table: str, device: torch.device) -> None:
    """Say which entries of a table are to be replaced by which, in the run and on the screen."""
    mine, whole = generation(device), held(table, device)
    found, changed, measured = {}, whole, []
    for tunable in tunables.of(table):
        known = entries(tunable, device)
        if run.data["rehearsal"]:
            why = "a rehearsal: nothing is chosen"
            found[tunable.name] = {"winner": IN_FORCE, "entry": title(known[IN_FORCE]), "why": why}
            continue
        said = verdict(run, tunable, [*known])
        entry = known[said["winner"]]
        found[tunable.name] = said | {"entry": title(entry), "was": title(known[IN_FORCE])}
        changed = having(changed, tunable.key, entry)
        measured += [tunable.key] if said["ratios"] else []
    where = f"{run.data['environment'].get('device', 'unknown')}, {run.data['started'][:10]}"
    text = "" if changed == whole else lines(mine, changed, where, measured)
    known, result = run.data["tune"], {"generation": mine, "where": where, "entries": found}
    results = known.get("tables", {}) | {table: result | {"lines": text}}
    run.set("tune", known | {"tables": results})
    for name, said in found.items():
        stays = "stays" if said["winner"] == IN_FORCE else f"in place of {said['was']}"
        print(f"{name}: {said['entry']} {stays}: {said['why']}")
    file, name = table.split(".")
    if text:
        print(f"for {name} in kernels/{file}.py:\n{text}", flush=True)
    elif measured:
        print(f"for the comment of {name} in kernels/{file}.py: {where}", flush=True)


def lines(mine: int, whole: Any, where: str, measured: Sequence[Any]) -> str:
    """Return the lines of Python that a table is to have for a generation.

    Args:
        mine: the generation.
        whole: what the table is to hold for it.
        where: GPU and date.
        measured: keys of those entries that were measured, the others being as they were.
    """
    some = isinstance(whole, dict) and measured != [None]
    of = f"; measured: {', '.join(map(literal, measured))}" if some else ""
    head = [f"    # {where}{of}"]
    one = f"    {mine}: {literal(whole)},"
    nested = isinstance(whole, dict) and any(isinstance(v, dict | tuple) for v in whole.values())
    if not nested:
        return "\n".join([*head, one])
    inner = [f"        {literal(k)}: {literal(v)}," for k, v in whole.items()]
    return "\n".join([*head, f"    {mine}: {{", *inner, "    },"])


def literal(value: Any) -> str:
    """Return a value as Python has it, in double quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    return repr(value).replace("'", '"')
