"""What is captured comes back to the bit, and what is damaged or foreign is refused by name."""

import json
import shutil

import pytest
import state_worker
import torch
import transformers
from checkpoint_cases import (
    CONFIG,
    FROZEN,
    contents,
    model,
    names,
    same,
    state,
    tokenizer,
    train,
)
from run_ranks import run_ranks

from bert_fast import BertConfig, BertForPreTraining, BertTokenizer
from bert_fast.train import LAMB, AdamW, decay_groups
from bert_fast.train.checkpoints import MANIFEST, Checkpoints, load
from bert_fast.train.state import TrainingState, capture, restore

TOKENIZER = tokenizer()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FACTS = {"seed": 3, "scale": 65536.0, "versions": {"torch": "2"}, "lr": 0.1 + 0.2}


def taken(trained, optimizer, step=3):
    return capture(trained, optimizer, step=step, position={"epoch": 1, "batch": 12}, facts=FACTS)


def on_disk(directory, captured, config=CONFIG):
    """The state as it is after a save and a load."""
    path = Checkpoints(directory).save(captured, config=config, tokenizer=TOKENIZER)
    return load(path).state


def bits(trained, optimizer):
    """Everything that decides the next step, by name."""
    found = {name: p.detach().clone() for name, p in trained.named_parameters()}
    for name, p in trained.named_parameters():
        for kind, value in optimizer.state.get(p, {}).items():
            found[f"{kind}.{name}"] = value.clone()
    return found


def equal(one, other):
    return one.keys() == other.keys() and all(
        t.dtype == other[n].dtype and torch.equal(t, other[n]) for n, t in one.items()
    )


def reversed_groups(trained):
    """The same groups with their parameters in another order."""
    groups = decay_groups(trained)[::-1]
    return [{**group, "params": group["params"][::-1]} for group in groups]


# --- capture and restore -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [AdamW, LAMB, torch.optim.AdamW])
def test_round_trip(tmp_path, kind, dtype):
    """Into a run with other weights, other moments and another order; then it goes on the same."""
    first = model(dtype)
    optimizer = kind(decay_groups(first), lr=1e-2, eps=1e-4)
    train(first, optimizer, 3)
    state = on_disk(tmp_path, taken(first, optimizer))
    assert same(state, taken(first, optimizer))
    assert all(t.dtype == torch.float32 for t in (*state.weights.values(), *state.moments.values()))
    second = model(dtype, seed=1)
    other = kind(reversed_groups(second), lr=1e-2, eps=1e-4)
    train(second, other, 1, seed=5)
    restore(state, second, other)
    assert equal(bits(second, other), bits(first, optimizer))
    train(first, optimizer, 2, seed=9)
    train(second, other, 2, seed=9)
    assert equal(bits(second, other), bits(first, optimizer))
    assert not equal(bits(second, other), dict.fromkeys(bits(first, optimizer), torch.ones(())))


def test_sixteen_bits_are_the_rounding_of_their_masters():
    trained = model(torch.bfloat16)
    optimizer = AdamW(decay_groups(trained), lr=1e-4)
    train(trained, optimizer, 5)
    state = taken(trained, optimizer)
    finer = 0
    for name, p in trained.named_parameters():
        master = optimizer.state[p].get("master") if p in optimizer.state else None
        assert torch.equal(state.weights[name].to(torch.bfloat16), p)
        if master is not None:
            assert torch.equal(state.weights[name], master)
            finer += not torch.equal(master, p.float())
    assert finer > 10  # what rounding would have lost


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_before_the_first_step(tmp_path, dtype):
    first, second = model(dtype), model(dtype, seed=1)
    optimizer, other = (AdamW(decay_groups(m), lr=1e-2) for m in (first, second))
    state = on_disk(tmp_path, taken(first, optimizer, step=0))
    assert not state.moments
    train(second, other, 2, seed=5)
    restore(state, second, other)
    assert equal(bits(second, other), bits(first, optimizer))
    for pair in ((first, optimizer), (second, other)):
        train(*pair, 2)
    assert equal(bits(second, other), bits(first, optimizer))


