"""Build bert_fast: pyproject.toml says what is in it, this file adds the extension bert_fast._C.

The environment variable BERT_FAST_EXT decides: `0` leaves it out, `1` requires it, and `auto`, the
default, builds it where torch can be imported and the compiler works, and otherwise says why not.
Under pip's build isolation torch is absent; to have the extension, install with
`pip install --no-build-isolation .`

BERT_FAST_SANITIZE=1 builds it with the address and undefined behaviour sanitizers, for `make
sanitize`: Python loads it only with their libraries preloaded.
"""

import os
import platform
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent


# OpenMP: else at::parallel_for runs on one thread. Products and sums are fused where the code says
# so and nowhere else, so that a row has the same bits wherever it stands.
CXX_FLAGS = ["-O3", "-g0", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden"]
CXX_FLAGS += ["-Wall", "-Werror", "-Wno-unknown-pragmas"]  # of PyTorch's headers

SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SANITIZERS = SANITIZE_FLAGS if os.environ.get("BERT_FAST_SANITIZE") == "1" else []
if SANITIZERS:  # of several -O the last counts
    CXX_FLAGS += [*SANITIZERS, "-O1", "-g1", "-fno-wrapv", "-D_GLIBCXX_ASSERTIONS"]

NVCC_FLAGS = ["-O3", "--fmad=false", "--Werror=all-warnings"]
CUDA_ARCHS = "8.0;8.6;8.9;9.0;10.0+PTX"  # what TORCH_CUDA_ARCH_LIST is where it is not set


def is_x86() -> bool:
    """Return whether this machine's processor is one of x86-64."""
    return platform.machine() in ("x86_64", "AMD64")


def instruction_sets() -> dict[str, list[str]]:
    """Return the compiler's flags for each set of csrc/cpu's objects, the portable one first."""
    flags = {"DEFAULT": []}
    if is_x86():
        flags["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
        flags["AVX512"] = ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw"]
        # GCC 12 says it of its own header (GCC bug 105593)
        flags["AVX512"] += ["-mfma", "-mf16c", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    # at::vec, and the namespace of our functions, go by these macros
    return {
        name: [*options, f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"]
        for name, options in flags.items()
    }


def glob(pattern: str) -> list[str]:
    """Return the files of that pattern, in order."""
    return sorted(str(path) for path in Path().glob(pattern))


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

        def build_extension(self, ext) -> None:
            """Compile csrc/cpu once for each instruction set, then the rest, and link."""
            # The portable objects come first: of an inline function that several sets of objects
            # hold, the linker takes the first, which any processor can run.
            for name, flags in instruction_sets().items():
                ext.extra_objects += self.compiler.compile(
                    glob("csrc/cpu/*.cpp"),
                    output_dir=str(Path(self.build_temp) / name),
                    include_dirs=ext.include_dirs,
                    extra_postargs=[*CXX_FLAGS, *flags],
                    depends=ext.depends,
                )
            super().build_extension(ext)

    # Not torch.cuda.is_available(): the machine that builds need not have a GPU.
    cuda = cpp_extension.CUDA_HOME is not None and torch.version.cuda is not None
    sources = [*glob("csrc/*.cpp"), *glob("csrc/data_path/*.cpp")]
    sources += glob("csrc/cuda/*.c*") if cuda else []
    macros = [("BERT_FAST_X86", None)] if is_x86() else []
    if cuda:
        macros.append(("BERT_FAST_CUDA", None))
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    module = make(
        "bert_fast._C",
        sources,
        include_dirs=[str(ROOT / "csrc" / "include")],
        define_macros=macros,
        depends=glob("csrc/include/*.*"),
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        extra_link_args=["-fopenmp", *SANITIZERS],
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
