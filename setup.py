"""Build bert_fast: pyproject.toml says what is in it, this file adds the extension bert_fast._C.

The environment variable BERT_FAST_EXT decides: `0` leaves it out, `1` requires it, and `auto`, the
default, builds it where torch can be imported and the compiler works, and otherwise says why not.
Under pip's build isolation torch is absent; to have the extension, install with
`pip install --no-build-isolation .`
"""

import os
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent


def wanted() -> str:
    """Return BERT_FAST_EXT: `auto`, `0` or `1`."""
    value = os.environ.get("BERT_FAST_EXT", "auto")
    if value not in ("auto", "0", "1"):
        raise ValueError(f"BERT_FAST_EXT: want auto, 0 or 1, got {value!r}")
    return value


def without_extension(reason: str) -> None:
    """Say that this build has no compiled extension, and why."""
    print(f"bert_fast: building without the compiled extension: {reason}", flush=True)


def extension(required: bool) -> dict:
    """Return the arguments of setup() that build bert_fast._C."""
    import torch
    from torch.utils import cpp_extension

    class BuildExtension(cpp_extension.BuildExtension):
        """torch's build_ext; unless the extension is required, a failure leaves it out."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # a missing compiler and a failing one have no common class
                if required:
                    raise
                without_extension(f"compiling it failed ({type(error).__name__}: {error})")
                self.extensions = []

    sources = sorted(str(p) for p in Path("csrc").rglob("*.cpp"))
    # Not torch.cuda.is_available(): the machine that builds need not have a GPU.
    cuda = cpp_extension.CUDA_HOME is not None and torch.version.cuda is not None
    cuda_sources = sorted(str(p) for p in Path("csrc").rglob("*.cu")) if cuda else []
    make = cpp_extension.CUDAExtension if cuda_sources else cpp_extension.CppExtension
    module = make(
        "bert_fast._C",
        sources + cuda_sources,
        include_dirs=[str(ROOT / "csrc" / "include")],
        depends=sorted(str(p) for p in Path("csrc/include").glob("*.h")),
        extra_compile_args={
            "cxx": ["-O3", "-g0", "-fopenmp", "-Wall", "-Werror"],  # OpenMP: for at::parallel_for
            "nvcc": ["-O3", "--Werror=all-warnings"],
        },
        extra_link_args=["-fopenmp"],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


def optional_parts() -> dict:
    """Return the arguments of setup() for the extension, or none where it is not to be built."""
    want = wanted()
    if want == "0":
        return {}
    try:
        return extension(required=want == "1")
    except ImportError as error:
        if want == "1":
            raise ImportError(
                f"BERT_FAST_EXT=1 needs torch while building, got {error!r}; "
                "pip hides it unless called with --no-build-isolation"
            ) from error
        without_extension(f"torch cannot be imported ({error})")
        return {}


setup(**optional_parts())