def test_to_torch_and_back():
    """AdamW of ours and of torch take each other's; in fp32 no bit is lost on the way."""
    first, second, third = (model(seed=i) for i in range(3))
    ours = AdamW(decay_groups(first), lr=1e-2)
    theirs = torch.optim.AdamW(decay_groups(second), lr=1e-2)
    again = AdamW(decay_groups(third), lr=1e-2)
    train(first, ours, 3)
    state = taken(first, ours)
    restore(state, second, theirs)
    assert same(taken(second, theirs), state)
    restore(taken(second, theirs), third, again)
    assert equal(bits(third, again), bits(first, ours))
    train(first, ours, 2, seed=9)
    train(second, theirs, 2, seed=9)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_another_dtype_takes_the_same_state():
    """An fp32 run goes on in bf16: the weights that are trained are its masters."""
    first, second = model(), model(torch.bfloat16, seed=1)
    optimizer, other = (AdamW(decay_groups(m), lr=1e-2) for m in (first, second))
    train(first, optimizer, 2)
    state = taken(first, optimizer)
    restore(state, second, other)
    got, finer = taken(second, other), 0
    assert equal(got.moments, state.moments)
    for name, p in second.named_parameters():
        assert torch.equal(p, state.weights[name].bfloat16())
        if p in other.state:
            assert torch.equal(got.weights[name], state.weights[name])
            finer += not torch.equal(p.float(), state.weights[name])
    assert finer > 10


def test_hyperparameters_are_those_of_the_new_settings():
    first, second = model(), model(seed=1)
    optimizer = AdamW(decay_groups(first), lr=1e-2)
    other = AdamW(decay_groups(second, 0.3), lr=torch.tensor(5e-3), betas=(0.8, 0.9), eps=1e-3)
    train(first, optimizer, 2)
    before = [{k: v for k, v in group.items() if k != "params"} for group in other.param_groups]
    lr = other.param_groups[0]["lr"]
    restore(taken(first, optimizer), second, other)
    after = [{k: v for k, v in group.items() if k != "params"} for group in other.param_groups]
    assert after == before and other.param_groups[0]["lr"] is lr


def test_sharded_over_two_processes(tmp_path):
    """FSDP2: every process has the whole state, and takes its part of one."""
    ranks = run_ranks(state_worker.__file__, state_worker.RANKS, tmp_path)
    for first, given, whole in ([TrainingState(**s) for s in rank] for rank in ranks):
        assert same(given, whole)
        assert same(first, TrainingState(**ranks[0][0]))
        second = model(seed=5)
        optimizer = AdamW(decay_groups(second), lr=1e-2)
        restore(first, second, optimizer)
        assert same(capture(second, optimizer, **state_worker.OPTIONS), first)


def edited(**changes):
    """A state with tensors replaced, or taken out where None."""

    def edit(state):
        tensors = []
        for kept in (state.weights, state.moments):
            kept = {n: changes.get(n.replace(".", "_"), t) for n, t in kept.items()}
            tensors.append({n: t for n, t in kept.items() if t is not None})
        return tensors

    return edit


BIAS = "cls.predictions.bias"


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (edited(cls_predictions_bias=None), ValueError, f"got none for {BIAS}"),
        (
            edited(cls_predictions_bias=torch.ones(3)),
            ValueError,
            rf"{BIAS}: want \[11\], got \[3\]",
        ),
        (edited(cls_predictions_bias=torch.arange(11)), TypeError, f"{BIAS}: want a floating"),
        (edited(step_cls_predictions_bias=None), ValueError, f"got none for step.{BIAS}"),
        (edited(exp_avg_cls_predictions_bias=None), ValueError, f"got none for exp_avg.{BIAS}"),
        (
            edited(exp_avg_sq_cls_predictions_bias=torch.ones(1)),
            ValueError,
            rf"exp_avg_sq.{BIAS}: want \[11\], got \[1\]",
        ),
        (edited(step_cls_predictions_bias=torch.ones(1)), ValueError, r"want \[\], got \[1\]"),
        (lambda s: ({**s.weights, "x": torch.ones(1)}, s.moments), ValueError, "beside them x"),
        (
            lambda s: (s.weights, {**s.moments, "step.x": torch.ones(())}),
            ValueError,
            r"got step\.x",
        ),
        (
            lambda s: (s.weights, {**s.moments, f"step.{FROZEN}": torch.ones(())}),
            ValueError,
            f"got step.{FROZEN}",
        ),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(edit, error, message):
    first, second = model(), model(seed=1)
    optimizer, other = (AdamW(decay_groups(m), lr=1e-2) for m in (first, second))
    train(first, optimizer, 2)
    train(second, other, 1)
    state, before = taken(first, optimizer), bits(second, other)
    weights, moments = edit(state)
    wrong = TrainingState(step=3, position={}, facts={}, weights=weights, moments=moments)
    with pytest.raises(error, match=message):
        restore(wrong, second, other)
    assert equal(bits(second, other), before)


