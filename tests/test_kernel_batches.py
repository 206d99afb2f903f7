"""A row, and a sequence, is what it is: whatever stands beside it, to the bit."""

import random
from dataclasses import replace
from functools import partial
from itertools import pairwise

import op_cases
import pytest
import torch

pytest.importorskip("triton")

from interpreter_tools import FUNCTIONS, in_interpreter, in_long, some_dtypes, sum_columns
from op_cases import (
    Case,
    assert_same_bits,
    attention_case,
    borders,
    embed_case,
    gelu_case,
    gradients,
    kernel_dtype,
    layer_norm_case,
    linear_case,
    random_gradient,
)

poison = op_cases.poison

# --- rows ----------------------------------------------------------------------------------------

ROW_CASES = {
    "embed": partial(embed_case, D=40, sizes=(90, 70, 2)),
    "embed-rows": partial(embed_case, D=100, with_ids=False),
    "layer_norm": partial(layer_norm_case, D=100, residual=False),
    "add_layer_norm": partial(layer_norm_case, D=33),
    "gelu": partial(gelu_case, D=100),
    "gelu-tanh": partial(gelu_case, D=7, activation="gelu_new"),
    "linear-invariant": partial(linear_case, D=40, F_=33, invariant=True),
    "linear_gelu-invariant": partial(linear_case, D=7, F_=130, activation="gelu", invariant=True),
}
ROW_CASES = {n: make for n, make in ROW_CASES.items() if n.partition("-")[0] in FUNCTIONS}
every_row_case = pytest.mark.parametrize("name", ROW_CASES)
IDS = ("input_ids", "position_ids", "token_type_ids")


def by_row(name: str, case: Case) -> list[str]:
    """The inputs that hold a row for each row of the result."""
    with_rows = ("x", "residual", *IDS, *(("word",) if name == "embed-rows" else ()))
    return [n for n, t in case.inputs.items() if n in with_rows and t is not None]


def assert_rows_stand_alone(name: str, case: Case, chosen: list[list[int]]) -> None:
    """The output and the gradients of chosen rows are those among all rows."""
    dy = random_gradient(case.call())
    whole = gradients(case, case.call, dy)
    inputs = by_row(name, case)
    kept = ["out", *(f"d_{n}" for n in inputs if n in case.leaves)]
    for rows in chosen:
        part = case.with_inputs(**{n: case.inputs[n][rows] for n in inputs})
        got = gradients(part, part.call, dy[rows])
        assert_same_bits({n: got[n] for n in kept}, {n: whole[n][rows] for n in kept})


