"""Philox and the masks made from it: the right bits and rate, and the same wherever needed."""

from functools import partial

import numpy as np
import op_cases
import pytest
import torch
from op_cases import (
    assert_refused,
    assert_same_bits,
    attention_case,
    embed_case,
    gradients,
    layer_norm_case,
)
from op_formulas import SEED, attention_factors, philox, row_factors
from torch.utils.checkpoint import checkpoint

from bert_fast import ops, reference_dropout

try:  # triton has wheels for Linux only
    import triton
    import triton.language as tl
except ImportError:
    triton = None

poison = op_cases.poison
MASK32 = 0xFFFFFFFF
KNOWN = [  # Random123's kat_vectors for philox4x32-10: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK32,) * 4, (MASK32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


# --- the bits ------------------------------------------------------------------------------------


def as_int64(key: int) -> int:
    return key - 2**64 if key >= 2**63 else key


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    key = key[0] | key[1] << 32
    got = reference_dropout.philox(torch.tensor(as_int64(key)), *(torch.tensor(c) for c in counter))
    assert tuple(int(word) for word in got) == words
    assert tuple(philox(key, *counter)) == words


if triton is not None:

    @triton.jit
    def _philox_kernel(out_ptr, counters_ptr, key_ptr, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        c0, c1, c2, c3 = (tl.load(counters_ptr + i * BLOCK + at) for i in tl.static_range(4))
        words = tl.philox(tl.load(key_ptr), c0, c1, c2, c3)
        for i in tl.static_range(4):
            tl.store(out_ptr + i * BLOCK + at, words[i])


@pytest.mark.skipif(triton is None, reason="no triton on this platform")
@pytest.mark.parametrize("key", [0, 1, SEED, -1, as_int64(0x8000000180000001)])
def test_same_words_as_triton(key, device):
    """What kernels will draw is what the reference draws."""
    counters = torch.randint(0, 2**32, (4, 64), device=device)
    counters[:, :8] = torch.arange(8, device=device)
    out = torch.zeros(4, 64, dtype=torch.int32, device=device)
    seed = torch.tensor([key], device=device)
    _philox_kernel[(1,)](out, counters.to(torch.int32), seed, BLOCK=64)
    expected = reference_dropout.philox(seed[0], *counters)
    assert torch.equal(out.long() & MASK32, torch.stack(expected))


# --- masks, found in what the ops give -----------------------------------------------------------


def add_layer_norm_mask(T, D, p, seed=SEED, site=0, dtype=torch.float32):
    """The factors (T, D): z of rows of ones."""
    ones, seed = torch.ones(T, D, dtype=dtype), torch.tensor([seed])
    w = torch.ones(D, dtype=dtype)
    return torch.ops.bert_fast.add_layer_norm(ones, None, None, w, w, 1.0, p, seed, site, dtype)[1]


def embed_mask(T, D, p, seed=SEED, site=0, dtype=torch.float32):
    """The factors (T, D): what a LayerNorm that gives ones becomes."""
    ids, table = torch.zeros(T, dtype=torch.int64), torch.randn(1, D, dtype=dtype)
    w, b = torch.zeros(D, dtype=dtype), torch.ones(D, dtype=dtype)
    seed = torch.tensor([seed])
    return ops.embed(ids, ids, ids, table, table, table, w, b, p=p, seed=seed, site=site)


def attention_masks(lengths, H, p, seed=SEED, site=0, dtype=torch.float32):
    """The factors (H, n, n) of each sequence: equal keys, and values that name the key."""
    longest = max(lengths)
    qkv = torch.zeros(sum(lengths), 3, H, longest, dtype=dtype)
    for first, n in zip(op_cases.borders(lengths).tolist(), lengths, strict=False):
        qkv[first : first + n, 2] = n * torch.eye(n, longest, dtype=dtype)[:, None]
    seed = torch.tensor([seed])
    o = ops.attention(qkv, op_cases.borders(lengths), longest, p=p, seed=seed, site=site)
    parts = o.transpose(0, 1).split(lengths, dim=1)
    return [part[..., :n] for part, n in zip(parts, lengths, strict=True)]


def attention_mask(T, D, p, seed=SEED, site=0, dtype=torch.float32):
    """The factors of one head of a sequence of T rows, as many of its columns as there are."""
    return attention_masks([max(T, D)], 1, p, seed, site, dtype)[0][0, :T, :D]


every_mask = pytest.mark.parametrize(
    "mask", [add_layer_norm_mask, embed_mask, attention_mask], ids=lambda f: f.__name__[:-5]
)


@every_mask
@pytest.mark.parametrize("p", [2**-17, 2**-16, 0.1, 0.5, 0.9, 1 - 2**-16, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_factors(mask, p, dtype):
    """Every one of them, from the counters that are promised, and the scale to the last bit."""
    got = mask(21, 37, p, site=5, dtype=dtype)
    expected = row_factors if mask is not attention_mask else rows_of_a_sequence
    expected = expected(21, 37, p, site=5).to(dtype)
    eps = 4 * torch.finfo(dtype).eps if mask is attention_mask else 0
    torch.testing.assert_close(got, expected, rtol=eps, atol=0)


def rows_of_a_sequence(T, D, p, site):
    return attention_factors(max(T, D), 0, 1, p, site=site)[0, :T, :D]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 3, -(2**63)])
def test_seeds_at_the_ends(seed):
    """Key = seed + site, modulo 2**64."""
    got = add_layer_norm_mask(3, 17, 0.5, seed=seed, site=2)
    assert torch.equal(got, row_factors(3, 17, 0.5, seed=seed, site=2).float())


def test_attention_counters():
    """Row and key in the sequence, its number in the batch, the head; nothing else."""
    for b, got in enumerate(attention_masks([5, 0, 33, 1, 12], 3, 0.3, site=4)):
        expected = attention_factors(got.shape[1], b, 3, 0.3, site=4).float()
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_attention_mask_is_that_of_any_lengths():
    """A sequence's mask is a corner of a longer one's, whatever stands around it."""
    short = attention_masks([3, 12, 1], 2, 0.5)
    long = attention_masks([40, 33, 7], 2, 0.5)
    for a, b in zip(short, long, strict=True):
        n = a.shape[1]
        assert torch.equal(a != 0, b[:, :n, :n] != 0)
    assert not torch.equal(long[0][:, :7, :7] != 0, long[2] != 0)
    assert not torch.equal(long[0][0] != 0, long[0][1] != 0)


@every_mask
@pytest.mark.parametrize("p", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_keep_rate(mask, p):
    """Within four standard deviations."""
    kept = mask(200, 200, p) != 0
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.double().mean() - (1 - p)) < 4 * deviation


@every_mask
@pytest.mark.parametrize("down,right", [(0, 1), (0, 2), (0, 8), (1, 0), (1, 1), (1, -1)])
def test_neighbours_are_independent(mask, down, right):
    """Chi-square of the four outcomes of neighbouring elements, one degree of freedom: p > 1e-4."""
    kept = mask(256, 256, 0.5) != 0
    first = kept[: 256 - down, max(0, -right) : 256 - max(0, right)]
    second = kept[down:, max(0, right) : 256 + min(0, right)]
    first, second = (torch.stack([m, ~m]).flatten(1).double() for m in (first, second))
    joint = first @ second.T
    expected = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True) / joint.sum()
    chi_square = ((joint - expected) ** 2 / expected).sum()
    assert chi_square < 15.14


@every_mask
def test_another_seed_or_site(mask):
    """Differs in about every second element."""
    masks = [mask(64, 64, 0.5, seed, site) != 0 for seed, site in [(7, 0), (8, 0), (7, 5), (9, 5)]]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert 0.45 < (a != b).double().mean() < 0.55
    assert torch.equal(mask(64, 64, 0.5, 7, 5) != 0, masks[2])


def test_seeds_and_sites_are_added():
    """A model's seeds are 63 random bits: that two of them differ by a site will not happen."""
    assert torch.equal(embed_mask(9, 9, 0.5, 7, 1), embed_mask(9, 9, 0.5, 8, 0))


# --- the same mask in the backward, and in a recomputed forward ----------------------------------


def test_add_layer_norm_backward_has_the_mask():
    """Where x is dropped it gets no gradient; the residual shows what it would have been."""
    case = layer_norm_case(33, 65, p=0.4)
    found = gradients(case, case.call)
    factors = case.factors.float()
    torch.testing.assert_close(found["d_x"], found["d_residual"] * factors, rtol=1e-6, atol=0)
    assert torch.equal(found["d_x"] == 0, factors == 0)


def test_embed_backward_has_the_mask():
    """A gradient that only dropped elements get comes to nothing."""
    case = embed_case(33, 65, p=0.4)
    dropped = (case.factors == 0).float()
    found = gradients(case, case.call, dropped * torch.randn(33, 65))
    for name in found.keys() - {"out"}:
        assert not found[name].any(), name


def test_attention_backward_has_the_mask():
    """The gradient of a value is what the row that reads it kept."""
    n = 33
    case = attention_case((n,), H=1, K=n, p=0.4)
    case.inputs["qkv"][:, :2] = 0
    found = gradients(case, case.call, torch.eye(n)[:, None])
    factors = found["d_qkv"][:, 2, 0].T * n
    torch.testing.assert_close(factors, case.factors[0][0].float(), rtol=1e-5, atol=0)


DROPPING = {
    "add_layer_norm": partial(layer_norm_case, 7, 20, p=0.3),
    "add_layer_norm-alone": partial(layer_norm_case, 7, 20, residual=False, p=0.3),
    "embed": partial(embed_case, 7, 20, p=0.3),
    "attention": partial(attention_case, (5, 0, 9), p=0.3),
}
dropping = pytest.mark.parametrize("make", DROPPING.values(), ids=DROPPING)


@dropping
def test_finite_differences(make):
    """The derivative along a random direction, by central differences with the mask held."""
    case = make().to(torch.float64)
    dy = torch.randn_like(case.call())
    found = gradients(case, case.call, dy)
    for name in case.leaves:
        x, step = case.inputs[name], 1e-5 * torch.randn_like(case.inputs[name])
        there, back = (case.call(**{name: x + sign * step}) for sign in (1, -1))
        difference = ((there - back) / 2 * dy).sum()
        expected = (found[f"d_{name}"] * step).sum()
        torch.testing.assert_close(difference, expected, rtol=1e-5, atol=1e-12)


@dropping
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(make, use_reentrant):
    """A recomputed forward drops the same elements: gradients equal to the bit."""
    case = make()
    dy = torch.randn_like(case.call())

    def recomputed(**inputs):
        names = list(inputs)

        def call(*tensors):
            return case.call(**dict(zip(names, tensors, strict=True)))

        return checkpoint(call, *inputs.values(), use_reentrant=use_reentrant)

    assert_same_bits(gradients(case, recomputed, dy), gradients(case, case.call, dy))


@dropping
def test_the_generator_is_left_alone(make):
    """All randomness is in the seed: torch's own state is neither read nor moved."""
    case = make()
    before = torch.get_rng_state()
    out = case.call()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(case.call(), out)


@dropping
def test_p_of_0_needs_no_seed(make):
    case = make()
    case.dropout["p"] = 0.0
    with_seed = case.call()
    case.dropout["seed"] = None
    assert torch.equal(case.call(), with_seed)


@dropping
@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"p": -0.1}, "p: want 0 to 1, got -0.1"),
        ({"p": 1.5}, "p: want 0 to 1, got 1.5"),
        ({"p": float("nan")}, "p: want 0 to 1, got nan"),
        ({"seed": None}, "seed: want [1] torch.int64 with p > 0, got None"),
        ({"seed": torch.tensor(3)}, "got [] torch.int64"),
        ({"seed": torch.tensor([3, 4])}, "got [2] torch.int64"),
        ({"seed": torch.tensor([3], dtype=torch.int32)}, "got [1] torch.int32"),
        ({"seed": torch.tensor([3.0])}, "got [1] torch.float32"),
        ({"seed": torch.tensor([3], device="meta")}, "meta"),
    ],
    ids=str,
)
def test_refused(make, change, got):
    case = make()
    case.dropout.update(change)
    assert_refused(ValueError, case.name, got, case.call)


def test_numpy_philox_broadcasts():
    """The tests' own Philox: a table of counters is what each gives alone."""
    words = philox(SEED, np.arange(3)[:, None], np.arange(2), 5, 6)
    assert words.shape == (3, 2, 4)
    assert (words[2, 1] == philox(SEED, 2, 1, 5, 6)).all()
