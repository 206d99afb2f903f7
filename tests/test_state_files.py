"""A checkpoint that is damaged, mixed or hostile is refused, and the one before it is taken."""

import json
import os
import pickle
import random
import shutil
import sys

import pytest
from checkpoint_cases import CONFIG, contents, names, same, sealed, state, tokenizer
from stream_runs import in_child

from bert_fast.train.checkpoints import MANIFEST, OPTIMIZER, STATE, Checkpoints, load

TOKENIZER = tokenizer()
REFUSALS = ValueError, FileNotFoundError
DIFFERING = ["model.safetensors", OPTIMIZER, STATE, "bert_fast.json", MANIFEST]


def save(directory, step, mark=None):
    return Checkpoints(directory).save(state(step, mark), config=CONFIG, tokenizer=TOKENIZER)


def passed_over(directory):
    """What is said of the newer of two checkpoints; the older one must be taken."""
    notes = []
    found = Checkpoints(directory).newest(notes.append)
    assert found.path.name == "step-00000010" and same(found.state, state(10))
    assert len(notes) == 1
    return notes[0]


@pytest.fixture
def pair(tmp_path):
    """A directory with two checkpoints, and the newer one."""
    save(tmp_path, 10)
    return tmp_path, save(tmp_path, 20)


# --- damage --------------------------------------------------------------------------------------


def test_the_names_are_complete(pair):
    files = json.loads((pair[1] / MANIFEST).read_text())["files"]
    assert files.keys() == {*names(pair[1])} - {MANIFEST}
    assert {*DIFFERING, "config.json", "tokenizer.json", "vocab.txt"} <= {*files, MANIFEST}


