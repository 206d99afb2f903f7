"""benchmarks/machine.py and profiles.py: where a run was measured, and where its time goes."""

import getpass
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import machine
import profiles
import pytest
import torch
from torch.autograd import DeviceType

CPU = torch.device("cpu")


def test_slug():
    assert machine.slug("NVIDIA H200") == "nvidia-h200"
    assert machine.slug("AMD EPYC, 2 cores") == "amd-epyc-2-cores"
    assert machine.slug("Intel(R) Xeon(R) Platinum 8480C, 16 cores") == (
        "intel-xeon-platinum-8480c-16-cores"
    )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
    elif isinstance(value, str):
        yield value


def test_environment_tells_no_names_and_no_paths(monkeypatch):
    planted = {
        "TORCH_LOGS": f"all:{Path.home()}/logs",
        "TORCH_TRACE": "/scratch/someone",
        "TRITON_CACHE_DIR": "/scratch/someone/cache",
        "TORCH_HOME": "/scratch/someone",
        "LD_PRELOAD": "/usr/lib/someone/libtcmalloc.so.4:/opt/someone/libx.so",
        "OMP_NUM_THREADS": "2",
        "SECRET": "someone",
    }
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    found = machine.environment(CPU)
    json.dumps(found, allow_nan=False)
    assert found["variables"]["OMP_NUM_THREADS"] == "2"
    assert found["variables"]["LD_PRELOAD"] == "libtcmalloc.so.4:libx.so"
    for text in _texts(found):
        assert "someone" not in text
        assert not re.search(r"(^|[\s:;,=~])/", text), text
        for name in (socket.gethostname(), getpass.getuser()):
            assert not re.search(rf"\b{re.escape(name)}\b", text), text


def test_environment_of_this_processor():
    found = machine.environment(CPU)
    assert found["gpu"] is None
    assert found["torch"] == str(torch.__version__)
    assert found["sentence-transformers"] is None or found["sentence-transformers"][0].isdigit()
    assert 1 <= found["cores"] <= found["logical_cores"] <= os.cpu_count()
    assert found["threads"] == torch.get_num_threads()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert found["memory"] == pytest.approx(pages, rel=0.1)
    assert found["memory"] > found["memory_available"] > 2**20
    assert machine.clocks(CPU)["load"] >= 0


def _commit(root: Path) -> None:
    who = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    here = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "c"]):
        subprocess.run(["git", "-C", str(root), *command], check=True, env=here)


