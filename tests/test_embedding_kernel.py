"""The kernels of embed: in Triton's interpreter here, compiled where there is a GPU."""

import op_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    DATA,
    Case,
    assert_same_bits,
    check,
    embed_case,
    gradients,
    kernel_dtype,
)

from bert_fast import reference

poison = op_cases.poison
IDS = ("input_ids", "position_ids", "token_type_ids")
TABLES = ("word", "position", "type_")


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 4 entries, 2 rows and 2 partial sums at a time, 8 columns in a program."""
    from bert_fast.kernels import embedding_tables

    monkeypatch.setattr(embedding_tables, "CHUNKS", {80: ((0, 4, 2),)})
    monkeypatch.setattr(embedding_tables, "TABLE_COLUMNS", 8)
    monkeypatch.setattr(embedding_tables, "JOINED_ROWS", 2)


# --- shapes --------------------------------------------------------------------------------------

SHAPES = [
    (0, 64, (11, 7, 2)),  # no rows
    (1, 1, (1, 1, 1)),  # the smallest: its variance is 0
    (1, 7, (11, 7, 2)),  # fewer columns than one call of Philox makes bits for
    (3, 100, (11, 7, 5)),  # D is no power of two
    (17, 64, (11, 7, 2)),  # a tile of rows, and one row left over
    (5, 260, (3000, 7, 2)),  # a table large enough for small chunks; two programs for its columns
    (2, 1025, (11, 7, 2)),  # one column past a power of two
]


@kernel_dtype
@pytest.mark.parametrize("with_ids", [True, False], ids=["ids", "rows"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(shape, with_ids, dtype, kernel_device):
    T, D, sizes = shape
    check(embed_case(T, D, sizes=sizes, with_ids=with_ids).to(dtype, kernel_device))


@kernel_dtype
@pytest.mark.parametrize("data", DATA[1:])
def test_data(data, dtype, kernel_device):
    check(embed_case(9, 33, data=data).to(dtype, kernel_device))


@kernel_dtype
@pytest.mark.parametrize("p", [0.1, 1.0])
@pytest.mark.parametrize("with_ids", [True, False], ids=["ids", "rows"])
def test_dropout(with_ids, p, dtype, kernel_device):
    check(embed_case(19, 20, with_ids=with_ids, p=p, site=5).to(dtype, kernel_device))


@kernel_dtype
def test_far_from_zero(dtype, kernel_device):
    """A variance made of sums of squares would lose all its digits."""
    case = embed_case(5, 768)
    check(case.with_inputs(word=case.inputs["word"] + 1000).to(dtype, kernel_device))


@kernel_dtype
def test_eps(dtype, kernel_device):
    case = embed_case(9, 24, eps=1e-3)
    small = {name: 1e-2 * case.inputs[name] for name in TABLES}
    check(case.with_inputs(**small).to(dtype, kernel_device))


@pytest.mark.parametrize("norm", [torch.float16, torch.float32], ids=str)
def test_mixed_dtypes(norm, kernel_device):
    """LayerNorm's parameters, and one table, in another dtype than the rest."""
    tables = torch.float32 if norm == torch.float16 else torch.float16
    case = embed_case(9, 24).to(tables, kernel_device)
    check(case.with_inputs(**{name: case.inputs[name].to(norm) for name in ("w", "b")}))
    check(case.with_inputs(position=case.inputs["position"].float()))


@pytest.mark.long
@kernel_dtype
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("with_ids", [True, False], ids=["ids", "rows"])
@pytest.mark.parametrize(
    "shape", [(40, 768, (3000, 512, 2)), (300, 33, (3, 2, 1)), (3, 8192, (4, 3, 2))], ids=str
)
def test_formula_of_more(shape, with_ids, p, dtype, kernel_device):
    T, D, sizes = shape
    case = embed_case(T, D, sizes=sizes, with_ids=with_ids, p=p, pad_id=0)
    check(case.to(dtype, kernel_device))


