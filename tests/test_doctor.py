"""The diagnosis: facts of the machine, what is missing, and that wrong answers are seen."""

import json
import sys
import types

import pytest
import torch

from bert_fast import doctor, ops
from bert_fast.doctor import diagnose
from bert_fast.ops import products

OPS = "embed add_layer_norm gelu linear linear_gelu attention linear_cross_entropy".split()


@pytest.fixture(autouse=True)
def processor_alone(monkeypatch):
    """Without the GPU, if there is one: tests/test_gpu.py has that."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_healthy_machine():
    found = diagnose()
    assert found.healthy and not found.problems
    assert found.versions["torch"] == torch.__version__
    assert {"bert_fast", "python", "triton", "tokenizers", "safetensors"} <= {*found.versions}
    assert found.devices["cpu"]["threads"] == torch.get_num_threads()
    assert found.devices["cpu"]["cores"] > 0 and found.devices["cpu"]["model"]
    assert found.devices["cpu"]["instructions"] == torch.backends.cpu.get_cpu_capability()
    expected = {op: by["cpu"]._asdict() for op, by in ops.implementations().items()}
    assert found.ops == {"cpu": expected}
    assert found.extension["loaded"] == (not found.extension["reason"])
    served = {c.op for c in found.checks}
    ours = {op.removeprefix("bias_") for op in ops.implementations() if not op.endswith("_bwd")}
    of_gpus = {"work_list", "unpad_work"}
    assert served == ours - of_gpus - {"adamw_", "grad_norm", "lamb_"}  # these have a test's truth
    assert all(c.problem == "" and c.error < 1e-5 for c in found.checks)


@pytest.mark.skipif(not products._has_onednn(), reason="this PyTorch has no oneDNN")
def test_how_products_are_made(monkeypatch):
    monkeypatch.setattr(products, "packs_weights", lambda dtype: True)
    for times, said in (({}, ""), ({"blas": 2.0, "onednn": 1.0}, "blas 2.00 ms, onednn 1.00 ms")):
        monkeypatch.setattr(products, "cpu_library_times", lambda times=times: times)
        with products.fixed_cpu_library("blas"):
            assert doctor._products() == f"by blas ({said})".removesuffix(" ()")
        with products.fixed_cpu_library("onednn"):
            packed = ", ".join(filter(None, (said, "packed weights")))
            assert doctor._products() == f"by onednn ({packed})"


def test_as_json_and_as_text():
    """The text has every fact that matters, in lines that are no longer than they must be."""
    found = diagnose()
    assert json.loads(json.dumps(found.to_dict()))["healthy"] is True
    text = str(found)
    for word in ("versions", "devices", "ops on cpu", "self-check", "healthy: yes", found.no_gpu):
        assert word in text
    for op, entry in found.ops["cpu"].items():
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [op]]
        assert entry["name"] in line and entry["reason"] in line


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("fault", ["wrong", "nan", "shape", "raises"])
def test_a_wrong_answer_is_seen(monkeypatch, op, fault):
    right = getattr(ops, op)

    def wrong(*args, **options):
        if fault == "raises":
            raise RuntimeError("illegal\nmemory access")
        y = right(*args, **options).clone()
        if fault == "shape":
            return y[None]
        y.view(-1)[-1] += {"wrong": 0.01 * y.abs().max(), "nan": torch.nan}[fault]
        return y

    monkeypatch.setattr(ops, op, wrong)
    found = diagnose()
    assert not found.healthy and "healthy: no" in str(found)
    (problem,) = found.problems
    assert problem.startswith(f"{op} on cpu: ")
    want = {
        "shape": "want shape (",
        "raises": "RuntimeError: illegal memory access",
        "wrong": "an error of 1.0e-02, want",
    }
    assert want.get(fault, "") in problem


def test_a_wrong_answer_of_unpad_is_seen(monkeypatch):
    right = ops.unpad
    monkeypatch.setattr(ops, "unpad", lambda mask: (right(mask)[0] + 1, *right(mask)[1:]))
    assert diagnose().problems[0].startswith("unpad on cpu: an error of")


def test_an_extension_that_is_not_built(monkeypatch):
    """That is no illness; what to install is said, the compiler first if there is none."""
    monkeypatch.delenv("BERT_FAST_EXT", raising=False)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    found = diagnose()
    assert found.healthy and not found.extension["loaded"]
    assert found.extension["reason"] == "the C++ extension is not built"
    assert "pip install --no-build-isolation ." in str(found)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert diagnose().extension["install"].startswith("a C++ compiler; ")


def test_an_extension_that_does_not_load(monkeypatch):
    monkeypatch.delenv("BERT_FAST_EXT", raising=False)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())

    reason = "the C++ extension does not load: undefined symbol: _ZN"
    monkeypatch.setattr(doctor.extension, "load", lambda: (None, reason))
    (problem,) = diagnose().problems
    assert problem.startswith("the C++ extension does not load: undefined symbol: _ZN; build it")


def test_packages(monkeypatch):
    """One that is needed and missing or old is a problem; an optional one is a hint."""
    lines = [
        "torch>=99.1",
        "nowhere-to-be-found>=1; platform_system == 'Linux'",
        "of-another-system; platform_system == 'Plan 9'",
        "numpy>=1.0",
        'not-there>=2; extra == "hf"',
        'neither; extra == "hf"',
        'for-work; extra == "dev"',
        'bert-fast[hf]; extra == "dev"',
    ]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: lines)
    monkeypatch.setattr(doctor.platform, "system", lambda: "Linux")
    found = diagnose()
    assert found.problems == [
        f"torch {torch.__version__} is older than 99.1: pip install 'torch>=99.1'",
        "nowhere-to-be-found is not installed: pip install 'nowhere-to-be-found>=1'",
    ]
    install = "pip install 'not-there>=2' 'neither'"
    missing = ["not-there is not installed", "neither is not installed"]
    assert found.extras == {"hf": {"missing": missing, "install": install}}
    assert install in str(found)


@pytest.mark.parametrize(
    ("cuda", "driver", "reason"),
    [
        (None, None, "is built without CUDA"),
        (None, "570.1", "there is an NVIDIA driver 570.1: install torch with CUDA"),
        ("12.8", None, "no NVIDIA driver"),
        ("12.8", "470.1", "torch with CUDA 12.8 finds none under driver 470.1"),
    ],
)
def test_why_there_is_no_gpu(monkeypatch, cuda, driver, reason):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor, "_driver", lambda: driver)
    assert reason in diagnose().no_gpu


def test_a_gpu(monkeypatch):
    """Its facts, and the ops on it; what it computes only a GPU can tell."""
    facts = types.SimpleNamespace(name="H200", total_memory=150e9, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: facts)
    monkeypatch.setattr(doctor, "check_ops", lambda device: [])
    found = diagnose()
    want = {"model": "H200", "memory_gb": 150.0, "capability": "9.0"}
    assert want.items() <= found.devices["cuda:0"].items() and found.no_gpu == ""
    assert {*found.ops} == {"cpu", "cuda"}
    assert "H200" in str(found) and "ops on cuda" in str(found)


def test_python_is_named():
    assert sys.executable in diagnose().versions["python"]