@pytest.fixture
def copy(tmp_path) -> Path:
    """A small copy of the repository without git."""
    for name in ("bert_fast/heads/a.py", "csrc/cpu/b.cpp", "benchmarks/c.py", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def test_a_copy_without_git_takes_the_commit_it_is_told(copy, monkeypatch):
    monkeypatch.delenv("COMMIT", raising=False)
    found = machine.environment(CPU, copy)
    assert found["commit"] is None and found["dirty"] is None
    monkeypatch.setenv("COMMIT", "abc123")
    told = machine.environment(CPU, copy)
    assert told["commit"] == "abc123" and told["dirty"] is None
    assert found["source"] == told["source"] == machine.source_digest(copy)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not here")
def test_a_checkout_says_whether_it_was_changed(copy, monkeypatch):
    monkeypatch.setenv("COMMIT", "abc123")  # git knows better
    result = copy / "benchmarks/results/README.md"
    result.parent.mkdir()
    result.write_text("ledger")
    (copy / "README.md").write_text("words")
    _commit(copy)
    inner = copy / "plain"  # a copy within a checkout is not that checkout
    (inner / "csrc").mkdir(parents=True)
    assert machine.environment(CPU, inner)["commit"] == "abc123"

    def dirty() -> bool:
        found = machine.environment(CPU, copy)
        assert re.fullmatch("[0-9a-f]{40}", found["commit"])
        return found["dirty"]

    assert dirty() is False
    (copy / "notes.txt").write_text("no source")
    result.with_name("run.py").write_text("untracked, but no source")
    result.write_text("another ledger")
    assert dirty() is False
    (copy / "kernels").mkdir()
    (copy / "kernels/d.py").write_text("untracked")
    assert dirty() is True
    (copy / "kernels/d.py").unlink()
    (copy / "README.md").write_text("other words")
    assert dirty() is True


def test_source_digest_sees_every_byte_of_a_source_and_nothing_else(copy):
    before = machine.source_digest(copy)
    for name in ("benchmarks/results/d/x.py", "benchmarks/texts/x.py", "docs/x.py", "csrc/x.txt"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("x")
        assert machine.source_digest(copy) == before, name
    seen = {before}
    for name in ("bert_fast/heads/a.py", "csrc/cpu/b.cpp", "benchmarks/c.py", "pyproject.toml"):
        with (copy / name).open("ab") as file:
            file.write(b"\n")
        seen.add(machine.source_digest(copy))
    (copy / "csrc/cpu/b.cpp").rename(copy / "csrc/cpu/moved.cpp")
    seen.add(machine.source_digest(copy))
    assert len(seen) == 6


def test_timed_counts_time_and_calls():
    calls = []

    def work() -> None:
        calls.append(1)
        time.sleep(0.01)

    times = machine.timed(work, CPU, seconds=0, least=4)
    assert times["n"] == 4 and len(calls) == 6  # two of them warm up
    assert 0.01 <= times["p20"] <= times["p50"] <= times["p80"]
    assert machine.timed(work, CPU, seconds=60, most=5)["n"] == 5


def test_ceilings(device):
    found = machine.ceilings(torch.device(device), small=True)
    json.dumps(found, allow_nan=False)
    copy = found["how"]["copy"]
    assert found["copy_gb_per_s"] == pytest.approx(copy["bytes"] / copy["p50"] / 1e9)
    assert 0.01 < found["copy_gb_per_s"] < 1e5
    rates = found["matmul_tflop_per_s"]
    assert {"fp32", "bf16"} <= rates.keys() or not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for dtype, rate in rates.items():
        how = found["how"][dtype]
        assert rate == pytest.approx(2 * how["M"] * how["K"] * how["N"] / how["p50"] / 1e12)
        assert 0 < rate < 1e4


@pytest.fixture
def precision() -> Iterator[Any]:
    """Where torch holds the precision of fp32 products on a GPU."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield matmul
    matmul.fp32_precision = before


def test_ceilings_leave_the_precision_as_it_was(precision):
    precision.fp32_precision, seen = "tf32", []
    with pytest.raises(ZeroDivisionError), machine._tf32(False):
        seen.append(precision.fp32_precision)
        with machine._tf32(True):
            seen.append(precision.fp32_precision)
        seen.append(precision.fp32_precision)
        raise ZeroDivisionError
    assert [*seen, precision.fp32_precision] == ["ieee", "tf32", "ieee", "tf32"]


def test_every_way_multiplies():
    for product in machine._products(CPU, small=True):
        x, w = machine._operands(product, CPU, torch.float32)
        assert x.shape == (product["M"], product["K"]) and w.shape == (product["N"], product["K"])
        for name, way in machine._ways(CPU).items():
            torch.testing.assert_close(way(x, w), x @ w.T, msg=name, atol=1e-4, rtol=1e-4)


def test_gemms(monkeypatch):
    monkeypatch.setattr(machine, "timed", lambda *_, **__: {"p50": 1e-6})
    rows = machine.gemms(CPU, small=True, matmul={"fp32": 0.5})
    up = next(row for row in rows if row["what"] == "ffn up")
    assert (up["M"], up["K"], up["N"]) == (8, 32, 128)
    assert up["tflop_per_s"] == pytest.approx(2 * 8 * 32 * 128 / 1e-6 / 1e12)
    assert up["of_matmul"] == pytest.approx(2 * up["tflop_per_s"])
    assert {row["through"] for row in rows} == set(machine._ways(CPU))
    assert len(rows) == 12 * len(machine._ways(CPU))  # 5 products of 2 sizes, 2 gradients


def test_gemms_have_the_shapes_of_bert():
    shapes = {(p["model"], p["what"], p["M"]): p for p in machine._products(CPU, small=False)}
    assert {M for _, what, M in shapes if what == "qkv"} == {128, 1024}
    decoder = shapes["large", "decoder", 154]  # 15 % of 1024
    assert (decoder["K"], decoder["N"]) == (1024, 30522)
    on_gpu = {(p["model"], p["what"]): p for p in machine._products(torch.device("cuda"), False)}
    weight = on_gpu["base", "ffn up, gradient of the weight"]
    assert (weight["M"], weight["K"], weight["N"]) == (3072, 16384, 768)


def test_gemms_keep_to_their_seconds(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(machine.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(machine, "timed", lambda *_, **__: {"p50": 1e-6})
    rows = machine.gemms(CPU, ["fp32"], small=True, seconds=5)
    assert len({(row["what"], row["M"]) for row in rows if "p50" in row}) == 4
    late = [row for row in rows if "left_out" in row]
    assert len(late) == 8 and late[0]["left_out"] == "the 5 s were over"
    assert all("p50" not in row and row["K"] for row in late)


def test_a_profile_counts_the_calls_of_an_operator():
    x, w = torch.randn(32, 48), torch.randn(48, 16)
    calls = []

    def step() -> None:
        calls.append(1)
        with torch.profiler.record_function("my range"):
            (x @ w).tanh_() @ w.T

    found = profiles.kernels(step, CPU, top=2)
    json.dumps(found, allow_nan=False)
    by_name = {row["name"]: row for row in profiles.kernels(step, CPU)["kernels"]}
    assert by_name["aten::mm"]["calls"] == 2 and by_name["aten::tanh_"]["calls"] == 1
    assert "my range" not in by_name
    assert sum(row["share"] for row in by_name.values()) == pytest.approx(1)
    assert len(found["kernels"]) == 2 and found["kinds"] == len(by_name)
    assert found["wall_s"] > 0 and found["device_s"] > 0
    lines = profiles.table(found).splitlines()
    assert len(lines) == 5 and lines[-1].endswith(f"{len(by_name) - 2} more")


def test_a_profile_of_a_gpu_lists_kernels_only(monkeypatch):
    def event(key, device_type, count, us, annotation=False):
        time_of = {"self_device_time_total": us, "self_cpu_time_total": 7.0}
        about = {"device_type": device_type, "is_user_annotation": annotation}
        return SimpleNamespace(key=key, count=count, **time_of, **about)

    events = [
        event("aten::mm", DeviceType.CPU, 6, 90.0),  # the time of the kernels it launched
        event("cudaLaunchKernel", DeviceType.CPU, 9, 0.0),
        event("k" * 200, DeviceType.CUDA, 6, 90.0),
        event("_layer_norm_kernel", DeviceType.CUDA, 4, 30.0),
        event("my range", DeviceType.CUDA, 3, 120.0, annotation=True),
    ]

    class Watched:
        def __init__(self, activities):
            assert profiles.ProfilerActivity.CUDA in activities

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def key_averages(self):
            return events

    monkeypatch.setattr(profiles, "profile", Watched)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    found = profiles.kernels(lambda: None, torch.device("cuda"))
    assert [row["name"] for row in found["kernels"]] == ["k" * 120, "_layer_norm_kernel"]
    assert found["kernels"][0] | {"name": ""} == {
        "name": "",
        "calls": 2,
        "total_us": 30.0,
        "share": 0.75,
    }
    assert found["kernels"][1]["calls"] == 1.33  # calls that differed
    assert found["device_s"] == pytest.approx(40e-6) and found["host_ops"] == 2
    events.clear()
    assert profiles.kernels(lambda: None, torch.device("cuda"))["device_s"] is None


def test_a_profile_of_a_gpu_sums_raw_events_where_torch_has_them():
    def event(name, kind, ns, annotation=False, hidden=False):
        return SimpleNamespace(
            name=lambda: name,
            device_type=lambda: kind,
            duration_ns=lambda: ns,
            is_user_annotation=lambda: annotation,
            is_hidden_event=lambda: hidden,
        )

    raw = [
        event("gemm", DeviceType.CUDA, 2000),
        event("gemm", DeviceType.CUDA, 4000),
        event("gemm", DeviceType.CPU, 9000),
        event("range", DeviceType.CUDA, 7000, annotation=True),
        event("hidden", DeviceType.CUDA, 7000, hidden=True),
    ]
    results = SimpleNamespace(events=lambda: raw)
    watched = SimpleNamespace(profiler=SimpleNamespace(kineto_results=results))
    found = profiles._events(watched, torch.device("cuda"))
    assert [(e.key, e.device_type, e.count, e.self_device_time_total) for e in found] == [
        ("gemm", DeviceType.CUDA, 2, 6.0),
        ("gemm", DeviceType.CPU, 1, 9.0),
        ("range", DeviceType.CUDA, 1, 7.0),
    ]
    assert [profiles._timeline(e) for e in found] == [False, False, True]


def test_a_call_too_slow_to_profile_is_left_out(monkeypatch):
    monkeypatch.setattr(profiles, "_SLOWEST", 0.01)
    calls = []

    def slow() -> None:
        calls.append(1)
        time.sleep(0.02)

    found = profiles.kernels(slow, CPU)
    assert len(calls) == 2 and found["kernels"] == [] and found["device_s"] is None
    assert profiles.table(found) == found["left_out"] and "want at most 0.01 s" in found["left_out"]