def draw_and_check(data, device):
    T, D = data.draw(st.integers(0, 13)), data.draw(st.integers(1, 20))
    sizes = tuple(data.draw(st.integers(1, 9)) for _ in range(3))
    case = embed_case(
        T,
        D,
        sizes=sizes,
        with_ids=data.draw(st.booleans()),
        ids_dtype=data.draw(st.sampled_from([torch.int32, torch.int64])),
        pad_id=data.draw(st.sampled_from([None, 0, sizes[0] - 1])),
        p=data.draw(st.sampled_from([0.0, 0.4])),
        data=data.draw(st.sampled_from(DATA)),
    )
    check(case.to(data.draw(st.sampled_from(op_cases.KERNEL_DTYPES)), device))


@pytest.mark.parametrize("examples", [8, pytest.param(300, marks=pytest.mark.long)])
def test_drawn(examples, kernel_device, small_chunks):
    options = settings(derandomize=True, max_examples=examples, deadline=None, database=None)
    options(given(data=st.data())(draw_and_check))(device=kernel_device)


# --- the gradients of the tables -----------------------------------------------------------------

# Lengths of the runs of equal ids, in chunks of 4.
RUNS = {
    "one": (1,),
    "distinct": (1,) * 9,
    "equal": (23,),  # one run crosses every border, and ends within a chunk
    "equal to the end": (24,),
    "a chunk": (4,),
    "chunks": (4, 4, 4),  # runs begin and end on borders
    "past a border": (5, 4, 3),
    "across one": (3, 2, 3),
    "across one to the next": (3, 5, 4),  # ends on a border
    "from a border across many": (4, 13, 2),
    "across many": (2, 15, 1, 1, 6, 2),
    "one after the other": (6, 6, 6, 6),  # one run enters a chunk, the next leaves it
    "one left over": (4, 4, 1),
}


def case_of_runs(lengths: tuple[int, ...], name: str) -> Case:
    """An embed in which the ids of one table come in runs of these lengths, shuffled."""
    ids = torch.repeat_interleave(torch.arange(len(lengths)) * 2, torch.tensor(lengths))
    T, rows = len(ids), 2 * len(lengths) + 1  # every second row of the table has no run
    sizes = tuple(rows if n == name else 3 for n in IDS)
    return embed_case(T, 5, sizes=sizes).with_inputs(**{name: ids[torch.randperm(T)]})


@pytest.mark.parametrize("lengths", RUNS.values(), ids=RUNS)
def test_runs(lengths, kernel_device, small_chunks):
    check(case_of_runs(lengths, "input_ids").to(torch.float32, kernel_device))


@kernel_dtype
def test_runs_of_every_dtype(dtype, kernel_device, small_chunks):
    check(case_of_runs(RUNS["across many"], "input_ids").to(dtype, kernel_device))


@pytest.mark.parametrize("name", IDS[1:])
def test_runs_of_the_other_tables(name, kernel_device, small_chunks):
    check(case_of_runs((2, 15, 1, 6), name).to(torch.float32, kernel_device))


@pytest.mark.parametrize("pad_id", [0, 2, 6, 1], ids=["first", "long", "last", "unused"])
def test_padding_row(pad_id, kernel_device, small_chunks):
    """Its run lies in one chunk or in many; all else has the bits it has without padding."""
    case = case_of_runs((3, 14, 2, 5), "input_ids").to(torch.float32, kernel_device)
    dy = torch.randn(24, 5, device=kernel_device)
    plain = gradients(case, case.call, dy)
    case.options["pad_id"] = pad_id
    padded = gradients(case, case.call, dy)
    assert not padded["d_word"][pad_id].any()
    plain["d_word"][pad_id] = 0
    assert_same_bits(padded, plain)


def test_rows_nobody_uses(kernel_device, small_chunks):
    case = case_of_runs((3, 14, 2, 5), "input_ids").to(torch.float32, kernel_device)
    d_word = gradients(case, case.call)["d_word"]
    assert not d_word[1::2].any()
    assert d_word[::2].any(-1)[:4].all()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_types(size, kernel_device, small_chunks):
    """A few rows take everything."""
    check(embed_case(37, 3, sizes=(9, 9, size)).to(torch.float32, kernel_device))


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 2, 5, 512, 3000])
def test_sums_over_many_tokens(size, kernel_device):
    """More partial sums than are read at once, in the chunks of the launch rule."""
    from bert_fast.kernels.embedding_tables import table_gradient

    dz = torch.randn(5000, 3, device=kernel_device) + 0.5
    ids = torch.randint(0, size, (5000,), device=kernel_device)
    got = table_gradient(dz, ids, torch.empty(size, 3, device=kernel_device), -1)
    exact = torch.zeros(size, 3, dtype=torch.float64, device=kernel_device)
    exact.index_add_(0, ids, dz.double())
    longest = int(ids.bincount().max())
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=5e-6 * longest**0.5)


