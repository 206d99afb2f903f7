"""Every line of docs/migration.md runs, but for those of libraries that cannot be had here."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from encoder_models import save_for

from bert_fast.hf.marks import MARK

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
ABSENT = ("flash-attn", "optimum", "kernl")  # the first line of a block that only they run
SECTIONS = ("transformers", "sentence-transformers", "flash-attn", "BetterTransformer", "Kernl")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model and a tokenizer, where the page says path-or-hub-id."""
    return save_for(PAGE, tmp_path_factory.mktemp("migration") / "model")


def section(name):
    return re.search(rf"^## From {name}.*?$(.*?)(?=^## |\Z)", PAGE, re.M | re.S)[1]


def blocks(name):
    found = re.findall(r"^```python\n(.*?)^```$", section(name), re.M | re.S)
    return [block for block in found if not block.startswith(tuple(f"# {a}" for a in ABSENT))]


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.filterwarnings("ignore:.*(initialised|not used by)")
def test_the_lines_run(name, checkpoint):
    """One after the other, as a reader would paste them; something of it is ours in the end."""
    ids = torch.randint(5, 200, (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    scope = {"batch": {"input_ids": ids, "attention_mask": mask}}
    if name == "transformers" and int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("BERT takes an attention by name from transformers 5 on")
    results = {"logits": [], "vectors": []}
    for block in blocks(name):
        code = compile(block.replace("path-or-hub-id", str(checkpoint)), "migration.md", "exec")
        torch.manual_seed(0)  # of new heads
        exec(code, scope)
        for key, found in results.items():
            if f"{key} = " in block:
                found.append(torch.as_tensor(scope[key]).detach())
    for found in results.values():
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)
    assert "bert_fast" in section(name)
    if name == "sentence-transformers":
        assert MARK in scope["st"].__dict__ and len(results["vectors"]) == 3


@pytest.mark.parametrize("name", SECTIONS)
def test_before_and_after(name):
    """Each library has both."""
    text = section(name)
    assert text.index("Before") < text.index("After")


def test_what_is_not_run():
    """One block for each library that is absent, and it is at least Python."""
    found = re.findall(r"^```python\n(# (.*?)\n.*?)^```$", PAGE, re.M | re.S)
    assert [library for _, library in found] == list(ABSENT)
    for code, _ in found:
        compile(code, "migration.md", "exec")


def test_the_command(checkpoint, tmp_path, capsys):
    from bert_fast import cli

    command = re.search(r"`bert-fast (verify .*?)`", PAGE)[1]
    texts = tmp_path / "texts.txt"
    texts.write_text("The sea is calm.\nWaves, none.\n", encoding="utf-8")
    arguments = command.replace("path-or-hub-id", str(checkpoint)).replace("texts.txt", str(texts))
    assert cli.main(arguments.split()) == 0, capsys.readouterr().err
