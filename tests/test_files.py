"""Damage to files is seen, a save is all or nothing, and the hub's cache is read where it is."""

import builtins
import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from bert_fast.checkpoint import locate, read_tensors, save_tensors
from bert_fast.config import BertConfig, read_config
from bert_fast.files import find_directory, plain_file

CONFIG = BertConfig(vocab_size=11, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
REVISION = "0123456789abcdef0123456789abcdef01234567"


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (11, 8), "b.bias": (8,), "c": (3, 5), "d": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save(directory, seed=0, sharded=False, **fields):
    config = BertConfig.from_dict(CONFIG.to_dict(), **fields)
    size = 50 if sharded else "5GB"
    save_tensors(directory, tensors(seed), config=config, max_shard_size=size)
    return directory


def holds(directory, seed):
    found, want = read_tensors(directory), tensors(seed)
    return found.keys() == want.keys() and all(torch.equal(found[n], want[n]) for n in want)


def contents(directory):
    return {p.name: p.read_bytes() for p in Path(directory).iterdir()}


# --- damage --------------------------------------------------------------------------------------


def flip(path, rng):
    raw = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(raw))
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)
    return bit


@pytest.mark.parametrize("count", [500, pytest.param(5000, marks=pytest.mark.long)])
def test_flipped_bits(tmp_path, count):
    """In shards, index and manifest; each is seen."""
    rng, names = random.Random(0), sorted(contents(save(tmp_path, sharded=True)).keys())
    names.remove("config.json")
    assert len(names) >= 5
    for i in range(count):
        path = tmp_path / names[i % len(names)]
        before = path.read_bytes()
        bit = flip(path, rng)
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            read_tensors(tmp_path)
        assert str(tmp_path) in str(error.value), (path.name, bit)
        path.write_bytes(before)
    assert holds(tmp_path, 0)


@pytest.mark.filterwarnings("ignore:.*ignored the keys")
def test_flipped_bits_in_the_configuration(tmp_path):
    """Whatever decides what is computed is covered; labels, say, may be edited."""
    path, rng, seen = save(tmp_path) / "config.json", random.Random(0), 0
    before = path.read_bytes()
    for _ in range(500):
        flip(path, rng)
        try:
            read_tensors(tmp_path)
        except ValueError as error:
            assert str(path) in str(error)
            seen += 1
        else:
            assert read_config(tmp_path)[0].fingerprint() == CONFIG.fingerprint()
        path.write_bytes(before)
    assert seen > 200


