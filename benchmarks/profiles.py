"""Where the time of a call goes: its kernels on a GPU, its operators on a CPU."""

import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_WARMUP = 2
_CALLS = 3
_SLOWEST = 1.0  # seconds of a call: one of many small kernels has millions of events beyond that
_NAME = 120  # characters; a kernel's template arguments can fill a page


def _device_us(event: Any) -> float:
    """Return the event's own time on the GPU in microseconds, by the name this torch has for it."""
    for name in ("self_device_time_total", "self_cuda_time_total"):
        if hasattr(event, name):
            return float(getattr(event, name))
    return 0.0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timeline(event: Any) -> bool:
    """Return whether the event is a range that someone named: its kernels are events already."""
    return bool(getattr(event, "is_user_annotation", False)) or event.key.startswith("ProfilerStep")


def _events(watched: profile, device: torch.device) -> list[Any]:
    """Return the events, those of one name together.

    For a GPU without their nesting, which only a processor's times need: to find it, `key_averages`
    takes 0.2 ms an event, and a call of many small kernels has a hundred thousand.
    """
    raw = getattr(getattr(watched, "profiler", None), "kineto_results", None)
    if device.type != "cuda" or raw is None:
        return watched.key_averages()
    spent: dict[tuple[str, DeviceType, bool], list[int]] = defaultdict(list)
    for event in raw.events():
        if not getattr(event, "is_hidden_event", bool)():
            name, kind, named = event.name(), event.device_type(), event.is_user_annotation()
            spent[name, kind, named].append(event.duration_ns())
    return [
        SimpleNamespace(
            key=name,
            device_type=kind,
            is_user_annotation=named,
            count=len(ns),
            self_device_time_total=sum(ns) / 1e3,
        )
        for (name, kind, named), ns in spent.items()
    ]


def kernels(run_once: Callable[[], Any], device: torch.device, top: int = 25) -> dict[str, Any]:
    """Profile a few calls after a warm-up.

    Args:
        run_once: the call.
        device: where it runs.
        top: of the kernels, those that take longest, are listed.

    Returns:
        "of": "kernels" or, on a CPU, "operators". For one call: "wall_s" without the profiler;
        "device_s", the time of all of them; "kernels", each with "name", "calls", "total_us" and
        its "share" of "device_s"; "kinds", how many differ; "host_ops", operators dispatched by
        the host. Where the profiler saw nothing on the GPU, "device_s" is None; a call that takes
        too long for it has "left_out", why, and no kernels.
    """
    wall = 0.0
    for _ in range(_WARMUP):
        start = time.perf_counter()
        run_once()
        _wait(device)
        wall = time.perf_counter() - start
    if wall > _SLOWEST:
        why = f"a call takes {wall:.1f} s, want at most {_SLOWEST:g} s to profile it"
        none = {"of": "kernels", "wall_s": wall, "device_s": None, "kernels": [], "kinds": 0}
        return none | {"host_ops": None, "left_out": why}
    start = time.perf_counter()
    for _ in range(_CALLS):
        run_once()
    _wait(device)
    wall = (time.perf_counter() - start) / _CALLS

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as watched:
        for _ in range(_CALLS):
            run_once()
        _wait(device)

    events = [event for event in _events(watched, device) if not _timeline(event)]
    host = [event for event in events if event.device_type == DeviceType.CPU]
    listed = [event for event in events if event.device_type == DeviceType.CUDA] if cuda else host
    own = _device_us if cuda else lambda event: float(event.self_cpu_time_total)
    total = sum(own(event) for event in listed)
    longest = sorted(listed, key=own, reverse=True)[:top]
    return {
        "of": "kernels" if cuda else "operators",
        "wall_s": wall,
        "device_s": total / _CALLS * 1e-6 if listed else None,
        "kernels": [
            {
                "name": event.key[:_NAME],
                "calls": _each(event.count),
                "total_us": round(own(event) / _CALLS, 3),
                "share": own(event) / total if total else 0.0,
            }
            for event in longest
        ],
        "kinds": len(listed),
        "host_ops": _each(sum(event.count for event in host if _dispatched(event.key))),
    }


def _dispatched(name: str) -> bool:
    """Return whether a host event is an operator, "aten::mm", and no call of autograd or CUDA."""
    return "::" in name and not name.startswith(("autograd::", "torch::autograd"))


def _each(count: int) -> int | float:
    """Return the number for one call; no whole one where calls differed."""
    return count // _CALLS if count % _CALLS == 0 else round(count / _CALLS, 2)


def table(profiled: dict[str, Any]) -> str:
    """Return what `kernels` found as text, a line for each kernel."""
    if "left_out" in profiled:
        return profiled["left_out"]
    spent = profiled["device_s"]
    device = (
        "nothing seen on the device"
        if spent is None
        else f"{1e3 * spent:.3f} ms in {profiled['of']}"
    )
    head = f"{1e3 * profiled['wall_s']:.3f} ms a call, {device}, {profiled['host_ops']} host ops"
    lines = [head, f"{'share':>6} {'us':>11} {'calls':>6}  name"]
    for row in profiled["kernels"]:
        share = f"{100 * row['share']:.1f}%"
        lines.append(f"{share:>6} {row['total_us']:>11.1f} {row['calls']:>6}  {row['name']}")
    more = profiled["kinds"] - len(profiled["kernels"])
    if more:
        rest = 1 - sum(row["share"] for row in profiled["kernels"])
        lines.append(f"{f'{100 * rest:.1f}%':>6} {'':>11} {'':>6}  {more} more")
    return "\n".join(lines)
