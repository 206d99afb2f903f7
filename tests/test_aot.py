"""Every kernel compiled for sm_80 and sm_90, in the variants the launchers ask for; without a GPU.

BERT-base's sizes; `test_aot_long` has the others. What this cannot show: races, speed, and whether
the machine code is right.
"""

import ast
import importlib.metadata
import json
from pathlib import Path

import aot_runs
import pytest

ARCHS = 80, 90
MOST_COMPILES = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("aot")


@pytest.fixture(scope="module")
def default(folder):
    """(What was recorded, a row for each compiled variant) of the default calls."""
    return aot_runs.record_and_compile(folder, "default", ARCHS)


@pytest.fixture(scope="module")
def controls(folder):
    """By arch and name, what `aot_compile` says is wrong with each planted kernel, and its row."""
    _, rows = aot_runs.record_and_compile(folder, "controls", ARCHS)
    return {(row["arch"], row["call"]): row for row in rows}


def kernels_in(folder: Path) -> set[str]:
    """module:name of every function there that ends in _kernel and is Triton's."""
    found = set()
    for path in folder.glob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                if any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                    found.add(f"bert_fast.kernels.{path.stem}:{node.name}")
    return found


# --- recorded ------------------------------------------------------------------------------------


def test_every_call_goes_through_its_launcher(default):
    assert not default[0]["failed"], "\n".join(default[0]["failed"])


def test_every_kernel_is_reached(default):
    reached = {variant["kernel"] for variant in default[0]["variants"]}
    kernels = kernels_in(aot_runs.ROOT / "kernels")
    assert len(kernels) >= 10
    assert not kernels - reached, f"no call in aot_calls.py reaches {sorted(kernels - reached)}"


def test_a_kernel_that_is_not_reached_is_seen(tmp_path):
    text = "@triton.jit(do_not_specialize=['T'])\ndef _new_kernel(T):\n    pass\n"
    (tmp_path / "new.py").write_text(text + "def _other_kernel():\n    pass\n", "utf-8")
    assert kernels_in(tmp_path) == {"bert_fast.kernels.new:_new_kernel"}


def test_compiles_are_few_enough_for_every_run(default):
    assert len(default[1]) == len(default[0]["variants"]) <= MOST_COMPILES


# --- compiled ------------------------------------------------------------------------------------


def test_every_variant_can_be_launched(default):
    """Compiles; fits into shared memory and registers; no float atomics, no bf16 arithmetic, no
    TF32 that nobody asked for; says whether products and sums are fused."""
    unfit = aot_runs.unfit(default[1])
    assert not unfit, "\n".join(unfit)


def test_bert_base_spills_nothing_on_sm_90_in_16_bits(default):
    held = [row for row in default[1] if aot_runs.must_not_spill(row)]
    assert len(held) >= 20
    assert not aot_runs.spills(default[1]), "\n".join(aot_runs.spills(default[1]))


def test_nothing_needs_more_than_the_table_says(default):
    table = json.loads(aot_runs.TABLE.read_text("utf-8"))
    installed = importlib.metadata.version("triton")
    if installed != table["triton"]:
        pytest.skip(f"the table is of Triton {table['triton']}, installed is {installed}")
    worse = aot_runs.worse_than_table(default[1], table)
    assert not worse, "\n".join([*worse, "if it must be so: make aot-table"])


# --- each check can fail -------------------------------------------------------------------------

WRONG = {
    "good": "",
    "good-fp32": "",
    "tf32-asked": "",
    "spill": "",  # is allowed where nothing else is asked
    "atomic": "floating-point atomics: ['atom.",
    "bf16": "arithmetic in bf16: ['arith.addf']",
    "bf16-reduction": "arithmetic in bf16: ['arith.addf']",
    "tf32": "products of fp32: want ieee, got tf32",
    "shared": "shared memory: want ",
    "registers": "registers: want 65536 at most",
    "broken": "does not compile: CompilationError",
    "deadly": "does not compile: the compiler died",
    "fusion": "enable_fp_fusion: want it said",
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", WRONG)
def test_what_is_planted_is_found(controls, name, arch):
    assert len(controls) == len(ARCHS) * len(WRONG)
    wrong = controls[arch, name]["wrong"]
    if not WRONG[name]:
        assert wrong == []
    else:
        assert len(wrong) == 1 and wrong[0].startswith(WRONG[name]), wrong


def test_a_planted_spill_is_found(controls):
    row = controls[90, "spill"] | {"call": "attention K=64 p=0.0 bfloat16"}
    assert len(aot_runs.spills([row])) == 1
    for call in ("attention K=64 p=0.0 float32", "attention K=128 p=0.0 bfloat16"):
        assert not aot_runs.spills([row | {"call": call}])
    assert not aot_runs.spills([controls[90, "good"] | {"call": row["call"]}])


@pytest.mark.parametrize("is_default", [True, False])
def test_what_is_worse_than_the_table_is_found(controls, is_default, tmp_path):
    row = controls[90, "spill"] | {"default": is_default}
    aot_runs.write_table([row], tmp_path / "table.json")
    table = json.loads((tmp_path / "table.json").read_text("utf-8"))
    assert table == aot_runs.table_of([row])
    assert not aot_runs.worse_than_table([row], table)
    for name, value in (("registers", 1.06), ("stack", 1.01), ("shared", 1)):
        worse = row | {name: row[name] * value + (name == "shared")}
        found = aot_runs.worse_than_table([worse], table)
        assert len(found) == (1 if is_default or name == "stack" else 0), name
    unknown = aot_runs.worse_than_table([row | {"text": "other"}], table)
    assert len(unknown) == 1
