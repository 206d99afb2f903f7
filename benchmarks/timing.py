"""How long a call takes: by the host's clock and by CUDA events, with cold caches if asked for."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

_SLEEP_CYCLES = 1_000_000  # about 0.5 ms of a GPU: the host enqueues a call meanwhile


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Return the 20th, 50th and 80th percentile of the samples and their number."""
    p20, p50, p80 = (float(v) for v in np.percentile(samples, (20, 50, 80)))
    return {"p20": p20, "p50": p50, "p80": p80, "n": len(samples)}


@dataclass
class Samples:
    """Seconds of single calls: `wall` by the host's clock, `device` by CUDA events."""

    wall: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)


class Stopwatch:
    """Times single calls on a device.

    Args:
        device: where the calls run; work that is still under way there is waited for.
        flush: overwrite a buffer larger than the caches before each call.
    """

    def __init__(self, device: torch.device, flush: bool = False):
        self._cuda = device.type == "cuda"
        self._device = device
        self._cache = None
        if flush:
            size = 4 * self._cache_bytes()
            self._cache = torch.empty(size, dtype=torch.int8, device=device)

    def _cache_bytes(self) -> int:
        """Return the size of the last cache, within 16 to 256 MiB."""
        if self._cuda:
            size = getattr(torch.cuda.get_device_properties(self._device), "L2_cache_size", 0)
        else:
            name = "SC_LEVEL3_CACHE_SIZE"
            size = os.sysconf(name) if name in os.sysconf_names else 0
        return min(max(size, 2**24), 2**28)

    def wait(self) -> None:
        """Return when the device has nothing left to do."""
        if self._cuda:
            torch.cuda.synchronize(self._device)

    def seconds(self, call: Callable[[], Any]) -> float:
        """Return the time of a call, its work on the device included."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def time(self, call: Callable[[], Any], into: Samples) -> None:
        """Add the time of a call to the samples.

        With cold caches on a GPU the call is made twice: its kernels are timed apart, queued behind
        a pause, so that they do not wait for the host.
        """
        if self._cache is not None:
            self._cache.fill_(1)
        if not self._cuda:
            into.wall.append(self.seconds(call))
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self._cache is None:
            self.wait()
            start = time.perf_counter()
            first.record()
            call()
            last.record()
            self.wait()
            into.wall.append(time.perf_counter() - start)
        else:
            into.wall.append(self.seconds(call))
            torch.cuda._sleep(_SLEEP_CYCLES)
            self._cache.fill_(1)
            first.record()
            call()
            last.record()
            self.wait()
        into.device.append(first.elapsed_time(last) / 1e3)


class Pulse:
    """A fixed matrix product and a fixed copy, timed now and then, whatever is measured.

    They say how steady the machine is, in arithmetic and in memory.

    Args:
        device: where they run.
        small: a rehearsal's sizes.
    """

    def __init__(self, device: torch.device, small: bool = False):
        cuda = device.type == "cuda"
        self._side = 64 if small else (8192 if cuda else 1024)
        size = 2**12 if small else (2**30 if cuda else 2**26)
        dtype = torch.bfloat16 if cuda else torch.float32
        kind = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        x, w = (torch.randn(self._side, self._side, **kind).to(dtype) for _ in range(2))
        source = torch.ones(size, dtype=torch.int8, device=device)
        target = torch.zeros_like(source)
        self._calls = {"product": lambda: x @ w, "copy": lambda: target.copy_(source)}
        self._amounts = {"product": 2e-12 * self._side**3, "copy": 2e-9 * size}
        self._samples = {name: Samples() for name in self._calls}
        self._dtype, self._size = str(dtype).removeprefix("torch."), size
        self._watch = Stopwatch(device)
        for call in self._calls.values():
            call()

    def beat(self) -> None:
        """Time one of each."""
        for name, call in self._calls.items():
            self._watch.time(call, self._samples[name])

    def found(self) -> dict[str, Any] | None:
        """Return what they are and their rates by percentile; None: they took no time."""
        rates = {}
        for name, samples in self._samples.items():
            seconds = [s for s in samples.device or samples.wall if s > 0]
            if not seconds:
                return None
            rates[name] = spread([self._amounts[name] / s for s in seconds])
        n = min(rate.pop("n") for rate in rates.values())
        product = {"tflop_per_s": rates["product"], "dtype": self._dtype, "side": self._side}
        return product | {"gb_per_s": rates["copy"], "bytes": self._size, "n": n}
