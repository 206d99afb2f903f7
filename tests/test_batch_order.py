"""The order of micro-batches in steps, processes and workers; micro-batches of random ids."""

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import corpora
import numpy as np
import pytest
import torch
from batch_cases import MASK, V, batches_of, corpus, plain, rows, split

import bert_fast
from bert_fast.data import batches as module
from bert_fast.data.batches import Position, steps
from bert_fast.data.instances import pairs_of
from bert_fast.data.synthetic import SyntheticBatches
from bert_fast.train.objective import PreTrainingObjective

__all__ = ["corpus", "split"]


# --- order in steps -------------------------------------------------------------------------------


def taken(batches, count, *, start=(0, 0), micro_batches=4, **options):
    """Steps as lists of (number, micro-batch), and where each next one begins."""
    made = steps(batches, Position(*start), micro_batches, **options)
    got = [([(j, plain(b)) for j, b in s.batches], s.after) for s in islice(made, count)]
    made.close()
    return got


@pytest.mark.parametrize(
    ("workers", "micro_batches", "worlds"),
    [(0, 4, (1, 2, 4)), (0, 3, (1, 3)), (0, 1, (1,)), (2, 4, (1, 2)), (2, 1, (1,))],
)
def test_processes_and_workers_share_one_sequence(split, workers, micro_batches, worlds):
    batches = batches_of(split, sequences=9, max_length=48)
    each, count = batches.count(0), 7
    assert each % 4 and each % 3 and (each < count * micro_batches or micro_batches == 1)
    positions = [(e, n) for e in range(9) for n in range(batches.count(e))]
    for world in worlds:
        ranks = [
            taken(batches, count, micro_batches=micro_batches, rank=r, world=world, workers=workers)
            for r in range(world)
        ]
        for number, of_ranks in enumerate(zip(*ranks, strict=True)):
            whole = dict(pair for got, _ in of_ranks for pair in got)
            assert sum(len(got) for got, _ in of_ranks) == len(whole) == micro_batches
            at = number * micro_batches
            want = [plain(batches[p]) for p in positions[at : at + micro_batches]]
            assert [whole[j] for j in range(micro_batches)] == want
            assert {after for _, after in of_ranks} == {positions[at + micro_batches]}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_start_anywhere_gives_the_rest(split, workers):
    batches = batches_of(split, tokens=500)
    count, each = 14, batches.count(0)
    whole = taken(batches, count, micro_batches=3)
    afters = [after for _, after in whole]
    assert afters[-1].epoch >= 1 and any(a.epoch and 0 < a.batch < 3 for a in afters)
    for number in range(0, count - 1, 5 if workers else 1):
        start = tuple(whole[number][1])  # as it comes back from a checkpoint: no Position
        more = count - 1 - number
        assert (
            taken(batches, more, start=start, micro_batches=3, workers=workers)
            == whole[number + 1 :]
        )
    inside = taken(batches, 1, start=(0, each - 1), micro_batches=3)
    want = [plain(batches[p]) for p in ((0, each - 1), (1, 0), (1, 1))]
    assert [b for _, b in inside[0][0]] == want


def test_an_epoch_of_one_micro_batch(split):
    batches = batches_of(split, sequences=10**6)
    got = taken(batches, 2, micro_batches=2)
    assert [after for _, after in got] == [(2, 0), (4, 0)]
    want = [plain(batches[epoch, 0]) for epoch in range(4)]
    assert [b for step, _ in got for _, b in step] == want


# --- signals and dead workers ---------------------------------------------------------------------


def outcomes(folder, *cases):
    """What came of cases of batches_worker.py, in a process group of its own."""
    here = Path(__file__).parent
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(here)]))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(here / "batches_worker.py"), str(folder), *cases]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
    try:
        printed, said = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, said
    return json.loads(printed)


def test_signals_and_workers_that_die(tmp_path):
    alive = ("nothing", "SIGTERM", "SIGINT to all", "SIGTERM to all", "SIGTERM to a worker")
    killed = ("SIGKILL to a worker",)
    got = outcomes(tmp_path, *alive, *killed, "exit 1", "raise 0", "raise 2")
    for case, told in zip(alive, ([], [15], [2], [15], []), strict=True):
        want = {"steps": 12, "same": True, "told": told, "error": None, "left": 0}
        assert got[case] == want, case
    for case in killed:
        found = got[case]
        assert found["error"] and found["same"] and not found["told"], case
        assert found["steps"] < 12 and found["left"] == 0
    came, error, _, seconds = got["exit 1"]
    assert came <= 3 and error and seconds < 30
    for workers in (0, 2):
        came, error, message, _ = got[f"raise {workers}"]
        assert (came, error) == (3, "OSError") and "a file is gone" in message


