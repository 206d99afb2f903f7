"""The peers of the benchmarks: right answers, and none ever left out of a list."""

import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed: most peers are its own")

import gate
import onnx_bert
import peer_cases
import peers
import stock_bert
import training_peers
import workload
from peer_cases import (
    CONFIG,
    CPU,
    FP32,
    LENGTHS,
    by_name,
    hidden,
    outside,
    plain_attention,
    prepared_here,
    training_answers,
)

import bert_fast

RUN_ANYWHERE = {"transformers eager", "transformers sdpa"}
COMPILED = {"transformers sdpa compile default", "transformers eager compile default"}
FORCED_ON_CPU = {"transformers sdpa flash", "transformers sdpa math"}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return peer_cases.state()


@pytest.fixture(scope="module")
def ours(state) -> bert_fast.BertForPreTraining:
    return peer_cases.ours(state)


# --- answers -------------------------------------------------------------------------------------


def test_encoder_peers_give_our_answers(state, ours):
    found = prepared_here(peers.encoder_peers(state, CONFIG, CPU, FP32, full=True))
    assert RUN_ANYWHERE | FORCED_ON_CPU <= set(found)
    found["varlen"] = peers._varlen(state, CONFIG, CPU, FP32, plain_attention)
    for kind, lengths in LENGTHS.items():
        batch = workload.batch(CONFIG, lengths, CPU, seed=3, width=17 if kind == "padded" else 0)
        assert (batch.attention_mask is None) == (kind == "full")
        want = hidden(ours, batch)
        for name, prepared in found.items():
            assert not outside(prepared.check(batch), want), (name, kind)
            assert prepared.run(batch).shape == (*batch.input_ids.shape, CONFIG.hidden_size), name


def test_a_batch_wider_than_its_longest_sequence(state, ours):
    batch = workload.batch(CONFIG, (7, 7), CPU, seed=3, width=11)
    found = peers._varlen(state, CONFIG, CPU, FP32, plain_attention).check(batch)
    assert not outside(found, hidden(ours, batch))


def test_text_peers_give_our_answers_in_the_order_of_the_texts(state, ours):
    lengths = (5, 19, 1, 8, 8, 8, 8, 30, 2)  # two texts a batch: full batches and padded ones
    texts = workload.texts(CONFIG.vocab_size, lengths, seed=4, pin=False, sample=4)
    with torch.inference_mode():
        rows = [ours.bert(ids[None]).last_hidden_state[:, 0] for ids in texts.ids.split(lengths)]
    want = torch.cat(rows)
    candidates = peers.text_peers(state, CONFIG, CPU, FP32, batch_size=2, full=True)
    found = prepared_here(candidates)
    assert set(found) == {"transformers sdpa padded", "transformers sdpa sorted"}
    found["varlen"] = peers._varlen_texts(state, CONFIG, CPU, FP32, 27, plain_attention)
    for name, prepared in found.items():
        assert not outside({"embedding": prepared.run(texts)}, {"embedding": want}), name
        sample = {"embedding": want[list(texts.sample)]}
        assert not outside(prepared.check(texts), sample), name


def test_sorted_texts_are_padded_less(state, monkeypatch):
    pad, widths = torch.nn.utils.rnn.pad_sequence, []

    def spy(*args, **kwargs) -> Tensor:
        padded = pad(*args, **kwargs)
        widths.append(padded.shape[1])
        return padded

    monkeypatch.setattr(torch.nn.utils.rnn, "pad_sequence", spy)
    texts = workload.texts(CONFIG.vocab_size, (5, 19, 1, 8, 30, 2), seed=4, pin=False)
    candidates = peers.text_peers(state, CONFIG, CPU, FP32, batch_size=2, full=False)
    by_name(candidates, "transformers sdpa padded").prepare().run(texts)
    assert widths == [19, 8, 30]
    widths.clear()
    by_name(candidates, "transformers sdpa sorted").prepare().run(texts)
    assert widths == [30, 8, 2]


def test_budgeted_batches_hold_every_text_once():
    assert peers.budgeted((3, 4, 5, 20, 1, 9, 1), 10) == [(3, 4), (5,), (20,), (1, 9), (1,)]
    assert peers.budgeted((30,), 10) == [(30,)]


