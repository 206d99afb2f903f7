"""The masks that kernels draw: those of the numpy Philox, forward, backward and recomputed."""

from functools import partial

import op_cases
import pytest
import torch

pytest.importorskip("triton")

from interpreter_tools import FUNCTIONS, in_long, raw
from op_cases import (
    assert_same_bits,
    attention_case,
    borders,
    embed_case,
    gradients,
    kernel_dtype,
    layer_norm_case,
    random_gradient,
)
from op_formulas import SEED, attention_factors, philox, row_factors
from torch.utils.checkpoint import checkpoint

from bert_fast import ops

poison = op_cases.poison

# --- masks, found in what the kernels give -------------------------------------------------------


def add_layer_norm_mask(T, D, p, seed=SEED, site=0, dtype=torch.float32, device="cpu"):
    """The factors (T, D) of the forward: z of rows of ones."""
    w = torch.ones(D, dtype=dtype, device=device)
    return raw(
        "add_layer_norm",
        x=torch.ones(T, D, dtype=dtype, device=device), bias=None, residual=None, w=w, b=w,
        eps=1.0, p=p, seed=torch.tensor([seed], device=device), site=site, out_dtype=dtype,
    )[1]  # fmt: skip


def add_layer_norm_bwd_mask(T, D, p, seed=SEED, site=0, dtype=torch.float32, device="cpu"):
    """The factors (T, D) of the backward: the gradient of x over that of the residual."""
    x, residual = (torch.randn(T, D, device=device).to(dtype).requires_grad_() for _ in range(2))
    w, seed = torch.ones(D, dtype=dtype, device=device), torch.tensor([seed], device=device)
    y = ops.add_layer_norm(x, residual, w, w, p=p, seed=seed, site=site)
    y.backward(torch.randn(T, D, device=device).to(dtype))
    return (x.grad.double() / residual.grad.double()).nan_to_num(0).to(dtype)


def embed_mask(T, D, p, seed=SEED, site=0, dtype=torch.float32, device="cpu"):
    """The factors (T, D) of the forward: what a LayerNorm that gives ones becomes."""
    ids = torch.zeros(T, dtype=torch.int64, device=device)
    table = torch.randn(1, D, device=device).to(dtype)
    w, b = (torch.full((D,), v, dtype=dtype, device=device) for v in (0.0, 1.0))
    seed = torch.tensor([seed], device=device)
    return ops.embed(ids, ids, ids, table, table, table, w, b, p=p, seed=seed, site=site)


def embed_bwd_mask(T, D, p, seed=SEED, site=0, dtype=torch.float32, device="cpu"):
    """The factors (T, D) of the backward, a row after the other: what reaches the shift b."""
    ids = torch.zeros(T, dtype=torch.int64, device=device)
    tables = [torch.randn(1, D, device=device).to(dtype) for _ in range(3)]
    w, b = (torch.full((D,), v, dtype=dtype, device=device) for v in (0.0, 1.0))
    b.requires_grad_()
    seed = torch.tensor([seed], device=device)
    y = ops.embed(ids, ids, ids, *tables, w, b, p=p, seed=seed, site=site)
    rows = []
    for t in range(T):
        dy = torch.zeros(T, D, dtype=dtype, device=device)
        dy[t] = 1
        rows.append(torch.autograd.grad(y, b, dy, retain_graph=True)[0])
    return torch.stack(rows)


def attention_inputs(lengths, H, K, dtype, device):
    """Equal keys, and a row of values for each of K keys at a time that names the key."""
    n = max(lengths)
    for first in range(0, n, K):
        qkv = torch.zeros(sum(lengths), 3, H, K, dtype=dtype, device=device)
        for start, length in zip(borders(lengths).tolist(), lengths, strict=False):
            for key in range(first, min(first + K, length)):
                qkv[start + key, 2, :, key - first] = 1
        yield qkv


def attention_masks(lengths, H, p, seed=SEED, site=0, dtype=torch.float32, device="cpu", K=64):
    """The factors (H, n, n) of each sequence, from the forward."""
    seed, cu_seqlens = torch.tensor([seed], device=device), borders(lengths).to(device)
    outs = [
        ops.attention(qkv, cu_seqlens, max(lengths), p=p, seed=seed, site=site)
        for qkv in attention_inputs(lengths, H, K, dtype, device)
    ]
    whole = torch.cat(outs, dim=2).transpose(0, 1).split(lengths, dim=1)
    return [part[..., :n] * n for part, n in zip(whole, lengths, strict=True)]


