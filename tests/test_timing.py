"""benchmarks/timing.py, and the rates that come from its times."""

from types import SimpleNamespace

import harness
import pytest
import timing
import torch
from bench_cases import CPU, case
from gate import Work
from harness import rates


def test_percentiles_by_hand():
    found = timing.spread([0.5, 9, 2, 1, 4, 3])  # sorted: 0.5 1 2 3 4 9
    assert found == {"p20": 1, "p50": 2.5, "p80": 4, "n": 6}
    assert timing.spread([7.0]) == {"p20": 7, "p50": 7, "p80": 7, "n": 1}


def test_caches_are_overwritten_before_each_call(monkeypatch):
    monkeypatch.setattr(timing.Stopwatch, "_cache_bytes", lambda self: 256)
    watch, samples, seen = timing.Stopwatch(CPU, flush=True), timing.Samples(), []
    assert watch._cache.numel() == 1024  # larger than the cache

    def call():
        seen.append(watch._cache.unique().tolist())
        watch._cache.zero_()

    for _ in range(3):
        watch.time(call, samples)
    assert seen == [[1]] * 3 and len(samples.wall) == 3 and samples.device == []
    assert timing.Stopwatch(CPU)._cache is None
    monkeypatch.undo()
    assert 2**24 <= timing.Stopwatch(CPU)._cache_bytes() <= 2**28


class Log(list):
    """What is asked of a GPU, in order; events are 3 ms apart."""

    def note(self, what, result=None):
        return lambda *a, **k: self.append(what) or result

    def event(self, **how):
        assert how == {"enable_timing": True}
        return SimpleNamespace(record=self.note("record"), elapsed_time=lambda last: 3.0)


@pytest.mark.parametrize("flush", [False, True])
def test_the_order_on_a_gpu(monkeypatch, flush):
    """With a CUDA of paper: events right around the call, nothing of the flush between them."""
    log = Log()
    cuda = SimpleNamespace(
        Event=log.event,
        synchronize=log.note("wait"),
        _sleep=log.note("pause"),
        get_device_properties=lambda device: SimpleNamespace(L2_cache_size=50 * 2**20),
    )
    buffer, sizes = SimpleNamespace(fill_=log.note("flush")), []
    empty = lambda size, **how: sizes.append(size) or buffer  # noqa: E731
    fake = SimpleNamespace(cuda=cuda, empty=empty, int8=torch.int8)
    monkeypatch.setattr(timing, "torch", fake)
    watch, samples = timing.Stopwatch(SimpleNamespace(type="cuda"), flush), timing.Samples()
    watch.time(log.note("call"), samples)
    if flush:
        assert sizes == [200 * 2**20]
        host, device = log[: log.index("pause")], log[log.index("pause") :]
        assert host == ["flush", "wait", "call", "wait"]
        assert device == ["pause", "flush", "record", "call", "record", "wait"]
    else:
        assert log == ["wait", "record", "call", "record", "wait"]
    assert samples.device == [0.003] and len(samples.wall) == 1


DATA = {
    "environment": {"device": "NVIDIA H200"},
    "ceilings": {"copy_gb_per_s": 8.0, "matmul_tflop_per_s": {"bf16": 24.0}},
}
WORK = Work(tokens=100, slots=400, sequences=3, bytes=2 * 10**9, flops=3 * 10**12)


def test_rates_by_hand():
    assert rates(case("bf16", work=WORK), 0.5, DATA) == {
        "tokens_per_s": 200,
        "sequences_per_s": 6,
        "gb_per_s": 4,
        "tflop_per_s": 6,
        "of_copy": 0.5,
        "of_matmul": 0.25,
        "of_989": pytest.approx(6 / 989),
    }
    only_bytes = rates(case("bf16", work=Work(bytes=10**9)), 1.0, DATA)
    assert only_bytes == {"gb_per_s": 1, "of_copy": 0.125}
    assert rates(case(work=Work()), 1.0, DATA) == {}


@pytest.mark.parametrize(
    ("device", "dtype", "of_989"),
    [
        ("NVIDIA H100 80GB HBM3", "fp16", True),
        ("NVIDIA H200", "fp32", False),
        ("NVIDIA A100-SXM4-80GB", "bf16", False),
        ("AMD EPYC 9B45, 2 cores", "bf16", False),
    ],
)
def test_the_customary_ceiling_is_that_of_hopper_in_16_bits(device, dtype, of_989):
    data = {"environment": {"device": device}, "ceilings": {}}
    found = rates(case(dtype, work=WORK), 0.5, data)
    assert ("of_989" in found) is of_989
    assert "of_copy" not in found and "of_matmul" not in found and found["gb_per_s"] == 4


def test_kernels_are_rated_by_the_time_on_the_device():
    samples = timing.Samples(wall=[4.0, 4.0], device=[0.5, 0.5])
    entry = SimpleNamespace(name="a", samples=samples, graphs=0)
    for flush, seconds in ((True, 0.5), (False, 4.0)):
        found = harness._times(case(work=WORK, flush=flush), entry, DATA)
        assert found["rate"]["tokens_per_s"] == 100 / seconds
        assert found["wall"]["p50"] == 4 and found["device"]["p50"] == 0.5
