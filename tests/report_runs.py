"""Runs made up for the tests of the report: no figure in them was measured."""

import json
import math
import random

import report_cases

HOST = {"device": "AMD EPYC, 2 cores", "slug": "amd-epyc-2-cores", "gpu": None}
COMMAND = "python benchmarks/run.py cpu 'a row'"
PICTURES = {
    "time-against-length",
    "throughput-against-fill",
    "roofline",
    "bandwidth",
    *(f"memory-{family}" for family in ("encoder", "pretraining")),
    *(f"ratios-{family}" for family in ("kernels", "encoder", "pretraining")),
}
PEERS = ("transformers sdpa", "transformers sdpa compile default", "onnxruntime")
LONG = "a candidate with a name so long that no legend has ever been laid out for the like of it"
LENGTHS = {"full": 1.0, "glue": 0.21, "squad": 0.45, "wikipedia": 0.62, "lognormal": 0.16}


def row(case, candidate, ms=None, state="measured", **fields):
    """A row as the harness leaves it."""
    made = {"case": case, "candidate": candidate, "state": state, "why": ""}
    if ms is not None:
        wall = {"p20": ms / 1.03e3, "p50": ms / 1e3, "p80": ms / 0.95e3, "n": 20}
        error = {"own": {"max": 2.5e-6, "l2": 6e-7}, "allowed": {"max": 4e-5, "l2": 4e-6}}
        made |= {"wall": wall, "device": None, "error": error, "rate": {}, "memory": None}
    return made | fields


def run(cases, rows, machine=HOST, started="2025-01-02T03:04:05Z", **fields):
    """A run with these cases and rows."""
    environment = machine | {"commit": "0123456789abcdef", "dirty": False, "threads": 2}
    return {
        "format": 1,
        "suite": "made up",
        "command": COMMAND,
        "rehearsal": False,
        "started": started,
        "finished": "2025-01-02T04:00:00Z",
        "ended": "complete",
        "environment": environment | {"processor": "AMD EPYC", "torch": "2.13.0+cpu"},
        "ceilings": {"copy_gb_per_s": 30.0, "matmul_tflop_per_s": {"fp32": 0.21}},
        "stages": [],
        "cases": cases,
        "rows": rows,
    } | fields


def write(path, data):
    """Write a run as its file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def encoder(n, length, lengths="full", model="base", **fields):
    """What a run knows of an encoder's case."""
    fill = LENGTHS[lengths]
    made = {"device": "cpu", "dtype": "fp32", "model": model, "seed": 1234, "family": "encoder"}
    words = f"{n} x {length}, full" if fill == 1 else f"{n} of {lengths}, at most {length}"
    made |= {"sequences": n, "longest": length, "slots": n * length, "lengths": words}
    made |= {"input": "batch"}
    tokens = round(n * length * fill)
    pulse = {"tflop_per_s": {"p20": 0.2, "p50": 0.21, "p80": 0.22}, "dtype": "fp32", "side": 1024}
    made |= {"fill": tokens / (n * length), "tokens": tokens, "pulse": pulse}
    return made | {"command": f"bert-fast bench encoder --length {length}"} | fields


def kernel(op, direction="forward", flops=None, moved=1e8, **fields):
    """What a run knows of a kernel's case."""
    made = {"device": "cpu", "dtype": "fp32", "op": op, "direction": direction, "seed": 0}
    made |= {"family": "kernels", "sizes": {"T": 4096, "D": 768}, "flushed": True}
    return made | {"bytes": moved, "flops": flops} | fields


def rates(case, ms, copy=30.0, matmul=0.21):
    """The rates that the harness would write for a kernel."""
    found = {"gb_per_s": case["bytes"] / ms / 1e6}
    found["of_copy"] = found["gb_per_s"] / copy
    if case["flops"]:
        found["tflop_per_s"] = case["flops"] / ms / 1e9
        found["of_matmul"] = found["tflop_per_s"] / matmul
    return found


