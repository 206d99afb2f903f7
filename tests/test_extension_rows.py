"""The compiled row-wise ops called as they are: what the ops' own tests do not reach."""

import os
import subprocess
import sys

import op_cases
import op_formulas
import pytest
import torch

from bert_fast import reference

call = torch.ops.bert_fast
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = ("gelu", "gelu_new", "relu")
pytestmark = pytest.mark.usefixtures("compiled")
poison = op_cases.poison


@pytest.fixture(autouse=True)
def seeded():
    """Same data at every run, and the threads there were."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def randn(*shape, dtype=torch.float32):
    return (torch.randn(*shape) + 0.5).to(dtype)


def norm_args(T, D, *, dtype=torch.float32, p=0.0, bias=True, residual=True, seed=5, site=3):
    """Arguments of add_layer_norm up to `save`."""
    x, r, w, b, c = (randn(*s, dtype=dtype) for s in ((T, D), (T, D), (D,), (D,), (D,)))
    seed = torch.tensor([seed]) if p else None
    return x, c if bias else None, r if residual else None, w, b, 1e-12, p, seed, site, dtype


def norm_bwd_args(T, D, *, p=0.0, with_bias=True, dtype=torch.float32):
    """Arguments of add_layer_norm_bwd."""
    args = norm_args(T, D, dtype=dtype, p=p, bias=with_bias)
    _, z, mean, rstd = call.add_layer_norm(*args)
    return randn(T, D, dtype=dtype), z, args[3], mean, rstd, with_bias, p, *args[7:]


def embed_args(ids, sizes, D, *, dtype=torch.float32, p=0.0):
    """Arguments of embed up to `save`; ids: of words (None: rows), positions and types."""
    tables = [randn(size, D, dtype=dtype) for size in sizes]
    seed = torch.tensor([5]) if p else None
    norm = randn(D, dtype=dtype), randn(D, dtype=dtype), 1e-12, p, seed, 3, dtype
    return *ids, *tables, *norm


def embed_bwd_args(ids, sizes, D, *, dtype=torch.float32, p=0.0, pad_id=-1):
    """Arguments of embed_bwd."""
    args = embed_args(ids, sizes, D, dtype=dtype, p=p)
    _, z, mean, rstd = call.embed(*args)
    dy = randn(*z.shape, dtype=dtype)
    return dy, *args[:7], z, mean, rstd, pad_id, p, *args[10:12]


def random_ids(T, sizes, dtype=torch.int64):
    return tuple(torch.randint(0, size, (T,), dtype=dtype) for size in sizes)


def exactly(name, args):
    """What the reference gives in float64."""
    wide = [
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    ]
    wide = [torch.float64 if isinstance(a, torch.dtype) else a for a in wide]
    out = getattr(reference, name)(*wide)
    return out if isinstance(out, tuple) else (out,)


def outputs(name, args):
    out = getattr(call, name)(*args)
    return out if isinstance(out, tuple) else (out,)


def assert_close(name, args, rows, bound=1e-5):
    """Every output within `bound` of the largest, and within 5e-6 sqrt(rows) if that is more."""
    bound = max(bound, 5e-6 * rows**0.5)
    pairs = zip(outputs(name, args), exactly(name, args), strict=True)
    for index, (got, exact) in enumerate(pairs):
        assert got.shape == exact.shape, f"{name} {index}"
        if exact.numel():
            error = (got.double() - exact).abs().max() / exact.abs().max().clamp(min=1)
            assert error <= bound, f"{name} {index}: {error:.2e} > {bound:.2e}"


# --- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", [1, 7, 8, 255, 256, 257, 600])
@pytest.mark.parametrize("seed", [0, 12345, -1, 2**63 - 1, -(2**63)])
def test_dropout_has_the_bits_of_the_formula(D, seed):
    """Groups of 256 columns, whole and not, and keys that use all of 64 bits and wrap."""
    x = torch.ones(70, D, dtype=torch.float64)
    given = x, None, None, x[0], x[0], 1e-12, 0.3, torch.tensor([seed]), 9, x.dtype
    z = call.add_layer_norm(*given)[1]
    key = (seed + 9) % 2**64
    assert torch.equal(z, op_formulas.row_factors(70, D, 0.3, seed=key, site=0))


@pytest.mark.parametrize("p", [1 / 65536, 2.5 / 65536, 0.1, 0.5, 1 - 1 / 65536, 1.0])
def test_dropout_has_the_share_of_the_formula(p):
    x = torch.ones(300, 512, dtype=torch.float64)
    z = call.add_layer_norm(x, None, None, x[0], x[0], 1e-12, p, torch.tensor([7]), 0, x.dtype)[1]
    assert torch.equal(z, op_formulas.row_factors(300, 512, p, seed=7))


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_dropout_refuses_what_is_no_probability(p):
    args = list(norm_args(2, 8))
    args[6:8] = p, torch.tensor([1])
    with pytest.raises(ValueError, match="p: want 0 to 1, got"):
        call.add_layer_norm(*args)


# --- what is saved -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_without_save(p, dtype):
    """The same y, and nothing else."""
    ids = random_ids(9, (11, 7, 2))
    for name, args in (
        ("add_layer_norm", norm_args(9, 37, dtype=dtype, p=p)),
        ("embed", embed_args(ids, (11, 7, 2), 37, dtype=dtype, p=p)),
    ):
        y, *saved = getattr(call, name)(*args, True)
        alone, *empty = getattr(call, name)(*args, False)
        assert torch.equal(y, alone) and not y.isnan().any(), name
        assert [t.numel() for t in empty] == [0, 0, 0], name
        assert [t.dtype for t in empty] == [t.dtype for t in saved], name
        assert not any(t.isnan().any() for t in saved), name


# --- threads and rows ----------------------------------------------------------------------------

SIZES = [(1500, 64), (333, 768), (5000, 33)]


def large_calls(T, D):
    """Calls whose work is shared out among threads."""
    sizes = (max(40, T // 3), 300, 3)
    ids = random_ids(T, sizes)
    x, dy, b = randn(T, D), randn(T, D), randn(D)
    return [
        ("add_layer_norm", norm_args(T, D, p=0.1)),
        ("add_layer_norm_bwd", norm_bwd_args(T, D, p=0.1)),
        ("embed", embed_args(ids, sizes, D, p=0.1)),
        ("embed_bwd", embed_bwd_args(ids, sizes, D, p=0.1, pad_id=2)),
        ("bias_gelu", (x, b, "gelu")),
        ("bias_gelu_bwd", (dy, x, b, "gelu_new")),
    ]


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape):
    calls = large_calls(*shape)
    expected = [outputs(name, args) for name, args in calls]
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        for (name, args), out in zip(calls, expected, strict=True):
            for index, (got, want) in enumerate(zip(outputs(name, args), out, strict=True)):
                assert torch.equal(got, want), f"{name} {index}: {threads} threads"


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_large_calls_are_right(shape):
    for name, args in large_calls(*shape):
        assert_close(name, args, shape[0])


def test_a_row_has_its_bits_among_any_number_of_rows():
    args = norm_args(3000, 100)
    y, z, mean, rstd = call.add_layer_norm(*args)
    for first, last in ((0, 1), (2999, 3000), (1311, 1400)):
        part = [a[first:last] if i in (0, 2) else a for i, a in enumerate(args)]
        for got, whole in zip(call.add_layer_norm(*part), (y, z, mean, rstd), strict=True):
            assert torch.equal(got, whole[first:last])


@pytest.mark.parametrize("T", [1, 31, 32, 33, 2048, 2049, 4100, 70000])
def test_sums_over_rows(T):
    """One block and many, parts of one block and of several, the last not full."""
    D = 9
    assert_close("add_layer_norm_bwd", norm_bwd_args(T, D), T)
    assert_close("bias_gelu_bwd", (randn(T, D), randn(T, D), None, "relu"), T)
    # equal terms make the largest partial sums: they lose at most a few digits
    ones = torch.full((T, D), 1.1)
    db = call.bias_gelu_bwd(ones, ones, None, "relu")[1]
    assert ((db.double() - T * ones[0].double()).abs() <= 2e-6 * T).all()


# --- embeddings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    ("T", "sizes", "D"),
    [
        (50, (10, 5, 2), 300),  # few rows that occur, more columns than a block
        (200, (1000, 64, 2), 33),  # many, most of the table untouched
        (2000, (40, 33, 1), 40),  # each occurs often
        (5, (3, 3, 3), 600),
        (0, (4, 3, 2), 16),
    ],
    ids=str,
)
@pytest.mark.parametrize("pad_id", [-1, 0, 2])
def test_embed_bwd(T, sizes, D, pad_id, dtype):
    ids = random_ids(T, sizes)
    args = embed_bwd_args(ids, sizes, D, dtype=dtype, p=0.2, pad_id=pad_id)
    assert_close("embed_bwd", args, T, 1e-5 if dtype == torch.float32 else 1e-12)
    dword = call.embed_bwd(*args)[0]
    absent = [v for v in range(sizes[0]) if v == pad_id or v not in ids[0]]
    assert not dword[absent].any()


@pytest.mark.parametrize("token", [0, 5, 99])
def test_embed_bwd_of_one_token(token):
    """All occurrences in one row of the table, the first and the last among them."""
    ids = torch.full((700,), token), *random_ids(700, (50, 2))
    args = embed_bwd_args(ids, (100, 50, 2), 24)
    assert_close("embed_bwd", args, 700)
    dword = call.embed_bwd(*args)[0]
    assert dword.any(1).nonzero().tolist() == [[token]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("bad", [-1, "size", 2**31 - 1, -(2**31)])
def test_ids_out_of_range(bad, which, dtype):
    """Nothing is read or written there, whoever calls."""
    sizes = 11, 7, 2
    ids = random_ids(9, sizes, dtype)
    args = embed_args(ids, sizes, 16), embed_bwd_args(ids, sizes, 16)
    ids[which][4] = sizes[which] if bad == "size" else bad
    name = ("input_ids", "position_ids", "token_type_ids")[which]
    for op, given in zip(("embed", "embed_bwd"), args, strict=True):
        match = rf"{op}: {name}: want 0 to {sizes[which] - 1}, got {ids[which][4]} at 4"
        with pytest.raises(IndexError, match=match):
            getattr(call, op)(*given)


# --- dtypes --------------------------------------------------------------------------------------


def assert_same_dtypes_and_close(name, args):
    """As the reference, within what one rounding of the narrowest dtype makes."""
    expected = getattr(reference, name)(*args)
    for index, (got, want) in enumerate(zip(outputs(name, args), expected, strict=True)):
        assert (got.dtype, got.shape) == (want.dtype, want.shape), f"{name} {index}"
        if want.numel():
            eps = max(torch.finfo(want.dtype).eps, 2e-6)
            error = (got.double() - want.double()).abs().max()
            assert error <= eps * want.abs().max().clamp(min=1), f"{name} {index}: {error:.2e}"


@pytest.mark.parametrize("x", DTYPES, ids=str)
@pytest.mark.parametrize("residual", DTYPES, ids=str)
@pytest.mark.parametrize("w", DTYPES, ids=str)
@pytest.mark.parametrize("out", [None, torch.float32, torch.float16], ids=str)
def test_mixed_dtypes_of_layer_norm(x, residual, w, out):
    args = list(norm_args(6, 20))
    args[0], args[2] = args[0].to(x), args[2].to(residual)
    args[1], args[3], args[4] = (args[i].to(w) for i in (1, 3, 4))
    args[9] = torch.promote_types(x, residual) if out is None else out
    assert_same_dtypes_and_close("add_layer_norm", args)
    _, z, mean, rstd = reference.add_layer_norm(*args)
    for p in (0.0, 0.5):
        seed = torch.tensor([2]) if p else None
        bwd = randn(6, 20).to(args[9]), z, args[3], mean, rstd, True, p, seed, 1, x
        assert_same_dtypes_and_close("add_layer_norm_bwd", bwd)


@pytest.mark.parametrize("word", DTYPES, ids=str)
@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("w", DTYPES, ids=str)
@pytest.mark.parametrize("with_ids", [True, False])
def test_mixed_dtypes_of_embeddings(with_ids, word, other, w):
    sizes = 11 if with_ids else 6, 7, 2
    ids = random_ids(6, sizes)
    args = list(embed_args(ids if with_ids else (None, *ids[1:]), sizes, 20))
    args[3], args[4], args[5] = args[3].to(word), args[4].to(other), args[5].to(other)
    args[6], args[7] = args[6].to(w), args[7].to(w)
    args[12] = torch.promote_types(word, other)
    assert_same_dtypes_and_close("embed", args)
    _, z, mean, rstd = reference.embed(*args)
    bwd = randn(6, 20).to(args[12]), *args[:7], z, mean, rstd, 1, 0.0, None, 0
    assert_same_dtypes_and_close("embed_bwd", bwd)


# --- GELU ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gelu_everywhere(activation):
    """Half an ulp and 1e-7 from the truth; far left the value keeps its digits."""
    x = torch.linspace(-16, 16, 400_001)[None]
    exact = exactly("bias_gelu", (x, None, activation))[0]
    if activation == "gelu":  # 1 + erf has no digits left of -8
        exact = x.double() * torch.erfc(x.double() * -(0.5**0.5)) / 2
    got = call.bias_gelu(x, None, activation).double()
    assert ((got - exact).abs() <= 6e-8 * exact.abs() + 1e-7).all()
    if activation == "gelu":
        left = (x > -12) & (x < -1e-3)
        assert ((got - exact).abs() <= 6e-6 * exact.abs())[left].all()
    dy = torch.ones_like(x)
    dx = call.bias_gelu_bwd(dy, x, None, activation)[0]
    slope = exactly("bias_gelu_bwd", (dy, x, None, activation))[0]
    assert ((dx.double() - slope).abs() <= 3e-7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gelu_at_the_ends(activation, dtype):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[inf, -inf, nan, 0.0, 6e4, -6e4]], dtype=dtype)
    y = call.bias_gelu(x, None, activation)[0]
    assert y[0] == inf and y[1] == 0 and y[2].isnan() and y[3] == 0 and y[4] == x[0, 4]
    assert y[5] == 0
    slopes = call.bias_gelu_bwd(torch.ones_like(x), x, None, activation)[0][0]
    assert slopes[[0, 1, 4, 5]].tolist() == [1, 0, 1, 0]


def test_nan_stays_in_its_row():
    for bad in (float("nan"), float("inf")):
        args = norm_args(40, 50, bias=False, residual=False)
        clean = call.add_layer_norm(*args)[0]
        args[0][17, 49] = bad
        y = call.add_layer_norm(*args)[0]
        assert y[17].isnan().any()
        assert torch.equal(torch.cat((y[:17], y[18:])), torch.cat((clean[:17], clean[18:])))


def test_constant_rows():
    """Rounding makes no variance negative, even where it is 0 and the values are large."""
    for value in (0.0, 0.1, 1000.3, -7e5):
        x, w = torch.full((3, 77), value), torch.ones(77)
        y, _, mean, rstd = call.add_layer_norm(x, None, None, w, w, 0.0, 0.0, None, 0, x.dtype)
        assert torch.equal(mean, x[:, 0]) and not (rstd.isnan() | (rstd < 10)).any()
        y = call.add_layer_norm(x, None, None, w, w, 1e-6, 0.0, None, 0, x.dtype)[0]
        assert (y - 1).abs().max() <= 1e-2


# --- refusals ------------------------------------------------------------------------------------


def changed(args, index, value):
    args = list(args)
    args[index] = value(args[index]) if callable(value) else value
    return args


def refusals():
    """Name of the op, its arguments, the error and its text."""
    D = 16
    norm, bwd = norm_args(5, D), norm_bwd_args(5, D)
    ids = random_ids(5, (11, 7, 2))
    embed, embed_bwd = embed_args(ids, (11, 7, 2), D), embed_bwd_args(ids, (11, 7, 2), D)
    gelu, gelu_bwd = (randn(5, D), randn(D), "gelu"), (randn(5, D), randn(5, D), randn(D), "gelu")
    calls = {
        "add_layer_norm": (norm, {"x": 0, "bias": 1, "residual": 2, "w": 3, "b": 4}),
        "add_layer_norm_bwd": (bwd, {"dy": 0, "z": 1, "w": 2, "mean": 3, "rstd": 4}),
        "embed": (embed, {"word": 3, "position": 4, "type_": 5, "w": 6, "b": 7}),
        "embed_bwd": (embed_bwd, {"dy": 0, "word": 4, "w": 7, "z": 8, "mean": 9, "rstd": 10}),
        "bias_gelu": (gelu, {"x": 0, "b": 1}),
        "bias_gelu_bwd": (gelu_bwd, {"dy": 0, "x": 1, "b": 2}),
    }
    for op, (args, names) in calls.items():
        for name, at in names.items():
            text = f"{op}: {name}: want "
            yield op, changed(args, at, lambda t: t.long()), TypeError, f"{text}fp32, fp16, bf16 or"
            yield op, changed(args, at, lambda t: t[None]), ValueError, text
            twice = changed(args, at, lambda t: t.repeat_interleave(2, -1)[..., ::2])
            yield op, twice, ValueError, f"{text}it contiguous, got strides"
            if name not in ("x", "w", "z", "word", "position", "type_") or op == "embed_bwd":
                fewer = changed(args, at, lambda t: t[:-1].clone())
                if name not in ("word", "w"):
                    yield op, fewer, ValueError, f"{text}["
    for at, name in enumerate(("input_ids", "position_ids", "token_type_ids")):
        text = f"embed: {name}: want "
        yield "embed", changed(embed, at, lambda t: t.float()), TypeError, f"{text}int64 or int32"
        yield "embed", changed(embed, at, lambda t: t[None]), ValueError, text
    yield "embed", changed(embed, 1, lambda t: t[:-1].clone()), ValueError, "position_ids: want [5]"
    yield "embed", changed(embed, 2, lambda t: t.repeat(2)[::2]), ValueError, "want it contiguous"
    for activation in ("silu", ""):
        text = f"want gelu, gelu_new, gelu_pytorch_tanh or relu, got {activation}"
        yield "bias_gelu", changed(gelu, 2, activation), ValueError, text
        yield "bias_gelu_bwd", changed(gelu_bwd, 3, activation), ValueError, text
    for seed in (torch.tensor([1, 2]), torch.tensor([1.0])):
        text = "seed: want [1] torch.int64 on cpu, got"
        given = changed(changed(norm, 6, 0.5), 7, seed)
        yield "add_layer_norm", given, ValueError, text
    yield "add_layer_norm", changed(norm, 9, torch.int64), TypeError, "out_dtype: want a floating"
    yield "add_layer_norm_bwd", changed(bwd, 9, torch.bool), TypeError, "x_dtype: want a floating"


def test_refusals():
    count = 0
    for op, args, error, text in refusals():
        with pytest.raises(error) as caught:
            getattr(call, op)(*args)
        assert text in str(caught.value)
        count += 1
    assert count > 80


# --- instruction sets ----------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_every_instruction_set(compiled, capability):
    """All of the above once more on the lesser ones."""
    if compiled.cpu_capability() == "DEFAULT":
        pytest.skip("there is one set here")
    arguments = ["-q", "-p", "no:cacheprovider", "-k", "not instruction_set", __file__]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:]
