"""What this machine offers bert_fast, what is missing, and whether the ops give right answers."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bert_fast import extension, ops, reference
from bert_fast.ops import invariant, products

_SHOWN = ("torch", "triton", "numpy", "tokenizers", "safetensors", "transformers")
_INSTALL_EXTENSION = "pip install --no-build-isolation . (in the source, with torch installed)"
# Largest error of a self-check, of the largest number in the answer.
_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Check:
    """One op computed on one device, against the reference in float64.

    Attributes:
        device: as "cpu" or "cuda:0".
        dtype: of the input.
        op: its name.
        error: the largest, of the largest number in the answer; None if it raised.
        problem: what is wrong; empty if nothing is.
    """

    device: str
    dtype: str
    op: str
    error: float | None
    problem: str


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` finds; printing it gives a page of text.

    Attributes:
        versions: of Python, bert_fast and the packages it uses; None: not installed.
        devices: the facts of each, by name.
        no_gpu: why there is no GPU among them; empty if there is.
        extension: whether the compiled extension is loaded, else why not and what to install.
        ops: for each kind of device, what serves each op and why nothing faster does.
        extras: packages of optional features that are missing, and how to install them.
        checks: the ops' answers against the reference.
        problems: what is promised and does not work.
    """

    versions: dict[str, str | None]
    devices: dict[str, dict[str, Any]]
    no_gpu: str
    extension: dict[str, Any]
    ops: dict[str, dict[str, dict[str, str]]]
    extras: dict[str, dict[str, Any]]
    checks: list[Check]
    problems: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether all that is promised works."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {"healthy": self.healthy, **asdict(self)}

    def __str__(self) -> str:
        return "\n".join(_page(self))


def diagnose() -> Diagnosis:
    """Look at versions, devices and implementations, and try every op on every device."""
    devices, no_gpu = _devices()
    compiled = _extension()
    required, extras = _requirements()
    kinds = sorted({name.partition(":")[0] for name in devices})
    checks = [c for name in devices for c in check_ops(name)]
    problems = [*required, *(f"{c.op} on {c.device}: {c.problem}" for c in checks if c.problem)]
    if not compiled["loaded"] and compiled["built"]:
        problems.append(f"{compiled['reason']}; build it again: {compiled['install']}")
    return Diagnosis(
        versions=_versions(),
        devices=devices,
        no_gpu=no_gpu,
        extension=compiled,
        ops={
            kind: {op: by[kind]._asdict() for op, by in sorted(ops.implementations().items())}
            for kind in kinds
        },
        extras=extras,
        checks=checks,
        problems=problems,
    )


# --- versions ------------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"bert_fast": sys.modules["bert_fast"].__version__}
    found["python"] = f"{platform.python_version()} ({sys.executable})"
    return found | {package: _version(package) for package in _SHOWN}


