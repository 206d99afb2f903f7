"""The model that comes with the package: whole, of use, opened by transformers, there offline."""

import json
import os
import random
import re
import sys
from pathlib import Path

import masked_words
import pytest
import torch
import transformers
from cli_cases import call, process
from safetensors.torch import load_file

import bert_fast
from bert_fast import ENGLISH_MINI, BertForPreTraining, Encoder
from bert_fast.train.settings import load

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "benchmarks" / "texts" / "pride_and_prejudice_whole.txt.gz"  # not among its texts
TEXTS = (
    "He was born in the [MASK] of London.",
    "The film was released in the United [MASK] in 1998.",
    "She had two [MASK] and a sister, and they lived in a small house near the river.",
)


@pytest.fixture(scope="module")
def encoder():
    return Encoder.from_pretrained(ENGLISH_MINI, dtype="float32", device="cpu")


def test_files():
    """What from_pretrained reads, sums that are compared on the way, and a card; small."""
    files = {path.name: path for path in ENGLISH_MINI.iterdir()}
    weights = {"config.json", "model.safetensors", "bert_fast.json"}
    words = {"vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert {*files} == weights | words | {"README.md", "settings.yaml"}
    assert sum(path.stat().st_size for path in files.values()) < 12.5e6
    tensors = load_file(files["model.safetensors"])
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert all(t.isfinite().all() for t in tensors.values())
    BertForPreTraining.from_pretrained(ENGLISH_MINI)


def test_settings():
    """They are those that are shipped under the name that the card gives."""
    trained, shipped = (
        load(name).mathematics() for name in (ENGLISH_MINI / "settings.yaml", "mini")
    )
    assert trained == shipped
    config = json.loads((ENGLISH_MINI / "config.json").read_text("utf-8"))
    assert (config["num_hidden_layers"], config["hidden_size"]) == (4, 256)
    assert (config["vocab_size"], config["max_position_embeddings"]) == (8192, 128)


def test_card():
    """Licences and origins of its texts, commands that exist, and what it is not for."""
    card = (ENGLISH_MINI / "README.md").read_text("utf-8")
    for fact in ("CC BY-SA", "Wikipedia", "Project Gutenberg", "Vibhas-hs-edu/WikiTasks", "STS-B"):
        assert fact in card
    commands = re.findall(r"^bert-fast ([a-z]+)", card, re.MULTILINE)
    assert commands == ["data", "data", "pretrain"]


def test_as_in_transformers(encoder):
    """Weights, vocabulary and answers."""
    model = transformers.BertForMaskedLM.from_pretrained(ENGLISH_MINI, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(ENGLISH_MINI)
    fill = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")
    for text in TEXTS:
        want, got = fill(text, top_k=5), encoder.fill_mask(text, top_k=5)
        assert [row["token"] for row in got] == [row["token"] for row in want]
        for one, other in zip(got, want, strict=True):
            assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_it_knows_words(encoder):
    """Of a book that it never saw: the bound of what is shipped, and beside frequencies alone."""
    sentences = masked_words.sentences_of(BOOK, encoder.tokenizer)
    random.Random(0).shuffle(sentences)
    hidden = masked_words.hidden_words(sentences[:400], encoder.tokenizer, 0, most=128)
    first, among = masked_words.guessed(encoder, hidden)
    usual = masked_words.most_frequent(hidden)
    assert len(hidden) > 250 and among > 0.25 and among > usual[1] + 0.1 and first > usual[0] + 0.05


def test_the_command_line_takes_it(encoder, capfd):
    """With and without other options; a model that is named is another one."""
    expected = encoder.fill_mask(TEXTS[0], top_k=3)
    status, out, err = call(capfd, "fill-mask", TEXTS[0], "--top-k", "3", "--device", "cpu")
    assert (status, err) == (0, "")
    assert [line.split()[1] for line in out.splitlines()[1:]] == [e["token_str"] for e in expected]
    status, out, _ = call(capfd, "fill-mask", str(ENGLISH_MINI), TEXTS[0], "--json")
    assert status == 0 and [e["token"] for e in json.loads(out)][:3] == [
        e["token"] for e in expected
    ]
    status, _, err = call(capfd, "fill-mask", "a", "b", "c")
    assert status == 2 and "want [MODEL] TEXT, got 3 arguments" in err
    status, _, err = call(capfd, "fill-mask", "no mask")
    assert status == 1 and "want [MASK] in the text, got 'no mask'" in err


def test_offline(tmp_path):
    """In a process that may not open a connection."""
    code = (
        "import sys\n"
        "def refuse(event, arguments):\n"
        "    assert event not in ('socket.connect', 'socket.getaddrinfo'), event\n"
        "sys.addaudithook(refuse)\n"
        "from bert_fast.cli import main\n"
        "sys.exit(main(['fill-mask', '-', '--json']))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "nothing")}
    status, out, err = process(
        prefix=(sys.executable, "-c", code), input="\n".join(TEXTS), env=environment, cwd=tmp_path
    )
    assert (status, err) == (0, "") and len(out.splitlines()) == len(TEXTS)


def test_public_name():
    assert "ENGLISH_MINI" in bert_fast.__all__ and bert_fast.ENGLISH_MINI.is_dir()
