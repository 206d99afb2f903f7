"""What is installed, and what an import loads: each in a fresh interpreter."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE = Path(sysconfig.get_path("purelib"))  # torch is here; its .pth files, -S leaves out


def run(*command, cwd, fails=False, **variables):
    """Run a command, which must succeed, or fail; return what it printed."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("BERT_FAST_", "PYTHON"))}
    env |= {k: str(v) for k, v in variables.items()}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, **pipes)
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


def python(code, *path, cwd):
    """Run code in an interpreter with only `path` on sys.path before torch's place.

    With -S no .pth file is read: an editable install of this checkout cannot stand in.
    """
    path = os.pathsep.join(map(str, [*path, SITE]))
    return run(sys.executable, "-S", "-c", code, cwd=cwd, PYTHONPATH=path).strip()


def pip(*args, cwd, **variables):
    run(sys.executable, "-m", "pip", *args, cwd=cwd, BERT_FAST_EXT="0", **variables)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the source tree, to build in."""
    built = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    copy = tmp_path_factory.mktemp("checkout") / "bert_fast"
    shutil.copytree(ROOT, copy, ignore=built)
    shutil.copytree(ROOT / ".ci", copy / ".ci")
    return copy


@pytest.fixture(scope="module")
def sdist(checkout):
    code = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    name = run(sys.executable, "-c", code, cwd=checkout, BERT_FAST_EXT="0").split()[-1]
    return checkout / "dist" / name


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the sdist: whatever it lacks is missed here."""
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", out, sdist, cwd=out)
    return next(out.glob("*.whl"))


IMPORTS = "import bert_fast, bert_fast.kernels as k; print(bert_fast.__file__, k.__file__)"


def test_sdist_has_what_building_and_testing_need(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("bert_fast", "kernels", "csrc", "tests", "benchmarks/texts"):
        here = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*") if p.is_file()}
        here = {n for n in here if not re.search(r"__pycache__|\.so$", n)}
        assert here and here <= names, sorted(here - names)
    for file in ("pyproject.toml", "setup.py", "LICENSE", "README.md", "Makefile", ".ci/run"):
        assert file in names
    assert not [n for n in names if n.endswith((".so", ".pyc"))]


def test_wheel_has_the_packages_and_no_other(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    info = next(n.partition("/")[0] for n in names if n.endswith(".dist-info/METADATA"))
    assert {n.partition("/")[0] for n in names} == {"bert_fast", info}
    sources = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "train/configs/*.yaml", "english_mini/*")
        for path in (ROOT / "bert_fast").rglob(pattern)
    }
    sources |= {f"bert_fast/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").rglob("*.py")}
    assert {n for n in names if n.startswith("bert_fast/")} == sources
    assert wheel.name.endswith("-py3-none-any.whl")  # BERT_FAST_EXT=0 promises no machine code


