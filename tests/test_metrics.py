"""Records of a run: what an interval's sums give, the file after kills, the live line."""

import io
import json
import math
import sys
import types

import pytest
import torch

from bert_fast import BertConfig
from bert_fast.train.flops import training_flops
from bert_fast.train.live import Live, format_record
from bert_fast.train.metrics import METRICS, Log, Meter, peak_memory, read_records
from bert_fast.train.step import Figures

CONFIG = BertConfig.named("tiny", vocab_size=1000)
STEP = Figures(
    step=0,
    mlm=60.0,
    nsp=6.0,
    mlm_correct=4.0,
    nsp_correct=7.0,
    labels=10,
    pairs=8,
    tokens=100,
    squares=1300,
    grad_norm=2.5,
    skipped=0,
    in_a_row=0,
)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


# --- the meter -----------------------------------------------------------------------------------


def test_an_interval_is_summed_before_it_is_divided():
    """Steps of 10 and 30 labels: the mean is that of 40 labels, not of the two means."""
    clock = Clock()
    meter = Meter(CONFIG, steps=10, peak=1e9, clock=clock)
    meter.add(STEP)
    more = {"labels": 30, "tokens": 300, "squares": 9100}
    meter.add(STEP._replace(step=1, mlm=30.0, grad_norm=1.5, **more))
    with meter.waiting():
        clock.now += 0.5
    with meter.paused():
        clock.now += 100
    clock.now += 1.5
    got = meter.record(epoch=3, lr=1e-4, memory=5, scale=None)
    flops = training_flops(CONFIG, 400, 10400, 40)
    assert got == {
        "kind": "train",
        "step": 2,
        "epoch": 3,
        "lr": 1e-4,
        "loss": pytest.approx(90 / 40 + 12 / 16),
        "mlm_loss": pytest.approx(90 / 40),
        "nsp_loss": pytest.approx(12 / 16),
        "mlm_accuracy": 8 / 40,
        "nsp_accuracy": 14 / 16,
        "grad_norm": 1.5,
        "tokens": 400,
        "sequences": 16,
        "labels": 40,
        "seconds": pytest.approx(2),
        "tokens_per_second": pytest.approx(200),
        "sequences_per_second": pytest.approx(8),
        "mfu": pytest.approx(flops / 2 / 1e9),
        "data_wait": pytest.approx(0.5),
        "memory": 5,
        "scale": None,
        "skipped": 0,
        "tokens_total": 400,
        "left": pytest.approx(8),
    }


def test_intervals_are_apart():
    clock = Clock()
    meter = Meter(CONFIG, steps=100, step=50, tokens=7000, clock=clock)
    for number, seconds in ((50, 4), (51, 2)):
        meter.add(STEP._replace(step=number))
        with meter.waiting():
            clock.now += seconds
        got = meter.record(epoch=0, lr=0.0)
    assert got["tokens"] == 100 and got["tokens_total"] == 7200 and got["step"] == 52
    assert got["seconds"] == got["data_wait"] == 2 and got["mfu"] is None
    assert got["left"] == 48 * 3  # the mean of both intervals


def test_accuracy_is_of_the_steps_that_counted():
    meter = Meter(CONFIG, steps=10)
    meter.add(STEP._replace(mlm_correct=math.nan, labels=90))
    assert meter.record(epoch=0, lr=0.0)["mlm_accuracy"] is None
    meter.add(STEP._replace(mlm_correct=math.nan, labels=90))
    meter.add(STEP)
    assert meter.record(epoch=0, lr=0.0)["mlm_accuracy"] == 4 / 10


def test_an_interval_without_steps_has_a_record():
    got = Meter(CONFIG, steps=10).record(epoch=0, lr=0.0)
    assert got["tokens"] == got["loss"] == 0 and got["grad_norm"] is None


def test_peak_memory_is_that_of_the_process():
    assert 1e7 < peak_memory(torch.device("cpu")) < 1e13


# --- the file ------------------------------------------------------------------------------------


def train(step, **fields):
    meter = Meter(CONFIG, steps=100, step=step - 1)
    meter.add(STEP._replace(step=step - 1))
    return meter.record(epoch=0, lr=1e-4) | fields


def steps_in(directory):
    return [record["step"] for record in read_records(directory / METRICS)]


def write(directory, numbers, **options):
    with Log(directory, steps=100, shown=False, **options) as log:
        for number in numbers:
            log.write(train(number))


def test_a_record_is_there_at_once(tmp_path):
    with Log(tmp_path, steps=100, shown=False) as log:
        log.write({"kind": "start", "step": 0, "versions": {"torch": "2"}})
        log.write(train(10))
        first, second = read_records(tmp_path / METRICS)
    assert first == {"kind": "start", "step": 0, "versions": {"torch": "2"}}
    assert second == {**train(10), "seconds": second["seconds"]} | {
        name: second[name] for name in ("tokens_per_second", "sequences_per_second", "left")
    }


def test_numbers_that_are_not_finite_are_null(tmp_path):
    with Log(tmp_path, steps=100, shown=False) as log:
        log.write(train(1, loss=math.nan, grad_norm=math.inf, memory=[-math.inf, 1.0]))

    def refuse(text):
        raise AssertionError(text)

    got = json.loads((tmp_path / METRICS).read_text(), parse_constant=refuse)
    assert got["loss"] is None and got["grad_norm"] is None and got["memory"] == [None, 1.0]