def _requirements() -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Return what is wrong with the packages that are needed, and the missing optional ones."""
    try:
        lines = importlib.metadata.requires("bert-fast") or []
    except importlib.metadata.PackageNotFoundError:
        lines = []  # run from its source, without having been installed
    problems, extras = [], {}
    for line in lines:
        spec, _, marker = (part.strip() for part in line.partition(";"))
        extra = re.search(r"""extra\s*==\s*["'](.+?)["']""", marker)
        system = re.search(r"""platform_system\s*==\s*["'](.+?)["']""", marker)
        name = re.match(r"[\w.-]+", spec)[0]
        if (system and system[1] != platform.system()) or name == "bert-fast":
            continue
        problem = _unmet(name, spec)
        if problem and extra is None:
            problems.append(f"{problem}: pip install '{spec}'")
        elif problem and extra[1] != "dev":  # that is for work on bert_fast itself
            entry = extras.setdefault(extra[1], {"missing": [], "install": "pip install"})
            entry["missing"].append(problem)
            entry["install"] += f" '{spec}'"
    return problems, extras


def _unmet(name: str, spec: str) -> str:
    """Return what the installed version lacks; specs here have one lower bound at most."""
    installed, least = _version(name), re.search(r">=([\d.]+)", spec)
    if installed is None:
        return f"{name} is not installed"
    numbers = [int(n) for n in re.match(r"[\d.]*\d", installed)[0].split(".")]
    if least and numbers < [int(n) for n in least[1].split(".")]:
        return f"{name} {installed} is older than {least[1]}"
    return ""


# --- devices -------------------------------------------------------------------------------------


def _devices() -> tuple[dict[str, dict[str, Any]], str]:
    affinity = getattr(os, "sched_getaffinity", None)
    devices: dict[str, dict[str, Any]] = {
        "cpu": {
            "model": _cpu_model(),
            "cores": len(affinity(0)) if affinity else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "products": _products(),
        }
    }
    driver = _driver()
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            no_gpu = f"torch {torch.__version__} is built without CUDA"
            if driver:
                no_gpu += f", while there is an NVIDIA driver {driver}: install torch with CUDA"
        elif driver is None:
            no_gpu = "no NVIDIA driver"
        else:
            no_gpu = f"torch with CUDA {torch.version.cuda} finds none under driver {driver}"
        return devices, no_gpu
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = {
            "model": facts.name,
            "memory_gb": round(facts.total_memory / 1e9, 1),
            "capability": f"{facts.major}.{facts.minor}",
            "driver": driver,
        }
    return devices, ""


def _products() -> str:
    """Say which library multiplies fp32 matrices on the CPU, and how it was found."""
    chosen, times = products.cpu_library(), products.cpu_library_times()
    found = [f"{name} {ms:.2f} ms" for name, ms in times.items()]
    if chosen == "onednn" and products.packs_weights(torch.float32):
        found.append("packed weights")
    if invariant.is_batch_invariant():
        found.append(f"batch-invariant: {invariant.ROWS} rows a call")
    return f"by {chosen} ({', '.join(found)})" if found else f"by {chosen}"


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text("utf-8", "replace")
    except OSError:
        return None
    found = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", text)
    return found[1] if found else "of unknown version"


def _extension() -> dict[str, Any]:
    """Say whether bert_fast._C is built, is loaded, and what is missing to build it."""
    compiled, reason = extension.load()
    if compiled is None and os.environ.get("BERT_FAST_EXT") == "0":
        return {"built": False, "loaded": False, "reason": reason, "install": ""}
    if importlib.util.find_spec("bert_fast._C") is None:
        needs = [f"pip install {name}" for name in ("ninja", "pybind11") if not _version(name)]
        if not any(shutil.which(name) for name in (os.environ.get("CXX"), "c++", "g++") if name):
            needs.insert(0, "a C++ compiler")
        install = "; ".join([*needs, _INSTALL_EXTENSION])
        reason = "the C++ extension is not built"
        return {"built": False, "loaded": False, "reason": reason, "install": install}
    install = _INSTALL_EXTENSION if compiled is None else ""
    return {"built": True, "loaded": not install, "reason": reason, "install": install}


# --- self-check ----------------------------------------------------------------------------------


def check_ops(device: str) -> list[Check]:
    """Compute each op on a device and compare it with the reference in float64 on the CPU."""
    kind = device.partition(":")[0]
    dtypes = [torch.float32] if kind == "cpu" else [torch.float32, torch.bfloat16]
    return [
        _check(device, dtype, name, op, truth)
        for dtype in dtypes
        for name, op, truth in _cases(dtype)
    ]


def _check(
    device: str,
    dtype: torch.dtype,
    name: str,
    op: Callable[[Callable[[Tensor], Tensor]], Tensor],
    truth: Callable[[], Tensor],
) -> Check:
    error, problem = None, ""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            want = truth()
            got = op(lambda tensor: tensor.to(device)).double().cpu()
        if got.shape != want.shape:
            raise ValueError(f"want shape {tuple(want.shape)}, got {tuple(got.shape)}")
        error = float((got - want).abs().max() / want.abs().max())
        if not error <= _BOUNDS[dtype]:  # also NaN
            problem = f"an error of {error:.1e}, want {_BOUNDS[dtype]:.0e} at most"
    except Exception as raised:  # whatever an op can fail with is a finding
        problem = " ".join(f"{type(raised).__name__}: {raised}".split())[:300]
    return Check(device, str(dtype).removeprefix("torch."), name, error, problem)


def _cases(dtype: torch.dtype) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, the op's answer given what moves a tensor, the reference's answer)."""
    T, D, H = 37, 64, 2
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) + 0.25).to(dtype)

    x, y, w_DD, w, b = randn(T, D), randn(T, D), randn(D, D) / 8, randn(D), randn(D)
    tables, qkv = (randn(9, D), randn(T, D), randn(2, D)), randn(T, 3, H, D // H)
    rows = torch.arange(T)
    ids, borders = (rows % 9, rows, rows % 2), torch.tensor([0, 20, 21, T], dtype=torch.int32)
    mask = rows[:, None] % 5 > torch.arange(4)
    last = 1e-12, 0.0, None, 0, torch.float64

    def wide(*tensors: Tensor) -> list[Tensor]:
        return [t.double() for t in tensors]

    yield (
        "embed",
        lambda to: ops.embed(*map(to, (*ids, *tables, w, b))),
        lambda: reference.embed(*ids, *wide(*tables, w, b), *last)[0],
    )
    yield (
        "add_layer_norm",
        lambda to: ops.add_layer_norm(*map(to, (x, y, w, b)), bias=to(b)),
        lambda: reference.add_layer_norm(*wide(x, b, y, w, b), *last)[0],
    )
    yield (
        "gelu",
        lambda to: ops.gelu(to(x), to(b)),
        lambda: reference.bias_gelu(*wide(x, b), "gelu"),
    )
    yield (
        "linear",
        lambda to: ops.linear(*map(to, (x, w_DD, b))),
        lambda: reference.linear(*wide(x, w_DD, b)),
    )
    yield (
        "column_sums",
        lambda to: torch.ops.bert_fast.column_sums(to(x)),
        lambda: reference.column_sums(*wide(x)),
    )
    yield (
        "linear_gelu",
        lambda to: ops.linear_gelu(*map(to, (x, w_DD, b))),
        lambda: reference.linear_gelu(*wide(x, w_DD, b), "gelu")[0],
    )
    yield (
        "attention",
        lambda to: ops.attention(to(qkv), to(borders), 20),
        lambda: reference.attention(*wide(qkv), borders, 20, 0.0, None, 0)[0],
    )
    yield (
        "linear_cross_entropy",
        lambda to: ops.linear_cross_entropy(*map(to, (x, w_DD, b, rows))),
        lambda: reference.linear_cross_entropy(*wide(x, w_DD, b), rows, False)[0],
    )
    yield (
        "unpad",
        lambda to: torch.cat([t.cpu() for t in ops.unpad(to(mask))[:2]]),
        lambda: torch.cat(reference.unpad(mask)[:2]).double(),
    )


# --- as text -------------------------------------------------------------------------------------


def _page(found: Diagnosis) -> Iterator[str]:
    yield "versions"
    for name, version in found.versions.items():
        yield f"  {name:<13} {version or 'not installed'}"
    yield "devices"
    for name, facts in found.devices.items():
        rest = [f"{key.replace('_', ' ')} {value}" for key, value in facts.items()][1:]
        yield f"  {name:<13} {facts['model']}"
        yield f"  {'':<13} {', '.join(rest)}"
    if found.no_gpu:
        yield f"  {'no GPU':<13} {found.no_gpu}"
    yield "extension"
    compiled = found.extension
    yield f"  {'bert_fast._C':<13} {'loaded' if compiled['loaded'] else compiled['reason']}"
    if compiled["install"]:
        yield f"  {'to build it':<13} {compiled['install']}"
    for kind, served in found.ops.items():
        yield f"ops on {kind}"
        width = max(map(len, served))
        for op, entry in served.items():
            reason = f"  ({entry['reason']})" if entry["reason"] else ""
            yield f"  {op:<{width}}  {entry['name']}{reason}"
    if found.extras:
        yield "not installed, and needed only for"
        for extra, entry in found.extras.items():
            yield f"  {extra:<13} {', '.join(entry['missing'])}"
            yield f"  {'':<13} {entry['install']}"
    yield "self-check against the reference"
    for device in found.devices:
        checks = [c for c in found.checks if c.device == device]
        right = sum(not c.problem for c in checks)
        yield f"  {device:<13} {right} of {len(checks)} answers are right"
    yield f"healthy: {'no' if found.problems else 'yes'}"
    for problem in found.problems:
        yield f"  problem: {problem}"
