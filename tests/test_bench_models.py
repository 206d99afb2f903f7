"""The encoder and pre-training cases, at a rehearsal's sizes, and the figures of the full ones."""

import json
from dataclasses import replace
from functools import partial

import encoder
import harness
import memory
import pretraining
import pytest
import stages
import text_in
import torch
from bench_cases import planted
from gate import Gate, RefusedError
from record import Run
from torch.utils.flop_counter import FlopCounterMode

from bert_fast import reference
from bert_fast.accuracy import NOT_ZEROS

CPU = torch.device("cpu")
MODULES = {**dict.fromkeys(encoder.SPECS, encoder), **dict.fromkeys(pretraining.SPECS, pretraining)}


def small(name, full=False):
    return MODULES[name].case(name, CPU, small=True, full=full)


@pytest.mark.parametrize("name", MODULES)
def test_ours_is_right_and_the_case_says_what_it_is(name):
    case, (ours, *_) = small(name)
    assert ours.name == "bert_fast" and case.name == name and len(case.inputs) == 2
    said = json.loads(json.dumps(harness.describe(case), allow_nan=False))
    assert {"model", "seed", "longest", "tokens", "fill", "flops", "baseline"} <= set(said)
    prepared = ours.prepare()
    error = Gate(case).check(prepared)
    assert error["share"] <= 1 and error["baseline_name"] == "transformers eager"
    if case.facts.get("input") != "texts":
        assert prepared.notes["ops"]["unpad"] in ("csrc", "reference")


@pytest.mark.parametrize("name", MODULES)
def test_every_peer_is_there(name):
    short, full = ([c.name for c in small(name, full=f)[1]] for f in (False, True))
    if MODULES[name].SPECS[name].kind == "texts":
        assert short == full == ["bert_fast", "sentence-transformers"]
        return
    assert len(set(full)) == len(full) > len(short) >= 3
    assert set(short) <= set(full)
    assert any("sdpa" in n for n in short) and any("varlen" in n for n in short)


def slightly_off(*args):
    y, h = reference.linear_gelu(*args)
    return y * 1.001, h


def scores_not_scaled(qkv, *args):
    factors = torch.tensor([qkv.shape[3] ** 0.5, 1, 1], dtype=qkv.dtype)
    return reference.attention(qkv * factors[:, None, None], *args)


@pytest.mark.parametrize("name", ["cpu 16x128 33%", "case 3", "case 5", "case 8"])
@pytest.mark.parametrize(
    ("op", "wrong"), [("linear_gelu", slightly_off), ("attention", scores_not_scaled)]
)
def test_a_wrong_model_is_never_timed(name, op, wrong, tmp_path):
    run = Run.start(tmp_path / "run.json", "test", "test")
    case, candidates = small(name)
    with planted(op, wrong):
        harness.measure(case, candidates, run, rounds=2, least=1)
    rows = {row["candidate"]: row for row in run.data["rows"]}
    assert rows["bert_fast"]["state"] == "refused"
    assert not {"wall", "device", "rate"} & set(rows["bert_fast"])
    assert "measured" in [row["state"] for row in rows.values()]


def relu_for_gelu(x, w, b, *rest):
    h = torch.nn.functional.linear(x, w, b)
    return h.relu(), h


def off_by(share):
    """The answers of a bf16 model with noise of so much of their norm."""

    def answer(truth, batch):
        y = truth(batch)["hidden"]
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
        return {"hidden": y * (1 + share * noise)}

    return answer


@pytest.mark.parametrize("name", ["cpu 8x128 bf16", "cpu 16x128 33% bf16"])
def test_bf16_on_a_cpu_is_held_to_a_bound_of_its_own(name):
    case, (ours, *_) = small(name)
    assert case.dtype == "bf16" and small(name.removesuffix(" bf16"))[0].dtype == "fp32"
    gate = Gate(case)
    prepared = ours.prepare()
    assert prepared.check(case.inputs[0])["hidden"].dtype == torch.bfloat16
    gate.check(prepared)
    with planted("linear_gelu", relu_for_gelu), pytest.raises(RefusedError):
        gate.check(prepared)
    # a baseline as inexact as this would let twice its error pass
    bad = replace(case, baseline=partial(off_by(0.1), case.truth))
    half = replace(prepared, check=partial(off_by(0.05), case.truth))
    assert Gate(replace(bad, limit=NOT_ZEROS)).check(half)["share"] < 1
    with pytest.raises(RefusedError, match="of the norm"):
        Gate(bad).check(half)
    config = encoder.config_of("base", 128, small=False)
    assert config.num_hidden_layers == 12
    assert encoder._LIMIT_OF_A_STEP * 13**0.5 == pytest.approx(0.0169, rel=1e-2)


def test_a_case_alone_is_that_of_the_list():
    for name in ("cpu 16x128 33%", "cpu 8x128 bf16", "cpu mini 32x128"):
        module = MODULES[name]
        case, candidates = small(name, full=True)
        names = [c.name for c in candidates]
        assert set(module.CPU_PEERS) - {"sentence-transformers"} <= set(names)
        prepared, inputs = memory.alone(name, "bert_fast", small=True)
        assert torch.equal(inputs.input_ids, case.inputs[0].input_ids)
        assert Gate(case).check(prepared)["share"] <= 1