def test_order_of_a_run_is_that_of_its_tokens(kernel_device, small_chunks):
    """Whatever tokens of other ids lie between: with the same chunks the same bits."""
    case = embed_case(14, 9, sizes=(1, 1, 1)).to(torch.float32, kernel_device)
    dy = torch.randn(14, 9, device=kernel_device)
    alone = gradients(case, case.call, dy)["d_word"]
    where = torch.tensor([0, 1, 2, 5, 6, 9, 11, 12, 13, 14, 15, 18, 20, 21], device=kernel_device)
    ids = torch.ones(22, dtype=torch.int64, device=kernel_device)
    ids[where] = 0
    among = embed_case(22, 9, sizes=(2, 1, 1)).to(torch.float32, kernel_device)
    word = torch.cat([case.inputs["word"], among.inputs["word"][1:]])
    same = {name: case.inputs[name] for name in ("position", "type_", "w", "b")}
    among = among.with_inputs(input_ids=ids, word=word, **same)
    dy_among = torch.randn(22, 9, device=kernel_device)
    dy_among[where] = dy
    assert torch.equal(gradients(among, among.call, dy_among)["d_word"][0], alone[0])


def test_int32_ids_are_int64_ids(kernel_device, small_chunks):
    case = embed_case(11, 5).to(torch.float32, kernel_device)
    dy = torch.randn(11, 5, device=kernel_device)
    narrow = case.with_inputs(**{name: case.inputs[name].int() for name in IDS})
    assert_same_bits(gradients(narrow, narrow.call, dy), gradients(case, case.call, dy))


@kernel_dtype
def test_sum_is_rounded_once(dtype, kernel_device):
    """1 and many numbers that are nothing beside it, but something together: no sum in 16 bits."""
    T = 149  # two chunks; the sum of either, rounded to fp16, would make theirs another
    rows = torch.full((T, 2), 2.0**-13, device=kernel_device)
    rows[0], rows[1] = 1, 0
    ids = torch.zeros(T, dtype=torch.int64, device=kernel_device)
    from bert_fast.kernels.embedding_tables import table_gradient

    table = torch.empty(2, 2, dtype=dtype, device=kernel_device)
    got = table_gradient(rows, ids, table, -1)
    assert torch.equal(got[0], rows.double().sum(0).to(dtype))
    assert not got[1].any()


def test_what_is_summed_was_not_rounded(kernel_device):
    """Of two gradients that nearly cancel: what is left is right to 16 bits."""
    case = embed_case(2, 24, sizes=(1, 1, 1)).to(torch.float16, kernel_device)
    dy = torch.randn(1, 24, device=kernel_device)
    dy = torch.cat([dy, 2**-10 - dy]).half()
    wide = case.to(torch.float32)
    expected = gradients(wide, wide.call, dy)
    for name, got in gradients(case, case.call, dy).items():
        error = (got.float() - expected[name]).norm()
        assert error < 2e-2 * expected[name].norm(), name


# --- ids out of range ----------------------------------------------------------------------------


