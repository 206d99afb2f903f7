"""The machine a run is measured on: what it is, and what it can do.

`environment` and `clocks` say what it is. `ceilings` and `gemms` measure it in the same run as
everything else: a rate is quoted against what this machine reached, never against a datasheet.
"""

import hashlib
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import card
import checkout  # noqa: F401
import torch
from record import ROOT, clean
from timing import Samples, Stopwatch, spread
from torch import Tensor
from torch.nn.functional import linear

from bert_fast.accuracy import DTYPES

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "sentence-transformers",
    "onnxruntime",
    "onnx",
    "liger-kernel",
    "numpy",
)
VARIABLES = (
    "OMP_ GOMP_ KMP_ MKL_ DNNL_ ONEDNN_ ATEN_ TORCH PYTORCH_ TRITON_ CUDA_ CUBLAS CUDNN_ "
    "NVIDIA_TF32_OVERRIDE LD_PRELOAD MALLOC_ BERT_FAST_"
).split()
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")

_SOURCE_FOLDERS = ("bert_fast", "kernels", "csrc", "benchmarks")
_SOURCE_FILES = ("setup.py", "pyproject.toml")
_SOURCE_SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h", ".toml")
_NO_SOURCES = ("benchmarks/results/", "benchmarks/texts/")

_DTYPES = DTYPES | {"tf32": torch.float32}


