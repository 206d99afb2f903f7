"""`bert-fast`: help whose examples work, errors of one line, and what the verbs print."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_cases import call, process, work_in

from bert_fast.encode import Encoder

ROOT = Path(__file__).resolve().parents[1]
VERBS = (
    *(["doctor"], ["encode"], ["fill-mask"], ["verify"]),
    *(["convert", "from-tf"], ["convert", "to-hf"], ["convert", "legacy-names"]),
    *(["data", "vocab"], ["data", "prepare"], ["data", "inspect"]),
)
GROUPS = (["convert"], ["data"], ["bench"])
BENCH = [  # test_cli_bench.py runs them
    ["bench", name] for name in ("kernels", "encoder", "pretraining", "all", "report", "compare")
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return work_in(tmp_path, monkeypatch)


# --- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [[], *GROUPS, *VERBS, *BENCH], ids=" ".join)
def test_help_is_readable(verb, capfd, monkeypatch):
    """In 80 columns, without colours, with every option explained."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    status, out, err = call(capfd, *verb, "--help")
    assert status == 0 and not err and "\x1b" not in out
    assert out.startswith(f"Usage: {' '.join(['bert-fast', *verb])} ")
    assert max(map(len, out.splitlines())) <= 80 and "..." not in out.partition("Commands:")[2]
    assert call(capfd, *verb, "-h") == (0, out, "")


def examples(capfd, verb):
    out = call(capfd, *verb, "--help")[1]
    lines = [line.strip() for line in out.partition("Example:\n")[2].splitlines() if line.strip()]
    assert lines and all(f"bert-fast {' '.join(verb)}" in line for line in lines), out
    return lines


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_the_examples_of_the_help_work(verb, capfd, folder, request):
    if verb[-1] == "from-tf":
        source = request.getfixturevalue("shared") / "data" / "ckpt" / "tf_google_tiny"
        shutil.rmtree(folder / "model")
        shutil.copytree(source, folder / "uncased_L-12_H-768_A-12")
    if verb[-1] == "inspect":
        made = ["data", "prepare", "book.txt", "--tokenizer", "model", "-o", "corpus"]
        assert call(capfd, *made)[0] == 0
    command = folder / "bin" / "bert-fast"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m bert_fast "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    for line in examples(capfd, verb):
        done = process(prefix=["sh", "-ec", line], env=environment)
        assert done[0] == 0, (line, done)
    made = {p.name for p in folder.iterdir()}
    assert (
        made
        >= {
            "doctor": set(),
            "encode": {"vectors.npy", "vectors.parquet", "vectors.jsonl"},
            "fill-mask": set(),
            "verify": set(),
            "from-tf": {"model"},
            "to-hf": {"converted"},
            "legacy-names": {"renamed"},
            "vocab": {"tokenizer", "cased"},
            "prepare": {"corpus", "made"},
            "inspect": set(),
        }[verb[-1]]
    )
    assert not [name for name in made if name.endswith(".parts")]


def test_starts_without_torch():
    """Not with the package's own __init__, which is not the command line's to decide."""
    code = (
        "import sys, types; package = types.ModuleType('bert_fast');"
        f"package.__path__ = [{str(ROOT / 'bert_fast')!r}]; sys.modules['bert_fast'] = package;"
        "from bert_fast.cli import main; status = main(['encode', '--help']);"
        "slow = {'torch', 'numpy', 'tokenizers', 'pyarrow', 'transformers'} & {*sys.modules};"
        "sys.exit(f'{slow}' if slow else status)"
    )
    status, out, err = process(prefix=[sys.executable, "-c", code])
    assert status == 0, err
    assert out.startswith("Usage: bert-fast encode ")


