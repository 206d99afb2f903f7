"""Random calls of the compiled operators: sizes, dtypes, lengths and memory layouts by chance.

The truth of a call is the reference in float64 on the same numbers. Of what 16 bits store, the
reference in the call's own dtypes says how far from the truth it may be.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from random import Random
from typing import Any

import torch
from torch import Tensor

from bert_fast import ops, reference

call = torch.ops.bert_fast
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
# Sizes at which loops over vectors of 4 to 32 lanes, tiles and blocks begin, end and turn over.
SIZES = (0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 47, 48, 49, 63, 64, 65, 100, 127)
WIDTHS = (*SIZES, 128, 129, 192, 255, 256, 257, 300)
HEADS = (1, 2, 3, 5, 7, 8, 9, 13, 16, 17, 24, 31, 32, 33, 40, 64, 65, 96, 128)
LENGTHS = (0, 0, 1, 1, 2, 3, 5, 6, 7, 8, 9, 15, 16, 17, 31, 33, 48, 49, 65)


@dataclass(frozen=True)
class Drawn:
    """A call of an operator.

    Attributes:
        op: its name in torch.ops.bert_fast.
        args: its arguments.
        rows: over how many rows a gradient sums.
        public: the same by the function of bert_fast.ops: from tensors by name to the output.
        leaves: those tensors; floating ones get a gradient.
        backward: from the outputs of `op` and dy to the call of its backward operator.
        own_bits: whether the bits are the same at any address and for any number of threads;
            those of PyTorch's products are not.
        scales: of what may cancel in each output: its rounding is left.
    """

    op: str
    args: tuple[Any, ...]
    rows: int = 1
    public: Callable[..., Tensor] | None = None
    leaves: dict[str, Tensor | None] = field(default_factory=dict)
    backward: Callable[[tuple[Tensor, ...], Tensor], "Drawn"] | None = None
    own_bits: bool = True
    scales: tuple[float, ...] = ()

    def run(self, args: tuple[Any, ...] | None = None) -> tuple[Tensor, ...]:
        out = getattr(call, self.op)(*(self.args if args is None else args))
        return out if isinstance(out, tuple) else (out,)

    def by_reference(self, wide: bool) -> tuple[Tensor, ...]:
        args = tuple(map(widened, self.args)) if wide else self.args
        out = getattr(reference, self.op)(*args)
        if self.op == "add_layer_norm_bwd" and not out[0].numel() and wide:
            out = (out[1], *out[1:])  # where all is float64, dx is dz
        return out if isinstance(out, tuple) else (out,)

    def __str__(self) -> str:
        return f"{self.op}({', '.join(map(shown, self.args))})"


def widened(a: Any) -> Any:
    if isinstance(a, torch.dtype):
        return torch.float64
    return a.double() if isinstance(a, Tensor) and a.is_floating_point() else a


def shown(a: Any) -> str:
    if not isinstance(a, Tensor):
        return str(a)
    small = a.numel() < 12 and not a.is_floating_point()
    return f"{[*a.shape]} {str(a.dtype)[6:]}" + (f" {a.tolist()}" if small else "")


# --- data and where it lies ----------------------------------------------------------------------


def rows(r: Random, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers whose mean is not 0; a few columns may be far larger."""
    x = torch.randn(*shape) + 0.5
    if r.random() < 0.15:
        x[..., :: max(1, shape[-1] // 3)] *= 20
    return x.to(dtype)


def empty(shape: list[int], dtype: torch.dtype) -> Tensor:
    """Memory that no operator may read: NaN, or what is out of every range."""
    poison = float("nan") if dtype.is_floating_point else True
    poison = torch.iinfo(dtype).max if dtype in (torch.int32, torch.int64) else poison
    return torch.full(shape, poison, dtype=dtype)


def moved(r: Random, t: Tensor) -> Tensor:
    """The same, contiguous, at any address that its elements may have."""
    before = r.randint(0, 9)
    buffer = empty([before + t.numel() + r.randint(0, 9)], t.dtype)
    return buffer[before : before + t.numel()].view(t.shape).copy_(t)


def spread(r: Random, t: Tensor) -> Tensor:
    """The same with strides by chance: dimensions in any order, with steps, within larger ones."""
    if t.ndim == 0 or r.random() < 0.2:
        return moved(r, t)
    order = r.sample(range(t.ndim), t.ndim)
    steps = [r.choice((1, 1, 1, 2, 3)) for _ in order]
    before = [r.choice((0, 0, 1, 2)) for _ in order]
    after = [r.choice((0, 0, 1, 2)) for _ in order]
    sizes = [before[d] + t.shape[d] * steps[d] + after[d] for d in order]
    view = empty(sizes, t.dtype).permute([order.index(d) for d in range(t.ndim)])
    at = zip(before, t.shape, steps, strict=True)
    return view[tuple(slice(b, b + n * step, step) for b, n, step in at)].copy_(t)


def memory(args: tuple[Any, ...]) -> list[Tensor]:
    """Copies of all bytes that the tensors among the arguments share memory with."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    return [torch.tensor([], dtype=torch.uint8).set_(t.untyped_storage()).clone() for t in tensors]


# --- draws ---------------------------------------------------------------------------------------


def dropout(r: Random) -> tuple[float, Tensor | None, int]:
    """p, seed and site; a seed of any 64 bits, and sums of both that wrap."""
    p = r.choice((0.0, 0.0, 0.0, 1 / 65536, 0.1, 0.3, 0.5, 1.0))
    ends = (0, -1, 2**63 - 1, -(2**63))
    seed = r.choice((*ends, *(r.randrange(-(2**63), 2**63) for _ in range(4))))
    site = r.choice((0, 1, 3, 500, -1, 2**63 - 1, -(2**63)))
    return p, torch.tensor([seed]) if p or r.random() < 0.2 else None, site


def row_counts(r: Random, columns: int) -> int:
    """T, at times enough to share out among threads."""
    if r.random() < 0.08:
        return r.randint(1, 4) * 40_000 // max(40, columns) + r.randint(0, 40)
    return r.choice(SIZES)


def mixed(r: Random) -> Callable[[], torch.dtype]:
    """A dtype a call: mostly the same."""
    main, share = r.choice(DTYPES), r.choice((0.0, 0.0, 0.4))
    return lambda: r.choice(DTYPES) if r.random() < share else main


def attention(r: Random) -> Drawn:
    H, K = r.choice((0, 1, 1, 2, 3, 4)), r.choice(HEADS)
    lengths = [r.choice(LENGTHS) for _ in range(r.choice((0, 1, 1, 2, 3, 4)))]
    if r.random() < 0.1:
        lengths.append(r.randint(100, 200))
    T = sum(lengths) + r.choice((0, 0, 1, 5))
    qkv = rows(r, T, 3, H, K, dtype=r.choice(DTYPES))
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    longest = max(lengths, default=0)
    max_len = r.choice((longest, longest, longest + r.randint(0, 99), 2**31, 2**63 - 1))
    p, seed, site = dropout(r)
    args = qkv, cu_seqlens, max_len, p, seed, site

    def public(qkv: Tensor) -> Tensor:
        keywords = {"p": p, "seed": seed, "site": site, "slack": True}
        return ops.attention(qkv, cu_seqlens, max_len, **keywords)

    def backward(out: tuple[Tensor, ...], dy: Tensor) -> Drawn:
        return Drawn("attention_bwd", (dy, qkv, *out, *args[1:]))

    return Drawn("attention", args, 1, public, {"qkv": qkv}, backward)


def add_layer_norm(r: Random) -> Drawn:
    D = r.choice(WIDTHS)
    T, dtype, eps = row_counts(r, D), mixed(r), r.choice((1e-12, 1e-5))
    p, seed, site = dropout(r)
    x, residual = rows(r, T, D, dtype=dtype()), rows(r, T, D, dtype=dtype())
    w, b, bias = (rows(r, D, dtype=dtype()) for _ in range(3))
    residual = residual if r.random() < 0.6 else None
    bias = bias if r.random() < 0.4 else None
    out_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    args = x, bias, residual, w, b, eps, p, seed, site, out_dtype

    def public(x, residual, w, b, bias):
        return ops.add_layer_norm(x, residual, w, b, eps, bias=bias, p=p, seed=seed, site=site)

    def backward(out: tuple[Tensor, ...], dy: Tensor) -> Drawn:
        _, z, mean, rstd = out
        z = x if bias is None and residual is None and p == 0 else z
        args = dy, z, w, mean, rstd, bias is not None, p, seed, site, x.dtype
        return norm_backward("add_layer_norm_bwd", args, dy, w, z, mean, rstd)

    leaves = {"x": x, "residual": residual, "w": w, "b": b, "bias": bias}
    inputs = [x, bias, residual]
    return norm_forward("add_layer_norm", args, inputs, public, leaves, backward)


def largest(*tensors: Tensor | None) -> float:
    """The largest size of a number in any, at least 1."""
    return max(
        [1.0, *(float(t.double().abs().max()) for t in tensors if t is not None and t.numel())]
    )


def norm_forward(op: str, args: tuple[Any, ...], inputs: list[Tensor | None], *rest: Any) -> Drawn:
    """A LayerNorm of the sum of inputs; where a row has hardly any variance, much cancels."""
    drawn = Drawn(op, args, 1, *rest)
    rstd = drawn.by_reference(wide=True)[3].nan_to_num()
    terms = 4e-6 * largest(*inputs) * largest(rstd)
    w, b = (t for name, t in drawn.leaves.items() if name in ("w", "b"))
    scales = terms * largest(w), 0.0, 0.0, terms * largest(rstd)
    return replace(drawn, scales=(scales[0] + 1e-6 * largest(b), *scales[1:]))


def norm_backward(
    op: str, args: tuple[Any, ...], dy: Tensor, w: Tensor, z: Tensor, mean: Tensor, rstd: Tensor
) -> Drawn:
    """A LayerNorm's backward."""
    scale = 0.0
    if z.numel():
        mean, rstd = mean.double()[:, None], rstd.double()[:, None]
        x_hat = ((z.double() - mean) * rstd).abs().amax(1, True).clamp(min=1)
        terms = float((rstd * x_hat**2 * (1 + 0.1 * (mean * rstd).abs())).max())
        scale = 1e-6 * largest(dy) * largest(w) * terms * z.shape[0] ** 0.5
    return Drawn(op, args, z.shape[0], scales=(scale,) * 5)


def embed(r: Random) -> Drawn:
    D = r.choice(WIDTHS)
    T, dtype, eps = row_counts(r, D), mixed(r), r.choice((1e-12, 1e-5))
    with_ids = r.random() < 0.7
    sizes = r.choice((1, 2, 11, 40, 500)), r.choice((1, 7, 130)), r.choice((1, 2, 3))
    ids_dtype = r.choice((torch.int32, torch.int64))
    ids = [torch.randint(0, size, (T,), dtype=ids_dtype) for size in sizes]
    input_ids = ids[0] if with_ids else None
    word = rows(r, sizes[0] if with_ids else T, D, dtype=dtype())
    position, type_ = (rows(r, size, D, dtype=dtype()) for size in sizes[1:])
    w, b = rows(r, D, dtype=dtype()), rows(r, D, dtype=dtype())
    p, seed, site = dropout(r)
    pad_id = r.choice((-1, -1, 0, 1, 10**6, -(2**63), 2**63 - 1))
    out_dtype = torch.promote_types(word.dtype, torch.promote_types(position.dtype, type_.dtype))
    inputs = input_ids, *ids[1:], word, position, type_, w
    args = *inputs, b, eps, p, seed, site, out_dtype

    def public(word: Tensor, position: Tensor, type_: Tensor, w: Tensor, b: Tensor) -> Tensor:
        tables, keywords = (word, position, type_), {"p": p, "seed": seed, "site": site}
        given = input_ids, *ids[1:], *tables, w, b, eps
        return ops.embed(*given, pad_id=None if pad_id == -1 else pad_id, **keywords)

    def backward(out: tuple[Tensor, ...], dy: Tensor) -> Drawn:
        args = dy, *inputs, *out[1:], pad_id, p, seed, site
        return norm_backward("embed_bwd", args, dy, w, *out[1:])

    leaves = {"word": word, "position": position, "type_": type_, "w": w, "b": b}
    return norm_forward("embed", args, [word, position, type_], public, leaves, backward)


def bias_gelu(r: Random) -> Drawn:
    F = r.choice(WIDTHS)
    T, dtype, activation = row_counts(r, F), mixed(r), r.choice(ACTIVATIONS)
    x, b = rows(r, T, F, dtype=dtype()), rows(r, F, dtype=dtype())
    b = b if r.random() < 0.6 else None

    def public(x: Tensor, b: Tensor | None) -> Tensor:
        return ops.gelu(x, b, activation)

    def backward(out: tuple[Tensor, ...], dy: Tensor) -> Drawn:
        scale = 1e-6 * largest(dy)
        return Drawn("bias_gelu_bwd", (dy, x, b, activation), T, scales=(scale, scale * T**0.5))

    leaves, scales = {"x": x, "b": b}, (1e-6 * largest(x, b),)
    return Drawn("bias_gelu", (x, b, activation), 1, public, leaves, backward, scales=scales)


def linear_gelu(r: Random) -> Drawn:
    T, D, F = (r.choice(SIZES) for _ in range(3))
    dtype, activation = r.choice(DTYPES), r.choice(ACTIVATIONS)
    x, b = rows(r, T, D, dtype=dtype), rows(r, F, dtype=dtype)
    w = (torch.randn(F, D) * max(1, D) ** -0.5).to(dtype)
    b = b if r.random() < 0.6 else None
    args = x, w, b, activation
    return Drawn("linear_gelu", args, own_bits=False)


DRAWS = {draw.__name__: draw for draw in (attention, add_layer_norm, embed, bias_gelu, linear_gelu)}


# --- rules ---------------------------------------------------------------------------------------


def assert_agrees(drawn: Drawn, got: tuple[Tensor, ...]) -> None:
    """As the reference in shape and dtype; as near to the truth as their dtype's rule asks.

    fp64: 1e-10. fp32: 1e-5 of the largest, 5e-6 sqrt(M) for sums over M rows. 16 bits: an ulp of
    the largest. On top of it twice the reference's own error, four times among few numbers, of
    which it may have one right by luck.
    """
    expected, truth = drawn.by_reference(wide=False), drawn.by_reference(wide=True)
    for index, (t, base, exact) in enumerate(zip(got, expected, truth, strict=True)):
        name = f"output {index}"
        assert (t.dtype, t.shape) == (base.dtype, base.shape), f"{name}: {shown(t)} {shown(base)}"
        assert t.is_contiguous(), name
        if not t.numel() or not (got[0].numel() or drawn.op.endswith("_bwd")):
            continue  # without columns there are no statistics
        info = torch.finfo(t.dtype)
        fits = exact.abs() < 0.9 * info.max  # what overflows is checked by the reference alone
        assert torch.equal(t[~fits].isfinite(), base[~fits].isfinite()), f"{name}: overflow"
        t, base, exact = t.double()[fits], base.double()[fits], exact[fits]
        if not exact.numel():
            continue
        bound = {8: 1e-10, 4: max(1e-5, 5e-6 * drawn.rows**0.5), 2: info.eps}[info.bits // 8]
        few = exact.numel() <= 200 or drawn.op.startswith("attention")
        error, allowed = (t - exact).abs(), (base - exact).abs()
        limit = (4 if few else 2) * allowed.max() + bound * exact.abs().max()
        scale = drawn.scales[index] if drawn.scales else 0.0
        limit += scale * (1e-8 if info.bits == 64 else 1.0) + info.smallest_normal
        assert error.max() <= limit, f"{name}: {error.max():.2e} > {limit:.2e}"


def assert_same_bits(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: str) -> None:
    for index, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), f"{what}: output {index}"
        assert torch.equal(one.nan_to_num(7.5), other.nan_to_num(7.5)), f"{what}: output {index}"


def steps(drawn: Drawn) -> Iterator[tuple[Drawn, tuple[Tensor, ...]]]:
    """The call and what it gives; then its backward with a random dy and what that gives."""
    out = drawn.run()
    yield drawn, out
    if drawn.backward is not None:
        backward = drawn.backward(out, torch.randn_like(out[0]) + 0.25)
        yield backward, backward.run()


def check_raw(r: Random, drawn: Drawn) -> None:
    """The operators as they are: right, whatever the address and the number of threads."""
    threads = torch.get_num_threads()
    for step, out in steps(drawn):
        assert_agrees(step, out)
        args = tuple(moved(r, a) if isinstance(a, Tensor) else a for a in step.args)
        before = memory(args)
        again = step.run(args)
        assert_same_bits(again if step.own_bits else step.run(), out, "again")
        for count in r.sample((1, 2, 3), 2) if step.own_bits else ():
            torch.set_num_threads(count)
            try:
                assert_same_bits(step.run(), out, f"{count} threads")
            finally:
                torch.set_num_threads(threads)
        for a, b in zip(memory(args), before, strict=True):
            assert torch.equal(a, b), "the arguments were written to"
        check_strides(r, step)
    if drawn.op in ("add_layer_norm", "embed"):
        y, *rest = drawn.run((*drawn.args, False))
        assert_same_bits((y,), drawn.run()[:1], "without save")
        assert [t.numel() for t in rest] == [0, 0, 0]


def check_strides(r: Random, drawn: Drawn) -> None:
    """A tensor that is not contiguous is refused, or taken for what it is."""
    places = [i for i, a in enumerate(drawn.args) if isinstance(a, Tensor) and a.ndim]
    at = r.choice(places)
    strided = spread(r, drawn.args[at])
    args = (*drawn.args[:at], strided, *drawn.args[at + 1 :])
    try:
        out = drawn.run(args)
    except ValueError as error:
        assert not strided.is_contiguous(), str(error)
        assert str(error).startswith(f"{drawn.op}: ") and "contiguous" in str(error), str(error)
    else:
        assert strided.is_contiguous() or drawn.op == "linear_gelu", f"argument {at} was taken"
        if drawn.op == "linear_gelu":  # its product is PyTorch's, which takes any
            assert_agrees(replace(drawn, args=args), out)


def check_public(r: Random, drawn: Drawn) -> None:
    """The public function, of tensors with any strides, has the operators' bits."""
    if drawn.public is None:
        return
    out = drawn.run()
    dy = torch.randn_like(out[0]) + 0.25
    given = {n: t if t is None else spread(r, t) for n, t in drawn.leaves.items()}
    leaves = {n: t if t is None else t.detach().requires_grad_() for n, t in given.items()}
    y = drawn.public(**leaves)
    y.backward(spread(r, dy))
    plain = {n: t if t is None else t.clone().requires_grad_() for n, t in drawn.leaves.items()}
    expected = drawn.public(**plain)
    expected.backward(dy)
    names = [n for n, t in leaves.items() if t is not None]
    assert_same_bits((y, expected), (out[0], out[0]), "public")
    gradients = tuple(leaves[n].grad for n in names), tuple(plain[n].grad for n in names)
    assert_same_bits(*gradients, f"gradients of {names}")
    with torch.no_grad():
        assert_same_bits((drawn.public(**given),), out[:1], "without gradient")
