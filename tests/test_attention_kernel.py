"""Attention kernels: both forms in fp32, their rules and plan; what ops share is elsewhere.

In fp32 all sequences stream, so that the form for short ones would be seen in 16 bits only, where
an error of 0.1 % does not show: here the rules are changed, and it is proved in fp32 as well.
"""

from collections.abc import Callable, Iterator
from functools import partial

import op_cases
import pytest
import torch
from op_cases import (
    assert_refused,
    assert_same_bits,
    attention_case,
    borders,
    check,
    gradients,
    kernel_dtype,
    rows,
)

from bert_fast import ops, reference
from bert_fast.ops.work_list import TILE

poison = op_cases.poison
FP32_SHORT = {  # what fp16 has, in tiles that fp32 can be run in
    "attention": {"BLOCK_M": 64, "num_warps": 4, "num_stages": 1},
    "attention_bwd": {"BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
}


@pytest.fixture(params=["rules", "short"])
def form(request, monkeypatch) -> str:
    """As the rules say, or with the form for short sequences in every dtype and head size."""
    from bert_fast.kernels import attention, attention_bwd

    if request.param == "short":
        for module in (attention, attention_bwd):
            rule = FP32_SHORT[module.__name__.rpartition(".")[2]]
            for key in module.SHORT[80]:
                monkeypatch.setitem(module.SHORT[80], key, rule)
    return request.param


CASES = [  # lengths, p
    ((1,), 0.0),  # smallest: the probability is 1
    ((31, 32, 33), 0.0),  # around the smallest tile
    ((63, 64, 65), 0.3),  # around the next
    ((127, 128), 0.0),  # the longest short ones
    ((129,), 0.3),  # the shortest long one: two tiles, one row in the second
    ((128 + 31, 0, 5), 0.0),  # tails of tiles of rows and of keys
    ((0, 0, 3, 0), 0.3),  # borders that repeat
]


@kernel_dtype
@pytest.mark.parametrize(("lengths", "p"), CASES, ids=str)
def test_formula(lengths, p, dtype, form, kernel_device):
    case = attention_case(lengths, H=1, K=16, slack=2, p=p)
    check(case.to(dtype, kernel_device), norm=1.5)


@kernel_dtype
@pytest.mark.parametrize("K", [8, 16, 24, 32, 40, 48, 64, 72, 80, 96, 104, 128])
def test_every_head_size(K, dtype, form, kernel_device):
    check(attention_case((1, 33), H=2, K=K).to(dtype, kernel_device), norm=1.5)


@kernel_dtype
@pytest.mark.parametrize("data", ["wide", "outliers"])
def test_data(data, dtype, form, kernel_device):
    case = attention_case((5, 70, 0), H=3, K=24, data=data, p=0.1)
    check(case.to(dtype, kernel_device), norm=1.5)


@pytest.mark.long
@kernel_dtype
@pytest.mark.parametrize("first", range(1, 131, 10))
def test_every_length(first, dtype, form, kernel_device):
    lengths = tuple(range(first, first + 10))
    check(attention_case(lengths, H=1, K=16, p=0.1).to(dtype, kernel_device), norm=1.5)


@pytest.mark.long
@kernel_dtype
def test_long_sequences(dtype, kernel_device):
    lengths = (511, 1, 512, 513)
    check(attention_case(lengths, H=1, K=64, p=0.1).to(dtype, kernel_device), norm=1.5)


@pytest.mark.parametrize("largest", [2e4, 6e4])
def test_large_scores(largest, form, kernel_device):
    """Rescaling, maxima and the log-sum-exp hold where a score is 6e4."""
    case = attention_case((7, 133), H=1, K=16)
    case.inputs["qkv"][:, :2] *= (largest / 16) ** 0.5
    case = case.to(torch.float16, kernel_device)
    check(case, norm=1.5)


def test_growing_scores(form, kernel_device):
    """Each key scores higher than all before it: every step rescales all that was summed."""
    case = attention_case((150,), H=1, K=16)
    qkv = case.inputs["qkv"]
    qkv[:, 0] = 1.0
    qkv[:, 1] = torch.linspace(-40, 40, 150)[:, None, None] / 4
    check(case.to(torch.float32, kernel_device), norm=1.5)


@kernel_dtype
def test_the_forms_agree(dtype, kernel_device, monkeypatch):
    """Within the rule of the dtype: they are other sums of the same numbers."""
    from bert_fast.kernels import attention, attention_bwd

    case = attention_case((90, 33), H=1, K=16, p=0.2).to(dtype, kernel_device)
    dy = torch.randn_like(case.call())
    found = []
    for short in (True, False):
        for module in (attention, attention_bwd):
            rule = FP32_SHORT[module.__name__.rpartition(".")[2]] if short else None
            for key in module.SHORT[80]:
                monkeypatch.setitem(module.SHORT[80], key, rule)
        found.append(gradients(case, case.call, dy))
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=tolerance, atol=tolerance)


@kernel_dtype
def test_the_work_list_may_come_from_outside(dtype, form, kernel_device):
    case = attention_case((33, 129, 0, 7), H=1, K=8, slack=1).to(dtype, kernel_device)
    dy = torch.randn_like(case.call())
    made_inside = gradients(case, case.call, dy)
    case.options["work"] = ops.work_list(case.inputs["cu_seqlens"], case.inputs["qkv"].shape[0])
    assert_same_bits(gradients(case, case.call, dy), made_inside)