def kernels(candidates=("torch", "torch compile")):
    """About seventy cases of kernels, of which some are slower than a peer."""
    draw = random.Random(1)
    cases, rows = {}, []
    words = {"forward": "fwd", "backward": "bwd", "both": "fwd+bwd"}
    for model, D in (("mini", 256), ("base", 768), ("large", 1024)):
        for op in ("attention", "linear", "linear_gelu", "linear_cross_entropy"):
            for s in (128, 512) if op == "attention" else (4096,):
                for direction in words:
                    times = {"forward": 1, "backward": 2, "both": 3}[direction]
                    if op == "attention":
                        flops, moved = 4 * s * 4096 * D * times, 16 * 4096 * D * times
                    else:
                        flops, moved = 8 * 4096 * D * D * times, 4 * 4096 * 5 * D * times
                    size = f" s{s}" if op == "attention" else ""
                    name = f"{op}{size} {words[direction]}, {model}"
                    cases[name] = kernel(op, direction, flops, moved, model=model)
        for op, factor in (("add_layer_norm", 4), ("embed", 3), ("bias_gelu", 2), ("unpad", 1)):
            for direction in words if op != "unpad" else ("forward",):
                name = f"{op} {words[direction]}, {model}"
                cases[name] = kernel(op, direction, None, 4 * 4096 * D * factor, model=model)
    for name, case in cases.items():
        intensity = (case["flops"] or 0) / case["bytes"]
        roof = min(0.21, intensity * 0.03) if intensity else None
        best = 1e3 * (case["flops"] / roof / 1e12 if roof else case["bytes"] / 30e9)
        ms = best / draw.uniform(0.55, 0.97)
        rows.append(row(name, "bert_fast", ms, rate=rates(case, ms)))
        for candidate in candidates:
            other = ms * math.exp(draw.uniform(-0.12, 1.4))
            rows.append(row(name, candidate, other, rate=rates(case, other)))
    return cases, rows


def whole(candidates=PEERS, bf16=False):
    """A run with cases for every picture."""
    draw = random.Random(2)
    cases, rows = kernels(("torch", candidates[-1]))
    dtypes = ("fp32", "bf16") if bf16 else ("fp32",)
    for dtype in dtypes:
        for n, length in [(1, 2**k) for k in range(4, 10)] + [(8, 2**k) for k in range(5, 10)]:
            cases[f"{n}x{length} {dtype}"] = encoder(n, length, dtype=dtype)
        for lengths in LENGTHS:
            cases[f"16x512 {lengths} {dtype}"] = encoder(16, 512, lengths, dtype=dtype)
    for model in ("mini", "small"):
        facts = encoder(32, 128, model=model, family="pretraining", dropout=0.1)
        cases[f"cpu {model} 32x128"] = facts
    for name, case in cases.items():
        if case["family"] == "kernels":
            continue
        ours = 1.1 * case["tokens"] * (3 if case["family"] == "pretraining" else 1)
        for i, candidate in enumerate(("bert_fast", *candidates)):
            slots = case["slots"] if i else case["tokens"]
            ms = ours * slots / case["tokens"] * (1 + (i > 0) * draw.uniform(-0.06, 0.9)) + 3
            memory = {"imported": 2**28, "peak": 2**28 + 2**20 * (300 + 90 * i + slots // 20)}
            rate = {"tokens_per_s": 1e3 * case["tokens"] / ms}
            rows.append(row(name, candidate, ms, memory=memory, rate=rate))
    return run(cases, rows)


def one(*rows, facts=None, **fields):
    return run({"a": facts or encoder(8, 128)}, list(rows), **fields)


def made(tmp_path, *several, name="run"):
    """The runs as files, read and merged: what the report is built from."""
    paths = [write(tmp_path / "m" / f"{name}{i}.json", data) for i, data in enumerate(several)]
    return report_cases.read(paths)