def test_training_peers_give_our_loss_and_gradients(state, ours):
    candidates = training_peers.pretraining_peers(state, CONFIG, CPU, FP32, full=True)
    found = prepared_here(candidates)
    assert set(found) == RUN_ANYWHERE | FORCED_ON_CPU
    found["varlen"] = training_peers._varlen(state, CONFIG, CPU, FP32, plain_attention)
    for kind, lengths in LENGTHS.items():
        lengths = tuple(n + 1 for n in lengths)  # a label stands at the second token
        batch = workload.pretraining_batch(CONFIG, lengths, CPU, seed=5)
        want = training_answers(ours, batch)
        for name, prepared in found.items():
            assert not outside(prepared.check(batch), want), (name, kind)


def test_a_training_step_trains_with_dropout_and_leaves_no_gradient(state):
    batch = workload.pretraining_batch(CONFIG, (8, 14), CPU, seed=5)
    found = prepared_here(training_peers.pretraining_peers(state, CONFIG, CPU, FP32, full=True))
    found["varlen"] = training_peers._varlen(state, CONFIG, CPU, FP32, plain_attention)
    with pytest.raises(RuntimeError, match="No available kernel"):  # on a CPU it has no dropout
        found.pop("transformers sdpa flash").run(batch)
    for name, prepared in found.items():
        assert prepared.changes_state, name
        before = prepared.check(batch)["loss"]
        losses = [prepared.run(batch) for _ in range(4)]
        assert all(not loss.requires_grad for loss in losses), name
        assert (losses[0] - before).abs() > 1e-3, f"{name}: no dropout"
        after = prepared.check(batch)
        assert after["loss"] < before - 0.05, name
        again = prepared.check(batch)  # the first would hold what a step leaves behind
        assert all(torch.equal(again[key], t) for key, t in after.items()), name


def test_autocast_keeps_weights_in_fp32_and_differs_from_fp32(state):
    batch = workload.pretraining_batch(CONFIG, (8, 14), CPU, seed=5)
    exact = training_peers.baseline_pretraining(state, CONFIG, CPU, FP32)[1](batch)
    for name, prepared in {
        "sdpa": training_peers._stock(state, CONFIG, CPU, torch.bfloat16, "sdpa"),
        "varlen": training_peers._varlen(state, CONFIG, CPU, torch.bfloat16, plain_attention),
    }.items():
        found = prepared.check(batch)
        assert prepared.notes["weights"] == "fp32" and prepared.notes["autocast"] == "bf16", name
        for key, t in exact.items():
            assert found[key].dtype == FP32, (name, key)
            error = (found[key] - t).norm() / t.norm()
            assert 1e-7 < error < 0.05, (name, key, error)


@pytest.mark.parametrize("hide", [False, True])
def test_baselines_give_our_answers(state, ours, hide, monkeypatch):
    if hide:
        monkeypatch.setitem(sys.modules, "transformers", None)
    want_name = "reference_model" if hide else "transformers eager"
    batch = workload.batch(CONFIG, LENGTHS["padded"], CPU, seed=3)
    name, call = peers.baseline_encoder(state, CONFIG, CPU, FP32)
    assert name == want_name and not outside(call(batch), hidden(ours, batch))
    training = workload.pretraining_batch(CONFIG, (9, 5, 17), CPU, seed=5)
    name, call = training_peers.baseline_pretraining(state, CONFIG, CPU, FP32)
    want = training_answers(ours, training)
    assert name == want_name and not outside(call(training), want)
    assert not outside(call(training), want), "a second call"


# --- nobody is left out --------------------------------------------------------------------------


