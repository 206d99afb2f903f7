"""benchmarks/card.py, and what machine.py makes of it: the answers of the drivers are made up."""

import json
import subprocess
from types import SimpleNamespace
from typing import Any

import card
import machine
import pytest
import torch

UUID = "11111111-2222-3333-4444-555555555555"
READ = {
    "driver": "580.95.05",
    "power_limit_w": 700.0,
    "power_w": 123.5,
    "sm_mhz": 1755,
    "sm_max_mhz": 1980,
    "memory_mhz": 3201,
    "memory_max_mhz": 3201,
    "temperature_c": 41,
    "mig": False,
    "throttle": ["software power cap", "software thermal slowdown"],
}


def _nvml(cards: int = 2, without: tuple[str, ...] = ()) -> SimpleNamespace:
    """Return the pynvml of a machine with two cards, the second of which is asked for."""

    def handle(uuid: bytes) -> str:
        if uuid != f"GPU-{UUID}".encode():
            raise RuntimeError("not found")
        return "card 1"

    fake = SimpleNamespace(
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: cards,
        nvmlDeviceGetHandleByIndex=lambda index: f"card {index}",
        nvmlDeviceGetHandleByUUID=handle,
        nvmlSystemGetDriverVersion=lambda: b"580.95.05",
        nvmlDeviceGetPowerManagementLimit=lambda h: {"card 0": 500_000, "card 1": 700_000}[h],
        nvmlDeviceGetPowerUsage=lambda h: 123_456,
        nvmlDeviceGetClockInfo=lambda h, which: {1: 1755, 2: 3201}[which],
        nvmlDeviceGetMaxClockInfo=lambda h, which: {1: 1980, 2: 3201}[which],
        nvmlDeviceGetTemperature=lambda h, which: 41,
        nvmlDeviceGetMigMode=lambda h: [0, 1],  # now, and after the next reset
        nvmlDeviceGetCurrentClocksEventReasons=lambda h: 0x24,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda h: 0x1,
    )
    for name in without:
        delattr(fake, name)
    return fake


SMI = {
    "uuid": f"GPU-{UUID}",
    "driver_version": "580.95.05",
    "power.limit": "700.00",
    "power.draw": "123.50",
    "clocks.sm": "1755",
    "clocks.max.sm": "1980",
    "clocks.mem": "3201",
    "clocks.max.mem": "3201",
    "temperature.gpu": "41",
    "mig.mode.current": "Disabled",
    "clocks_event_reasons.active": "0x0000000000000024",
}


@pytest.fixture
def nvml(monkeypatch):
    """Let this be the pynvml that card.py finds; None: there is none."""

    def use(fake: Any) -> None:
        def load(name: str) -> Any:
            assert name == "pynvml"
            if fake is None:
                raise ModuleNotFoundError(name)
            return fake

        monkeypatch.setattr(card, "importlib", SimpleNamespace(import_module=load))

    return use


@pytest.fixture
def smi(monkeypatch, nvml):
    """Let nvidia-smi print these cards, and pynvml be absent."""
    nvml(None)

    def use(*cards: dict[str, str], failure: Exception | None = None) -> None:
        def run(command, **_):
            assert command[0] == "nvidia-smi"
            if failure:
                raise failure
            fields = command[1].removeprefix("--query-gpu=").split(",")
            for field in fields:
                if cards and field not in cards[0]:
                    out = f'Field "{field}" is not a valid field to query.'
                    return subprocess.CompletedProcess(command, 2, out, "")
            lines = [", ".join(each[field] for field in fields) for each in cards]
            return subprocess.CompletedProcess(command, 0, "\n".join(lines) + "\n", "")

        monkeypatch.setattr(card.subprocess, "run", run)

    return use


def test_reasons_are_the_bits_of_nvml():
    assert card.reasons(0) == []
    assert card.reasons(0x8 | 0x40 | 0x80) == [
        "hardware slowdown",
        "hardware thermal slowdown",
        "hardware power brake",
    ]
    assert card.reasons(0x1 | 0x4000) == ["idle", "0x4000"]


def test_nvml_reads_the_card_asked_for(nvml):
    nvml(_nvml())
    assert card.reading(UUID) == {"via": "nvml", **READ}


def test_nvml_without_some_answers(nvml):
    nvml(_nvml(without=("nvmlDeviceGetPowerUsage", "nvmlDeviceGetMigMode")))
    assert card.reading(UUID) == {"via": "nvml", **READ, "power_w": None, "mig": None}
    nvml(_nvml(without=("nvmlDeviceGetCurrentClocksEventReasons",)))  # an older driver
    assert card.reading(UUID)["throttle"] == ["idle"]


def test_a_card_is_never_guessed_among_several(nvml, smi):
    smi(SMI, {**SMI, "uuid": "GPU-0"})
    nvml(_nvml())
    assert "2 cards" in card.reading("unknown")["unavailable"]
    nvml(_nvml(cards=1))
    assert card.reading("unknown")["power_limit_w"] == 500.0


def test_nvidia_smi_stands_in_for_nvml(smi):
    smi({**SMI, "uuid": "GPU-0", "power.limit": "1.00"}, SMI)
    assert card.reading(UUID) == {"via": "nvidia-smi", **READ}


def test_nvidia_smi_without_some_answers(smi):
    no = {"power.draw": "[N/A]", "clocks.sm": "[Not Supported]", "mig.mode.current": "[N/A]"}
    smi({**SMI, **no, "clocks_event_reasons.active": "[N/A]"})
    absent = {"power_w": None, "sm_mhz": None, "mig": None, "throttle": None}
    assert card.reading(UUID) == {"via": "nvidia-smi", **READ, **absent}


def test_nvidia_smi_of_an_older_driver(smi):
    older = {**SMI, "clocks_throttle_reasons.active": "0x0000000000000001"}
    del older["clocks_event_reasons.active"]
    smi(older)
    assert card.reading(UUID)["throttle"] == ["idle"]


def test_no_driver_at_all_says_so(smi):
    smi(failure=FileNotFoundError("nvidia-smi"))
    assert card.reading(UUID) == {"unavailable": "neither pynvml nor nvidia-smi is here"}
    smi(failure=subprocess.TimeoutExpired("nvidia-smi", 10))
    assert "TimeoutExpired" in card.reading(UUID)["unavailable"]
    smi()
    assert "0 cards" in card.reading(UUID)["unavailable"]


@pytest.fixture
def gpu(monkeypatch, nvml) -> torch.device:
    """A card that answers but cannot compute."""
    nvml(_nvml())
    properties = SimpleNamespace(
        name="NVIDIA H200",
        major=9,
        minor=0,
        total_memory=150_000_000_000,
        multi_processor_count=132,
        uuid=UUID,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return torch.device("cuda")


def test_environment_of_a_gpu(gpu):
    found = machine.environment(gpu)
    assert (found["device"], found["slug"]) == ("NVIDIA H200", "nvidia-h200")
    assert found["gpu"]["capability"] == "9.0" and found["gpu"]["multiprocessors"] == 132
    assert found["gpu"]["l2"] is None  # not every torch has it
    assert found["gpu"]["power_limit_w"] == 700.0 and found["gpu"]["driver"] == "580.95.05"
    json.dumps(found, allow_nan=False)


def test_clocks_of_a_gpu(gpu, monkeypatch):
    names = ("sm_mhz", "memory_mhz", "temperature_c", "power_w", "throttle")
    assert machine.clocks(gpu) == {name: READ[name] for name in names}

    def lost(_: Any) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lost)
    assert machine.clocks(gpu) == {"unavailable": "RuntimeError: device lost"}