def test_rows_say_which_library_and_instructions_ran():
    from bert_fast import extension
    from bert_fast.ops import products

    loaded, why = extension.load()
    (_, (fp32, *_)), (_, (bf16, *_)) = small("cpu 8x128"), small("cpu 8x128 bf16")
    notes = fp32.prepare().notes
    assert notes["cpu_library"] == products.cpu_library() in products.LIBRARIES
    assert notes["cpu_library_ms"] == products.cpu_library_times()
    assert notes["extension"] == (why if loaded is None else loaded.cpu_capability())
    assert "cpu_library" not in bf16.prepare().notes  # in bf16 there is no choice
    _, (ours, *_) = small("cpu mini wikipedia")
    assert ours.prepare().notes["optimizer"] == "bert_fast.train.optim.LAMB"
    _, (ours, sdpa, *_) = small("cpu mini 32x128")
    assert ours.prepare().notes["optimizer"] == "bert_fast.train.optim.AdamW"
    assert sdpa.prepare().notes["optimizer"] == "torch.optim.AdamW, fused"


def test_lengths_are_those_of_the_goals():
    def lengths(name):
        return MODULES[name].SPECS[name].lengths.draw(7)

    for name, shape in (("case 3", (128, 128)), ("case 4", (128, 384)), ("cpu 2x512", (2, 512))):
        assert lengths(name) == [shape[1]] * shape[0]
    for name, n, high, fill in (
        ("cpu 16x128 33%", 16, 128, 0.33),
        ("cpu 8x512 46%", 8, 512, 0.46),
        ("case 7", 16, 512, 0.6),
    ):
        got = lengths(name)
        assert len(got) == n and max(got) == high and min(got) >= 2
        assert abs(sum(got) / (n * high) - fill) < 1e-3
        assert got != encoder.SPECS[name].lengths.draw(8)
    texts = lengths("case 5")
    assert len(texts) == 8192 and min(texts) >= 16 and max(texts) <= 512
    assert abs(sum(texts) / 8192 - 256) < 5
    assert sum(lengths("case 9")) == 32 * 254 and max(lengths("case 9")) == 512
    squad = lengths("case 6")
    assert max(squad) <= 384 and abs(sum(squad) / len(squad) - 177) < 3


def test_flops_are_those_that_are_counted():
    """Products of the padded reference on full sequences, where nothing is padding."""
    case, _ = small("case 3")
    with FlopCounterMode(display=False) as counted:
        case.truth(case.inputs[0])
    assert case.work.flops == counted.get_total_flops()


def test_flops_of_a_step_are_three_forwards():
    config = encoder.config_of("large", 128, small=False)
    lengths = (128,) * 64
    forward = 24 * (24 * 1024**2 + 4 * 128 * 1024)  # of a token
    head = 0.15 * (2 * 1024**2 + 2 * 1024 * config.vocab_size)
    assert encoder.forward_flops(config, lengths) == forward * 64 * 128
    want = 3 * (forward + head) * 64 * 128
    assert pretraining.step_flops(config, lengths) == pytest.approx(want, rel=1e-9)


def test_training_has_dropout_and_moves_the_weights():
    case, (ours, *_) = small("case 8")
    prepared = ours.prepare()
    plain = prepared.check(case.inputs[0])["loss"]
    first = prepared.run(case.inputs[0])
    assert prepared.changes_state and abs(first - plain) > 1e-4
    for _ in range(20):
        prepared.run(case.inputs[0])
    assert prepared.check(case.inputs[0])["loss"] < plain - 0.1


def test_texts_are_checked_by_a_sample_of_all_lengths():
    case, _ = small("case 5")
    texts = case.inputs[0]
    chosen = [texts.lengths[i] for i in texts.sample]
    assert {min(texts.lengths), max(texts.lengths)} <= set(chosen)
    assert case.truth(texts)["embedding"].shape[0] == len(chosen)


def test_a_stage_that_is_not_there_is_refused(tmp_path):
    run = Run.start(tmp_path / "run.json", "test", "test")
    with pytest.raises(ValueError, match="got 'breakfast'"):
        stages.perform("breakfast", stages.Context(run, CPU, True, float("inf")))


@pytest.mark.parametrize("name", ["cpu 16x128 33%", "cpu 8x128", "cpu text"])
def test_peers_that_pad_nothing_or_take_texts_give_the_right_answers(name):
    case, candidates = small(name, full=True)
    gate = Gate(case)
    (peer,) = (
        c for c in candidates if c.name in ("nn.TransformerEncoder", "sentence-transformers")
    )
    assert gate.check(peer.prepare())["share"] <= 1


def test_texts_have_the_tokens_that_their_ids_are():
    case, _ = small("cpu text")
    texts = case.inputs[0]
    ids = text_in.tokenizer()(list(texts.lines))["input_ids"]
    assert [len(one) for one in ids] == list(texts.lengths)
    assert [i for one in ids for i in one] == texts.ids.tolist()