@pytest.mark.parametrize("hidden_package", [None, "transformers", "onnxruntime"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_peer_is_in_the_list_on_every_machine(state, device, hidden_package, monkeypatch):
    if hidden_package:
        monkeypatch.setitem(sys.modules, hidden_package, None)
    what = state, CONFIG, torch.device(device), torch.bfloat16
    modes = {
        f"transformers {attention} compile {mode}"
        for attention in ("eager", "sdpa")
        for mode in ("default", "reduce-overhead", "max-autotune")
    }
    backends = {f"transformers sdpa {name}" for name in ("flash", "cudnn", "efficient", "math")}
    varlen = {"varlen_attn", "varlen_attn compile"}
    names = [c.name for c in peers.encoder_peers(*what, full=True)]
    assert set(names) == RUN_ANYWHERE | backends | modes | varlen | {
        "nn.TransformerEncoder",
        "onnxruntime",
        "onnxruntime plain",
    }
    assert len(names) == len(set(names))
    few = [c.name for c in peers.encoder_peers(*what, full=False)]
    assert few == ["transformers sdpa", "varlen_attn"]
    texts = ["transformers sdpa padded", "transformers sdpa sorted", "varlen_attn"]
    assert [c.name for c in peers.text_peers(*what, full=False)] == texts
    texts.append("transformers sdpa compile default sorted")
    assert [c.name for c in peers.text_peers(*what, full=True)] == texts
    training = [c.name for c in training_peers.pretraining_peers(*what, full=True)]
    assert set(training) == RUN_ANYWHERE | backends | modes | {"flash varlen"}
    assert len(training) == len(set(training)) and training[-1].endswith("max-autotune")
    few = [c.name for c in training_peers.pretraining_peers(*what, full=False)]
    assert few == ["transformers sdpa", "flash varlen"]


@pytest.mark.parametrize(
    ("package", "names"),
    [
        ("transformers", {"transformers eager", "onnxruntime", "onnxruntime plain"}),
        ("onnxruntime", {"onnxruntime", "onnxruntime plain"}),
    ],
)
def test_a_package_that_is_not_installed_is_named(state, package, names, monkeypatch):
    if package == "transformers":
        pytest.importorskip("onnxruntime.transformers.optimizer")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delenv(onnx_bert.FOLDER, raising=False)  # files that are there need no package
    candidates = peers.encoder_peers(state, CONFIG, CPU, FP32, full=True)
    for name in names:
        with pytest.raises(gate.AbsentError, match=f"{package} is not installed"):
            by_name(candidates, name).prepare()


def test_a_package_that_is_broken_is_not_called_absent(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import module_that_nobody_has", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="module_that_nobody_has"):
        stock_bert.need("broken_package")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("transformers sdpa cudnn", "CUDA"),
        ("transformers sdpa efficient", "CUDA"),
        ("transformers sdpa compile reduce-overhead", "CUDA graphs"),
        ("transformers eager compile max-autotune", "CUDA graphs"),
        ("varlen_attn", "CUDA and 16 bits"),
        ("varlen_attn compile", "CUDA and 16 bits"),
    ],
)
def test_what_needs_a_gpu_says_so_on_a_cpu(state, name, why):
    candidates = peers.encoder_peers(state, CONFIG, CPU, FP32, full=True)
    with pytest.raises(gate.AbsentError, match=why):
        by_name(candidates, name).prepare()


def test_a_gpu_in_fp32_has_no_varlen_peer_and_onnxruntime_is_of_the_cpu(state):
    gpu = torch.device("cuda")
    candidates = peers.encoder_peers(state, CONFIG, gpu, FP32, full=True)
    with pytest.raises(gate.AbsentError, match="16 bits"):
        by_name(candidates, "varlen_attn").prepare()
    for name in ("onnxruntime", "onnxruntime plain"):
        with pytest.raises(gate.AbsentError, match="CPU in fp32"):
            by_name(candidates, name).prepare()
    training = training_peers.pretraining_peers(state, CONFIG, gpu, FP32, full=True)
    with pytest.raises(gate.AbsentError, match="16 bits"):
        by_name(training, "flash varlen").prepare()


# --- compiled, and ONNX --------------------------------------------------------------------------


def test_each_compiled_function_has_its_own_code(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: seen.append((f, kwargs)) or f)

    def made(n: int):
        def add(x: int, y: int = 2) -> int:
            return x + y + n

        return add

    one, other = (stock_bert.compiled(made(n), "default", True, CPU) for n in (10, 20))
    assert (one(1), other(1)) == (13, 23)
    assert one.__code__ is not other.__code__ and made(1).__code__ is made(2).__code__
    assert [kwargs for _, kwargs in seen] == [{"mode": "default", "dynamic": True}] * 2


def test_a_compiled_encoder_gives_our_answers(state, ours):
    candidates = peers.encoder_peers(state, CONFIG, CPU, FP32, full=True)
    prepared = by_name(candidates, "transformers sdpa compile default").prepare()
    batch = workload.batch(CONFIG, LENGTHS["padded"], CPU, seed=3)
    assert not outside(prepared.check(batch), hidden(ours, batch))


@pytest.mark.long
def test_all_compiled_peers_give_our_answers_side_by_side(state, ours):
    candidates = peers.encoder_peers(state, CONFIG, CPU, FP32, full=True)
    found = {name: by_name(candidates, name).prepare() for name in COMPILED}
    found["varlen"] = peers._varlen(state, CONFIG, CPU, FP32, plain_attention)
    stats = torch._dynamo.utils.counters["stats"]
    for turn in range(2):
        before = stats["unique_graphs"]
        for lengths in LENGTHS.values():
            batch = workload.batch(CONFIG, lengths, CPU, seed=3)
            for name, prepared in found.items():
                assert not outside(prepared.check(batch), hidden(ours, batch)), name
        assert (stats["unique_graphs"] == before) == (turn == 1), "compiled again"
    batch = workload.pretraining_batch(CONFIG, (8, 14), CPU, seed=5)
    training = training_peers.pretraining_peers(state, CONFIG, CPU, FP32, full=True)
    prepared = by_name(training, "transformers sdpa compile default").prepare()
    assert not outside(prepared.check(batch), training_answers(ours, batch))
    assert prepared.run(batch).isfinite()
    lengths = (5, 19, 1, 8, 8, 30, 2)
    texts = workload.texts(CONFIG.vocab_size, lengths, seed=4, pin=False)
    candidates = peers.text_peers(state, CONFIG, CPU, FP32, batch_size=2, full=True)
    plain, compiled = (
        by_name(candidates, f"transformers sdpa {name}sorted").prepare().check(texts)
        for name in ("", "compile default ")
    )
    assert not outside(compiled, plain)


def test_onnx_is_fused_and_honours_masks_and_other_lengths_than_it_was_exported_with(state, ours):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnx", reason="onnx is not installed")
    plain, plain_notes = onnx_bert.session(state, CONFIG, CPU, FP32, fused=False)
    call, notes = onnx_bert.session(state, CONFIG, CPU, FP32)
    assert "fused" not in plain_notes and "by the session" in plain_notes["graph"]
    layers, fused = CONFIG.num_hidden_layers, notes["fused"]
    assert fused["Attention"] == fused["BiasGelu"] == layers, fused
    assert fused["EmbedLayerNormalization"] == 1 and fused["SkipLayerNormalization"] == 2 * layers
    for lengths in ((23, 4, 1, 17), (40,), (16, 16)):
        batch = workload.batch(CONFIG, lengths, CPU, seed=7)
        found = {"hidden": batch.real(call(batch.input_ids, batch.attention_mask))}
        assert not outside(found, hidden(ours, batch)), lengths
        found = {"hidden": batch.real(plain(batch.input_ids, batch.attention_mask))}
        assert not outside(found, hidden(ours, batch)), lengths
    batch = workload.batch(CONFIG, (23, 4), CPU, seed=7)
    unmasked = {"hidden": batch.real(call(batch.input_ids, None))}
    assert outside(unmasked, hidden(ours, batch)), "the mask changes nothing"


def test_files_for_onnx_are_kept_by_weights_and_configuration(state, ours, monkeypatch, tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnx", reason="onnx is not installed")
    monkeypatch.setenv(onnx_bert.FOLDER, str(tmp_path))
    batch = workload.batch(CONFIG, (23, 4), CPU, seed=7)
    want = hidden(ours, batch)
    first = onnx_bert.session(state, CONFIG, CPU, FP32)
    with monkeypatch.context() as patch:  # a second session exports nothing
        patch.setattr(onnx_bert, "_export", None)
        again = onnx_bert.session(state, CONFIG, CPU, FP32)
    assert again[1] == first[1] and len(list(tmp_path.iterdir())) == 1
    found = {"hidden": batch.real(again[0](batch.input_ids, batch.attention_mask))}
    assert not outside(found, want)
    name = "bert.encoder.layer.1.output.dense.bias"
    other = {**state, name: state[name] * 3}
    call, _ = onnx_bert.session(other, CONFIG, CPU, FP32, fused=False)
    found = {"hidden": batch.real(call(batch.input_ids, batch.attention_mask))}
    assert outside(found, want), "the weights of before"
    files = sorted(sorted(p.name for p in folder.iterdir()) for folder in tmp_path.iterdir())
    assert [names[0] for names in files] == ["bert.onnx"] * 2
    assert [len(names) for names in files] == [1, 3], "the plain one needs no fused graph"