def test_optimizers_and_models_that_are_refused():
    trained = model()
    foreign = AdamW(decay_groups(model()), lr=1e-2)
    with pytest.raises(ValueError, match="optimizer: want parameters of the model, got"):
        taken(trained, foreign)
    third = torch.optim.AdamW(decay_groups(trained), amsgrad=True)
    train(trained, third, 1)
    with pytest.raises(NotImplementedError, match="max_exp_avg_sq"):
        taken(trained, third)
    head = trained.cls.predictions.decoder
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    with pytest.raises(ValueError, match="want tied weights to be one"):
        taken(trained, AdamW(decay_groups(trained)))


# --- what is on the disk -------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_other_tools_open_it(tmp_path, tied):
    """transformers and ours; the weights are those of the masters, and tied once."""
    trained = model(torch.bfloat16, tie_word_embeddings=tied).eval()
    optimizer = AdamW(decay_groups(trained), lr=1e-3)
    train(trained, optimizer, 3)
    saved = taken(trained, optimizer)
    path = Checkpoints(tmp_path).save(saved, config=trained.config, tokenizer=TOKENIZER)
    assert trained.config.dtype != torch.float32  # the run's own configuration stays its own
    ours, info = BertForPreTraining.from_pretrained(path, strict=True, output_loading_info=True)
    assert not any(info.values()) and ours.dtype == torch.float32
    assert all(torch.equal(p, saved.weights[name]) for name, p in ours.named_parameters())
    ours.save_pretrained(tmp_path / "plain")
    for name in ("model.safetensors", "config.json", "bert_fast.json"):
        assert (path / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
    theirs, info = transformers.BertForPreTraining.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()) and theirs.dtype == torch.float32
    ids = torch.randint(0, 11, (3, 6))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    with torch.no_grad():
        got, want = (m.eval()(ids, attention_mask=mask) for m in (ours, theirs))
    for name in ("prediction_logits", "seq_relationship_logits"):
        a, b = got[name], want[name]
        if a.ndim == 3:
            a, b = a[mask.bool()], b[mask.bool()]
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    text = "a b [MASK] f"
    expected = TOKENIZER(text)["input_ids"]
    assert transformers.AutoTokenizer.from_pretrained(path)(text)["input_ids"] == expected
    assert BertTokenizer.from_pretrained(path)(text)["input_ids"] == expected
    train(trained, optimizer, 1)
    assert same(load(path).state, load(path).state)
    assert not same(load(path).state, taken(trained, optimizer))


def test_a_tokenizer_of_transformers(tmp_path):
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    path = Checkpoints(tmp_path).save(state(1), config=CONFIG, tokenizer=theirs)
    listed = json.loads((path / MANIFEST).read_text())["files"]
    assert "tokenizer.json" in listed and listed.keys() == {*names(path)} - {MANIFEST}
    assert same(load(path).state, state(1))


def save(directory, *steps, keep=3):
    for step in steps:
        path = Checkpoints(directory, keep).save(state(step), config=CONFIG, tokenizer=TOKENIZER)
    return path


def newest(directory, **options):
    """The newest step, and what was passed over."""
    notes = []
    found = Checkpoints(directory).newest(notes.append, **options)
    return found and found.state.step, notes


def steps(directory):
    return [int(name[5:]) for name in names(directory) if name.startswith("step-")]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_are_kept(tmp_path, keep):
    save(tmp_path, 5, 10, 15, 20, keep=keep)
    assert steps(tmp_path) == [5, 10, 15, 20][-keep:]
    assert newest(tmp_path) == (20, [])
    with pytest.raises(ValueError, match="keep: want at least 1, got 0"):
        Checkpoints(tmp_path, 0)


def test_later_ones_stay_until_they_are_overtaken(tmp_path):
    """A run that was taken back to 10 does not lose what it had, nor itself."""
    save(tmp_path, 10, 20, 30)
    save(tmp_path, 15)
    assert steps(tmp_path) == [10, 15, 20, 30]
    save(tmp_path, 20, keep=2)
    assert steps(tmp_path) == [15, 20, 30]