def some_rows(T: int, rng: random.Random, count: int) -> list[list[int]]:
    """Alone, the first few, and any, in any order, some of them more than once."""
    chosen = [[0], [T - 1], list(range(T // 2))]
    return chosen + [rng.choices(range(T), k=rng.randrange(2, 65)) for _ in range(count)]


@every_row_case
@some_dtypes
def test_a_row_alone(name, dtype, kernel_device):
    case = ROW_CASES[name](T=37).to(dtype, kernel_device)
    assert_rows_stand_alone(name, case, some_rows(37, random.Random(name), 1))


@pytest.mark.long
@every_row_case
@kernel_dtype
@pytest.mark.parametrize("T", [1, 3, 64, 257, 300])
def test_a_row_among_300(name, T, dtype, kernel_device):
    case = ROW_CASES[name](T=T).to(dtype, kernel_device)
    assert_rows_stand_alone(name, case, some_rows(T, random.Random(f"{name} {T}"), 8))


@every_row_case
def test_dropout_knows_the_rows_index_alone(name, kernel_device):
    """The first rows are the same however many follow."""
    if name.startswith(("gelu", "layer_norm", "linear")):
        return
    case = ROW_CASES[name](T=37, p=0.3).to(torch.float32, kernel_device)
    assert_rows_stand_alone(name, case, [[0], list(range(5)), list(range(17))])


@every_row_case
def test_a_foul_row_stays_alone(name, kernel_device):
    """NaN and infinity in a row, and in its gradient, change no bit of the others."""
    case = ROW_CASES[name](T=19).to(torch.float32, kernel_device)
    inputs = [n for n in by_row(name, case) if n in case.leaves]
    if name == "embed":
        case.inputs["input_ids"][7] = 89
        case.inputs["input_ids"][torch.arange(19) != 7] %= 89
    dy = random_gradient(case.call())
    clean = gradients(case, case.call, dy)
    for foul in (torch.nan, torch.inf):
        dirty_dy, changed = dy.clone(), {n: case.inputs[n].clone() for n in inputs}
        if name == "embed":
            changed["word"] = case.inputs["word"].clone()
            changed["word"][89] = foul
        for t in (dirty_dy, *(changed[n] for n in inputs)):
            t[7] = foul
        dirty = gradients(case.with_inputs(**changed), case.with_inputs(**changed).call, dirty_dy)
        others = torch.arange(19, device=kernel_device) != 7
        for n in ("out", *(f"d_{n}" for n in inputs)):
            assert torch.equal(dirty[n][others], clean[n][others]), n
        if name == "embed":
            assert torch.equal(dirty["d_word"][:89], clean["d_word"][:89])


# --- sequences -----------------------------------------------------------------------------------


def parts(found: dict, lengths: list[int]) -> list[dict]:
    """What was found, for each sequence."""
    return [{n: t[a:b] for n, t in found.items()} for a, b in pairwise(borders(lengths).tolist())]


def assert_sequences_stand_alone(case: Case, lengths: list[int], orders: list[list[int]]) -> None:
    """Output and gradient of the chosen sequences, in that order, are those of the batch."""
    dy = random_gradient(case.call())
    whole = parts(gradients(case, case.call, dy), lengths)
    inputs = parts({"qkv": case.inputs["qkv"], "dy": dy}, lengths)
    for order in orders:
        chosen = [lengths[i] for i in order]
        cu_seqlens = borders(chosen).to(dy.device)
        batch = case.with_inputs(
            qkv=torch.cat([inputs[i]["qkv"] for i in order]), cu_seqlens=cu_seqlens
        )
        batch = replace(batch, options=batch.options | {"max_len": max(chosen, default=0)})
        found = gradients(batch, batch.call, torch.cat([inputs[i]["dy"] for i in order]))
        for i, got in zip(order, parts(found, chosen), strict=True):
            assert_same_bits(got, whole[i])


def some_orders(B: int, rng: random.Random, batches: int) -> list[list[int]]:
    alone = [[i] for i in rng.sample(range(B), min(B, 4))]
    return alone + [rng.choices(range(B), k=rng.randrange(2, 65)) for _ in range(batches)]


needs_attention = pytest.mark.skipif("attention" not in FUNCTIONS, reason="no kernel of attention")


@needs_attention
@some_dtypes
def test_a_sequence_alone(dtype, kernel_device):
    lengths = [5, 64, 1, 0, 17, 33, 65, 130, 2, 16]
    case = attention_case(lengths, H=1, K=16).to(dtype, kernel_device)
    orders = [[0], [1], [2], [3], [6, 4, 2], [7, 0], [3, 6, 1, 3, 0, 5, 4, 2, 9, 8]]
    assert_sequences_stand_alone(case, lengths, orders)


@pytest.mark.long
@needs_attention
@kernel_dtype
@pytest.mark.parametrize("number", range(20))
def test_a_sequence_in_200_batches(number, dtype, kernel_device):
    """Alone, and in batches of 2 to 64, at any place."""
    rng = random.Random(number)
    lengths = [rng.choice((0, 1, 7, 16, 33, 64, 65, 127, 129, 200)) for _ in range(10)]
    K = rng.choice((16, 24, 64, 72, 128))
    case = attention_case(lengths, H=1, K=K).to(dtype, kernel_device)
    assert_sequences_stand_alone(case, lengths, some_orders(10, rng, 10))


@needs_attention
@pytest.mark.parametrize("B", [1, 20, *in_long(40, 300)])
def test_many_sequences(B, kernel_device):
    """A batch of 1 to 300 mixed lengths: each is what it is alone."""
    rng = random.Random(B)
    lengths = [rng.choice((0, 1, 2, 3, 5, 9, 17, 33, 65)) for _ in range(B)]
    case = attention_case(lengths, H=1, K=16).to(torch.float32, kernel_device)
    assert_sequences_stand_alone(case, lengths, [[i] for i in rng.sample(range(B), min(B, 6))])


@needs_attention
@pytest.mark.parametrize("p", [0.2, *in_long(0.0)])
def test_a_sequence_knows_its_place_alone(p, kernel_device):
    """With dropout too a sequence is the same whatever the lengths of the others, and max_len."""
    torch.manual_seed(1)
    mine = attention_case((9, 33), H=1, K=16, p=p).to(torch.float32, kernel_device)
    dy = torch.randn(42, 1, 16, device=kernel_device)
    expected = gradients(mine, mine.call, dy)
    for others in ((1,), (70, 0, 130)):
        lengths = (9, 33, *others)
        batch = attention_case(lengths, H=1, K=16, p=p, slack=3).to(torch.float32, kernel_device)
        batch.inputs["qkv"][:42] = mine.inputs["qkv"]
        batch.options["max_len"] = 512
        wide = torch.cat((dy, torch.randn(sum(others) + 3, 1, 16, device=kernel_device)))
        got = gradients(batch, batch.call, wide)
        assert_same_bits({n: t[:42] for n, t in got.items()}, expected)


@needs_attention
@some_dtypes
@pytest.mark.parametrize("foul", [torch.nan, torch.inf, *in_long(-torch.inf)], ids=str)
def test_sequences_do_not_meet(foul, dtype, kernel_device):
    """NaN or infinity in a sequence and in rows of none changes no bit of the others."""
    lengths = (5, 40, 0, 9, 65)
    case = attention_case(lengths, H=1, K=16, slack=4).to(dtype, kernel_device)
    qkv, dy = case.inputs["qkv"], torch.randn(123, 1, 16).to(kernel_device, dtype)
    clean = gradients(case, case.call, dy)
    row = torch.arange(123, device=kernel_device)
    bad = ((row >= 5) & (row < 45)) | (row >= 119)
    dirty = case.with_inputs(qkv=torch.where(bad[:, None, None, None], foul, qkv))
    dirty = gradients(dirty, dirty.call, torch.where(bad[:, None, None], foul, dy))
    for name, value in clean.items():
        assert torch.equal(dirty[name][~bad], value[~bad]), name
        assert dirty[name][5:45].isnan().any(-1).all(), name  # what is foul shows
        assert not dirty[name][119:].any() and not value[119:].any(), name


# --- the technique sees what it is for -----------------------------------------------------------


class _Planted(torch.autograd.Function):
    """The sum of each row, in tiles whose width is set by how many rows there are."""

    @staticmethod
    def forward(ctx, x, depends):
        ctx.width = x.shape[1]
        y = torch.empty(x.shape[0])
        tile = 16 if depends and x.shape[0] < 8 else 64
        sum_columns[(x.shape[0],)](x, y, x.shape[1], BLOCK=tile)
        return y[:, None]

    @staticmethod
    def backward(ctx, dy):
        return dy.expand(-1, ctx.width).clone(), None


@in_interpreter
@pytest.mark.parametrize("depends", [False, True])
def test_a_tile_that_depends_on_the_batch_shows(depends):
    case = Case(lambda x: _Planted.apply(x, depends), None, {"x": torch.randn(67, 100)})
    chosen = some_rows(67, random.Random(0), 2)
    if not depends:
        return assert_rows_stand_alone("planted", case, chosen)
    with pytest.raises(AssertionError, match="out: "):
        assert_rows_stand_alone("planted", case, chosen)
