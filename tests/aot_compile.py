"""Compile recorded variants for GPUs that are not there, and read what came out.

In processes without TRITON_INTERPRET; what is in Triton's cache (TRITON_CACHE_DIR) is read again.

    python aot_compile.py --variants FILE --jobs 2 --out FILE
"""

import argparse
import importlib
import json
import multiprocessing
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  the kernels of this checkout
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Bytes of shared memory that a block may have (CUDA C++ Programming Guide, compute capabilities).
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
REGISTERS = 65536  # of a multiprocessor, on every one of them

_TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_THREADS = re.compile(r"\.(?:reqntid|maxntid)\s+(\d+)")
_FLOAT_ATOMIC = re.compile(r"^\s*(?:@!?%\w+\s+)?((?:atom|red)\.\S*\b(?:b?f16(?:x2)?|f32|f64)\b\S*)")
_BF16 = re.compile(r"bf16\b")
_KEEPS_BF16 = (
    "constant",
    "extf",
    "truncf",
    "bitcast",
    "select",
)  # moves or converts, no arithmetic
_OPERATION = re.compile(r"(?:^|= )\"?((?:arith|math)\.(\w+)|tt\.(?:extern_elementwise|fp_to_fp))")


def float_atomics(ptx: str) -> list[str]:
    """The instructions that add floating-point numbers in whatever order they come."""
    return sorted({m[1] for line in ptx.splitlines() if (m := _FLOAT_ATOMIC.match(line))})


def bf16_arithmetic(ttir: str) -> list[str]:
    """The operations on bf16: other than moving, converting and the operands of a product."""
    found = set()
    for line in ttir.splitlines():
        line = line.partition(" loc(")[0]
        if not _BF16.search(line):
            continue
        operation = _OPERATION.search(line)
        if operation and operation[2] not in _KEEPS_BF16 and operation[1] != "tt.fp_to_fp":
            found.add(operation[1])
        if "tt.dot" in line and re.search(r"bf16>$", line):
            found.add("tt.dot into bf16")
    return sorted(found)


def dot_precisions(ttir: str) -> list[str]:
    """How products of fp32 operands are made: "ieee", "tf32", ..."""
    found = set()
    for line in ttir.splitlines():
        line = line.partition(" loc(")[0].rstrip()
        if "tt.dot " in line and re.search(r": tensor<[\dx]*xf32>", line):
            said = re.search(r"inputPrecision = (\w+)", line)
            found.add(said[1] if said else "ieee")
    return sorted(found)


def load(variant: dict[str, Any]) -> tuple[ASTSource, GPUTarget, dict[str, Any]]:
    """What `triton.compile` takes."""
    module, _, name = variant["kernel"].partition(":")
    kernel = getattr(importlib.import_module(module), name)

    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    def constant(value: Any) -> Any:
        if isinstance(value, dict) and "constexpr" in value:
            return triton.language.constexpr(value["constexpr"])
        if isinstance(value, str) and triton.language.dtype.is_dtype(value):
            return triton.language.dtype(value)
        return value

    source = ASTSource(
        kernel,
        {name: tuples(kind) for name, kind in variant["signature"].items()},
        {tuple(path): constant(value) for path, value in variant["constants"]},
        {tuple(path): tuples(value) for path, value in variant["attrs"]},
    )
    options = {name: tuples(value) for name, value in variant["options"].items()}
    return source, GPUTarget("cuda", variant["arch"], 32), options


def compile_one(variant: dict[str, Any]) -> dict[str, Any]:
    """What the variant is as machine code, or the error."""
    start = time.monotonic()
    try:
        compiled = triton.compile(*load(variant))
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return {"error": f"{said[:500]} ... {said[-300:]}" if len(said) > 800 else said}
    directory = Path(next(iter(compiled.metadata_group.values()))).parent
    cubin = next(directory.glob("*.cubin"))
    command = [_TOOL, "-res-usage", cubin]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    usage = _USAGE.search(told.stdout)
    assert usage, told.stdout
    registers, stack, static, local = map(int, usage.groups())
    if variant["arch"] >= 90 and static:
        static -= 1024  # the system's, outside the limit; older ones do not list it
    ptx, ttir = compiled.asm["ptx"], compiled.asm["ttir"]
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": compiled.metadata.shared + static,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0,
        "threads": max([int(n) for n in _THREADS.findall(ptx)] or [0]),
        "atomics": float_atomics(ptx),
        "bf16": bf16_arithmetic(ttir),
        "dots": dot_precisions(ttir),
        "seconds": round(time.monotonic() - start, 2),
    }


def what_is_wrong(variant: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Why the variant could not be launched, or must not be."""
    if "error" in found:
        return [f"does not compile: {found['error']}"]
    wrong = []
    arch = variant["arch"]
    if found["shared"] > SHARED[arch] * 1024:
        wrong.append(f"shared memory: want {SHARED[arch] * 1024} at most, got {found['shared']}")
    # Given out to a warp at a time, in steps of 8 for each of its threads.
    held = -(-found["registers"] // 8) * 8 * found["threads"]
    if not found["threads"] or held > REGISTERS:
        threads = found["threads"]
        wrong.append(f"registers: want {REGISTERS} at most, got {held} by {threads} threads")
    if found["tensor_memory"] > 512:
        wrong.append(f"tensor memory: want 512 columns at most, got {found['tensor_memory']}")
    if variant["options"]["enable_fp_fusion"] is not True:
        wrong.append("enable_fp_fusion: want it said at the launch")
    if found["atomics"]:
        wrong.append(f"floating-point atomics: {found['atomics']}")
    if found["bf16"]:
        wrong.append(f"arithmetic in bf16: {found['bf16']}")
    asked = {str(value) for _, value in variant["constants"]}
    for precision in found["dots"]:
        if precision != "ieee" and precision not in asked:
            wrong.append(f"products of fp32: want ieee, got {precision}")
    return wrong


def compile_all(
    variants: list[dict[str, Any]], jobs: int
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield (variant, what `compile_one` found) as they come, from `jobs` processes.

    A compiler that dies takes its process along: what had not come back is done one at a time.
    """
    for variant in variants:
        importlib.import_module(variant["kernel"].partition(":")[0])
    context = multiprocessing.get_context("fork")
    left = dict(enumerate(variants))
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = {pool.submit(compile_one, variant): i for i, variant in left.items()}
        for future in as_completed(futures):
            try:
                yield left[futures[future]], future.result()
            except BrokenProcessPool:
                continue
            del left[futures[future]]
    for variant in left.values():
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                yield variant, pool.submit(compile_one, variant).result()
            except BrokenProcessPool:
                yield variant, {"error": "the compiler died"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--variants", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    variants = json.loads(args.variants.read_text())["variants"]
    rows = []
    for variant, found in compile_all(variants, args.jobs):
        kept = {name: variant[name] for name in ("kernel", "arch", "text", "call", "default")}
        rows.append(kept | found | {"wrong": what_is_wrong(variant, found)})
    args.out.write_text(json.dumps({"triton": triton.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