def slug(name: str) -> str:
    """Return the device's name as a folder: "NVIDIA H200" gives "nvidia-h200"."""
    name = re.sub(r"\((r|tm)\)", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


# What it is.


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _processor() -> dict[str, Any]:
    """Return what Linux says about the processor; cores are those that this process may use."""
    blocks = [
        dict(re.findall(r"^([^\t:\n]+?)\s*: ?(.*)$", block, re.MULTILINE))
        for block in _read("/proc/cpuinfo").strip().split("\n\n")
    ]
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    usable = set(affinity(0))
    ours = [b for b in blocks if b.get("processor", "").isdigit() and int(b["processor"]) in usable]
    cores = {(b.get("physical id"), b.get("core id", b["processor"])) for b in ours}
    first = blocks[0]
    flags = first.get("flags", "").split()
    return {
        "processor": first.get("model name") or platform.processor() or platform.machine(),
        "processor_model": " ".join(
            first.get(k, "?") for k in ("vendor_id", "cpu family", "model")
        ),
        "cores": len(cores) or len(usable),
        "logical_cores": len(usable),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
    }


def _memory() -> dict[str, int | None]:
    """Return the machine's memory in bytes, all of it and what is free to be used."""
    text = _read("/proc/meminfo")
    found = {}
    for key, name in (("memory", "MemTotal"), ("memory_available", "MemAvailable")):
        match = re.search(rf"^{name}:\s*(\d+) kB$", text, re.MULTILINE)
        found[key] = int(match[1]) * 1024 if match else None
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _variables() -> dict[str, str]:
    """Return the variables that change how the libraries compute; of a path its last part."""
    found = {}
    for name, value in sorted(os.environ.items()):
        place = name.endswith(("DIR", "HOME", "PATH", "ROOT")) or os.path.isabs(value)
        if name.startswith(tuple(VARIABLES)) and (not place or name == "LD_PRELOAD"):
            found[name] = clean(re.sub(r"(?<![\w.])/(?:[^\s:;,]*/)?", "", value), 120)
    return found


def _git(root: Path, *command: str) -> str | None:
    """Return git's answer, or None where `root` is no checkout or git does not work."""
    if not (root / ".git").exists():  # a plain copy may lie within some other checkout
        return None
    call = ["git", "--no-optional-locks", "-C", str(root), *command]
    here = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(call, capture_output=True, text=True, env=here, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _checkout(root: Path) -> dict[str, Any]:
    """Return "commit" and "dirty": whether tracked files differ, or sources are not tracked."""
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return {"commit": clean(os.environ.get("COMMIT", ""), 64) or None, "dirty": None}
    scope = (".", ":(exclude)benchmarks/results")  # what runs write is not what ran
    status = _git(root, "status", "--porcelain", "-z", "--untracked-files=all", "--", *scope)
    dirty = None
    if status is not None:
        entries = [entry for entry in status.split("\0") if entry]
        dirty = any(not e.startswith("??") or e.endswith(_SOURCE_SUFFIXES) for e in entries)
    return {"commit": commit.strip(), "dirty": dirty}


def source_digest(root: Path = ROOT) -> str:
    """Return the SHA-256 of the sources under `root`, which tells a copy's commit without git."""
    found = {name: root / name for name in _SOURCE_FILES if (root / name).is_file()}
    for folder in _SOURCE_FOLDERS:
        for path in (root / folder).rglob("*"):
            name = path.relative_to(root).as_posix()
            if path.suffix in _SOURCE_SUFFIXES and not name.startswith(_NO_SOURCES):
                found[name] = path
    digest = hashlib.sha256()
    for name in sorted(found):
        content = found[name].read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _uuid(device: torch.device) -> str | None:
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return None if uuid is None else str(uuid)


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2": getattr(properties, "L2_cache_size", None),
        **card.reading(_uuid(device)),
    }


def environment(device: torch.device, root: Path = ROOT) -> dict[str, Any]:
    """Return what a run was measured on: machine, software, commit.

    Names of hosts and users and absolute paths are not in it.

    Args:
        device: that the run measures.
        root: of the repository.
    """
    cuda = device.type == "cuda"
    processor = _processor()
    gpu = _gpu(device) if cuda else None
    cores = processor["cores"]
    own = f"{processor['processor']}, {cores} core{'s' if cores > 1 else ''}"
    name = gpu["name"] if gpu else own
    return {
        "device": name,
        "slug": slug(name),
        "gpu": gpu,
        **processor,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load": [round(load, 2) for load in os.getloadavg()],
        **_memory(),
        "os": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "torch": str(torch.__version__),  # its metadata may lack the build, "+cu130"
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "variables": _variables(),
        **_checkout(root),
        "source": source_digest(root),
    }


def clocks(device: torch.device) -> dict[str, Any]:
    """Return the clocks of this moment and what holds them back; never raises.

    Returns:
        Of a GPU "sm_mhz", "memory_mhz", "temperature_c", "power_w" and "throttle", a list of words;
        of a processor "mhz", the mean over its cores, and "load", over one minute. Or
        {"unavailable": reason}.
    """
    try:
        if device.type == "cuda":
            found = card.reading(_uuid(device))
            names = ("sm_mhz", "memory_mhz", "temperature_c", "power_w", "throttle", "unavailable")
            return {name: found[name] for name in names if name in found}
        mhz = re.findall(r"^cpu MHz\s*: ([\d.]+)$", _read("/proc/cpuinfo"), re.MULTILINE)
        mean = round(sum(map(float, mhz)) / len(mhz), 1) if mhz else None
        return {"mhz": mean, "load": round(os.getloadavg()[0], 2)}
    except Exception as error:
        return {"unavailable": clean(f"{type(error).__name__}: {error}", 160)}


# What it can do.


def timed(
    fn: Callable[[], Any],
    device: torch.device,
    seconds: float = 0.5,
    least: int = 3,
    most: int = 50,
    flush: bool = False,
) -> dict[str, float]:
    """Return p20, p50 and p80 of a call in seconds and their number n, after a warm-up.

    On a GPU the time is that of CUDA events.

    Args:
        fn: the call.
        device: where it runs.
        seconds: no call begins later than this, once `least` are timed.
        least: timed calls at least.
        most: timed calls at most.
        flush: begin with cold caches; on a GPU they always are.
    """
    watch, samples = Stopwatch(device, flush=flush or device.type == "cuda"), Samples()
    over = time.monotonic() + seconds
    for _ in range(2):
        watch.seconds(fn)
    timings = samples.device if device.type == "cuda" else samples.wall
    while len(timings) < most and (len(timings) < least or time.monotonic() < over):
        watch.time(fn, samples)
    return spread(timings)


@contextmanager
def _tf32(on: bool) -> Iterator[None]:
    """Let the GPU's fp32 products round their inputs to TF32, or not."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if on else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _ways(device: torch.device) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return ways to `x @ w.T`: on a CPU torch's own, which is MKL's in fp32, and oneDNN's."""
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"torch": linear}
    if device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pointwise = torch.ops.mkldnn._linear_pointwise
        ways["onednn"] = lambda x, w: pointwise(x, w, None, "none", [], "")
    return ways


def _copy(device: torch.device, size: int, seconds: float) -> dict[str, Any]:
    source = torch.ones(size, dtype=torch.int8, device=device)  # ones: a page of zeros may be none
    target = torch.zeros_like(source)
    times = timed(partial(target.copy_, source), device, seconds)
    return {"bytes": 2 * size, **times}


def _square(device: torch.device, dtype: str, side: int, seconds: float) -> dict[str, Any]:
    """Return the times of a square product of random numbers, by the faster of the ways to it."""
    x, w = (torch.randn(side, side, device=device).to(_DTYPES[dtype]) for _ in range(2))
    found = []
    with _tf32(dtype == "tf32"):
        for name, way in _ways(device).items():
            times = timed(partial(way, x, w), device, seconds)
            found.append({"M": side, "K": side, "N": side, "through": name, **times})
    return min(found, key=lambda times: times["p50"])


