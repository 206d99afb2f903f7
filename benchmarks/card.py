"""What the driver says about a GPU: limits, clocks, power, and what holds the clocks back.

NVML answers through pynvml where that is installed, else through `nvidia-smi`. Both only read: no
setting of the card is changed. A value that the driver does not give is None.
"""

import importlib
import re
import subprocess
from collections.abc import Callable
from typing import Any

from record import clean

# NVML's bits for what keeps the clocks down.
REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
}

_SMI_FIELDS = {
    "driver": "driver_version",
    "power_limit_w": "power.limit",
    "power_w": "power.draw",
    "sm_mhz": "clocks.sm",
    "sm_max_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "memory_max_mhz": "clocks.max.mem",
    "temperature_c": "temperature.gpu",
    "mig": "mig.mode.current",
}
_SMI_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # new, old driver
_SMI_SECONDS = 10
_NUMBERS = {name for name in _SMI_FIELDS if name not in ("driver", "mig")}


def reasons(mask: int) -> list[str]:
    """Return the words for NVML's bits; a bit without a name stands as a number."""
    bits = [1 << i for i in range(mask.bit_length()) if mask >> i & 1]
    return [REASONS.get(bit, hex(bit)) for bit in bits]


def _ask(call: Callable[[], Any]) -> Any:
    """Return the answer of one NVML call, or None: not every card and driver supports all."""
    try:
        return call()
    except Exception:
        return None


def _watts(call: Callable[[], int]) -> float | None:
    milliwatts = _ask(call)
    return None if milliwatts is None else round(milliwatts / 1e3, 1)


def _handle(nvml: Any, uuid: str | None) -> Any:
    """Return NVML's handle of the card; NVML's numbers are not those of CUDA_VISIBLE_DEVICES."""
    for prefix in ("GPU-", "MIG-", "") if uuid else ():
        for name in (f"{prefix}{uuid}", f"{prefix}{uuid}".encode()):  # str or bytes: both are out
            handle = _ask(lambda name=name: nvml.nvmlDeviceGetHandleByUUID(name))
            if handle is not None:
                return handle
    count = nvml.nvmlDeviceGetCount()
    if count == 1:
        return nvml.nvmlDeviceGetHandleByIndex(0)
    raise LookupError(f"NVML has {count} cards and not the one asked for")


def _by_nvml(uuid: str | None) -> dict[str, Any]:
    nvml = importlib.import_module("pynvml")
    nvml.nvmlInit()  # counted by NVML: cheap after the first
    h = _handle(nvml, uuid)
    driver = _ask(nvml.nvmlSystemGetDriverVersion)
    mask = _ask(lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(h))
    if mask is None:  # named so by older drivers
        mask = _ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(h))
    mig = _ask(lambda: nvml.nvmlDeviceGetMigMode(h)[0])
    return {
        "via": "nvml",
        "driver": driver.decode() if isinstance(driver, bytes) else driver,
        "power_limit_w": _watts(lambda: nvml.nvmlDeviceGetPowerManagementLimit(h)),
        "power_w": _watts(lambda: nvml.nvmlDeviceGetPowerUsage(h)),
        "sm_mhz": _ask(lambda: nvml.nvmlDeviceGetClockInfo(h, nvml.NVML_CLOCK_SM)),
        "sm_max_mhz": _ask(lambda: nvml.nvmlDeviceGetMaxClockInfo(h, nvml.NVML_CLOCK_SM)),
        "memory_mhz": _ask(lambda: nvml.nvmlDeviceGetClockInfo(h, nvml.NVML_CLOCK_MEM)),
        "memory_max_mhz": _ask(lambda: nvml.nvmlDeviceGetMaxClockInfo(h, nvml.NVML_CLOCK_MEM)),
        "temperature_c": _ask(lambda: nvml.nvmlDeviceGetTemperature(h, nvml.NVML_TEMPERATURE_GPU)),
        "mig": None if mig is None else bool(mig),
        "throttle": None if mask is None else reasons(mask),
    }


def _number(text: str) -> float | None:
    """Return the number in what nvidia-smi prints; "[N/A]" and its like have none."""
    try:
        return float(text)
    except ValueError:
        return None


def _smi(fields: list[str]) -> list[dict[str, str]]:
    """Return what nvidia-smi answers for each card.

    Raises:
        RuntimeError: it is not there or does not answer.
        ValueError: it does not know a field, or has no card.
    """
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_SECONDS)
    except FileNotFoundError:
        raise RuntimeError("neither pynvml nor nvidia-smi is here") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"nvidia-smi: {type(error).__name__}") from None
    if done.returncode:
        raise ValueError(f"nvidia-smi: {clean(done.stdout or done.stderr, 120)}")
    lines = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines()]
    return [dict(zip(fields, line, strict=True)) for line in lines if line != [""]]


def _by_smi(uuid: str | None) -> dict[str, Any]:
    error = None
    for field in _SMI_REASONS:
        try:
            rows = _smi(["uuid", *_SMI_FIELDS.values(), field])
            break
        except ValueError as caught:
            error = error or caught
    else:
        raise error
    row = next((r for r in rows if r["uuid"] in (uuid, f"GPU-{uuid}")), None)
    if row is None:
        if len(rows) != 1:
            raise LookupError(f"nvidia-smi has {len(rows)} cards and not the one asked for")
        row = rows[0]
    mask = row[field]
    found: dict[str, Any] = {"via": "nvidia-smi"}
    for name, key in _SMI_FIELDS.items():
        found[name] = _number(row[key]) if name in _NUMBERS else row[key]
    found["driver"] = None if row["driver_version"].startswith("[") else row["driver_version"]
    found["mig"] = {"Enabled": True, "Disabled": False}.get(found["mig"])
    is_mask = re.fullmatch("0x[0-9a-fA-F]+", mask)
    return found | {"throttle": reasons(int(mask, 16)) if is_mask else None}


def reading(uuid: str | None = None) -> dict[str, Any]:
    """Return what the driver says about one card now; never raises.

    Args:
        uuid: of the card, as `torch.cuda.get_device_properties` has it. Where the driver does not
            know it and has one card only, that one is taken.

    Returns:
        "via", "driver", "power_limit_w", "power_w", "sm_mhz", "sm_max_mhz", "memory_mhz",
        "memory_max_mhz", "temperature_c", "mig" and "throttle", a list of words; or
        {"unavailable": reason}.
    """
    try:
        return _by_nvml(uuid)
    except Exception:  # pynvml is not installed, or the library under it, or it lost the card
        pass
    try:
        return _by_smi(uuid)
    except Exception as error:
        return {"unavailable": clean(str(error), 160)}
