"""What changes with the batch is not compiled in; how kernels are launched, read from source."""

import ast
from pathlib import Path

import aot_runs
import pytest

BATCHES = 500


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    out = tmp_path_factory.mktemp("aot") / "batches.json"
    args = "--calls", "batches", "--batches", BATCHES, "--archs", 90
    return aot_runs.run("aot_record.py", *args, out=out)


def test_500_random_batches_compile_nothing_new(batches):
    assert batches["known"] >= 20
    assert not batches["added"], "\n".join(batches["added"])


def test_a_kernel_that_has_the_batch_compiled_in_is_seen(batches):
    """Specialised: 1, multiples of 16 and all else; constant: whatever there was; steady: once."""
    found = batches["controls"]
    assert found["_steady_kernel"] == 1
    assert found["_specialised_kernel"] == 3
    assert found["_constant_kernel"] > 200


# --- source --------------------------------------------------------------------------------------


def violations(text: str, is_common: bool = False) -> list[str]:
    """What a kernel file does that it must leave to `common.launch`, or must not do at import."""
    tree, found = ast.parse(text), []
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    launch = [f for f in functions if is_common and f.name == "launch"]
    allowed = {node for f in launch for node in ast.walk(f)}
    inside = {node for f in functions for part in f.body for node in ast.walk(part)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node not in allowed:
            called = node.func
            is_run = isinstance(called, ast.Attribute) and called.attr in ("run", "warmup")
            if isinstance(called, ast.Subscript) or is_run:
                found.append(f"{node.lineno}: launched outside common.launch")
        if node not in inside and isinstance(node, ast.Attribute):
            if ast.unparse(node) == "torch.cuda":
                found.append(f"{node.lineno}: torch.cuda at import")
    return found


@pytest.mark.parametrize("path", sorted((aot_runs.ROOT / "kernels").glob("*.py")), ids=str)
def test_kernels_are_launched_in_one_place(path: Path):
    assert not violations(path.read_text("utf-8"), path.name == "common.py")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def f(x):\n    kernel[(1,)](x)", 1),
        ("def launch(x):\n    kernel[grid](x)", 1),  # of another file
        ("def f(x):\n    kernel.run(x, grid=(1,), warmup=False)", 1),
        ("N = torch.cuda.device_count()", 1),
        ("def f(n=torch.cuda.device_count()):\n    pass", 1),
        ("def f():\n    return torch.cuda.device_count()", 0),
        ("def f(x):\n    common.launch(kernel, (1,), x)", 0),
    ],
)
def test_a_planted_launch_is_found(text, found):
    assert len(violations(text)) == found


def test_launch_itself_is_allowed():
    assert not violations("def launch(x):\n    kernel[grid](x)", is_common=True)