def test_as_a_module(capfd):
    status, out, err = process("--version")
    assert (status, err) == (0, "") and re.fullmatch(r"bert-fast \d+\.\d+\.\d+\n", out)
    assert call(capfd, "--version") == (0, out, "")


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nope"], 2, "No such command 'nope'. See bert-fast --help"),
        (["--nope"], 2, "No such option: --nope"),
        (["encode"], 2, "Missing argument 'MODEL'. See bert-fast encode --help"),
        (["encode", "model", "texts.txt"], 2, "Missing option '--output'"),
        (["encode", "model", "texts.txt", "-o", "v.npy", "--chunk", "0"], 2, "--chunk"),
        (["encode", "model", "texts.txt", "-o", "v.npy", "--errors", "x"], 2, "--errors"),
        (["encode", "model", "texts.txt", "-o", "v.txt"], 1, "v.txt: want .npy, .jsonl, .parquet"),
        (["encode", "model", "no.txt", "-o", "v.npy"], 1, "no.txt: want a file, got nothing"),
        (["encode", "./no", "texts.txt", "-o", "v.npy"], 1, "no: want a directory, got nothing"),
        (["encode", "model", "texts.zip", "-o", "v.npy"], 1, "texts.zip: want a "),
        (["encode", "model", "bad.txt", "-o", "v.npy"], 1, "bad.txt:2: want UTF-8, got byte 0xff"),
        (["encode", "model", "reviews.csv", "-o", "v.npy"], 1, "got 'id', 'body'"),
        (["encode", "model", "texts.txt", "-o", "v.npy", "--prompt-name", "q"], 1, "prompt_name"),
        (["encode", "model", "texts.txt", "-o", "v.npy", "--device", "tpu9"], 1, ""),
        (["fill-mask", "model", "no mask"], 1, "want [MASK] in the text, got 'no mask'"),
        (["convert", "from-tf", "model", "new"], 1, "model"),
        (["convert", "to-hf", "no", "new"], 1, "no"),
        (["convert", "legacy-names", "model", "model"], 1, "model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors(arguments, status, message, folder, capfd):
    """One line on stderr that says what is wrong; nothing on stdout, no traceback."""
    (folder / "bad.txt").write_bytes(b"ok\n\xff\n")
    (folder / "texts.zip").write_bytes(b"x")
    got, out, err = call(capfd, *arguments)
    assert (got, out) == (status, "")
    lines = [line for line in err.splitlines() if not line.startswith("bert-fast: warning: ")]
    assert len(lines) == 1 and lines[0].startswith("bert-fast: error: ") and message in lines[0]


def test_debug_prints_where(folder, capfd):
    for arguments in (["--debug", "fill-mask", "no", "x"], ["fill-mask", "no", "x", "--debug"]):
        status, out, err = call(capfd, *arguments)
        assert (status, out) == (1, "") and err.startswith("Traceback (most recent call last)")
        assert err.splitlines()[-1].startswith("bert-fast: error: ")


def test_without_a_verb(capfd):
    status, out, err = call(capfd)
    assert (status, out) == (2, "") and err.startswith("Usage: bert-fast ")
    status, out, err = call(capfd, "convert")
    assert (status, out) == (2, "") and err.startswith("Usage: bert-fast convert ")


def test_interrupted(folder, capfd, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Encoder, "encode", interrupted)
    status, out, err = call(capfd, "encode", "model", "texts.txt", "-o", "v.npy")
    assert (status, out) == (130, "") and err == "bert-fast: error: interrupted\n"


def test_an_error_nobody_foresaw(folder, capfd, monkeypatch):
    def broken(*_, **__):
        return {}["key"]

    monkeypatch.setattr(Encoder, "fill_mask", broken)
    status, _, err = call(capfd, "fill-mask", "model", "x")
    assert status == 1 and err == "bert-fast: error: KeyError: 'key' (--debug shows where)\n"


def test_nobody_reads_on(folder):
    """As in `bert-fast ... | head -0`."""
    command = f"{sys.executable} -m bert_fast doctor --json; echo $? >status"
    status, _, err = process(prefix=["sh", "-c", f"({command}) | true"])
    assert status == 0 and "Traceback" not in err and "error" not in err
    assert (folder / "status").read_text() in ("0\n", "1\n", "141\n")


# --- fill-mask, convert --------------------------------------------------------------------------


def test_fill_mask(folder, capfd):
    text, encoder = "the [MASK], the sea", Encoder.from_pretrained("model")
    expected = encoder.fill_mask(text, top_k=3)
    status, out, err = call(capfd, "fill-mask", "model", text, "--top-k", "3")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 4 and lines[0].split() == ["score", "token", "text"]
    for line, entry in zip(lines[1:], expected, strict=True):
        assert line.split()[:2] == [f"{entry['score']:.4f}", entry["token_str"]]
        assert entry["sequence"] in line
    status, out, _ = call(capfd, "fill-mask", "model", text, "--top-k", "3", "--json")
    assert status == 0 and json.loads(out) == expected


def test_fill_mask_of_several(folder):
    """Several masks in a text, several texts on stdin."""
    texts = ["[MASK] me [MASK].", "the [MASK]"]
    encoder = Encoder.from_pretrained("model")
    arguments = ["fill-mask", "model", "-", "--json", "--top-k", "2"]
    status, out, _ = process(*arguments, input="\n".join(texts))
    assert status == 0
    found = [json.loads(line) for line in out.splitlines()]
    for text, got in zip(texts, found, strict=True):
        want = encoder.fill_mask(text, top_k=2)
        flat = [np.ravel(rows).tolist() for rows in (got, want)]
        assert [row["token"] for row in flat[0]] == [row["token"] for row in flat[1]]
    status, out, _ = process("fill-mask", "model", texts[0], "--top-k", "2")
    assert status == 0 and out.count("score") == 2 and "mask 2" in out and "[MASK]" in out


def test_convert(folder, capfd, shared):
    """What was written, what was ignored and why."""
    source = shared / "data" / "ckpt" / "tf_google_tiny"
    status, out, _ = call(capfd, "convert", "from-tf", source, "new")
    assert status == 0 and out.startswith("BertForPreTraining: ") and "the optimizer's" in out
    assert "model.safetensors" in out and (folder / "new" / "model.safetensors").is_file()
    status, _, err = call(capfd, "convert", "from-tf", source, "new")
    assert status == 1 and "new" in err
    assert call(capfd, "convert", "from-tf", source, "new", "--overwrite", "--head", "none")[0] == 0
    options = ["--dtype", "float16", "--max-shard-size", "1KB"]
    status, out, _ = call(capfd, "convert", "to-hf", "new", "half", *options)
    assert status == 0 and "model.safetensors.index.json" in out
    assert call(capfd, "convert", "legacy-names", "new", "renamed")[0] == 0


# --- doctor --------------------------------------------------------------------------------------


def test_doctor(capfd, monkeypatch):
    status, out, _ = call(capfd, "doctor")
    assert status == 0 and "healthy: yes" in out
    status, out, _ = call(capfd, "doctor", "--json")
    assert status == 0 and json.loads(out)["healthy"] is True
    monkeypatch.setattr("bert_fast.ops.gelu", lambda x, b: x)
    status, out, _ = call(capfd, "doctor")
    assert status == 1 and "healthy: no" in out and "gelu on cpu" in out
