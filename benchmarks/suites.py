"""The suites kernels, encoder and pretraining: their cases, and how each is built.

    python benchmarks/suites.py SUITE --device cpu|cuda [--small]

prints the cases as JSON: run.py, which imports no torch, asks in this way.
"""

import argparse
import json
import shlex
from typing import Any

import checkout  # noqa: F401
import encoder
import ops
import pretraining
import specs
import torch
from gate import Candidate, Case

FAMILIES = ("kernels", "encoder", "pretraining")
MODULES = {"encoder": encoder, "pretraining": pretraining}
_SIZES = ("base", "large")
_KERNEL_SECONDS = {"cpu": 8.0, "cuda": 12.0}  # for a case, its truth included
_CASE_SECONDS = 25.0  # to prepare the candidates of a case
_CALLS = 40  # of all candidates, checks included
_CPU_RATE = 0.15e12  # FLOP/s


def family_of(name: str) -> str:
    """Return the family of a case."""
    return next((f for f, module in MODULES.items() if name in module.SPECS), "kernels")


def names(family: str, device: str, small: bool = False) -> list[str]:
    """Return the cases of a family.

    Args:
        family: in FAMILIES.
        device: "cpu" or "cuda".
        small: a rehearsal, in which an op has one size.
    """
    if family != "kernels":
        return specs.of_device(MODULES[family].SPECS, device)
    return [name if small else f"{name}, {size}" for name in ops.names() for size in _SIZES]


def build(
    name: str, device: torch.device, *, small: bool = False, full: bool = True
) -> tuple[Case, list[Candidate]]:
    """Return a case of any family and its candidates.

    Args:
        name: in `names`.
        device: where it runs.
        small: the rehearsal's sizes.
        full: every peer and mode; else the short list. Kernels have one list.
    """
    family = family_of(name)
    if family != "kernels":
        case, candidates = MODULES[family].case(name, device, small=small, full=full)
    else:
        row, _, size = name.partition(", ")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        case, candidates = ops.case(row, device, dtype, size or "small")
    command = ["bert-fast", "bench", family, "--device", device.type, "--case", name]
    case.facts.update(family=family, command=shlex.join(command))
    return case, candidates


def chosen_by_default(name: str, device: torch.device) -> tuple[str, ...] | None:
    """Return the peers that a case is compared with unless others are asked for; None: all."""
    module = MODULES.get(family_of(name))
    if module is None:
        return None
    few = module.FEW_PEERS if module.SPECS[name].few else None
    if device.type != "cpu":
        return few
    return tuple(p for p in module.CPU_PEERS if few is None or p in few)


def has_memory(name: str) -> bool:
    """Return whether a CPU's memory is measured: not of ops, nor where only a trend is shown."""
    module = MODULES.get(family_of(name))
    return module is not None and not module.SPECS[name].few


def _described(name: str, device: str, small: bool) -> dict[str, Any]:
    """Return the name of a case, what it is, and about how long it takes."""
    family = family_of(name)
    if family == "kernels":
        what = ops.ROWS[name.partition(", ")[0]].op
        seconds = 1.0 if small else _KERNEL_SECONDS[device]
    else:
        what, seconds = _whole(name, device, small)
    found = {"name": name, "family": family, "what": what, "seconds": round(seconds, 1)}
    return found | {"memory": has_memory(name)}


def _whole(name: str, device: str, small: bool) -> tuple[str, float]:
    """Return what a case of whole models is, and about how many seconds it takes."""
    family = family_of(name)
    spec = MODULES[family].SPECS[name]
    dtype = encoder.dtype_of(spec, torch.device(device))
    lengths = spec.small if small else spec.lengths
    what = f"BERT-{spec.model}, {lengths}, {str(dtype)[6:]}"
    if family == "pretraining":
        what += f", a step with {'LAMB' if spec.optimizer == 'lamb' else 'AdamW'}"
    elif spec.kind != "batch":
        what += f", {spec.kind} in host memory"
    seconds = _CASE_SECONDS
    if device == "cpu" and not small:
        drawn = lengths.draw(0)
        padded = (max(drawn),) * len(drawn)
        flops = encoder.forward_flops(encoder.config_of(spec.model, 512, False), padded)
        calls = 3 * _CALLS if family == "pretraining" else _CALLS
        seconds += calls * flops / _CPU_RATE / (2 if spec.few else 1)
    elif not small:
        seconds = 150.0
    return what, seconds


def main() -> int:
    """Print the cases of a suite."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("suite", choices=(*FAMILIES, "all"))
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    families = FAMILIES if args.suite == "all" else (args.suite,)
    found = [n for family in families for n in names(family, args.device, args.small)]
    print(json.dumps([_described(name, args.device, args.small) for name in found]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
