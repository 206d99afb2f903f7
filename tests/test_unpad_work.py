"""unpad_work: unpad and work_list in one op; on a GPU with csrc in one launch and one copy."""

import pytest
import torch
from torch import Tensor, library

from bert_fast import ops

MASKS = {
    "right": torch.arange(300)[None] < torch.tensor([3, 300, 128, 0, 129, 129])[:, None],
    "left": torch.arange(9)[None] >= torch.tensor([3, 9, 0])[:, None],
    "full": torch.ones(3, 7, dtype=torch.bool),
    "holes": torch.rand(40, 77, generator=torch.Generator().manual_seed(0)) < 0.6,
    "strided": (torch.rand(64, 40, generator=torch.Generator().manual_seed(1)) < 0.6).t(),
    "more rows than a block has threads": torch.arange(4)[None] < torch.arange(1500)[:, None] % 5,
    "no token": torch.zeros(4, 5, dtype=torch.bool),
    "no column": torch.ones(3, 0, dtype=torch.bool),
    "no row": torch.ones(0, 3, dtype=torch.bool),
}


def expected(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lengths = mask.sum(1)
    cu_seqlens = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()
    rows = mask.flatten().nonzero()[:, 0]
    longest = torch.tensor(int(lengths.max()) if mask.shape[0] else 0)
    return rows, cu_seqlens, ops.work_list(cu_seqlens, rows.shape[0]), longest


def assert_found(found: tuple[Tensor, ...], mask: Tensor, device: str) -> None:
    for i, (got, want) in enumerate(zip(found, expected(mask), strict=True)):
        assert got.dtype == want.dtype and torch.equal(got.cpu(), want), i
        assert got.device.type == ("cpu" if i == 3 else device)
        assert got.is_contiguous()


@pytest.mark.parametrize("name", MASKS)
def test_unpad_work(name, device):
    mask = MASKS[name]
    assert_found(ops.unpad_work(mask.to(device)), mask, device)
    rows, _, _, longest = expected(mask)
    known = ops.unpad_work(mask.to(device), rows.shape[0], int(longest))
    assert_found(known, mask, device)
    assert torch.equal(ops.unpad(mask.to(device))[0].cpu(), rows)


def test_refusals():
    with pytest.raises(ValueError, match=r"unpad_work: mask: want \(B, L\) .*got \[3\]"):
        ops.unpad_work(torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match="unpad_work: mask: want bool, got"):
        ops.unpad_work(torch.ones(2, 3))
    with pytest.raises(ValueError, match="want both or neither, got one"):
        ops.unpad_work(torch.ones(2, 3, dtype=torch.bool), num_rows=6)


def test_opcheck():
    op = torch.ops.bert_fast.unpad_work.default
    library.opcheck(op, (MASKS["right"], 128, None, None), test_utils="test_schema")
    args = MASKS["right"], 128, 689, 300
    library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.fixture
def compiled_gpu(device) -> str:
    if device != "cuda":
        pytest.skip("needs an NVIDIA GPU, and there is none")
    if ops.implementations()["unpad_work"]["cuda"].name != "csrc":
        pytest.skip("the extension was not built for CUDA")
    return device


def test_one_launch_and_one_copy(compiled_gpu):
    mask = MASKS["right"].to(compiled_gpu)
    ops.unpad_work(mask)
    with torch.profiler.profile() as profile:
        ops.unpad_work(mask)
    on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    names = sorted(e.name for e in on_gpu)
    assert len([n for n in names if "unpad_kernel" in n]) == 1
    assert len([n for n in names if "memcpy" in n.lower()]) == 1
    assert len(names) == 2, names


def test_nothing_waits_where_the_caller_knows(compiled_gpu):
    mask = MASKS["right"].to(compiled_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = ops.unpad_work(mask, 689, 300)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_found(found, MASKS["right"], compiled_gpu)


def test_a_large_mask(compiled_gpu):
    """8,192 sequences on every multiprocessor, 250 times the same."""
    lengths = torch.randint(0, 129, (8192,))
    mask = torch.arange(128)[None] < lengths[:, None]
    first = ops.unpad_work(mask.to(compiled_gpu))
    assert_found(first, mask, compiled_gpu)
    for _ in range(250):
        again = ops.unpad_work(mask.to(compiled_gpu))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
