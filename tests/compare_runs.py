"""Pairs of runs made up for the tests of comparing them."""

import copy
import json

import changes
from changes import MACHINE_NOISE
from ledger_runs import HOST, row, run

FLOOR = MACHINE_NOISE / 100


def times(ms, spread=0.0, n=20):
    """A row's time: spread is between the 20th percentile and the 80th, relative."""
    half = ms * spread / 2
    p20, p50, p80 = ((ms + by) / 1e3 for by in (-half, 0, half))
    return {"p20": p20, "p50": p50, "p80": p80, "n": n}


def timed(candidate, ms, spread=0.0, n=20, **fields):
    made = {"wall": times(ms, spread, n), "device": None}
    return row(candidate, **{**made, **fields})


def made(*rows, machine=HOST, case="cpu 1x128", **fields):
    return run({case: list(rows)}, machine, "fp32", **fields)


def pulsed(data, rates, dtype="fp32", side=1024, copies=()):
    """The run with a pulse in each of its cases, and with copies in it where they are given."""
    for i, (case, rate) in enumerate(zip(data["cases"].values(), rates, strict=True)):
        case["pulse"] = {"tflop_per_s": steady(rate), "dtype": dtype, "side": side, "n": 20}
        if copies:
            case["pulse"] |= {"gb_per_s": steady(copies[i]), "bytes": 2**26}
    return data


def steady(rate):
    return {"p20": rate, "p50": rate, "p80": rate}


def slower(data, by, ours_only=True, rates=True):
    """The run with its times multiplied, those of peers as well if asked for."""
    data = copy.deepcopy(data)
    for one in data["rows"]:
        if one["state"] != "measured" or (ours_only and one["candidate"] != "bert_fast"):
            continue
        for clock in ("wall", "device"):
            for name in ("p20", "p50", "p80") if one.get(clock) else ():
                one[clock][name] *= by
        if rates:
            one["rate"] = {name: value / by for name, value in (one.get("rate") or {}).items()}
    return data


def verdicts(before, after, over=5.0):
    found = changes.compare(before, after, over / 100)
    return {one.case: one.verdict for one in found.changes if one.ours}


def noise(before, after=None):
    found = changes.compare(before, after or before, 0.05)
    return {one.case: one.noise for one in found.changes if one.ours}


def files(tmp_path, *runs):
    paths = [tmp_path / f"{name}.json" for name in "ab"[: len(runs)]]
    for path, data in zip(paths, runs, strict=True):
        path.write_text(json.dumps(data), "utf-8")
    return [str(path) for path in paths]


def two_cases(**fields):
    rows = [timed("bert_fast", 10)]
    return run({"cpu 1x128": copy.deepcopy(rows), "cpu 8x128": rows}, HOST, "fp32", **fields)
