"""Saves that are killed, or whose disk is full or broken, at every moment: nothing is lost."""

import ctypes
import errno
import os
import random
import resource
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import transformers
from checkpoint_cases import CONFIG, Disk, contents, names, same, state, tokenizer
from stream_runs import in_child

from bert_fast.train import checkpoints
from bert_fast.train.checkpoints import Checkpoints, load

TOKENIZER = tokenizer()


def save(directory, step, mark=None, keep=2):
    return Checkpoints(directory, keep).save(state(step, mark), config=CONFIG, tokenizer=TOKENIZER)


def newest(directory):
    """The newest checkpoint: (step, mark); each that is there must be whole."""
    refused = []
    found = Checkpoints(directory).newest(refused.append)
    for path in Path(directory).glob("step-*"):
        whole(load(path))
    if found is None:
        return None
    assert not refused  # a kill leaves nothing that must be refused
    return whole(found)


def whole(found):
    """(step, mark) of a checkpoint whose tensors are all of one save."""
    step, mark = found.state.step, found.state.facts["mark"]
    assert same(found.state, state(step, mark))
    return step, mark


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """A folder in memory, where fsync does nothing: what a dead process wrote, the system has."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def first(directory):
    """Nothing there; saved is 10."""
    return 10, None


def one_too_many(directory):
    """Two are there, and the older one must go."""
    save(directory, 10)
    save(directory, 20)
    return 30, None


def same_step(directory):
    """Made again, after going back, say; the other may not be lost meanwhile."""
    save(directory, 10)
    save(directory, 20)
    return 20, 21


def left_over(directory):
    """A killed save and one that stepped aside are there."""
    save(directory, 10)
    save(directory, 20)
    save(directory, 30, keep=3)
    (directory / "step-00000010").rename(directory / ".step-00000010.0123456789abcdef.tmp")
    (directory / "step-00000030").rename(directory / "step-00000030.old")
    return 30, 31


SCENES = (first, one_too_many, same_step, left_over)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_killed_at_every_change_of_the_disk(memory, scene):
    """What is found is the checkpoint before or the new one; the next save leaves no trace."""
    base, folder = memory / "base", memory / "run"
    base.mkdir()
    step, mark = scene(base)
    mark = mark or step
    before, moment, found = newest(base), 0, []
    while True:
        shutil.copytree(base, folder)

        def killed(at=moment):
            with Disk(lambda number: os._exit(9) if number == at else None):
                save(folder, step, mark)

        ended = in_child(killed)
        assert ended in (0, 9)
        found.append(newest(folder))
        assert found[-1] in (before, (step, mark)), moment
        if ended == 0:
            break
        save(folder, step + 10)
        assert names(folder)[-1] == f"step-{step + 10:08}"
        assert len(names(folder)) <= 2, moment
        assert not [n for n in names(folder) if n.startswith(".") or n.endswith(".old")], moment
        shutil.rmtree(folder)
        moment += 1
    assert moment > 40
    assert found[0] == before and found[-1] == (step, mark)
    assert sorted(found, key=lambda f: f == (step, mark)) == found  # once it is there it stays


def save_until_killed(folder, last, again, wait):
    """A child saves on and on from the last checkpoint; it is killed a while after its first save.

    Args:
        folder: where to.
        last: (step, mark) of the newest checkpoint there.
        again: whether the first save is of that step once more.
        wait: seconds.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            (step, mark), step_by = last, not again
            while True:
                step, mark, step_by = step + step_by, mark + 1, True
                save(folder, step, mark)
                os.write(writing, b".")
        finally:
            os._exit(1)
    os.close(writing)
    saved = os.read(reading, 1)
    time.sleep(wait)
    os.kill(child, 9)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(reading)
    assert saved and ended == -9


@pytest.mark.parametrize("kills", [100, pytest.param(500, marks=pytest.mark.long)])
def test_killed_by_the_clock(memory, kills):
    """Saves without end, killed anywhere; each run goes on from what the one before has left."""
    chance, last = random.Random(0), (1, 1)
    save(memory, 1)
    began = time.perf_counter()
    save(memory, 1)
    usual = time.perf_counter() - began
    for _ in range(kills):
        again = chance.random() < 0.3
        save_until_killed(memory, last, again, chance.uniform(0, 3 * usual))
        now = newest(memory)
        assert now >= (last[0] + (not again), last[1] + 1)
        last = now
    save(memory, last[0] + 1)
    assert len(names(memory)) == 2


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "of transformers"])
def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, theirs):
    """In the order that a power failure would need: files, their names, the name of all, its."""
    used = TOKENIZER
    if theirs:
        TOKENIZER.save_pretrained(tmp_path / "tokenizer")
        used = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    with Disk(lambda number: None) as disk:
        path = Checkpoints(tmp_path / "run").save(state(10), config=CONFIG, tokenizer=used)
    synced, renamed = set(), False
    for what, argument in disk.calls:
        if what == "fsync":
            synced.add(argument)
        elif what == "replace":
            assert str(argument[0]) in synced, argument
            synced.add(str(argument[1]))
            synced.discard(str(Path(argument[1]).parent))  # which has changed
        elif what == "rename" and str(argument[1]) == str(path):
            temporary, renamed = Path(argument[0]), True
            assert {str(temporary / name) for name in names(path)} <= synced
            assert str(temporary) in synced
            synced.clear()
    assert renamed and str(tmp_path / "run") in synced
    written = [argument for what, argument in disk.calls if what == "open"]
    assert Path(written[-1]).name.startswith(".manifest.json.")
    assert theirs or len(written) == len(names(path))