def attention_bwd_masks(lengths, H, p, seed=SEED, site=0, dtype=torch.float32, device="cpu", K=64):
    """The factors of each sequence, from the gradients of the values: who read them."""
    seed, cu_seqlens = torch.tensor([seed], device=device), borders(lengths).to(device)
    grads = []
    for ones in attention_inputs(lengths, H, K, dtype, device):
        qkv = torch.zeros_like(ones).requires_grad_()
        o = ops.attention(qkv, cu_seqlens, max(lengths), p=p, seed=seed, site=site)
        o.backward(ones[:, 2].contiguous())
        grads.append(qkv.grad[:, 2])
    whole = torch.cat(grads, dim=2).transpose(0, 1).split(lengths, dim=1)
    return [part[..., :n].mT * n for part, n in zip(whole, lengths, strict=True)]


def square(masks, T, D, *args, **kwargs):
    """The factors of one head of a sequence of T rows, as many of its columns as there are."""
    return masks([max(T, D)], 1, *args, **kwargs)[0][0, :T, :D]


MASKS = {
    "add_layer_norm": add_layer_norm_mask,
    "add_layer_norm-backward": add_layer_norm_bwd_mask,
    "embed": embed_mask,
    "embed-backward": embed_bwd_mask,
    "attention": partial(square, attention_masks),
    "attention-backward": partial(square, attention_bwd_masks),
}
MASKS = {name: f for name, f in MASKS.items() if name.partition("-")[0] in FUNCTIONS}
every_mask = pytest.mark.parametrize("name", MASKS)
FORWARD = [name for name in MASKS if "-" not in name]
every_forward = pytest.mark.parametrize("name", FORWARD)


def formula(name, T, D, p, seed=SEED, site=0):
    """What numpy says that the factors are."""
    if name.startswith("attention"):
        return attention_factors(max(T, D), 0, 1, p, seed, site)[0, :T, :D]
    return row_factors(T, D, p, seed, site)


# --- the same as numpy's -------------------------------------------------------------------------


@every_mask
@kernel_dtype
@pytest.mark.parametrize("p", [0.1, 1.0, *in_long(2**-16, 0.5, 1 - 2**-16)])
def test_factors(name, p, dtype, kernel_device):
    """Every element is dropped or kept as promised, and what is kept is scaled by as much."""
    T = 2 if name == "embed-backward" else 9  # a call for each row
    got = MASKS[name](T, 37, p, site=5, dtype=dtype, device=kernel_device).double().cpu()
    expected = formula(name, T, 37, p, site=5)
    assert torch.equal(got != 0, expected != 0)
    if dtype == torch.float32 or p < 0.9:  # 65536 is no number of 16 bits
        eps = torch.finfo(dtype).eps
        rtol = {"add_layer_norm": eps / 2, "embed": eps / 2}.get(name, 8 * eps)
        torch.testing.assert_close(got, expected, rtol=rtol, atol=0)


@every_mask
def test_the_threshold_is_kept(name, kernel_device):
    """Bits below it are dropped, and those that equal it are not."""
    bits = int(philox(SEED, 0, 0, 0, 0)[0]) % 2**16  # of the first element
    for threshold, kept in ((bits, True), (bits + 1, False)):
        got = MASKS[name](1, 9, threshold / 2**16, device=kernel_device).cpu()
        assert bool(got[0, 0] != 0) == kept


@every_forward
@pytest.mark.parametrize("seed", [-1, 2**63 - 3, 2**32, *in_long(0, 1, -(2**63), 2**32 - 1)])
def test_seeds_at_the_ends(name, seed, kernel_device):
    """Key = seed + site, modulo 2**64."""
    got = MASKS[name](3, 17, 0.5, seed=seed, site=2, device=kernel_device).cpu()
    assert torch.equal(got != 0, formula(name, 3, 17, 0.5, seed=seed, site=2) != 0)


def seeds(count):
    return torch.randint(-(2**63), 2**63 - 1, (count,)).tolist()


def assert_rate(kept, p):
    """Within four standard deviations."""
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.double().mean() - (1 - p)) < 4 * deviation


@every_mask
@pytest.mark.parametrize("count", [10, *in_long(100)])
def test_keep_rate(name, count, kernel_device):
    """Of many seeds, forward and backward; no two masks are equal."""
    T, D = (1, 512) if name == "embed-backward" else (16, 64)
    found = []
    for site, seed in enumerate(seeds(count)):
        kept = MASKS[name](T, D, 0.1, seed=seed, site=site, device=kernel_device).cpu() != 0
        assert torch.equal(kept, formula(name, T, D, 0.1, seed=seed, site=site) != 0)
        assert_rate(kept, 0.1)
        found.append(tuple(kept.flatten().tolist()))
    assert len(set(found)) == count


def chi_square(a, b):
    """Of the four outcomes of two series of booleans, one degree of freedom."""
    a, b = (torch.stack([m, ~m]).flatten(1).double() for m in (a, b))
    joint = a @ b.T
    expected = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True) / joint.sum()
    return float(((joint - expected) ** 2 / expected).sum())