@pytest.mark.parametrize("count", [100, pytest.param(5000, marks=pytest.mark.long)])
def test_flipped_bits(pair, count):
    """One bit anywhere, the manifest too: refused by the name of the file."""
    folder, path = pair
    chance, files = random.Random(0), names(path)
    for i in range(count):
        file = path / files[i % len(files)]
        before = file.read_bytes()
        raw = bytearray(before)
        bit = chance.randrange(8 * len(raw))
        raw[bit // 8] ^= 1 << bit % 8
        file.write_bytes(raw)
        with pytest.raises(REFUSALS) as error:
            load(path)
        if file.name != MANIFEST:  # a name in it may have changed
            assert str(file) in str(error.value), (file.name, bit)
        if i < len(files):
            assert str(error.value) == passed_over(folder)
        file.write_bytes(before)
    assert same(load(path).state, state(20))


@pytest.mark.parametrize("stride", [61, pytest.param(1, marks=pytest.mark.long)])
def test_every_bit_of_the_manifest(pair, stride):
    path = pair[1] / MANIFEST
    before = path.read_bytes()
    for place in range(0, len(before) * 8, stride):
        raw = bytearray(before)
        raw[place // 8] ^= 1 << place % 8
        path.write_bytes(raw)
        with pytest.raises(REFUSALS):
            load(pair[1])


@pytest.mark.parametrize("count", [100, pytest.param(500, marks=pytest.mark.long)])
def test_truncation(pair, count):
    folder, path = pair
    chance, files = random.Random(0), names(path)
    for i in range(count):
        file = path / files[i % len(files)]
        before = file.read_bytes()
        file.write_bytes(before[: chance.randrange(len(before))])
        with pytest.raises(ValueError) as error:
            load(path)
        assert str(file) in str(error.value)
        if i < len(files):
            assert str(error.value) == passed_over(folder)
        file.write_bytes(before)


@pytest.mark.parametrize("name", DIFFERING)
def test_a_file_of_another_checkpoint(pair, name):
    """Of another step, and of the same step of another run."""
    folder, path = pair
    before = (path / name).read_bytes()
    other = save(folder / "other", 20, mark=21)
    for source in (folder / "step-00000010", other):
        shutil.copy(source / name, path)
        note = passed_over(folder)
        assert str(path) in note and "want" in note and "got" in note
    (path / name).write_bytes(before)
    assert same(load(path).state, state(20))


def test_a_file_that_is_missing(pair):
    folder, path = pair
    for name in names(path):
        before = (path / name).read_bytes()
        (path / name).unlink()
        assert str(path / name) in passed_over(folder)
        (path / name).write_bytes(before)


def test_a_checkpoint_under_another_name(pair):
    folder, path = pair
    path.rename(folder / "step-00000099")
    assert "want a name with its step 20, got step-00000099" in passed_over(folder)
    assert load(folder / "step-00000099").state.step == 20  # where somebody asks for it


def test_nothing_valid_is_left(pair):
    folder, _ = pair
    for name in names(folder):
        (folder / name / STATE).write_text("{}")
    notes = []
    assert Checkpoints(folder).newest(notes.append) is None
    assert len(notes) == 2


# --- files made to harm --------------------------------------------------------------------------


def put(**entries):
    """Replace entries of state.json; None takes one away."""

    def change(path, outside):
        values = json.loads((path / STATE).read_text()) | entries
        (path / STATE).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    return change


def write(name, raw):
    return lambda path, outside: (path / name).write_bytes(raw)


def listed(name):
    """The manifest lists a file that lies elsewhere, with its right size and sum."""

    def change(path, outside):
        manifest = json.loads((path / MANIFEST).read_text())
        manifest["files"][name.format(outside=outside)] = manifest["files"][STATE]
        shutil.copy(path / STATE, outside / "state.json")
        shutil.copy(path / STATE, path.parent / "state.json")
        (path / MANIFEST).write_text(json.dumps(manifest))

    return change


def linked(name):
    """A file is a link to the same bytes elsewhere."""

    def change(path, outside):
        (path / name).rename(outside / name)
        (path / name).symlink_to(outside / name)

    return change


def without(name):
    """The manifest does not list it."""

    def change(path, outside):
        manifest = json.loads((path / MANIFEST).read_text())
        del manifest["files"][name]
        (path / MANIFEST).write_text(json.dumps(manifest))

    return change


def manifest(**entries):
    def change(path, outside):
        sealed(path, **entries)

    return change


class Runs:
    """Pickles as a command."""

    def __reduce__(self):
        return os.system, ("touch canary",)


PICKLE = pickle.dumps(Runs())
HOSTILE = {
    "pickled moments": (write(OPTIMIZER, PICKLE), OPTIMIZER),
    "pickled weights": (write("model.safetensors", PICKLE), "model.safetensors"),
    "pickled state": (write(STATE, PICKLE), STATE),
    "deep": (write(STATE, b'{"step":' * 100_000), STATE),
    "a key twice": (write(STATE, b'{"step": 1, "step": 2}'), STATE),
    "a list": (write(STATE, b"[]"), STATE),
    "NaN": (put(facts={"a": float("nan")}), STATE),
    "no step": (put(step=None), STATE),
    "another step": (put(step=21), "step: want 20, got 21"),
    "a step that is true": (put(step=True), "step: want an int"),
    "a negative position": (put(position={"batch": -1}), "position: want ints"),
    "a position of text": (put(position={"batch": "1"}), "position: want ints"),
    "facts of text": (put(facts="seed"), "facts: want an object"),
    "an entry more": (put(weights=1), "got"),
    "header of a terabyte": (write(OPTIMIZER, b"\0\0\0\0\0\1\0\0{}"), OPTIMIZER),
    "no configuration": (write("config.json", b"{}"), "fingerprint"),
    "parent": (listed("../state.json"), "bare file name"),
    "absolute": (listed("{outside}/state.json"), "bare file name"),
    "inner": (listed("a/../state.json"), "bare file name"),
    "nul": (listed("state\0.json"), "bare file name"),
    "link of moments": (linked(OPTIMIZER), "got a link"),
    "link of state": (linked(STATE), "got a link"),
    "link of weights": (linked("model.safetensors"), "got a link"),
    "link of the manifest": (linked(MANIFEST), "got a link"),
    "link of the configuration": (linked("config.json"), "got a link"),
    "unlisted moments": (without(OPTIMIZER), "files: want"),
    "unlisted state": (without(STATE), "files: want"),
    "unlisted weights": (without("model.safetensors"), "files: want"),
    "unlisted configuration": (without("config.json"), "files: want"),
    "format": (manifest(format="another"), "format: want"),
    "version": (manifest(version=2), "version: want 1, got 2"),
    "files of text": (manifest(files="all"), "files: want"),
    "sums of text": (manifest(files=dict.fromkeys([*DIFFERING, "config.json"], "1")), "got"),
    "fingerprint": (manifest(config_fingerprint="0"), "config_fingerprint"),
    "entry": (manifest(more=1), MANIFEST),
}
KINDS = ("open", "exec", "subprocess", "os.system", "socket", "pickle.find_class", "import")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_checkpoints(tmp_path, name):
    """All sums are right; nothing runs, nothing outside is opened, the one before is taken."""
    home, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    save(home, 10)
    path = save(home, 20)
    change, fragment = HOSTILE[name]
    change(path, outside)
    if not fragment.startswith(("files", "format", "version", "config_f", "bare", MANIFEST)):
        if name not in ("sums of text", "link of the manifest"):
            sealed(path)

    def watched():
        seen = []

        def hook(event, args):
            if event == "open" and isinstance(args[0], str):
                if not os.path.realpath(args[0]).startswith(str(home)):
                    seen.append(args)
            elif event != "open" and event.startswith(KINDS):
                seen.append((event, args))

        os.chdir(tmp_path)
        sys.addaudithook(hook)
        note = passed_over(home)
        assert str(path) in note and fragment in note and len(note) < 2000, note
        assert not seen, seen

    assert in_child(watched) == 0
    assert not (tmp_path / "canary").exists()


def test_the_hook_sees_what_a_pickle_does(tmp_path):
    """Else the test above would show nothing."""

    def watched():
        seen = []
        sys.addaudithook(lambda event, args: seen.append(event))
        os.chdir(tmp_path)
        pickle.loads(PICKLE)
        os._exit(7 if {"os.system", "pickle.find_class"} <= {*seen} else 1)

    assert in_child(watched) == 7
    assert (tmp_path / "canary").exists()


def test_a_link_in_place_of_a_checkpoint(pair):
    folder, path = pair
    outside = folder.parent / f"{folder.name}_outside"
    path.rename(outside)
    path.symlink_to(outside)
    assert "want a directory, got a link" in passed_over(folder)
    before = contents(outside)
    save(folder, 30)
    Checkpoints(folder, keep=1).save(state(40), config=CONFIG, tokenizer=TOKENIZER)
    assert contents(outside) == before and path.is_symlink()
    shutil.rmtree(outside)
