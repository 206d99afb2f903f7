"""benchmarks/changes.py: how much of a change is noise, by which clock, and what is comparable."""

import math
import random
import statistics

import changes
import pytest
from compare_runs import FLOOR, made, noise, pulsed, slower, timed, times, two_cases, verdicts
from hypothesis import given
from hypothesis import strategies as st
from ledger_runs import H200


def test_sampling_is_two_standard_errors_of_the_median():
    """Of medians of normal numbers, with as many of them as it says."""
    assert changes.sampling(times(10, 0.1683, 25)) == pytest.approx(2 * 1.2533 * 0.1 / 5)
    draw, deviation = random.Random(0), 0.05
    medians = [statistics.median(draw.gauss(1, deviation) for _ in range(25)) for _ in range(2000)]
    says = changes.sampling(times(10, 1.683 * deviation, 25))
    assert 2 * statistics.stdev(medians) == pytest.approx(says, rel=0.1)


def test_few_calls_say_less():
    found = [changes.sampling(times(10, 0.05, n)) for n in range(2, 40)]
    assert found == sorted(found, reverse=True) and found[0] > 5 * found[7]
    assert changes.sampling(times(10, 0.0, 1)) == 0.25 > changes.sampling(times(10, 0.0, 2)) == 0


def test_a_single_call_is_hardly_evidence():
    one = made(timed("bert_fast", 10, n=1))
    assert verdicts(one, slower(one, 1.3)) == {"cpu 1x128": "within noise"}
    assert verdicts(one, slower(one, 1.5)) == {"cpu 1x128": "REGRESSION"}


def test_without_any_spread_the_machine_s_floor_stays():
    before = made(timed("bert_fast", 10))
    assert noise(before) == {"cpu 1x128": FLOOR}
    assert verdicts(before, slower(before, 1 + 0.9 * FLOOR), 0.1) == {"cpu 1x128": "within noise"}
    assert verdicts(before, slower(before, 1 + 1.1 * FLOOR), 0.1) == {"cpu 1x128": "REGRESSION"}


def test_a_machine_that_wavers_allows_more():
    calm, wild = pulsed(two_cases(), [0.2, 0.2]), pulsed(two_cases(), [0.18, 0.22])
    assert changes.wobble(calm, False) == 0
    assert changes.wobble(wild, False) == pytest.approx(statistics.stdev([0.9, 1.1]))
    assert noise(wild)["cpu 1x128"] == pytest.approx(changes.wobble(wild, False))
    assert noise(calm)["cpu 1x128"] == FLOOR
    other = pulsed(two_cases(), [0.2, 0.4])  # of another dtype: no wavering
    other["cases"]["cpu 8x128"]["pulse"]["dtype"] = "bf16"
    assert changes.wobble(other, False) == 0 == changes.wobble(two_cases(), False)


@pytest.mark.parametrize("by", [1.08, 1 / 1.08])
def test_a_drift_widens_what_is_allowed_and_is_not_divided_out(by):
    before, after = two_cases(), two_cases()
    pulsed(before, [0.2, 0.2])
    pulsed(after, [0.2, 0.2 * by])
    of = noise(before, after)
    assert of["cpu 1x128"] == pytest.approx(max(FLOOR, changes.wobble(after, False)))
    assert of["cpu 8x128"] == pytest.approx(of["cpu 1x128"] + abs(by - 1))
    changed = changes.compare(before, after, 0.05).changes
    assert all(one.ratio == 1 for one in changed)
    slow = verdicts(before, slower(after, 1.12))
    assert slow == {"cpu 1x128": "REGRESSION", "cpu 8x128": "within noise"}


def test_without_a_pulse_the_drift_is_that_of_the_ceiling():
    before, after = two_cases(), two_cases()
    assert changes.drift(before, after, "cpu 1x128") == 0
    before["ceilings"] = {"matmul_tflop_per_s": {"fp32": 0.2, "bf16": 0.4}}
    assert changes.drift(before, after, "cpu 1x128") == 0
    after["ceilings"] = {"matmul_tflop_per_s": {"fp32": 0.21, "bf16": 0.8}}
    assert changes.drift(before, after, "cpu 1x128") == pytest.approx(0.05)
    pulsed(after, [0.3, 0.3])
    assert changes.drift(before, after, "cpu 1x128") == pytest.approx(0.05)
    pulsed(before, [0.3, 0.3], side=512)  # another product
    assert changes.drift(before, after, "cpu 1x128") == pytest.approx(0.05)
    pulsed(before, [0.3, 0.3])
    assert changes.drift(before, after, "cpu 1x128") == 0


