"""embed against torch.nn.functional.embedding and layer_norm."""

import op_cases
import pytest
import torch
from op_cases import (
    DATA,
    assert_refused,
    assert_same_bits,
    check,
    embed_case,
    every_dtype,
    gradients,
)

poison = op_cases.poison
SHAPES = [
    (0, 64, (11, 7, 2)),  # no rows
    (1, 5, (1, 1, 1)),  # one row in each table
    (1, 64, (11, 7, 2)),  # one row
    (3, 100, (11, 7, 2)),  # D is no power of two
    (40, 768, (1000, 64, 2)),  # BERT-base; most rows of the table get no gradient
    (257, 33, (3, 2, 1)),  # many tokens add to each row
]


@every_dtype
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("with_ids", [True, False], ids=["ids", "rows"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(shape, with_ids, data, dtype, device):
    T, D, sizes = shape
    case = embed_case(T, D, sizes=sizes, with_ids=with_ids, data=data)
    check(case.to(dtype, device))


@every_dtype
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("with_ids", [True, False], ids=["ids", "rows"])
def test_dropout(with_ids, p, dtype, device):
    check(embed_case(19, 100, with_ids=with_ids, p=p).to(dtype, device))


@every_dtype
@pytest.mark.parametrize("eps", [1e-12, 1e-3])
def test_eps(eps, dtype, device):
    case = embed_case(9, 64, eps=eps)
    small = {name: 1e-2 * case.inputs[name] for name in ("word", "position", "type_")}
    check(case.with_inputs(**small).to(dtype, device))


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
def test_padding_row_gets_no_gradient(ids_dtype, device):
    case = embed_case(40, 24, sizes=(5, 7, 2), ids_dtype=ids_dtype, pad_id=3)
    check(case.to(torch.float32, device))
    out = gradients(case, case.call)
    assert (case.inputs["input_ids"] == 3).any()
    assert not out["d_word"][3].any()
    assert out["d_word"][[0, 1, 2, 4]].any(-1).all()


def test_padding_row_matters_to_word_alone():
    """Positions and types of a token that is padding count; so do rows given in place of ids."""
    case = embed_case(40, 24, sizes=(5, 7, 2))
    dy = torch.randn(40, 24)
    plain, padded = gradients(case, case.call, dy), None
    case.options["pad_id"] = 3
    padded = gradients(case, case.call, dy)
    padded["d_word"] = plain["d_word"]
    assert_same_bits(padded, plain)
    rows = embed_case(40, 24, with_ids=False, pad_id=0)
    assert gradients(rows, rows.call, dy)["d_word"].any(-1).all()


def test_int32_ids_are_int64_ids():
    case = embed_case(20, 24)
    dy = torch.randn(20, 24)
    ids = {n: t.int() for n, t in case.inputs.items() if n.endswith("_ids")}
    narrow = case.with_inputs(**ids)
    assert_same_bits(gradients(narrow, narrow.call, dy), gradients(case, case.call, dy))


def test_rows_without_ids_are_the_rows_of_ids():
    case = embed_case(20, 24)
    rows = {"input_ids": None, "word": case.inputs["word"][case.inputs["input_ids"]]}
    assert torch.equal(case.call(**rows), case.call())


@pytest.mark.parametrize(
    ("tables", "norm"),
    [
        (torch.bfloat16, torch.float32),  # LayerNorm kept in fp32
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
def test_mixed_dtypes(tables, norm, device):
    case = embed_case(33, 100).to(tables, device)
    check(case.with_inputs(**{name: case.inputs[name].to(norm) for name in ("w", "b")}))


@pytest.mark.parametrize(
    ("name", "value", "got"),
    [
        ("input_ids", 11, "input_ids: want 0 to 10, got 11 at 2"),
        ("input_ids", -1, "input_ids: want 0 to 10, got -1 at 2"),
        ("position_ids", 7, "position_ids: want 0 to 6, got 7 at 2"),
        ("position_ids", -(2**31), "got -2147483648 at 2"),
        ("token_type_ids", 2, "token_type_ids: want 0 to 1, got 2 at 2"),
    ],
)
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
def test_ids_out_of_range(name, value, got, ids_dtype):
    case = embed_case(ids_dtype=ids_dtype)
    ids = case.inputs[name].clone()
    ids[2] = value
    assert_refused(ValueError, "embed", got, lambda: case.call(**{name: ids}))


@pytest.mark.parametrize(
    ("change", "error", "got"),
    [
        ({"input_ids": torch.zeros(5)}, TypeError, "input_ids: want int64 or int32, got torch.f"),
        ({"input_ids": torch.zeros(5).bool()}, TypeError, "got torch.bool"),
        ({"position_ids": torch.zeros(5).to(torch.uint8)}, TypeError, "got torch.uint8"),
        ({"token_type_ids": torch.zeros(5).short()}, TypeError, "token_type_ids: want"),
        ({"position_ids": torch.zeros(4).long()}, ValueError, "position_ids: want (T,) [5], got"),
        ({"token_type_ids": torch.zeros(1).long()}, ValueError, "got [1]"),  # would broadcast
        ({"token_type_ids": torch.zeros(()).long()}, ValueError, "got []"),
        ({"input_ids": torch.zeros(()).long()}, ValueError, "got []"),
        ({"input_ids": torch.zeros(5, 1).long()}, ValueError, "got [5, 1]"),
        ({"word": torch.ones(11, 13)}, ValueError, "word: want (rows, D) [*, 12], got [11, 13]"),
        ({"word": torch.ones(12)}, ValueError, "got [12]"),
        ({"position": torch.ones(7, 1)}, ValueError, "position: want (rows, D) [*, 12], got [7"),
        ({"type_": torch.ones(2, 3, 4)}, ValueError, "got [2, 3, 4]"),
        ({"w": torch.ones(())}, ValueError, "got []"),
        ({"b": torch.ones(1, 12)}, ValueError, "b: want (D,) [12], got [1, 12]"),
        ({"input_ids": None, "word": torch.ones(4, 12)}, ValueError, "[4], got [5]"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused(change, error, got):
    case = embed_case()
    assert_refused(error, "embed", got, lambda: case.call(**change))