def launched(monkeypatch, qkv, cu_seqlens, max_len, **options) -> dict[str, int]:
    """Programs of each kernel that a forward and a backward launch."""
    from bert_fast.kernels import common

    found = {}
    launch = common.launch

    def recorded(kernel, grid, *args, **kwargs):
        found[kernel.fn.__name__] = grid[0]
        launch(kernel, grid, *args, **kwargs)

    monkeypatch.setattr(common, "launch", recorded)
    qkv = qkv.requires_grad_()
    ops.attention(qkv, cu_seqlens, max_len, **options).sum().backward()
    return {name: programs for name, programs in found.items() if name != "_work_list_kernel"}


def test_launches_of_one_length(monkeypatch, kernel_device):
    """Sequences of one length, which the host knows: not a program too many that streams."""
    qkv = rows(512, 3 * 2 * 8).view(512, 3, 2, 8).half().to(kernel_device)
    short = launched(monkeypatch, qkv, borders((128,) * 4).to(kernel_device), 128)
    assert short.pop("_attention_short_fwd_kernel") == (4 + 1) * 2
    assert short.pop("_attention_short_bwd_kernel") == (4 + 1) * 2
    assert not any(short.values())
    long = launched(monkeypatch, qkv, borders((256,) * 2).to(kernel_device), 256)
    assert long["_attention_long_fwd_kernel"] == 2 * 2 * 2
    assert long["_attention_long_bwd_kv_kernel"] == 2 * 4 * 2


@kernel_dtype
@pytest.mark.parametrize(
    ("lengths", "slack"), [((140, 40), 100), ((140,), 20), ((40, 90), 50)], ids=str
)
def test_rows_that_make_up_equal_lengths(lengths, slack, dtype, kernel_device):
    """B max_len is T, yet the lengths differ: rows of no sequence fill up. All is written."""
    case = attention_case(lengths, H=1, K=8, slack=slack)
    case.options["max_len"] = (sum(lengths) + slack) // len(lengths)
    check(case.to(dtype, kernel_device), norm=1.5)


def test_a_work_list_of_another_batch_is_refused():
    case = attention_case((5, 9))
    for work in (ops.work_list(borders((5, 9, 1)), 15), ops.work_list(borders((14,)), 14)):
        got = f"work: want (2 + T // 128 + B, 4) [4, 4], got {[*work.shape]}"
        assert_refused(ValueError, "attention", got, lambda work=work: case.call(work=work))
    work = torch.zeros(4, 4, dtype=torch.int64)
    got = "work: want int32, got torch.int64"
    assert_refused(TypeError, "attention", got, lambda: case.call(work=work))


@pytest.mark.parametrize(
    "lengths",
    [(1,) * 200, (129,) * 3, (129, 1, 1), (256, 255, 1), (385,), (130, 0, 0, 3)],
    ids=lambda lengths: str(lengths[:6]),
)
def test_no_entry_is_without_a_program(lengths, kernel_device):
    """However the rows are cut: the grids, made of T, B and a bound, hold every entry."""
    from bert_fast.kernels import attention, attention_bwd
    from bert_fast.kernels.attention_tiles import Plan

    cu_seqlens = borders(lengths).to(kernel_device)
    T = sum(lengths)
    work = ops.work_list(cu_seqlens, T)
    count, in_sequences, long, _ = work[0].tolist()
    for dtype in (torch.float16, torch.float32):
        qkv = torch.zeros(T, 3, 2, 16, dtype=dtype)
        for rules in (attention.SHORT, attention_bwd.SHORT):
            for max_len in (max(lengths), 512):
                plan = Plan(qkv, cu_seqlens, max_len, TILE, rules, 0.0, None, False)
                streamed = in_sequences if plan.flags["STREAM_ALL"] else long
                assert plan.num_streamed >= streamed
                assert plan.num_short >= count - streamed


def test_the_log_sum_exp(form, kernel_device):
    """The reference's, which either's backward may be given; 0 in rows of no sequence."""
    case = attention_case((5, 0, 40, 130), K=16, slack=3).to(torch.float32, kernel_device)
    args = case.inputs["qkv"], case.inputs["cu_seqlens"], 130, 0.0, None, 0
    found = torch.ops.bert_fast.attention(*args)
    torch.testing.assert_close(found, reference.attention(*args), rtol=1e-5, atol=1e-5)
    assert not found[1][:, -3:].any()


@pytest.fixture
def fp32_precision() -> Iterator[Callable[[str], None]]:
    """Sets how PyTorch's products of fp32 on a GPU may round, for one test."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield partial(setattr, matmul, "fp32_precision")
    matmul.fp32_precision = before


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_tf32_is_as_pytorch_has_it(precision, fp32_precision, monkeypatch, kernel_device):
    """Products of fp32 round their operands only where PyTorch's own may."""
    from bert_fast.kernels import common

    found = set()
    monkeypatch.setattr(common, "launch", lambda *_, **options: found.add(options.get("PRECISION")))
    fp32_precision(precision)
    case = attention_case((140, 5), K=16).to(torch.float32, kernel_device)
    gradients(case, case.call)
    assert found - {None} == {precision}  # None: the work list, and delta
