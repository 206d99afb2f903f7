"""Who may import whom, and what must not be in the tree; each rule is shown to bite."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (  # a module imports only what stands above its own line; a package also itself
    ("_C",),
    ("accuracy", "batch_encoding", "extension", "files", "progress", "reference_dropout"),
    ("config", "names", "outputs", "tensor_bundle", "tokenizer", "data"),
    ("kernels", "reference", "reference_model", "reference_optimizer", "weights"),
    ("checkpoint", "shipped"),
    ("ops",),
    ("packing",),
    ("functional",),
    ("layers",),
    ("base",),
    ("pretrained",),
    ("model",),
    ("heads",),
    ("hf",),
    ("graphs", "report"),  # what is reported of is accelerated, too
    ("convert", "doctor", "encode"),
    ("train",),
    ("cli",),
    ("__main__",),
    ("__init__",),  # the public names, from anywhere; so nothing inside imports them from here
)
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}
FOLDERS = ("bert_fast", "kernels", "csrc", "tests", "benchmarks")
MOST_LINES = 450


def name_of(path: Path, root: Path) -> str:
    """bert_fast/ops/unpad.py -> bert_fast.ops.unpad, kernels/gelu.py -> bert_fast.kernels.gelu."""
    parts = path.relative_to(root).with_suffix("").parts
    if parts[0] == "kernels":
        parts = ("bert_fast", *parts)
    return ".".join(parts)


def layer_name(module: str) -> str:
    """bert_fast.ops.unpad -> ops; bert_fast itself -> __init__."""
    return [*module.split("."), "__init__"][1]


def imports(tree: ast.AST, module: str) -> Iterator[tuple[int, bool, str]]:
    """Yield (line, whether inside a function, dotted name) of whatever is imported.

    `from a import b` gives a.b: whether b is a module or a name, its layer is the same.
    """
    inside = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.walk(node)
    }
    package = module.split(".")[:-1]
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{start}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args:  # importlib.import_module("...")
            called, what = node.func, node.args[0]
            called = getattr(called, "attr", getattr(called, "id", None))
            if called in ("import_module", "__import__") and isinstance(what, ast.Constant):
                names = [what.value]
        for name in names:
            yield node.lineno, node in inside, name


def broken_by(module: str, name: str, in_function: bool) -> Iterator[str]:
    """Yield the rules that `import name` in `module` breaks."""
    top, here = name.split(".")[0], layer_name(module)
    if top == "kernels":
        yield "`kernels` is Hugging Face's: say bert_fast.kernels"
    if top in ("tests", "benchmarks"):
        yield f"nobody imports {top}"
    if top == "transformers" and here != "hf":
        yield "only hf/ imports transformers"
    if top != "bert_fast":
        return
    there = layer_name(name)
    if there not in LAYER:
        yield f"{there} is no module in LAYERS: a public name comes from its own module"
    elif here in LAYER and here != there and LAYER[there] >= LAYER[here]:
        yield f"{here} imports {there}, which is not below it"
    if there == "kernels" and here != "kernels":
        if here != "ops":
            yield "only ops imports kernels"
        elif not in_function:
            yield "kernels are imported inside functions: import bert_fast must not load Triton"
    if here == "kernels" and there != "kernels":
        yield "kernels know tensors and nothing else of bert_fast"


def violations(root: Path) -> list[str]:
    """Return what breaks a rule in the tree under root: 'file:line: rule'."""
    found = []
    for path in sorted([*root.glob("bert_fast/**/*.py"), *root.glob("kernels/**/*.py")]):
        where, module = path.relative_to(root), name_of(path, root)
        if layer_name(module) not in LAYER:
            found.append(f"{where}: {layer_name(module)} has no line in LAYERS")
        for line, in_function, name in imports(ast.parse(path.read_text("utf-8")), module):
            found += [f"{where}:{line}: {rule}" for rule in broken_by(module, name, in_function)]
    found = list(dict.fromkeys(found))  # one line may import several names
    for folder in ("tests", "benchmarks"):
        for path in root.glob(f"{folder}/**/__init__.py"):
            found.append(f"{path.relative_to(root)}: {folder} is not a package")
    sources = [root / "setup.py", *(p for folder in FOLDERS for p in root.glob(f"{folder}/**/*"))]
    for path in sources:
        if path.is_file() and path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h"):
            lines = len(path.read_text("utf-8").splitlines())
            if lines > MOST_LINES:
                found.append(f"{path.relative_to(root)}: {lines} lines, want {MOST_LINES} at most")
    return found


def test_the_tree_keeps_the_rules():
    found = violations(ROOT)
    assert not found, "\n".join(found)


ALLOWED = {
    "bert_fast/__init__.py": "from bert_fast.heads import BertForMaskedLM",
    "bert_fast/config.py": "import dataclasses",
    "bert_fast/reference.py": "from bert_fast.config import BertConfig",
    "bert_fast/ops/__init__.py": "from bert_fast.ops.gelu import gelu",
    "bert_fast/ops/gelu.py": "from . import registry\ndef f():\n    import bert_fast.kernels.gelu",
    "bert_fast/ops/registry.py": "import importlib\nimportlib.import_module('bert_fast._C')",
    "bert_fast/layers.py": "import bert_fast.ops\nfrom bert_fast import ops, packing",
    "bert_fast/heads.py": "from .layers import EncoderLayer",
    "bert_fast/hf/x.py": "import transformers",
    "kernels/gelu.py": "import triton\nfrom bert_fast.kernels import common",
    "tests/test_gelu.py": "import transformers\nfrom bert_fast.kernels import gelu",
}


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return root


def test_a_tree_that_keeps_the_rules_passes(tmp_path):
    assert violations(plant(tmp_path, ALLOWED | {"setup.py": ""})) == []


@pytest.mark.parametrize(
    ("file", "text", "rule"),
    [
        ("bert_fast/config.py", "from bert_fast import ops", "config imports ops"),
        ("bert_fast/config.py", "def f():\n    import bert_fast.model", "config imports model"),
        ("bert_fast/files.py", "import bert_fast.config", "files imports config"),
        ("bert_fast/config.py", "from .heads import X", "config imports heads"),
        ("bert_fast/config.py", "from . import report", "config imports report"),
        ("bert_fast/outputs.py", "import bert_fast.config", "outputs imports config"),
        ("bert_fast/ops/gelu.py", "from ..layers import X", "ops imports layers"),
        ("bert_fast/data/text.py", "from bert_fast.tokenizer import X", "data imports tokenizer"),
        ("bert_fast/layers.py", "import bert_fast", "layers imports __init__"),
        ("bert_fast/layers.py", "from bert_fast import BertModel", "BertModel is no module"),
        ("bert_fast/helpers.py", "", "helpers has no line"),
        ("bert_fast/ops/gelu.py", "import kernels", "Hugging Face's"),
        ("bert_fast/hf/x.py", "from kernels import get_kernel", "Hugging Face's"),
        ("bert_fast/ops/gelu.py", "from bert_fast.kernels import gelu", "inside functions"),
        ("bert_fast/model.py", "def f():\n    import bert_fast.kernels.gelu", "only ops imports"),
        ("bert_fast/checkpoint.py", "import transformers", "only hf/ imports transformers"),
        ("kernels/gelu.py", "def f():\n    from transformers import X", "only hf/ imports"),
        ("kernels/gelu.py", "from bert_fast.config import BertConfig", "tensors and nothing else"),
        ("bert_fast/cli.py", "from benchmarks import ops", "nobody imports benchmarks"),
        ("bert_fast/cli.py", "import tests.conftest", "nobody imports tests"),
        ("bert_fast/model.py", "__import__('transformers')", "only hf/ imports transformers"),
        ("tests/__init__.py", "", "tests is not a package"),
        ("benchmarks/texts/__init__.py", "", "benchmarks is not a package"),
        ("csrc/cpu/gelu.cpp", "\n" * 451, "451 lines, want 450 at most"),
        ("bert_fast/model.py", "x = 1\n" * 451, "451 lines, want 450 at most"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, text, rule):
    found = violations(plant(tmp_path, ALLOWED | {"setup.py": "", file: text}))
    assert len(found) == 1 and found[0].startswith(file) and rule in found[0], found