def raw(case: Case, dy: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """(y, z, mean, rstd) and (dword, dposition, dtype, dw, db) of the ops below the checks."""
    ids = [case.inputs[name] for name in IDS]
    tables = [case.inputs[name] for name in TABLES]
    w, b = case.inputs["w"], case.inputs["b"]
    p, seed = case.dropout.get("p", 0.0), case.dropout.get("seed")
    ops = torch.ops.bert_fast
    out = ops.embed(*ids, *tables, w, b, 1e-12, p, seed, 0, w.dtype)
    return out, ops.embed_bwd(dy, *ids, *tables, w, *out[1:], -1, p, seed, 0)


@pytest.mark.parametrize(
    ("name", "value", "p"),
    [
        ("input_ids", -1, 0.3),
        ("input_ids", "size", 0.0),
        ("input_ids", 2**62, 0.0),
        ("input_ids", -(2**63), 0.0),
        ("position_ids", "size", 0.3),
        ("position_ids", -1, 0.0),
        ("token_type_ids", "size", 0.0),
        ("token_type_ids", -(2**31) - 1, 0.0),
    ],
)
def test_ids_out_of_range(name, value, p, kernel_device, small_chunks):
    """The row is NaN, all others keep their bits; it adds to no gradient."""
    case = embed_case(9, 5, p=p).to(torch.float32, kernel_device)
    dy = torch.randn(9, 5, device=kernel_device)
    clean, _ = raw(case, dy)
    bad = case.inputs[name].clone()
    bad[4] = case.inputs[TABLES[IDS.index(name)]].shape[0] if value == "size" else value
    out, grads = raw(case.with_inputs(**{name: bad}), dy)
    others = torch.arange(9, device=kernel_device) != 4
    for got, expected in zip(out, clean, strict=True):
        assert got[4].isnan().all()
        assert torch.equal(got[others], expected[others])
    dy[4] = 0  # what a row without part in any gradient is
    _, expected = raw(case, dy)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_position_out_of_range_beside_rows(kernel_device):
    """Of rows given in place of ids, the bad one's gradient is 0."""
    case = embed_case(5, 12, with_ids=False).to(torch.float32, kernel_device)
    positions = case.inputs["position_ids"].clone()
    positions[2] = 7
    dy = torch.randn(5, 12, device=kernel_device)
    out, grads = raw(case.with_inputs(position_ids=positions), dy)
    assert out[0].isnan().all(-1).tolist() == [False, False, True, False, False]
    assert not grads[0][2].any() and grads[0][[0, 1, 3, 4]].any(-1).all()
    assert all(g.isfinite().all() for g in grads)


def test_every_id_out_of_range(kernel_device, small_chunks):
    case = embed_case(9, 5).to(torch.float32, kernel_device)
    ids = torch.tensor([-5] * 5 + [11] * 4, device=kernel_device)
    out, grads = raw(case.with_inputs(input_ids=ids), torch.randn(9, 5, device=kernel_device))
    assert out[0].isnan().all()
    assert not any(g.any() for g in grads)


# --- what all kernels share ----------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_row_does_not_depend_on_the_others(p, kernel_device):
    """Without dropout, whose counters are the row's, its bits are those of a batch of one."""
    case = embed_case(18, 40, p=p).to(torch.float32, kernel_device)
    whole = case.call()
    first = {name: case.inputs[name][:1] for name in IDS}
    assert torch.equal(case.call(**first), whole[:1])
    if p == 0:
        last = {name: case.inputs[name][17:] for name in IDS}
        assert torch.equal(case.call(**last), whole[17:])


def test_same_bits_twice(kernel_device, small_chunks):
    case = embed_case(14, 5, sizes=(3, 2, 1), p=0.3).to(torch.float16, kernel_device)
    dy = torch.randn(14, 5, device=kernel_device)
    assert_same_bits(gradients(case, case.call, dy), gradients(case, case.call, dy))


def test_saved_is_the_reference_s(kernel_device):
    """z, mean and rstd of the raw op, which the backward of either implementation may be given."""
    case = embed_case(9, 24, p=0.3).to(torch.float32, kernel_device)
    args = [case.inputs[n] for n in (*IDS, *TABLES, "w", "b")]
    args += [1e-12, 0.3, case.dropout["seed"], 0, torch.float32]
    for got, want in zip(torch.ops.bert_fast.embed(*args), reference.embed(*args), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("D", "dtype", "got"),
    [(8193, torch.float32, "D: want 1 to 8192"), (4, torch.float64, "float64")],
)
def test_unsupported(D, dtype, got, kernel_device):
    case = embed_case(2, D).to(dtype, kernel_device)
    with pytest.raises(NotImplementedError, match="embed: ") as caught:
        case.call()
    assert got in str(caught.value) and "want " in str(caught.value)
