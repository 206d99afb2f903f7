"""Record which variants of the kernels the launchers ask Triton for, without a GPU.

The launchers are the real ones, called on small CPU tensors in a process without TRITON_INTERPRET.
What stands for Triton's driver names a GPU that is not there, and Triton's hook before a compile
takes down the variant and stops: nothing is compiled, nothing runs, so outputs are not written.

    python aot_record.py --calls every|default|batches|controls [--archs 80,90] --out FILE
"""

import argparse
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  the kernels of this checkout
import torch
import triton
from torch import library
from triton.backends.compiler import GPUTarget

ARCHS = (80, 86, 89, 90, 100, 120)
DO_COMPILE = triton.JITFunction._do_compile

# A launch that leaves this to Triton is recorded without it: the default changes with Triton 3.10.
triton.knobs.language.default_fp_fusion = False


class Driver:
    """Answers what a launch asks of Triton's driver before it compiles."""

    def __init__(self) -> None:
        self.arch = 90

    def get_current_device(self) -> int:
        return self.arch  # so that each keeps a cache of its own

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


class Recorder:
    """What was asked for while it recorded.

    Attributes:
        variants: everything that `aot_compile` needs to compile each one, by its key.
        label: what is written down as the call a variant came from.
    """

    def __init__(self) -> None:
        self.variants: dict[str, dict[str, Any]] = {}
        self.label = ""
        self.default = False
        self.driver = Driver()
        self._defaults: dict[int, dict[str, Any]] = {}
        self._seen: dict[tuple[int, Any, Any], dict[str, Any]] = {}

    def _defaults_of(self, arch: int) -> dict[str, Any]:
        if arch not in self._defaults:
            backend = triton.compiler.make_backend(GPUTarget("cuda", arch, 32))
            options = backend.parse_options({"enable_fp_fusion": True})
            self._defaults[arch] = json.loads(json.dumps(options.__dict__))
        return self._defaults[arch]

    def _hook(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        data = json.loads(compile["specialization_data"])
        arch = self.driver.arch
        defaults = self._defaults_of(arch)
        variant = {
            "kernel": f"{fn.module}:{fn.jit_function.__qualname__}",
            "arch": arch,
            "signature": data["signature"],
            "constants": list(zip(data["constant_keys"], data["constant_vals"], strict=True)),
            "attrs": list(zip(data["attrs_keys"], data["attrs_vals"], strict=True)),
            "options": data["options"],
            "said": {n: v for n, v in data["options"].items() if defaults.get(n) != v},
        }
        key = json.dumps(variant)
        if key not in self.variants:
            more = {"text": describe(variant), "call": self.label, "default": False}
            self.variants[key] = variant | more
        self._seen[arch, fn.jit_function, compile["key"]] = self.variants[key]
        self.variants[key]["default"] |= self.default
        return True  # do not compile

    def _compile(self, kernel: Any, key: Any, *args: Any, **kwargs: Any) -> None:
        """What Triton calls for a variant it does not have; the hook is slow, and called once."""
        seen = self._seen.get((self.driver.arch, kernel, key))
        if seen is None:
            return DO_COMPILE(kernel, key, *args, **kwargs)
        seen["default"] |= self.default
        return None

    @contextmanager
    def recording(self) -> Iterator["Recorder"]:
        """Launches are written down for the GPU of `driver.arch`, and go no further."""
        from bert_fast.kernels import common

        before = common.generation
        common.generation = lambda t: self.driver.arch
        triton.runtime.driver.set_active(self.driver)
        triton.knobs.runtime.jit_cache_hook = self._hook
        triton.JITFunction._do_compile = lambda *args, **kwargs: self._compile(*args, **kwargs)
        try:
            yield self
        finally:
            triton.knobs.runtime.jit_cache_hook = None
            triton.JITFunction._do_compile = DO_COMPILE
            common.generation = before

    def save(self, path: Path, **more: Any) -> None:
        path.write_text(json.dumps({"variants": list(self.variants.values())} | more))


def describe(variant: dict[str, Any]) -> str:
    """A line that tells a kernel's variants apart: arguments by type, constants, options.

    `x!` is a pointer that is not aligned to 16 bytes, `D%16` an int that is a multiple of 16.
    """
    divisible = {
        tuple(path) for path, value in variant["attrs"] if ["tt.divisibility", 16] in value
    }
    constants = {tuple(path): value for path, value in variant["constants"]}
    by_type: dict[str, list[str]] = {}
    fixed = []
    for i, (name, kind) in enumerate(variant["signature"].items()):
        name = name.removesuffix("_ptr")
        if kind == "constexpr":
            fixed.append(f"{name}={constants.get((i,))}")
        elif str(kind).startswith("*"):
            by_type.setdefault(kind[1:], []).append(name + ("" if (i,) in divisible else "!"))
        else:
            by_type.setdefault(str(kind), []).append(name + ("%16" if (i,) in divisible else ""))
    options = [f"{name}={value}" for name, value in variant["said"].items()]
    parts = [f"{kind} {' '.join(names)}" for kind, names in by_type.items()]
    return "; ".join([*parts, " ".join([*fixed, *options])])


def use_kernels() -> list[library.Library]:
    """Make the public ops run the launchers on CPU tensors, for as long as the result lives.

    PyTorch's matrix products, which cost all the time, are not made either.
    """
    from bert_fast.ops import registry

    ours, aten = (library.Library(name, "IMPL") for name in ("bert_fast", "aten"))
    warnings.filterwarnings("ignore", "Warning only once for all operators")
    for name, kernel in registry.kernels.items():
        ours.impl(name, kernel, "CPU", allow_override=True)

    def product(*args: Any) -> torch.Tensor:
        a, b = args[-2:]
        return a.new_empty(a.shape[0], b.shape[1])

    aten.impl("mm", product, "CPU", allow_override=True)
    aten.impl("addmm", lambda *args, **_: product(*args), "CPU", allow_override=True)
    for name in ("mm.out", "addmm.out"):
        aten.impl(name, lambda *args, out, **_: out, "CPU", allow_override=True)
    return [ours, aten]


def main() -> None:
    import aot_batches
    import aot_calls
    import aot_controls

    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", choices=("every", "default", "batches", "controls"))
    parser.add_argument("--archs", default=",".join(map(str, ARCHS)))
    parser.add_argument("--batches", type=int, default=500)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    libraries = use_kernels()
    recorder = Recorder()
    more: dict[str, Any] = {"failed": []}
    with recorder.recording():
        for recorder.driver.arch in map(int, args.archs.split(",")):
            if args.calls == "batches":
                more |= aot_batches.record(recorder, args.batches)
            elif args.calls == "controls":
                more["controls"] = aot_controls.record(recorder)
            else:
                more["failed"] += aot_calls.record(recorder, every=args.calls == "every")
    if args.calls == "batches":
        with Recorder().recording() as other:
            more["controls"] = aot_controls.record_batches(other, args.batches)
    recorder.save(args.out, **more)
    for one in libraries:
        one._destroy()


if __name__ == "__main__":
    main()