def test_a_resumed_run_drops_the_records_of_later_steps(tmp_path):
    write(tmp_path, [10, 20, 30])
    with open(tmp_path / METRICS, "ab") as file:
        file.write(b'{"kind": "train", "step": 40, "lo')  # a kill
    write(tmp_path, [25, 35], step=20)
    assert steps_in(tmp_path) == [10, 20, 25, 35]
    assert [*tmp_path.iterdir()] == [tmp_path / METRICS]


def test_half_a_line_is_dropped_even_if_nothing_else_is(tmp_path):
    write(tmp_path, [10])
    with open(tmp_path / METRICS, "ab") as file:
        file.write(b'{"kind": "train", "step": 20')
    assert steps_in(tmp_path) == [10]
    write(tmp_path, [20], step=10)
    assert steps_in(tmp_path) == [10, 20]
    assert len((tmp_path / METRICS).read_bytes().splitlines()) == 2


def test_a_new_run_begins_a_new_file(tmp_path):
    write(tmp_path, [10, 20])
    write(tmp_path, [5])
    assert steps_in(tmp_path) == [5]


def test_removing_records_is_atomic(tmp_path, monkeypatch):
    write(tmp_path, [10, 20])
    before = (tmp_path / METRICS).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, [15], step=10)
    assert (tmp_path / METRICS).read_bytes() == before
    assert [*tmp_path.iterdir()] == [tmp_path / METRICS]


# --- TensorBoard ---------------------------------------------------------------------------------


def test_tensorboard_is_asked_for_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'bert-fast\[train\]'"):
        Log(tmp_path, steps=100, tensorboard=True)
    assert [*tmp_path.iterdir()] == []


def test_tensorboard_gets_the_numbers(tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, directory, purge_step):
            calls.append((directory, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def close(self):
            calls.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with Log(tmp_path, steps=100, step=20, tensorboard=True, shown=False) as log:
        log.write({"kind": "resume", "step": 20})
        log.write(train(30))
    assert calls[0] == (str(tmp_path / "tensorboard"), 21) and calls[-1] == "closed"
    assert ("train/grad_norm", 2.5, 30) in calls
    names = {call[0] for call in calls[1:-1]}
    assert "train/mfu" not in names and "train/kind" not in names  # null; a word


# --- the live line -------------------------------------------------------------------------------

RECORD = {
    **{"kind": "train", "step": 1200, "loss": 5.6, "mlm_loss": 5.0, "nsp_loss": 0.6},
    **{"mlm_accuracy": 0.25, "nsp_accuracy": 0.7, "seconds": 4.0, "tokens_per_second": 12345.6},
    **{"sequences_per_second": 140.2, "mfu": 0.416, "data_wait": 0.02, "memory": 1.2e9},
    **{"skipped": 0, "left": 3723.4},
}
LINE = (
    "step 1,200/9,000, loss 5.600 (MLM 5.000, NSP 0.600), right 25.0 %, 70.0 %, 12,346 tokens/s, "
    "140 sequences/s, MFU 41.6 %, data wait 0.5 %, 1.2 GB, 1:02:03 left"
)
HELD_OUT = {
    **{"kind": "evaluation", "step": 1200, "mlm_loss": 5.1, "nsp_loss": 0.61, "corpus": "en"},
    **{"mlm_accuracy": 0.2, "nsp_accuracy": 0.66, "unigram_entropy": 6.9},
}


def test_the_line_says_it_all():
    assert format_record(RECORD, 9000) == LINE
    little = RECORD | {"mlm_accuracy": None, "mfu": None, "memory": None, "skipped": 2}
    line = format_record(little, 9000)
    assert "right - %, 70.0 %" in line and "MFU" not in line and "GB, 2 skipped" not in line
    assert ", 2 skipped, 1:02:03 left" in line
    assert format_record(HELD_OUT, 9000) == (
        "step 1,200 held out of en: MLM 5.100, NSP 0.610 (unigrams 6.900), right 20.0 %, 66.0 %"
    )


def test_without_a_terminal_a_line_now_and_then(capsys):
    clock = Clock()
    live = Live(9000, clock=clock)
    for step in range(1, 8):  # every 6 s: at 18 and 36 s, and the last
        clock.now += 6
        live.show(RECORD | {"step": step})
    live.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("/")[0] for line in lines] == ["step 3", "step 6", "step 7"]


def test_notes_and_evaluations_come_in_their_place(capsys):
    live = Live(9000)
    live.show(RECORD)
    live.note("saved")
    live.show(HELD_OUT)
    live.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [LINE, "saved", format_record(HELD_OUT, 9000)]


def test_quiet(capsys):
    live = Live(9000, shown=False)
    live.show(RECORD)
    live.show(HELD_OUT)
    live.close()
    assert capsys.readouterr().err == ""


def test_on_a_terminal_one_line_is_rewritten(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    for name, value in (("COLUMNS", "200"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    live = Live(9000)
    for step in (1, 2, 3):
        live.show(RECORD | {"step": step})
    live.note("a [note]")
    live.close()
    text = screen.getvalue()
    assert text.count("\n") == 2 and "a [note]\n" in text  # the note, and the end
    assert text.count("\x1b[2K") >= 3 and text.rstrip("\x1b[?25h\n").endswith("1:02:03 left")
