"""csrc/cuda: its kernels run on the CPU in an emulator, and are compiled for GPUs, without a GPU.

The emulator runs the kernels' own code, every thread of it, in an order of its own. What it cannot
show: speed, and what the GPU's memory does between threads. With a GPU the ops are compared too.
"""

import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_launchers import CSRC, KERNELS, ROOT, Guarded, Launchers, compile_launchers
from optimizer_cases import (
    BF16,
    CASES,
    FP16,
    OPS,
    Case,
    Shape,
    assert_agrees,
    assert_same_bits,
)
from torch import Tensor

from bert_fast import ops, reference, reference_optimizer
from bert_fast.ops import optimizer

ARCHS = 80, 86, 89, 90, 100
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "--fmad=false",
    "--Werror=all-warnings",
    "-Xcompiler=-Wall,-Werror",
]
LAUNCHES = {"adamw_": 2, "lamb_": 3}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compile_launchers(tmp_path_factory.mktemp("launchers"))


@pytest.fixture(params=[0, 1, 2], ids=["in order", "seed 1", "seed 2"])
def launchers(library, request) -> Launchers:
    return Launchers(library, seed=request.param, processors=(3, 1, 5)[request.param])


# --- unpad ---------------------------------------------------------------------------------------


def lengths_mask(lengths: list[int], L: int, left: bool = False) -> Tensor:
    columns, ends = torch.arange(L), torch.tensor(lengths)[:, None]
    return columns >= L - ends if left else columns < ends


def holes(B: int, L: int, kept: float = 0.5, seed: int = 0) -> Tensor:
    return torch.rand(B, L, generator=torch.Generator().manual_seed(seed)) < kept