def test_what_is_not_ours_stays(tmp_path):
    save(tmp_path, 10)
    shutil.copytree(tmp_path / "step-00000010", tmp_path / "step-00000011")
    (tmp_path / "step-00000011/notes.txt").write_text("mine")
    (tmp_path / "step-00000012").mkdir()
    (tmp_path / "step-00000012/model.safetensors").write_text("mine")
    (tmp_path / "step-00000013").symlink_to(tmp_path / "step-00000010")
    (tmp_path / "step-00000014").write_text("mine")
    for step in (10, 15):
        (tmp_path / f"step-{step:08}.old").mkdir()
        (tmp_path / f"step-{step:08}.old/notes.txt").write_text("mine")
    (tmp_path / "best").mkdir()
    (tmp_path / ".step-00000015.tmp").mkdir()
    others = [name for name in names(tmp_path) if name != "step-00000010"]
    save(tmp_path, 20, keep=2)  # they do not count
    assert names(tmp_path) == sorted([*others, "step-00000010", "step-00000020"])
    for step in (11, 12, 13, 14):
        before = contents(tmp_path)
        with pytest.raises(FileExistsError, match=f"step-{step:08}: want a checkpoint or not"):
            save(tmp_path, step)
        assert contents(tmp_path) == before
    assert newest(tmp_path)[0] == 20


def test_one_that_stepped_aside(tmp_path):
    """It counts until the new one is in its place, and then no more."""
    save(tmp_path, 10)
    (tmp_path / "step-00000010").rename(tmp_path / "step-00000010.old")
    assert newest(tmp_path) == (10, [])
    path = Checkpoints(tmp_path).save(state(10, mark=11), config=CONFIG, tokenizer=TOKENIZER)
    assert names(tmp_path) == [path.name]
    shutil.copytree(path, tmp_path / "step-00000010.old")
    (path / "state.json").write_bytes((path / "state.json").read_bytes() + b" ")
    assert newest(tmp_path)[0] == 10
    assert Checkpoints(tmp_path).newest(print).path.suffix == ".old"
    save(tmp_path, 10)
    shutil.copytree(path, tmp_path / "step-00000010.old")
    assert Checkpoints(tmp_path).newest(print).path == path


def test_nothing_there(tmp_path):
    assert newest(tmp_path / "none") == (None, [])
    assert newest(tmp_path) == (None, [])
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        load(tmp_path)


def test_facts_that_are_no_json(tmp_path):
    for bad in ({"a": float("nan")}, {"a": {1, 2}}):
        wrong = TrainingState(step=1, position={}, facts=bad, weights={}, moments={})
        with pytest.raises((ValueError, TypeError)):
            Checkpoints(tmp_path).save(wrong, config=CONFIG, tokenizer=TOKENIZER)
    assert not names(tmp_path)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """Else they would push out those that are."""
    save(tmp_path, 10)
    before, wrong = contents(tmp_path), state(20)
    wrong.weights["a.bias"][3] = float("nan")
    with pytest.raises(ValueError, match=r"weights: want finite ones, got .* a\.bias"):
        Checkpoints(tmp_path).save(wrong, config=CONFIG, tokenizer=TOKENIZER)
    assert contents(tmp_path) == before


def test_another_model_or_run(tmp_path):
    """The one before it is taken, if that is of this run."""
    save(tmp_path, 10)
    other = BertConfig.from_dict(CONFIG.to_dict(), num_attention_heads=4, hidden_dropout_prob=0.3)
    Checkpoints(tmp_path).save(state(20, mark=8), config=other, tokenizer=TOKENIZER)
    step, notes = newest(tmp_path, config=CONFIG)
    assert step == 10 and len(notes) == 1
    assert notes[0].startswith(str(tmp_path / "step-00000020/config.json"))
    assert "got one with num_attention_heads 4" in notes[0] and "dropout" not in notes[0]
    step, notes = newest(tmp_path, facts={"seed": 7, "mark": 10})
    assert step == 10 and notes[0].endswith("step-00000020/state.json: mark: want 10, got 8")
    step, notes = newest(tmp_path, facts={"corpus": "abc"})
    assert step is None and len(notes) == 2 and "corpus: want 'abc', got None" in notes[0]
