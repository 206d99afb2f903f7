"""Runs made up for the tests of the ledger."""

import ledger
from ledger import Kept, Line

H200 = {"device": "NVIDIA H200", "slug": "nvidia-h200", "gpu": {"name": "NVIDIA H200"}}
HOST = {"device": "AMD EPYC", "slug": "amd-epyc-2-cores", "gpu": None}
TARGETS = {target.key: target for target in ledger.TARGETS}


def row(candidate, ms=None, state="measured", **fields):
    """A row as the harness leaves it: `ms` on the wall, half of that on the device."""
    made = {"candidate": candidate, "state": state, "why": ""}
    if ms is not None:
        wall = {"p20": ms / 1e3, "p50": ms / 1e3, "p80": ms / 1e3, "n": 20}
        made |= {"wall": wall, "device": wall | {"p50": ms / 2e3}}
    return made | fields


def run(cases, machine=H200, dtype="bf16", started="2025-01-02T03:04:05Z", **fields):
    device = "cuda" if machine is H200 else "cpu"
    environment = machine | {"commit": "0123456789abcdef", "dirty": False, "source": "fedcba98"}
    return {
        "format": 1,
        "suite": "made up",
        "command": "none",
        "rehearsal": False,
        "started": started,
        "finished": "2025-01-02T04:00:00Z",
        "ended": "complete",
        "environment": environment | {"processor": "AMD EPYC", "torch": "2.11"},
        "ceilings": {},
        "stages": [],
        "cases": {name: {"device": device, "dtype": dtype} for name in cases},
        "rows": [{"case": name} | r for name, rows in cases.items() for r in rows],
    } | fields


def cells(key, *runs):
    """The cells `best measured`, `against peers` and `file` of a row."""
    kept = [Kept(f"x/{i}.json", r) for i, r in enumerate(runs)]
    return Line.of(TARGETS[key], kept).cells()[2:]