@every_forward
def test_neighbours_are_independent(name, kernel_device):
    """Right, two on, in the next group of eight, below and across: p > 1e-4."""
    kept = (MASKS[name](96, 96, 0.5, device=kernel_device) != 0).cpu()
    assert_rate(kept, 0.5)
    for down, right in [(0, 1), (0, 2), (0, 8), (1, 0), (1, 1), (1, -1), (16, 0), (0, 64)]:
        first = kept[: 96 - down, max(0, -right) : 96 - max(0, right)]
        second = kept[down:, max(0, right) : 96 + min(0, right)]
        assert chi_square(first, second) < 15.14, (down, right)


def test_dependent_neighbours_show():
    """The technique sees what it is for: a number that serves two elements, and a constant."""
    kept = torch.rand(96, 48) < 0.5
    assert chi_square(kept, torch.rand(96, 48) < 0.5) < 15.14
    assert chi_square(kept, kept) > 15.14
    with pytest.raises(AssertionError):
        assert_rate(torch.rand(96, 96) < 0.55, 0.5)


@every_forward
def test_another_seed_or_site(name, kernel_device):
    """Differs in about every second element."""
    pairs = [(7, 0), (8, 0), (7, 5), (9, 5), (7 + 2**32, 0)]
    masks = [MASKS[name](32, 64, 0.5, *pair, device=kernel_device) != 0 for pair in pairs]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert 0.44 < (a != b).double().mean() < 0.56


# --- attention: head, sequence, and nothing else -------------------------------------------------

needs_attention = pytest.mark.skipif("attention" not in FUNCTIONS, reason="no kernel of attention")


@needs_attention
@pytest.mark.parametrize("find", [attention_masks, attention_bwd_masks], ids=["fwd", "bwd"])
def test_attention_counters(find, kernel_device):
    """Row and key in the sequence, its number in the batch, the head; not the lengths, nor K."""
    for lengths, K in (([5, 0, 33, 1], 24), ([9, 0, 130], 128)):
        found = find(lengths, 2, 0.3, site=4, device=kernel_device, K=K)
        for b, got in enumerate(found):
            expected = attention_factors(got.shape[1], b, 2, 0.3, site=4).float()
            torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=0)


@needs_attention
def test_heads_and_sequences_differ(kernel_device):
    a, b = attention_masks([64, 64], 2, 0.5, device=kernel_device)
    corners = [a[0] != 0, a[1] != 0, b[0] != 0, b[1] != 0]
    for i, first in enumerate(corners):
        for second in corners[:i]:
            assert chi_square(first, second) < 15.14


# --- the gradient's mask, recomputed and by differences ------------------------------------------

DROPPING = {
    "add_layer_norm": partial(layer_norm_case, 7, 20, p=0.3),
    "add_layer_norm-alone": partial(layer_norm_case, 7, 20, residual=False, p=0.3),
    "embed": partial(embed_case, 7, 20, p=0.3),
    "attention": partial(attention_case, (5, 0, 19), K=16, p=0.3),
}
DROPPING = {name: make for name, make in DROPPING.items() if name.partition("-")[0] in FUNCTIONS}
dropping = pytest.mark.parametrize("make", DROPPING.values(), ids=DROPPING)


@dropping
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(make, use_reentrant, kernel_device):
    """A recomputed forward drops the same elements: gradients equal to the bit."""
    case = make().to(torch.float32, kernel_device)
    dy = random_gradient(case.call())

    def recomputed(**inputs):
        def call(*tensors):
            return case.call(**dict(zip(inputs, tensors, strict=True)))

        return checkpoint(call, *inputs.values(), use_reentrant=use_reentrant)

    assert_same_bits(gradients(case, recomputed, dy), gradients(case, case.call, dy))


def assert_derivative(case, dy, name, found):
    """That along a random direction, by central differences in fp32 with the mask held."""
    x, direction = case.inputs[name], torch.randn_like(case.inputs[name])
    step = 1e-2
    there, back = (case.call(**{name: x + sign * step * direction}) for sign in (1, -1))
    difference = ((there.double() - back.double()) / (2 * step) * dy).sum()
    each = found.double() * direction
    scale = each.norm() + (dy.double() * there.double()).norm() * 1e-2
    assert abs(difference - each.sum()) < 5e-3 * scale, name


@dropping
def test_finite_differences(make, kernel_device):
    case = make().to(torch.float32, kernel_device)
    dy = random_gradient(case.call())
    found = gradients(case, case.call, dy)
    for name in case.leaves:
        assert_derivative(case, dy, name, found[f"d_{name}"])


@dropping
def test_a_derivative_of_another_mask_shows(make, kernel_device):
    """The technique sees what it is for: a backward with a mask of its own."""
    case = make().to(torch.float32, kernel_device)
    dy = random_gradient(case.call())
    case.dropout["site"] += 1
    wrong = gradients(case, case.call, dy)
    case.dropout["site"] -= 1
    with pytest.raises(AssertionError):
        for name in case.leaves:
            assert_derivative(case, dy, name, wrong[f"d_{name}"])
