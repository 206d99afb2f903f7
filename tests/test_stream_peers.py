"""Several processes share an encoding: the same bytes as one, and none waits for the dead."""

import os
import random
import subprocess
import sys
import time

import pytest
import stream_runs
from stream_runs import FakeEncoder, run

from bert_fast.encode import peers
from bert_fast.encode.peers import Peers, ranks


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(peers, "_BEAT", 0.05)
    monkeypatch.setattr(peers, "_POLL", 0.02)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"text {i}\n" for i in range(50)))
    return path


def start(rank, world, action):
    """Fork a process of the group; it ends with 0, or 1 after an error, which it writes down."""
    child = os.fork()
    if child:
        return child
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    try:
        action(rank)
    except BaseException as error:
        with open(f"../error-{rank}", "w") as file:
            file.write(f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)


def end(children):
    """Wait for all; return their exit statuses."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.fixture
def expected(tmp_path, source):
    path = tmp_path / "expected.npy"
    run(source, path, chunk=4)
    return path.read_bytes()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    path = tmp_path / "out"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


@pytest.mark.parametrize("world", [2, 3, 20])
def test_the_bytes_of_one_process(world, source, expected, folder):
    """Also of more processes than there are chunks (13)."""
    target = folder / "v.npy"

    def action(rank):
        encoder = FakeEncoder()
        done = run(source, target, chunk=4, encoder=encoder)
        assert len(encoder.calls) == len(range(rank, 13, world))
        assert done.rows == 50 and target.exists()

    assert end([start(rank, world, action) for rank in range(world)]) == [0] * world
    assert target.read_bytes() == expected
    assert os.listdir(folder) == ["v.npy"]


def test_late_ones(source, expected, folder):
    """The last to come finds its share undone, and the output not yet there; or nothing to do."""
    target = folder / "v.npy"
    for late in (0, 1):

        def action(rank, late=late):
            time.sleep(1.0 * (rank == late))
            run(source, target, chunk=4, overwrite=True)

        assert end([start(rank, 2, action) for rank in range(2)]) == [0, 0]
        assert target.read_bytes() == expected and os.listdir(folder) == ["v.npy"]


@pytest.mark.parametrize("world", [1, 3])
def test_killed_and_started_with_another_number(world, source, expected, folder):
    target = folder / "v.npy"

    def slow(rank):
        run(source, target, chunk=4, delay=0.1)

    children = [start(rank, 2, slow) for rank in range(2)]
    time.sleep(0.4)
    for child in children:
        os.kill(child, 9)
    assert end(children) == [-9, -9] and not target.exists()
    assert any(name.startswith("part-") for name in os.listdir(folder / "v.npy.parts"))

    def again(rank):
        done = run(source, target, chunk=4)
        assert done.encoded < 50

    assert end([start(rank, world, again) for rank in range(world)]) == [0] * world
    assert target.read_bytes() == expected and os.listdir(folder) == ["v.npy"]


@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_any_change_of_the_disk(count, source, expected, folder):
    """One of two dies at a change, the other notices or is killed; then both start again."""
    target, rng = folder / "v.npy", random.Random(count)

    for i in range(count):
        moment, victim = rng.randrange(45), i % 2

        def action(rank, moment=moment, victim=victim):
            if rank == victim:
                stream_runs.die_at(moment)
            # longer than a process that is alive may wait for a busy processor
            run(source, target, chunk=4, patience=2.0, overwrite=True)

        first = end([start(rank, 2, action) for rank in range(2)])
        assert first[victim] in (0, -9) and first[1 - victim] in (0, 1), first

        def again(rank):
            run(source, target, chunk=4, overwrite=True)

        assert end([start(rank, 2, again) for rank in range(2)]) == [0, 0], (moment, victim)
        assert target.read_bytes() == expected and os.listdir(folder) == ["v.npy"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_is_noticed(victim, source, folder):
    target = folder / "v.npy"

    def action(rank):
        run(source, target, chunk=4, delay=0.1, patience=0.5)

    started = time.monotonic()
    children = [start(rank, 2, action) for rank in range(2)]
    time.sleep(0.5)
    os.kill(children[victim], 9)
    ended = end(children)
    assert ended[victim] == -9 and ended[1 - victim] == 1
    assert time.monotonic() - started < 10 and not target.exists()
    said = open(folder.parent / f"error-{1 - victim}").read()
    assert said.startswith(f"RuntimeError: process {victim} of 2: no sign of life for ")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_failure_is_passed_on(victim, source, folder):
    """Its reason too, without waiting."""

    class Failing(FakeEncoder):
        def encode(self, texts, **options):
            time.sleep(0.1)
            if len(self.calls) == 3:
                raise ValueError("no more memory")
            return super().encode(texts, **options)

    def action(rank):
        encoder = Failing() if rank == victim else FakeEncoder(0.02)
        run(source, folder / "v.npy", chunk=4, encoder=encoder)

    started = time.monotonic()
    assert end([start(rank, 2, action) for rank in range(2)]) == [1, 1]
    assert time.monotonic() - started < 20
    said = open(folder.parent / f"error-{1 - victim}").read()
    assert said == f"RuntimeError: process {victim} of 2 failed ValueError: no more memory"


def test_a_pipe_cannot_be_shared(source, folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="want a file, which 2 processes can read, got a pipe"):
        run("-", folder / "v.npy")


def test_ranks():
    assert ranks({}) == (0, 1) == ranks({"RANK": "0", "WORLD_SIZE": "1"})
    assert ranks({"RANK": "3", "WORLD_SIZE": "4"}) == (3, 4)
    for wrong in ({"RANK": "1"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "x"}):
        with pytest.raises(ValueError, match="RANK, WORLD_SIZE: want numbers, the first below"):
            ranks(wrong)


def test_what_an_earlier_run_left_is_no_sign_of_life(tmp_path):
    (tmp_path / "process-1").write_text("abc 17 ready")
    with Peers(tmp_path, 0, 2, patience=0.03) as group:
        assert not group.are_ready()
        with pytest.raises(RuntimeError, match=r"process 1 of 2: no sign of life for 0 seconds"):
            group.wait(group.are_ready, [1])


def test_under_torchrun(source, expected, folder):
    """The launcher itself, with its environment."""
    worker = folder / "worker.py"
    worker.write_text(
        "import sys\n"
        f"sys.path.insert(0, {os.path.dirname(stream_runs.__file__)!r})\n"
        "from stream_runs import run\n"
        f"run({str(source)!r}, {str(folder / 'v.npy')!r}, chunk=4)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(worker)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (folder / "v.npy").read_bytes() == expected
