"""Fixtures of every test."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import library

if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core: threads would only collide
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from bert_fast import extension
from bert_fast.ops import registry

ROOT = Path(__file__).resolve().parents[1]


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker("device")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernel_device(device) -> Iterator[str]:
    """Where the kernels serve the ops: a GPU, else the CPU, in Triton's interpreter."""
    if device == "cuda":
        yield device
        return
    ours = library.Library("bert_fast", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for name, kernel in registry.kernels.items():
            ours.impl(name, kernel, "CPU", allow_override=True)
    yield device
    ours._destroy()


@pytest.fixture
def compiled() -> ModuleType:
    """The extension, which must be what runs; the reference would prove nothing there."""
    module, reason = extension.load()
    if module is None:
        pytest.skip(reason)
    assert registry.implementations()["unpad"]["cpu"].name == "csrc"
    return module


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("no ../shared beside this checkout: its real files are not in the repository")
    return path