def test_memory_that_is_slower_is_a_drift_where_caches_are_cold():
    before, after = two_cases(), two_cases()
    pulsed(before, [0.2, 0.2], copies=[20.0, 20.0])
    pulsed(after, [0.19, 0.2], copies=[20.0, 15.0])
    assert changes.drift(before, after, "cpu 8x128") == 0
    before["cases"]["cpu 8x128"]["flushed"] = True
    assert changes.drift(before, after, "cpu 1x128") == pytest.approx(0.05)
    assert changes.drift(before, after, "cpu 8x128") == pytest.approx(0.25)
    assert changes.wobble(after, True) == pytest.approx(statistics.stdev([20, 15]) / 17.5)
    pulsed(before, [0.2, 0.2])  # a run that measured no copy
    assert changes.drift(before, after, "cpu 8x128") == 0


SPREADS = st.floats(0, 0.5)
CALLS = st.integers(1, 60)


@given(ratio=st.floats(0.3, 3), spreads=st.tuples(SPREADS, SPREADS), n=st.tuples(CALLS, CALLS),
       over=st.floats(0.1, 50))  # fmt: skip
def test_the_rule(ratio, spreads, n, over):
    """Whatever the times: a regression is above both limits, and nothing is both ways worse."""
    before = made(timed("bert_fast", 10, spreads[0], n[0]))
    after = made(timed("bert_fast", 10 * ratio, spreads[1], n[1]))
    (one,) = changes.compare(before, after, over / 100).changes
    (back,) = changes.compare(after, before, over / 100).changes
    assert one.noise == back.noise >= FLOOR and one.ratio == pytest.approx(1 / back.ratio)
    assert (one.verdict == "REGRESSION") is (one.ratio > 1 + max(one.noise, over / 100))
    if one.verdict in ("REGRESSION", "slower"):
        assert one.ratio > 1 + one.noise and back.ratio < 1
    if one.verdict == "same":
        assert max(one.ratio, 1 / one.ratio) <= 1 + over / 100
    assert one.noise >= math.hypot(one.sampling, one.machine)


@given(st.floats(0, 0.3), CALLS)
def test_a_run_has_not_changed_from_itself(spread, n):
    data = made(timed("bert_fast", 10, spread, n))
    assert verdicts(data, data) == {"cpu 1x128": "same"}


def test_the_clock_that_counts():
    def kernels(wall, device, flushed):
        fields = {"device": device and times(device)}
        data = made(timed("bert_fast", wall, **fields), machine=H200)
        data["cases"]["cpu 1x128"]["flushed"] = flushed
        return data

    pair = kernels(10, 1, True), kernels(10, 2, True)
    (one,) = changes.compare(*pair, 0.05).changes
    assert one.times == (0.001, 0.002)
    for pair in (
        (kernels(10, 1, False), kernels(11, 2, False)),
        (kernels(10, None, True), kernels(11, 2, True)),
        (kernels(10, 1, True), kernels(11, None, True)),
    ):
        (one,) = changes.compare(*pair, 0.05).changes
        assert one.times == (0.01, 0.011)


def test_the_noise_is_put_together_as_it_is_said():
    """On a run that waves by 4 %, before or after, with a drift of 5 %."""
    half = 0.04 / 2**0.5
    wild, calm = pulsed(two_cases(), [1 - half, 1 + half]), pulsed(two_cases(), [1 - half] * 2)
    for pair in ((wild, calm), (calm, wild)):
        (first, second) = changes.compare(*pair, 0.05).changes
        assert first.machine == second.machine == pytest.approx(max(FLOOR, 0.04))
        assert first.drift == 0 and second.drift > 0.05
    before = made(timed("bert_fast", 10, 0.05, 9))
    (one,) = changes.compare(before, before, 0.05).changes
    error = 2 * 1.2533 * 0.05 / 1.683 / 3 * 2.306 / 1.96  # Student's t for n = 9
    assert one.sampling == pytest.approx(error * 2**0.5)
    assert one.noise == pytest.approx((one.sampling**2 + FLOOR**2) ** 0.5)
    for share, verdict in ((0.98, "within noise"), (1.02, "faster")):
        after = slower(before, 1 / (1 + share * one.noise))
        assert verdicts(before, after, 0.1) == {"cpu 1x128": verdict}


def test_peers_that_change_unlike_each_other_are_the_machine_s_noise():
    def one(candidate, ratio):
        return changes.Change("a", candidate, (1.0, ratio), 0.0, 0.0, 0.0, 0.05)

    same = [one(f"peer {i}", 1.2) for i in range(9)]
    assert changes.scatter(same) == 0 == changes.scatter([*same[:4], one("bert_fast", 9.0)])
    moved = [one(f"peer {i}", 1.2 * 1.1**i) for i in range(-4, 5)]
    assert changes.scatter(moved) == pytest.approx(1.1 ** (2 * 1.4826 * 2) - 1)
    wild = [*same, one("peer", 7.0)]
    assert changes.scatter(wild) == 0