# --- a disk that fails ---------------------------------------------------------------------------


def unharmed(folder, before, step, mark):
    """After a save that failed, or that failed to clear up; the next one clears up."""
    now = contents(folder)
    new = f"step-{step:08}/"
    for name, raw in before.items():
        assert now.get(name) == raw or name.startswith(("step-00000010/", new)), name
    assert newest(folder) in ((20, 20), (step, mark))
    save(folder, step + 10)
    left = names(folder)
    assert len(left) == 2 and left[-1] == f"step-{step + 10:08}"
    assert left[0] in ("step-00000020", f"step-{step:08}")


@pytest.mark.filterwarnings("ignore:.*cannot be removed")
@pytest.mark.parametrize(
    ("scene", "number", "lasting"),
    [(same_step, errno.EIO, False), (one_too_many, errno.ENOSPC, True)],
    ids=["once", "from then on"],
)
def test_errors_at_every_change_of_the_disk(memory, scene, number, lasting):
    base, folder = memory / "base", memory / "run"
    base.mkdir()
    step, mark = scene(base)
    mark, before, moment, raised = mark or step, contents(base), 0, 0

    def fail(at):
        if at == moment or (lasting and at > moment):
            raise OSError(number, os.strerror(number))

    while True:
        shutil.copytree(base, folder)
        try:
            with Disk(fail) as disk:
                save(folder, step, mark)
        except OSError as error:
            assert error.errno == number
            raised += 1
            if not lasting and newest(folder) == (20, 20):
                assert contents(folder) == before, moment
        if len(disk.calls) <= moment:
            break
        unharmed(folder, before, step, mark)
        shutil.rmtree(folder)
        moment += 1
    assert raised > 40


@pytest.mark.parametrize("part", range(1, 21))
def test_a_file_that_cannot_grow(tmp_path, part):
    """A real limit in the middle of a write, at 20 places."""
    save(tmp_path, 10)
    before = contents(tmp_path)
    limit = max(map(len, before.values())) * part // 21
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(OSError) as error:
            save(tmp_path, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert error.value.errno == errno.EFBIG
    assert contents(tmp_path) == before


def test_a_full_file_system(tmp_path, monkeypatch):
    """A real one, of 20 sizes, in a mount namespace of a child's own."""
    monkeypatch.setattr(checkpoints, "MARGIN", 0)  # what it is for, the tokenizer, does not fit

    def mounted():
        libc = ctypes.CDLL(None, use_errno=True)
        private, namespace = 1 << 18 | 1 << 14, 0x20000
        if libc.unshare(namespace) or libc.mount(b"none", b"/", None, private, None):
            os._exit(77)
        need = sum(-(-len(raw) // 4096) * 4096 for raw in contents(save(tmp_path, 10)).values())
        full = 0
        for part in range(20):
            where = tmp_path / f"disk{part}"
            where.mkdir()
            size = f"size={need + 4096 + need * part // 20}".encode()
            if libc.mount(b"tmpfs", bytes(where), b"tmpfs", 0, size):
                os._exit(77)
            save(where, 10)
            before = contents(where)
            try:
                save(where, 20)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                assert contents(where) == before and newest(where) == (10, 10)
                full += 1
        os._exit(0 if full > 15 else 1)

    ended = in_child(mounted)
    if ended == 77:
        pytest.skip("no permission here to mount a small file system")
    assert ended == 0


def test_free_space_is_looked_at_first(tmp_path, monkeypatch):
    save(tmp_path, 10)
    before = contents(tmp_path)
    need = state(20).nbytes + checkpoints.MARGIN
    for free in (0, need):
        usage = shutil._ntuple_diskusage(10**9, 10**9 - free, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        with (
            Disk(lambda number: None) as disk,
            pytest.raises(OSError, match=r"want \d+ bytes on the disk"),
        ):
            save(tmp_path, 20)
        assert contents(tmp_path) == before and not disk.calls


def test_a_directory_that_is_read_only(monkeypatch):
    """In a child that is nobody, where the tests run as root."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        save(Path(folder), 10)
        before = contents(folder)
        os.chmod(folder, 0o555)

        def as_nobody():
            if os.geteuid() == 0:
                os.seteuid(65534)
            try:
                save(Path(folder), 20)
            except PermissionError:
                os._exit(13)

        assert in_child(as_nobody) == 13
        assert contents(folder) == before
        os.chmod(folder, 0o755)
