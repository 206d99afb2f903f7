"""AdamW and LAMB as torch.optim.Optimizer: beside torch.optim.AdamW, and LAMB's reference."""

import copy
import io
import pickle

import pytest
import torch
from optimizer_cases import BF16, FP16, FP64
from torch import Tensor, nn

from bert_fast import reference_optimizer
from bert_fast.train import LAMB, AdamW, decay_groups

both = pytest.mark.parametrize("make", [AdamW, LAMB])


def tiny(dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 33), nn.LayerNorm(33), nn.GELU(), nn.Linear(33, 5))
    return model.to(device, dtype)


def give_grads(models: list[nn.Module], step: int) -> None:
    """The same gradients to each."""
    torch.manual_seed(step)
    for params in zip(*(m.parameters() for m in models), strict=True):
        grad = torch.randn(params[0].shape) * 0.3 + 0.1
        for p in params:
            p.grad = grad.to(p.device, p.dtype, copy=True)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().cpu().clone() for p in model.parameters()]


@pytest.mark.parametrize("clip", [None, 0.7, 1e3])
def test_adamw_is_torch_optim_adamw(clip, device):
    """50 steps, two groups, a schedule; within 1e-6."""
    models = tiny(device=device), tiny(device=device)
    ours = AdamW(decay_groups(models[0], 0.1), lr=1e-2, max_grad_norm=clip)
    theirs = torch.optim.AdamW(decay_groups(models[1], 0.1), lr=1e-2)
    optimizers = ours, theirs
    schedules = [torch.optim.lr_scheduler.LinearLR(o, total_iters=30) for o in optimizers]
    for step in range(50):
        give_grads(models, step)
        if clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(models[1].parameters(), clip)
        for one in (*optimizers, *schedules):
            one.step()
        if clip is not None:
            torch.testing.assert_close(ours.grad_norm, norm, rtol=1e-5, atol=0)
    for a, b in zip(*map(weights, models), strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("options", [{}, {"always_adapt": True}, {"max_grad_norm": None}], ids=str)
def test_lamb_is_its_reference(options, device):
    """50 steps against float64, two groups."""
    model, wide = tiny(device=device), tiny(FP64)
    ours = LAMB(decay_groups(model, 0.1), lr=1e-2, **options)
    groups = [group["params"] for group in decay_groups(wide, 0.1)]
    params = [p for group in groups for p in group]
    state = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    steps = [torch.tensor(0.0) for _ in params]
    norm, limit = None, options.get("max_grad_norm", 1.0)
    for step in range(50):
        give_grads([model, wide], step)
        ours.step()
        grads = [p.grad for p in params]
        if limit is not None:
            norm = reference_optimizer.grad_norm(grads, None)
        with torch.no_grad():
            reference_optimizer.lamb_(
                params, grads, *state, steps, [torch.empty(0)] * len(params),
                [len(g) for g in groups], [1e-2, 1e-2], [0.1, 0.0], [], 0.9, 0.999, 1e-6,
                limit or 0.0, norm, None, None, options.get("always_adapt", False),
            )  # fmt: skip
    for a, b in zip(weights(model), weights(wide), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@both
def test_masters(make, dtype, device):
    """16-bit weights are their masters rounded, which go where fp32 weights go."""
    narrow, wide = tiny(dtype, device), tiny(dtype, device).float()
    optimizers = make(narrow.parameters(), lr=1e-4), make(wide.parameters(), lr=1e-4)
    for step in range(20):
        give_grads([narrow, wide], step)
        for p in wide.parameters():
            p.grad = p.grad.to(dtype).float()
        for one in optimizers:
            one.step()
    for p, w in zip(narrow.parameters(), wide.parameters(), strict=True):
        state = optimizers[0].state[p]
        assert state["master"].dtype == state["exp_avg"].dtype == torch.float32
        assert torch.equal(p.detach(), state["master"].to(dtype))
        torch.testing.assert_close(state["master"], w.detach(), rtol=1e-6, atol=1e-7)


@both
def test_without_masters_steps_are_rounded(make):
    model = tiny(BF16)
    one = make(model.parameters(), lr=1e-5, weight_decay=0.0, master_weights=False)
    before = weights(model)
    give_grads([model], 0)
    one.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert "master" not in one.state[p] and one.state[p]["exp_avg"].dtype == torch.float32
        assert (p.detach() - old).abs().max() <= 2.0**-8 * old.abs().max() + 1e-5


def trained(make, dtype=torch.float32, steps=4, **options):
    model = tiny(dtype)
    one = make(decay_groups(model), lr=1e-2, **options)
    for step in range(steps):
        give_grads([model], step)
        one.step()
    return model, one


def saved(state_dict):
    """Through a file."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@both
def test_resuming_gives_the_same_bits(make, dtype):
    model, one = trained(make, dtype)
    other = copy.deepcopy(model)
    resumed = make(decay_groups(other), lr=1e-2)
    resumed.load_state_dict(saved(one.state_dict()))
    for step in range(4, 8):
        give_grads([model, other], step)
        one.step()
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(other), strict=True))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert one.state[p].keys() == resumed.state[q].keys()
        for name, t in one.state[p].items():
            assert t.dtype == torch.float32 and torch.equal(t, resumed.state[q][name])
            assert t.data_ptr() != resumed.state[q][name].data_ptr()


@pytest.mark.parametrize("fused", [False, True])
def test_state_goes_to_and_from_torch_optim(fused):
    model, ours = trained(AdamW)
    other = copy.deepcopy(model)
    theirs = torch.optim.AdamW(decay_groups(other), lr=1e-2, fused=fused)
    theirs.load_state_dict(saved(ours.state_dict()))
    third = copy.deepcopy(model)
    back = AdamW(decay_groups(third), lr=1e-2)
    back.load_state_dict(saved(theirs.state_dict()))
    for keys in ours.state_dict()["state"].values():
        assert set(keys) == {"step", "exp_avg", "exp_avg_sq"}
    for step in range(4, 9):
        give_grads([model, other, third], step)
        for one in (ours, theirs, back):
            one.step()
    for a, b, c in zip(*map(weights, (model, other, third)), strict=True):
        assert torch.equal(a, c)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_amsgrad_is_refused():
    model = tiny()
    theirs = torch.optim.AdamW(model.parameters(), amsgrad=True)
    with pytest.raises(ValueError, match="want amsgrad False, got True"):
        AdamW(model.parameters()).load_state_dict(theirs.state_dict())


def test_hooks_of_loading_are_heard():
    model, one = trained(AdamW)
    other = AdamW(decay_groups(copy.deepcopy(model)))

    def halve(_, loaded):
        state = {i: s | {"exp_avg": s["exp_avg"] / 2} for i, s in loaded["state"].items()}
        return loaded | {"state": state}

    other.register_load_state_dict_pre_hook(halve)
    other.load_state_dict(one.state_dict())
    for p, q in zip(model.parameters(), other.param_groups[0]["params"], strict=False):
        assert torch.equal(one.state[p]["exp_avg"] / 2, other.state[q]["exp_avg"])
        break
    assert len(other._optimizer_load_state_dict_pre_hooks) == 1


@both
def test_copies_and_pickles(make):
    _, one = trained(make, max_grad_norm=0.5, master_weights=False)
    for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert (other.max_grad_norm, other.master_weights) == (0.5, False)
        p = other.param_groups[0]["params"][0]
        p.grad = torch.ones_like(p)
        other.step()
        assert other.grad_norm > 0


@both
def test_parameters_without_gradient_are_left(make):
    model = tiny()
    one = make(model.parameters(), lr=1e-2)
    one.step()  # none has a gradient
    assert not one.state
    before = weights(model)
    give_grads([model], 0)
    model[0].weight.grad = None
    one.step()
    assert model[0].weight not in one.state and torch.equal(model[0].weight, before[0])
    assert not torch.equal(model[0].bias, before[1])
    one.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@both
def test_gradients_are_only_read(make):
    model = tiny()
    give_grads([model], 0)
    before = [p.grad.clone() for p in model.parameters()]
    make(model.parameters(), max_grad_norm=0.01).step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


@both
def test_closure(make):
    model, x = tiny(), torch.randn(4, 9)
    one = make(model.parameters(), lr=1e-2)

    def closure() -> Tensor:
        one.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    losses = [float(one.step(closure)) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]


@both
def test_groups_of_other_betas_and_dtypes(make):
    """Other hyperparameters go to other calls; the clipping is one."""
    model, other = tiny(), tiny()
    groups = [{"params": [p], "betas": (0.8 + 0.01 * i, 0.99)} for i, p in enumerate(
        model.parameters())]  # fmt: skip
    one = make(groups, lr=1e-2, max_grad_norm=0.3)
    give_grads([model, other], 0)
    one.step()
    squares = sum(float(p.grad.square().sum()) for p in other.parameters())
    assert float(one.grad_norm) == pytest.approx(squares**0.5, rel=1e-5)
    scale = 0.3 / squares**0.5
    for (i, p), q in zip(enumerate(model.parameters()), other.parameters(), strict=True):
        expected = (1 - (0.8 + 0.01 * i)) * q.grad * scale
        torch.testing.assert_close(one.state[p]["exp_avg"], expected, rtol=1e-4, atol=1e-7)


@both
def test_a_learning_rate_that_is_a_tensor(make, device):
    models = tiny(device=device), tiny(device=device)
    lr = torch.tensor(1e-2, device=device)
    ones = make(models[0].parameters(), lr=lr), make(models[1].parameters(), lr=1e-2)
    for step in range(6):
        if step == 3:
            lr.fill_(3e-3)
            ones[1].param_groups[0]["lr"] = 3e-3
        give_grads([*models], step)
        for one in ones:
            one.step()
    for a, b in zip(*map(weights, models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@both
def test_grad_scaler(make, device):
    """It leaves the scale to us; a gradient that is not finite makes no step."""
    models = tiny(device=device), tiny(device=device)
    ones = [make(m.parameters(), lr=1e-2, max_grad_norm=0.5) for m in models]
    scaler = torch.amp.GradScaler(device, init_scale=256.0, growth_interval=100)
    x = torch.randn(8, 9, device=device)
    for step in range(6):
        for one, model in zip(ones, models, strict=True):
            one.zero_grad()
            loss = model(x).square().mean()
            (scaler.scale(loss) if one is ones[0] else loss).backward()
        if step == 3:
            models[0][0].bias.grad[0] = float("inf")
        before = weights(models[0])
        scaler.step(ones[0])
        scaler.update()
        if step == 3:
            assert all(map(torch.equal, before, weights(models[0])))
            assert scaler.get_scale() == 128.0
            continue
        ones[1].step()
        torch.testing.assert_close(ones[0].grad_norm, ones[1].grad_norm, rtol=1e-5, atol=0)
    for a, b in zip(*map(weights, models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert all(float(s["step"]) == 5 for s in ones[0].state.values())


def test_a_step_is_seen_by_autograd():
    """A backward over weights that were changed since the forward is refused."""
    model = tiny()
    one = AdamW(model.parameters())
    x = torch.randn(3, 9, requires_grad=True)
    y = model(x).sum()
    give_grads([model], 0)
    one.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_sparse_gradients_are_refused():
    table = nn.Embedding(7, 3, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(NotImplementedError, match="want a dense tensor, got "):
        AdamW(table.parameters()).step()


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"lr": torch.ones(2)},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9,)},
        {"eps": -1e-8},
        {"weight_decay": -0.1},
        {"max_grad_norm": 0.0},
    ],
    ids=str,
)
@both
def test_hyperparameters_out_of_range_are_refused(make, bad):
    name = next(iter(bad))
    with pytest.raises(ValueError, match=rf"{name}: want .*, got "):
        make(tiny().parameters(), **bad)
    if name != "max_grad_norm":
        with pytest.raises(ValueError, match=rf"{name}: want .*, got "):
            make([{"params": tiny().parameters(), **bad}])


def test_decay_groups():
    model = tiny()
    model[3].bias.requires_grad_(False)
    model.tied = model[0]
    decayed, rest = decay_groups(model, 0.3)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert [*map(id, decayed["params"])] == [id(model[0].weight), id(model[3].weight)]
    expected = model[0].bias, model[1].weight, model[1].bias
    assert [*map(id, rest["params"])] == [*map(id, expected)]
