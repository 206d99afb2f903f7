"""How long a call takes: by the host's clock and by CUDA events, with cold caches if asked for."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
    """A fixed matrix product, timed now and then: how steady the machine is, whatever is measured.

    Args:
        device: where it runs.
        small: a rehearsal's size.
    """

    def __init__(self, device: torch.device, small: bool = False):
        cuda = device.type == "cuda"
        self._side = 64 if small else (8192 if cuda else 1024)
        self._dtype = torch.bfloat16 if cuda else torch.float32
        self._device = device
        self._operands = self._random()
        self._watch, self._samples = Stopwatch(device), Samples()
        self._product()

    def _random(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(self._device).manual_seed(0)
        kind = {"generator": generator, "device": self._device}
        x, w = (torch.randn(self._side, self._side, **kind) for _ in range(2))
        return x.to(self._dtype), w.to(self._dtype)

    def _product(self) -> Tensor:
        x, w = self._operands
        return x @ w

    def beat(self) -> None:
        """Time one product."""
        self._watch.time(self._product, self._samples)

    def found(self) -> dict[str, Any] | None:
        """Return its rates "tflop_per_s" by percentile and how many n; None: it took no time."""
        seconds = [s for s in self._samples.device or self._samples.wall if s > 0]
        if not seconds:
            return None
        rates = spread([2e-12 * self._side**3 / s for s in seconds])
        n = rates.pop("n")
        dtype = str(self._dtype).removeprefix("torch.")
        return {"tflop_per_s": rates, "dtype": dtype, "side": self._side, "n": n}