def test_metadata_pins_nothing(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    lines = archive.read(metadata).decode().splitlines()
    needs = [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist")]
    core = {re.match(r"[\w-]+", need)[0].lower() for need in needs if "extra ==" not in need}
    assert core == set("torch triton numpy tokenizers safetensors typer rich pyyaml".split())
    versions = [re.search(r"[=~!<>]+", need.partition(";")[0]) for need in needs]
    assert {found[0] for found in versions if found} == {">="}
    assert 'triton>=3.6; platform_system == "Linux"' in needs


def test_wheel_imports_outside_the_checkout(wheel, tmp_path):
    target = tmp_path / "target"
    pip("install", "--no-deps", "--no-index", "--target", target, wheel, cwd=tmp_path)
    files = python(IMPORTS, target, cwd=tmp_path).split()
    assert files == [f"{target}/bert_fast/__init__.py", f"{target}/bert_fast/kernels/__init__.py"]


def test_editable_install_maps_kernels(checkout, tmp_path):
    pip(
        *("install", "--no-build-isolation", "--no-deps", "--no-index", "--ignore-installed"),
        *("--prefix", tmp_path, "-e", checkout),
        cwd=tmp_path,
    )
    site = next(tmp_path.rglob("__editable__*.pth")).parent
    code = f"import site; site.addsitedir({str(site)!r}); {IMPORTS}"  # reads its .pth
    files = python(code, site, cwd=tmp_path).split()
    assert files == [f"{checkout}/bert_fast/__init__.py", f"{checkout}/kernels/__init__.py"]


# --- the extension's switch --------------------------------------------------------------------


def setup(checkout, ext, fails=False, **variables):
    command = (sys.executable, "setup.py", "build_ext", "--build-lib", "out", "--build-temp", "tmp")
    return run(*command, cwd=checkout, fails=fails, BERT_FAST_EXT=ext, **variables)


def test_extension_switch_refuses_other_values(checkout):
    assert "BERT_FAST_EXT: want auto, 0 or 1, got 'yes'" in setup(checkout, "yes", fails=True)


@pytest.fixture
def no_torch(tmp_path):
    """As under pip's build isolation."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch here')")
    return {"PYTHONPATH": tmp_path}


def test_without_torch_auto_goes_on_and_says_so(checkout, no_torch):
    printed = setup(checkout, "auto", **no_torch)
    assert "without the compiled extension: torch cannot be imported (no torch here)" in printed


def test_without_torch_a_required_extension_fails(checkout, no_torch):
    printed = setup(checkout, "1", fails=True, **no_torch)
    assert "BERT_FAST_EXT=1 needs torch" in printed and "--no-build-isolation" in printed


def test_without_compiler_auto_goes_on_and_says_so(checkout):
    printed = setup(checkout, "auto", CXX="false")
    assert "without the compiled extension: compiling it failed" in printed.splitlines()[-1]
    assert not [*checkout.glob("out/**/*.so")]


def test_without_compiler_a_required_extension_fails(checkout):
    setup(checkout, "1", fails=True, CXX="false")


# --- what an import loads ----------------------------------------------------------------------


def test_importing_loads_neither_triton_nor_transformers_nor_cuda(tmp_path):
    code = """if True:
        import sys, bert_fast, torch
        print([n for n in ("triton", "transformers", "kernels") if n in sys.modules])
        print(torch.cuda.is_initialized())"""
    assert python(code, ROOT, cwd=tmp_path).split() == ["[]", "False"]


def test_kernels_folder_gives_way_to_the_package_of_that_name(tmp_path):
    """From the root as from elsewhere, with submodules, and only for the name `kernels`."""
    theirs = tmp_path / "kernels"
    theirs.mkdir()
    (theirs / "__init__.py").write_text("from kernels.layer import owner")
    (theirs / "layer.py").write_text("owner = 'theirs'")
    code = "import kernels, kernels.layer as l; print(kernels.owner, l.owner, kernels.__file__)"
    for cwd, path in ((ROOT, [tmp_path]), (tmp_path, [ROOT])):
        assert python(code, *path, cwd=cwd) == f"theirs theirs {theirs}/__init__.py"


def test_kernels_folder_passes_on_an_error_of_the_package(tmp_path):
    (tmp_path / "kernels.py").write_text("raise ImportError('broken theirs')")
    code = """if True:
        try:
            import kernels
        except ImportError as error:
            import sys
            print(error, "kernels" in sys.modules)"""
    assert python(code, tmp_path, cwd=ROOT) == "broken theirs False"


def test_kernels_folder_alone_names_an_old_version(tmp_path):
    """transformers reads it; without one it takes the folder for Hugging Face's package."""
    assert python("import kernels; print(kernels.__version__)", ROOT, cwd=tmp_path) == "0"


ANY_NAME = """
from unittest.mock import MagicMock
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock()
"""


@pytest.mark.parametrize("installed", [False, True])
def test_transformers_beside_us_from_the_root(tmp_path, installed):
    """With a `kernels` of a version that transformers makes use of, and without."""
    version = pytest.importorskip("transformers.utils.import_utils").KERNELS_MIN_VERSION
    if installed:
        package, info = tmp_path / "kernels", tmp_path / f"kernels-{version}.dist-info"
        package.mkdir()
        (package / "__init__.py").write_text(ANY_NAME)
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}")
    code = """if True:
        import transformers, bert_fast
        from transformers import BertModel
        from transformers.utils import is_kernels_available
        import kernels
        print(is_kernels_available(), kernels.__file__)"""
    file = (tmp_path if installed else ROOT) / "kernels" / "__init__.py"
    assert python(code, tmp_path, cwd=ROOT) == f"{installed} {file}"