def test_an_end_gives_up_what_is_being_made(split, monkeypatch):
    """Python cannot end beside a thread that computes: none is left behind steps that are closed,
    which takes no longer than a piece of its work; what was given up is made when it is wanted."""
    begun, asked = threading.Event(), []

    def never(*, gives_up, **options):
        begun.set()
        while not gives_up():
            asked.append(time.sleep(0.001))
        raise InterruptedError

    batches = batches_of(split, sequences=9)
    assert batches.count(0)
    before = threading.active_count()
    made = steps(batches, Position(0, 0), 1)
    monkeypatch.setattr(module, "pairs_of", lambda split, **options: never(**options))
    first = next(made)  # of an epoch that was there, while the next one is begun
    assert begun.wait(10) and threading.active_count() == before + 1
    made.close()
    assert threading.active_count() == before and asked
    monkeypatch.undo()
    again = batches_of(split, sequences=9)
    assert [plain(batches[e, 0]) for e in (0, 1)] == [plain(again[e, 0]) for e in (0, 1)]
    assert plain(first.batches[0][1]) == plain(again[0, 0])


def test_pairs_are_given_up_between_pieces(split):
    left = [3]

    def gives_up():
        left[0] -= 1
        return left[0] < 0

    with pytest.raises(InterruptedError):
        pairs_of(split, seed=0, epoch=0, max_length=32, gives_up=gives_up)
    assert left == [-1]


@pytest.mark.long
def test_workers_that_end_without_an_error(tmp_path):
    """Which nothing tells of but their silence: it takes seconds until it is noticed."""
    came, error, message, seconds = outcomes(tmp_path, "exit 0")["exit 0"]
    assert came <= 3 and error == "RuntimeError" and "exited unexpectedly" in message
    assert seconds < 30


# --- random ids, and the model --------------------------------------------------------------------


def synthetic(lengths, seed=0, **options):
    return SyntheticBatches(V, lengths, mlm_probability=0.15, seed=seed, **options)


def test_random_ids_have_the_lengths_in_turn():
    made = synthetic([7, 20, 11], sequences=4)
    lengths = [n for i in range(6) for n in made[0, i]["cu_seq_lens_q"].diff().tolist()]
    assert lengths == [7, 20, 11] * 8
    assert made.count(0) >= 2**31 - 1


@pytest.mark.parametrize(("lengths", "tokens"), [([16], 64), ([16], 79), ([10, 30], 80)])
def test_random_ids_keep_to_a_budget(lengths, tokens):
    made = synthetic(lengths, tokens=tokens)
    for number in range(8):
        total = made[0, number]["input_ids"].numel()
        assert tokens - max(lengths) < total <= tokens


def test_random_ids_have_labels_and_types():
    batch = synthetic([40, 64], sequences=50)[1, 3]
    ids, where = batch["input_ids"][0], batch["masked_positions"]
    assert ((ids >= 4) & (ids < V)).all() and (ids[where] == MASK).all()
    assert len(where) == round(0.15 * len(ids)) == len(batch["masked_labels"])
    assert (ids == MASK).sum() == len(where) == len(where.unique()) and (where.diff() > 0).all()
    assert ((batch["masked_labels"] > MASK) & (batch["masked_labels"] < V)).all()
    assert {*batch["next_sentence_label"].tolist()} == {0, 1}
    for _, _, types, positions in rows(batch):
        assert positions == [*range(len(types))]
        assert types == sorted(types) and 0.4 < np.mean(types) < 0.6
    assert plain(batch).keys() == plain(synthetic([40], sequences=2)[0, 0]).keys()


def test_random_ids_depend_on_seed_and_position():
    made, again = synthetic([9, 33], sequences=3), synthetic([9, 33], sequences=3)
    positions = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(plain(made[p]) == plain(again[p]) for p in positions)
    seen = {str(plain(made[p])["masked_labels"]) for p in positions}
    seen.add(str(plain(synthetic([9, 33], seed=1, sequences=3)[0, 0])["masked_labels"]))
    assert len(seen) == 5
    assert taken(made, 3, workers=2) == taken(again, 3)


@pytest.mark.parametrize("kind", ["text", "random"])
def test_a_model_takes_a_micro_batch(split, kind):
    batches = batches_of(split) if kind == "text" else synthetic([9, 33], sequences=3)
    batch = batches[0, 0]
    assert plain(batch).keys() == plain(batches_of(split)[0, 1]).keys()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = bert_fast.BertConfig(
        vocab_size=V, intermediate_size=24, max_position_embeddings=64, **sizes
    )
    model = bert_fast.BertForPreTraining(config)
    counts = torch.tensor([len(batch["masked_labels"]), len(batch["next_sentence_label"])]).float()
    loss, sums = PreTrainingObjective(model.eval())(batch, counts)
    loss.backward()
    assert abs(sums.mlm / counts[0] - np.log(V)) < 0.5
    assert abs(sums.nsp / counts[1] - np.log(2)) < 0.2


@pytest.mark.parametrize(("lengths", "tokens"), [([10, 10, 100], 100), ([100, 10], 115)])
def test_random_ids_keep_to_a_budget_whatever_the_turn(lengths, tokens):
    made = SyntheticBatches(1000, lengths, mlm_probability=0.15, seed=0, tokens=tokens)
    totals = [made[0, number]["input_ids"].numel() for number in range(9)]
    assert max(totals) <= tokens < max(totals) + max(lengths), totals


def test_micro_batches_travel_to_a_worker_that_is_not_forked():
    split = corpora.in_memory(corpora.numbered([[4, 4], [4, 4]]))
    batches = batches_of(split)
    batches.count(0)
    assert pickle.loads(pickle.dumps(batches)).count(0) == batches_of(split).count(0)