@torch.inference_mode()
def ceilings(device: torch.device, small: bool = False) -> dict[str, Any]:
    """Measure how fast this machine copies and multiplies.

    Args:
        device: to measure.
        small: sizes for tests and rehearsals; what comes out is no ceiling.

    Returns:
        "copy_gb_per_s", bytes read and written; "matmul_tflop_per_s" by dtype; "how": the sizes
        and times of each, and the clocks after them.
    """
    if device.type == "cuda":
        size = 2**24 if small else 2**31
        size = min(size, torch.cuda.mem_get_info(device)[0] // 8)
        sides = {"bf16": 8192, "fp32": 4096, "tf32": 4096}
    else:
        size = 2**20 if small else 2**28
        sides = {"fp32": 2048}
        onednn = torch.backends.mkldnn.is_available()
        if onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported():  # without: minutes
            sides["bf16"] = 2048
    seconds = 0.02 if small else 1.0
    how = {"copy": _copy(device, size, seconds)}
    for dtype, side in sides.items():
        how[dtype] = _square(device, dtype, 128 if small else side, seconds)
    how["clocks"] = clocks(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    rates = {dtype: 2e-12 * how[dtype]["M"] ** 3 / how[dtype]["p50"] for dtype in sides}
    copy = 1e-9 * how["copy"]["bytes"] / how["copy"]["p50"]
    return {"copy_gb_per_s": copy, "matmul_tflop_per_s": rates, "how": how}


def _products(device: torch.device, small: bool) -> Iterator[dict[str, Any]]:
    """Yield the products (M, K) x (K, N) of BERT's layers."""
    models = {"toy": (32, 100)} if small else {"base": (768, 30522), "large": (1024, 30522)}
    if small:
        rows = [8, 16]
    else:
        rows = [128, 1024] if device.type == "cpu" else [128, 1024, 4096, 16384]
    for model, (D, V) in models.items():
        layers = {"qkv": (D, 3 * D), "output": (D, D), "ffn up": (D, 4 * D), "ffn down": (4 * D, D)}
        for M in rows:
            for what, (K, N) in layers.items():
                yield {"model": model, "what": what, "M": M, "K": K, "N": N}
            masked = max(1, round(0.15 * M))
            yield {"model": model, "what": "decoder", "M": masked, "K": D, "N": V}
        if device.type == "cuda" or small:
            M, up = rows[-1], {"model": model, "what": "ffn up, gradient of the input"}
            yield {**up, "M": M, "K": 4 * D, "N": D}
            yield {**up, "what": "ffn up, gradient of the weight", "M": 4 * D, "K": M, "N": D}


def _operands(
    product: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return x (M, K) and w (N, K), each laid out in memory as the layer has it."""
    M, K, N = (product[name] for name in "MKN")
    x = torch.randn(M, K, device=device).to(dtype)
    w = torch.randn(N, K, device=device).to(dtype)
    if product["what"].endswith("gradient of the input"):  # dy @ w, w lies as (K, N)
        w = w.T.contiguous().T
    elif product["what"].endswith("gradient of the weight"):  # dy.T @ x, both lie as (K, .)
        x, w = x.T.contiguous().T, w.T.contiguous().T
    return x, w


@torch.inference_mode()
def gemms(
    device: torch.device,
    dtypes: Sequence[str] | None = None,
    small: bool = False,
    seconds: float = 30,
    matmul: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Measure the matrix products of BERT's layers, with cold caches.

    Args:
        device: to measure; on a CPU torch's product stands beside oneDNN's.
        dtypes: of "bf16", "fp16", "fp32" and "tf32"; None: bf16 on a GPU, fp32 on a CPU.
        small: sizes for tests and rehearsals.
        seconds: for all of them; a product that finds them over is left out.
        matmul: `ceilings(...)["matmul_tflop_per_s"]`, for the share "of_matmul".

    Returns:
        For each product "model", "what", "M", "K", "N", "dtype" and "through", then "p50" in
        seconds and "tflop_per_s", or "left_out": why.
    """
    over = time.monotonic() + seconds
    each = 0.01 if small else 0.1
    dtypes = dtypes or (["bf16"] if device.type == "cuda" else ["fp32"])
    rows = []
    for dtype in dtypes:
        for product in _products(device, small):
            names = {**product, "dtype": dtype}
            if time.monotonic() >= over:
                rows.append({**names, "left_out": f"the {seconds:g} s were over"})
                continue
            x, w = _operands(product, device, _DTYPES[dtype])
            flops = 2 * product["M"] * product["K"] * product["N"]
            with _tf32(dtype == "tf32"):
                for name, way in _ways(device).items():
                    p50 = timed(partial(way, x, w), device, each, flush=True)["p50"]
                    row = {**names, "through": name, "p50": p50, "tflop_per_s": 1e-12 * flops / p50}
                    if matmul and dtype in matmul:
                        row["of_matmul"] = row["tflop_per_s"] / matmul[dtype]
                    rows.append(row)
    return rows