def test_truncation_to_every_length(tmp_path):
    """Without a manifest: the file alone says how long it should be."""
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors(0), path)
    raw = path.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    for length in range(min(header + 200, len(raw))):
        path.write_bytes(raw[:length])
        with pytest.raises(ValueError) as error:
            read_tensors(tmp_path)
        want = 8 if length < 8 else header if length < header else len(raw)
        assert f"{path}: truncated: want" in str(error.value)
        assert f" {want} bytes, got {length}" in str(error.value)
    path.write_bytes(raw + b"\0")
    with pytest.raises(ValueError, match=f"want {len(raw)} bytes, got {len(raw) + 1}"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_truncated_real_files(shared, tmp_path, name, count):
    raw = (shared / "data/ckpt/hf_tiny_generated" / name).read_bytes()
    rng = random.Random(0)
    for _ in range(count):
        (tmp_path / name).write_bytes(raw[: rng.randrange(len(raw))])
        with pytest.raises(ValueError, match=name):
            read_tensors(tmp_path)


def swap_shards(directory, other):
    one, two = sorted(directory.glob("model-*"))[:2]
    raw = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(raw)
    return one.name, "sha256"


def shard_of_another_save(directory, other):
    name = min(p.name for p in directory.glob("model-*"))
    shutil.copy(other / name, directory)
    return name, "sha256"


def manifest_of_another_save(directory, other):
    shutil.copy(other / "bert_fast.json", directory)
    return "model-", "sha256"


def shard_is_missing(directory, other):
    name = min(p.name for p in directory.glob("model-*"))
    (directory / name).unlink()
    return name, "got none for"


def file_of_another_save(directory, other):
    (directory / "model.safetensors").write_bytes(min(directory.glob("model-*")).read_bytes())
    return "model.safetensors", "beside them"


def index_is_missing(directory, other):
    (directory / "model.safetensors.index.json").unlink()
    return "model.safetensors.index.json", "got none for"


def configuration_is_missing(directory, other):
    (directory / "config.json").unlink()
    return "config.json", "got nothing"


def configuration_of_another_model(directory, other):
    config = BertConfig.from_pretrained(directory, hidden_act="relu")
    config.save_pretrained(directory)
    return "config.json", config.fingerprint()


def edit_manifest(**fields):
    def edit(directory, other):
        path = directory / "bert_fast.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return "bert_fast.json", next(iter(fields))

    edit.__name__ = "_".join(["manifest", *fields])
    return edit


DAMAGE = [
    swap_shards,
    shard_of_another_save,
    manifest_of_another_save,
    shard_is_missing,
    file_of_another_save,
    index_is_missing,
    configuration_is_missing,
    configuration_of_another_model,
    edit_manifest(format_version=2),
    edit_manifest(files={}),
    edit_manifest(files=["model.safetensors"]),
    edit_manifest(files={"../model.safetensors": {}}),
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_manifest(tmp_path, damage):
    save(tmp_path / "a", sharded=True)
    name, fragment = damage(tmp_path / "a", save(tmp_path / "b", 1, sharded=True))
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_tensors(tmp_path / "a")
    for text in (str(tmp_path / "a"), name, fragment, "want", "got"):
        assert text in str(error.value)
    assert len(str(error.value)) < 1000


def test_labels_may_be_edited(tmp_path):
    config = BertConfig.from_pretrained(save(tmp_path), num_labels=7, hidden_dropout_prob=0.5)
    config.save_pretrained(tmp_path)
    assert holds(tmp_path, 0)


# --- all or nothing ------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_no_file_of_an_earlier_save_is_left(tmp_path, before, after):
    other = {"pytorch_model.bin": b"theirs", "vocab.txt": b"[PAD]", "model-a.safetensors": b""}
    for name, raw in other.items():
        (tmp_path / name).write_bytes(raw)
    save(tmp_path, 1, sharded=before)
    save(tmp_path, 2, sharded=after)
    assert holds(tmp_path, 2)
    alone = save(tmp_path.parent / f"{tmp_path.name}_alone", 2, sharded=after)
    assert contents(tmp_path) == contents(alone) | other


@pytest.mark.parametrize("sharded", [False, True])
def test_a_crash_at_any_step(tmp_path, monkeypatch, sharded):
    """What is in the directory before each change to it: the old, the new or a refusal."""
    directory = save(tmp_path / "live", 1, hidden_act="relu", sharded=not sharded)
    states = []

    def watch(owner, name):
        original = getattr(owner, name)

        def wrapper(*args, **kwargs):
            states.append(shutil.copytree(directory, tmp_path / f"state{len(states)}"))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    for name in ("replace", "fsync", "unlink"):
        watch(os, name)
    watch(Path, "unlink")
    save(directory, 2, sharded=sharded)
    monkeypatch.undo()
    seen = []
    for state in [*states, directory]:
        try:
            seen.append(1 if holds(state, 1) else 2)
            assert seen[-1] == 1 or holds(state, 2)
            assert read_config(state)[0].hidden_act == {1: "relu", 2: "gelu"}[seen[-1]]
        except ValueError as error:
            assert "bert_fast.json" in str(error)
            seen.append("refused")
    assert len(states) >= 10 and seen[0] == 1 and seen[-1] == 2
    order = [1, "refused", 2]
    assert seen == sorted(seen, key=order.index) and set(seen) == set(order)


def failing(original, at):
    calls = iter(range(1000))

    def wrapper(*args, **kwargs):
        if next(calls) == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("at", range(7))
@pytest.mark.parametrize("call", ["fsync", "open"])
def test_failure_leaves_the_old_files(tmp_path, monkeypatch, call, at):
    """Four shards, index, configuration, manifest: each in turn cannot be written."""
    before = contents(save(tmp_path, 1))
    owner = os if call == "fsync" else builtins
    monkeypatch.setattr(owner, call, failing(getattr(owner, call), at))
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, sharded=True)
    monkeypatch.undo()
    assert contents(tmp_path) == before and holds(tmp_path, 1)


@pytest.mark.parametrize("part", range(1, 21))
def test_full_disk(tmp_path, part):
    """A real limit in the middle of a write, at 20 places."""
    before = contents(save(tmp_path, 1))
    limit = len(before["model.safetensors"]) * part // 21
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(OSError) as error:
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert error.value.errno == errno.EFBIG
    assert contents(tmp_path) == before and holds(tmp_path, 1)


def test_configuration_alone_is_all_or_nothing(tmp_path, monkeypatch):
    CONFIG.save_pretrained(tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr(os, "fsync", failing(os.fsync, 0))
    with pytest.raises(OSError, match="No space left"):
        BertConfig().save_pretrained(tmp_path)
    assert contents(tmp_path) == before


# --- the hub -------------------------------------------------------------------------------------


def cache(root, store="blobs", name="model.safetensors"):
    """The hub's cache after a download; `shared` as with its store for all models."""
    repo = root / "models--org--tiny"
    snapshot = repo / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(REVISION)
    source = save(root / "source")
    if name == "pytorch_model.bin":
        torch.save(tensors(0), source / name)
    for number, file in enumerate(("config.json", name)):
        blob = repo / "blobs" / (str(number) * 40)
        raw = (source / file).read_bytes()
        if store == "shared":
            digest = f"{number}" * 64
            (root / "blobs" / digest[:2]).mkdir(parents=True)
            (root / "blobs" / digest[:2] / digest).write_bytes(raw)
            blob.symlink_to(f"../../blobs/{digest[:2]}/{digest}")
        else:
            blob.write_bytes(raw)
        (snapshot / file).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


@pytest.mark.parametrize("store", ["blobs", "shared"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_hub_cache(tmp_path, store, name):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    snapshot = cache(tmp_path, store, name)
    where = {"cache_dir": tmp_path, "local_files_only": True}
    assert locate("org/tiny", **where) == snapshot
    assert holds(snapshot, 0)
    assert BertConfig.from_pretrained("org/tiny", **where) == CONFIG
    assert locate("org/tiny", revision=REVISION, **where) == snapshot
    with pytest.raises(OSError, match=r"org/other.*directory or the id.*the hub gives"):
        locate("org/other", **where)


@pytest.mark.parametrize(
    "target", ["../../../secret", "../../../models--org--other/blobs/a", "../../refs/main", "sub/x"]
)
def test_cache_links_lead_nowhere_else(tmp_path, target):
    snapshot = cache(tmp_path)
    link = snapshot / "model.safetensors"
    link.unlink()
    link.symlink_to(target)
    (snapshot / target).parent.mkdir(parents=True, exist_ok=True)
    (snapshot / target).write_bytes((tmp_path / "source/model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"want a file inside .*got a link to"):
        read_tensors(snapshot)
    blob = tmp_path / "models--org--tiny/blobs/9"  # nor by way of a blob
    blob.symlink_to(snapshot / target)
    link.unlink()
    link.symlink_to("../../blobs/9")
    with pytest.raises(ValueError, match=r"want a file inside .*got a link to"):
        read_tensors(snapshot)


def test_links_inside_and_to_a_directory(tmp_path):
    directory = save(tmp_path / "real")
    (directory / "model.safetensors").rename(directory / "weights")
    (directory / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to("real")
    assert holds(tmp_path / "link", 0)
    with pytest.raises(FileNotFoundError, match="want a plain file, got something else"):
        plain_file(tmp_path, "real")


def test_downloads_only_what_is_read(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    asked = []

    def download(name, *, allow_patterns, **options):
        asked.append((name, allow_patterns, options))
        (tmp_path / "sub").mkdir(exist_ok=True)
        if any("pytorch_model.bin" in p for p in allow_patterns):
            torch.save(tensors(0), tmp_path / "sub/pytorch_model.bin")
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    found = locate("org/tiny", subfolder="sub", revision="v1", token="t", force_download=True)
    assert found == tmp_path / "sub" and holds(found, 0)
    assert len(asked) == 2 and {name for name, _, _ in asked} == {"org/tiny"}
    assert asked[0][2]["revision"] == "v1" and asked[0][2]["token"] == "t"
    assert all(p.startswith("sub/") for _, patterns, _ in asked for p in patterns)
    assert not any("bin" in p for p in asked[0][1])
    save(tmp_path / "sub")
    locate("tiny", subfolder="sub")
    assert len(asked) == 3


@pytest.mark.parametrize(
    "path", ["./no", "/no/where", "a/b/c", "../no", "", "~/x", "a\\b", Path("no")]
)
def test_missing_paths_are_not_asked_of_the_hub(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="want a directory, got nothing"):
        locate(path)


def test_without_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"org/tiny: .*pip install huggingface_hub"):
        locate("org/tiny")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="want a directory, got a file"):
        find_directory(tmp_path / "file", [])


PEAK = """
import sys
from bert_fast.checkpoint import read_tensors
read_tensors(sys.argv[1])  # a small one first: what the code itself takes
def kilobytes(key):
    return int(open("/proc/self/status").read().partition(key + ":")[2].split()[0])
before = kilobytes("VmRSS")
read_tensors(sys.argv[2])
print(1024 * (kilobytes("VmHWM") - before))
"""


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_memory(tmp_path, form):
    """A file is read into as much memory as it is long."""
    weight = torch.ones(24, 2**20)
    for name, state in (("small", tensors(0)), ("big", {"w": weight, "tied": weight})):
        if form == "safetensors":
            save_tensors(tmp_path / name, state, config=CONFIG)
        else:
            (tmp_path / name).mkdir()
            file = tmp_path / name / "pytorch_model.bin"
            torch.save(state, file, _use_new_zipfile_serialization=form == "zip")
    command = [sys.executable, "-c", PEAK, tmp_path / "small", tmp_path / "big"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    size = max(p.stat().st_size for p in (tmp_path / "big").iterdir())
    assert 0.5 * size < int(done.stdout) < 1.5 * size