def assert_unpadded(launchers: Launchers, mask: Tensor, tile: int = 128) -> None:
    rows, cu, work, totals = launchers.unpad(mask, tile)
    lengths = [int(row.count_nonzero()) for row in mask]
    expected = mask.flatten().nonzero()[:, 0]
    borders = torch.tensor([sum(lengths[:b]) for b in range(len(lengths) + 1)], dtype=torch.int32)
    assert totals == [sum(lengths), max(lengths, default=0)]
    assert torch.equal(rows, expected) and torch.equal(cu, borders)
    assert torch.equal(work, reference.work_list(borders, sum(lengths), tile))
    known = launchers.unpad(mask, tile, known=(totals[0], totals[1]))
    for got, want in zip(known[:3], (rows, cu, work), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(launchers.unpad(mask, work=False)[0], expected)


MASKS = {
    "right": lengths_mask([3, 1, 5, 5], 5),
    "left": lengths_mask([3, 1, 5], 5, left=True),
    "full": lengths_mask([4, 4], 4),
    "empty rows": lengths_mask([0, 3, 0, 0, 2, 0], 3),
    "no token": lengths_mask([0, 0], 3),
    "one": lengths_mask([1], 1),
    "holes": holes(6, 33),
    "any byte": torch.tensor([[2, 0, 255], [0, 128, 1]], dtype=torch.uint8).view(torch.bool),
    "any byte of a word": torch.arange(256).to(torch.uint8).view(4, 64).view(torch.bool),
    "no column": torch.ones(3, 0, dtype=torch.bool),
    "no row": torch.ones(0, 3, dtype=torch.bool),
    "words of 16": holes(5, 64, 0.7),
    "long": lengths_mask([700, 128, 129, 0, 257, 700], 700),
    "long with holes": holes(3, 400, 0.9),
    "more rows than threads": holes(1100, 3),
    "as many rows as threads": holes(512, 2),
}


@pytest.mark.parametrize("name", MASKS)
def test_unpad(name, launchers):
    assert_unpadded(launchers, MASKS[name])


@pytest.mark.parametrize("tile", [1, 7, 16])
def test_unpad_with_other_tiles(tile, launchers):
    assert_unpadded(launchers, lengths_mask([7, 0, 16, 15, 17, 1, 16], 20), tile)


STRIDED = {
    "transposed": lambda m: m.t(),
    "every other column": lambda m: m[:, ::2],
    "columns inside": lambda m: m[:, 3:-2],
    "aligned rows": lambda m: m[:, 16:32],
    "rows off by three": lambda m: m[:, 3:35],
    "one row for all": lambda m: m[:1].expand(7, -1),
    "one value for all": lambda m: m[:1, :1].expand(3, 4),
}


@pytest.mark.parametrize("view", STRIDED)
def test_unpad_takes_any_strides(view, launchers):
    assert_unpadded(launchers, STRIDED[view](holes(32, 64, 0.6)))


def test_unpad_on_random_masks(library):
    chance = random.Random(0)
    for i in range(25):
        B, L = chance.randint(0, 30), chance.randint(0, 150)
        mask = holes(B, 2 * L, chance.choice([0.02, 0.5, 0.98]), i)[:, :: chance.choice([1, 2])]
        one = Launchers(library, seed=i, processors=chance.randint(1, 6))
        assert_unpadded(one, mask, chance.choice([1, 16, 128]))


@pytest.mark.parametrize("told", [0, 3, 30])
def test_unpad_writes_nothing_outside_whatever_it_is_told(told, launchers):
    """The caller says how many tokens there are, and is wrong: no row may point outside."""
    mask = lengths_mask([9, 0, 5], 10)
    rows, _, work, _ = launchers.unpad(mask, tile=4, known=(told, 9))
    expected = mask.flatten().nonzero()[:told, 0]
    assert torch.equal(rows[: len(expected)], expected) and not rows[len(expected) :].any()
    count = int(work[0, 0])
    assert 0 <= work[0, 2] <= work[0, 1] <= count < work.shape[0]
    _, first, length, _ = work[1 : 1 + count].T
    assert (first >= 0).all() and (length >= 0).all() and (first + length <= told).all()


# --- optimizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("op", OPS)
def test_step(op, name, library):
    guarded = Guarded()
    before = CASES[name].draw(guarded)
    truth, kept, expected = before.truth(op), before.clone(), before.clone()
    Launchers(library, seed=1).step(op, *before.args(op), launches=LAUNCHES[op])
    assert_agrees(before, truth, kept)
    guarded.check()
    again = kept.clone()
    Launchers(library, seed=2).step(op, *again.args(op), launches=LAUNCHES[op])
    assert_same_bits(again, before)
    if op == "adamw_" and not CASES[name].clip:  # one arithmetic: no sum is in it
        optimizer.adamw_(*expected.args(op))
        if ops.implementations()["adamw_"]["cpu"].name == "csrc":
            assert_same_bits(before, expected)


@pytest.mark.parametrize("offset", [1, 2])
@pytest.mark.parametrize("op", OPS)
def test_step_on_tensors_that_are_not_aligned(op, offset, library):
    """Each dtype's loads of four refuse an address that is not theirs; the bits are the same."""
    shapes = [Shape(103), Shape(70, BF16, master=True), Shape(33, FP16), Shape(12, group=1)]
    torch.manual_seed(0)
    aligned = Case(shapes).draw(Guarded())
    torch.manual_seed(0)
    guarded = Guarded(offset)
    shifted = Case(shapes).draw(guarded)
    for call in (aligned, shifted):
        Launchers(library).step(op, *call.args(op), launches=LAUNCHES[op])
    guarded.check()
    if op == "adamw_":
        assert_same_bits(shifted, aligned)
    else:  # its sums have another order
        assert_agrees(shifted, aligned, aligned)


@pytest.mark.parametrize("op", OPS)
def test_found_inf_changes_nothing(op, library):
    call = Case(CASES["mixed"].shapes, found_inf=1.0, clip=True).draw()
    kept = call.clone()
    Launchers(library).step(op, *call.args(op), launches=LAUNCHES[op])
    assert_same_bits(call, kept)


@pytest.mark.parametrize("op", OPS)
def test_more_tensors_than_a_launch_takes(op, library):
    """512 go with a launch; their scalars and sums follow each other in the next."""
    shapes = [Shape(1 + i % 3, group=i % 2, zero=i % 7 == 0) for i in range(530)]
    call = Case(shapes).draw()
    truth, kept = call.truth(op), call.clone()
    Launchers(library).step(op, *call.args(op), launches=2 * LAUNCHES[op])
    assert_agrees(call, truth, kept)


def test_norm_that_is_not_a_number_goes_on(library):
    """As with torch.nn.utils.clip_grad_norm_: it is the caller who looks at the norm."""
    call = Case([Shape(9)], clip=True).draw()
    call.scalars[0].fill_(float("nan"))
    Launchers(library).step("adamw_", *call.args("adamw_"), launches=2)
    assert call.lists[0][0].isnan().all()


@pytest.mark.parametrize("scale", [None, 64.0])
def test_grad_norm(scale, launchers):
    shapes = 0, 1, 5, 16384, 16385, 40000
    dtypes = torch.float32, BF16, FP16
    grads = [torch.randn(n).to(dtypes[i % 3]) + 0.5 for i, n in enumerate(shapes)]
    grads = [*map(Guarded(), grads), Guarded(1)(torch.randn(50))]
    scale = None if scale is None else torch.tensor(scale)
    expected = reference_optimizer.grad_norm(grads, scale)
    torch.testing.assert_close(launchers.grad_norm(grads, scale), expected, rtol=1e-6, atol=0)


def test_grad_norm_has_one_order(library):
    """Of many chunks the same bits, whatever order threads and blocks run in."""
    grads = [torch.randn(5 * 16384 + 7), torch.randn(999)]
    found = {float(Launchers(library, seed=seed).grad_norm(grads)) for seed in range(4)}
    assert len(found) == 1


def test_grad_norm_of_nothing(library):
    assert Launchers(library).grad_norm([torch.empty(0)], launches=1) == 0
    many = [torch.full((1,), 2.0) for _ in range(529)]
    assert Launchers(library).grad_norm(many, launches=3) == 46


# --- compiled for GPUs ---------------------------------------------------------------------------


def tool(name: str) -> str:
    """A program of the CUDA toolkit, or of the triton package."""
    found = shutil.which(name)
    if found is None:
        triton = pytest.importorskip("triton")
        inside = Path(triton.__file__).parent / "backends/nvidia/bin" / name
        found = str(inside) if inside.exists() else None
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def compile_for_gpus(source: Path, out: Path) -> subprocess.CompletedProcess:
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    command = [tool("nvcc"), *NVCC_FLAGS, f"-I{CSRC / 'include'}", *archs, "-c", "-o", str(out)]
    return subprocess.run([*command, str(source)], capture_output=True, text=True)


@pytest.fixture(scope="module", params=KERNELS, ids=lambda path: path.stem)
def compiled(request, tmp_path_factory) -> tuple[Path, Path]:
    """A source of kernels, and what nvcc alone makes of it."""
    out = tmp_path_factory.mktemp("nvcc") / "out.o"
    done = compile_for_gpus(request.param, out)
    assert done.returncode == 0, done.stderr[-4000:]
    return request.param, out


def test_compiles_for_every_gpu(compiled):
    """Nothing spilled, every kernel there for each of them."""
    source, out = compiled
    kernels = set(re.findall(r"\b(\w+_kernel)\(", source.read_text("utf-8")))
    usage = subprocess.run([tool("cuobjdump"), "-res-usage", out], capture_output=True, text=True)
    line = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    found = re.findall(line, usage.stdout)
    assert kernels and len(found) == len(kernels) * len(ARCHS), usage.stdout
    for name, registers, stack, shared, local in found:
        assert any(kernel in name for kernel in kernels)
        assert int(stack) == 0 and int(local) == 0, f"{name}: spilled"
        assert int(registers) <= 128 and int(shared) <= 48 * 1024, name


def test_a_warning_fails_the_compilation(tmp_path):
    source = tmp_path / "warns.cu"
    source.write_text("__global__ void kernel() { int unused; }\n", "utf-8")
    assert compile_for_gpus(source, tmp_path / "out.o").returncode != 0


VECTORS = {"adamw": (4, 3), "lamb_moments": (4, 2), "lamb_apply": (3, 1), "squares": (1, 0)}


def test_loads_and_stores_are_of_16_bytes(compiled):
    source, out = compiled
    if source.stem != "optimizer":
        pytest.skip("only the optimizer's kernels move vectors")
    nvdisasm, command = tool("nvdisasm"), [tool("cuobjdump"), "-sass", "-arch", "sm_90", out]
    path = {"PATH": str(Path(nvdisasm).parent)}
    sass = subprocess.run(command, capture_output=True, text=True, env=path).stdout
    bodies = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", sass, re.S))
    for kernel, (loads, stores) in VECTORS.items():
        body = next(text for name, text in bodies.items() if f"{kernel}_kernel" in name)
        assert len(re.findall(r"LDG\.E\.EF\.128", body)) >= loads, kernel
        assert len(re.findall(r"STG\.E\.EF\.128", body)) >= stores, kernel


# --- rules of the sources ------------------------------------------------------------------------


def broken(name: str, text: str) -> list[str]:
    """The rules that a source of csrc/cuda breaks."""
    code = re.sub(r"//[^\n]*", "", text)
    found = []
    for launch in re.findall(r"<<<(.*?)>>>", code, re.S):
        if [part.strip() for part in launch.split(",")][3:] != ["stream"]:
            found.append(f"a launch that does not name its stream: <<<{launch}>>>")
    for call in ("cudaMalloc", "cudaFree", "DeviceSynchronize", "cudaMemcpy("):
        if call in code:
            found.append(call)
    if re.search(r"\batomic\w+\s*\(", code):
        found.append("an atomic operation: sums have one order")
    if not name.endswith(".cpp"):
        for include in re.findall(r"#include [<\"](\S+)[>\"]", code):
            if re.match(r"(torch|ATen|c10|pybind11)/", include):
                found.append(f"a header of PyTorch: {include}")
        if "cudaStreamSynchronize" in code or "cudaMemcpyAsync" in code:
            found.append("a launcher that waits or copies")
    if name == "bindings.cpp" and code.count("cudaMemcpyAsync") != 1:
        found.append("other than one copy to the host")
    return found


SOURCES = [*(CSRC / "cuda").iterdir(), *(CSRC / "include").glob("cuda_*")]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_sources_keep_the_rules(source):
    assert not broken(source.name, source.read_text("utf-8"))


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("a.cu", "kernel<<<1, 2>>>();", "stream"),
        ("a.cu", "kernel<<<1, 2, 0>>>();", "stream"),
        ("a.cuh", "kernel<<<1, 2, 0, 0>>>();", "stream"),
        ("a.cu", "cudaMalloc(&p, 4);", "cudaMalloc"),
        ("a.cu", "cudaDeviceSynchronize();", "DeviceSynchronize"),
        ("a.cu", "atomicAdd(sum, x);", "atomic"),
        ("a.cu", "#include <ATen/Tensor.h>", "PyTorch"),
        ("a.cu", "cudaStreamSynchronize(stream);", "waits"),
        ("bindings.cpp", "cudaMemcpyAsync(a); cudaMemcpyAsync(b);", "one copy"),
    ],
)
def test_a_planted_violation_is_found(name, text, rule):
    found = broken(name, text)
    assert len(found) == 1 and rule in found[0], found


def test_bindings_compile_against_the_headers_of_torch():
    """With CUDA's runtime headers, which the triton package has too; nothing is linked."""
    from torch.utils import cpp_extension

    triton = pytest.importorskip("triton")
    compiler = shutil.which("g++") or pytest.skip("no g++")
    folders = [*cpp_extension.include_paths(), CSRC / "include"]
    folders.append(Path(triton.__file__).parent / "backends/nvidia/include")
    command = [compiler, "-fsyntax-only", "-std=c++20", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    command += ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", *(f"-I{folder}" for folder in folders)]
    done = subprocess.run(
        [*command, str(ROOT / "csrc/cuda/bindings.cpp")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
