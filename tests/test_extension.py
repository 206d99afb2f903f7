"""The compiled ops against one line of PyTorch each."""

import random

import pytest
import torch

from bert_fast import ops

unpad = torch.ops.bert_fast.unpad.default  # no checks in front of it but its own
pytestmark = pytest.mark.usefixtures("compiled")


def want(mask):
    """Rows, cu_seqlens and max_len by indexing alone."""
    lengths = [int(row.count_nonzero()) for row in mask]
    cu_seqlens = torch.tensor([sum(lengths[:b]) for b in range(len(lengths) + 1)])
    rows = mask.flatten().nonzero()[:, 0]
    return rows, cu_seqlens.int(), torch.tensor(max(lengths, default=0))


def check(mask):
    names = ("rows", "cu_seqlens", "max_len")
    for name, got, expected in zip(names, unpad(mask), want(mask), strict=True):
        assert got.dtype == expected.dtype and got.device.type == "cpu", name
        assert torch.equal(got, expected), f"{name}: {got} for {mask.int()}"
        assert got.is_contiguous()


def lengths_mask(lengths, L, left=False):
    columns = torch.arange(L)
    lengths = torch.tensor(lengths)[:, None]
    return columns >= L - lengths if left else columns < lengths


def test_module_names_what_it_registers(compiled):
    names = "add_layer_norm attention bias_gelu embed".split()
    names += [f"{name}_bwd" for name in names] + "adamw_ grad_norm lamb_".split()
    names += "column_sums linear_gelu unpad".split()
    assert sorted(compiled.cpu_ops()) == sorted(names)
    for name in compiled.cpu_ops():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bert_fast::{name}", "CPU")
        assert ops.implementations()[name]["cpu"].name == "csrc"


@pytest.mark.parametrize(
    "mask",
    [
        lengths_mask([3, 1, 5], 5),
        lengths_mask([3, 1, 5], 5, left=True),
        lengths_mask([4, 4], 4),  # nothing padded
        lengths_mask([0, 3, 0, 0, 2, 0], 3),  # rows without a token first, last and between
        lengths_mask([0, 0], 3),
        lengths_mask([1], 1),
        lengths_mask([0], 1),
        torch.tensor([[1, 0, 1, 0, 1], [0, 1, 1, 0, 0]]).bool(),  # holes
        torch.tensor([[0, 0, 0, 1], [1, 0, 0, 0]]).bool(),  # the last column, the first
        torch.tensor([[2, 0, 255], [0, 128, 1]], dtype=torch.uint8).view(torch.bool),
        torch.ones(3, 0, dtype=torch.bool),
        torch.ones(0, 3, dtype=torch.bool),
        torch.ones(0, 0, dtype=torch.bool),
    ],
)
def test_unpad(mask):
    check(mask)


STRIDED = {
    "transposed": lambda m: m.t(),
    "every other column": lambda m: m[:, ::2],
    "every third row": lambda m: m[::3],
    "columns inside": lambda m: m[:, 3:-2],
    "one row for all": lambda m: m[:1].expand(7, -1),
    "one column for all": lambda m: m[:, :1].expand(-1, 7),
    "one value for all": lambda m: m[:1, :1].expand(3, 4),
    "of a 3-D mask": lambda m: m[:, None].expand(-1, 2, -1)[:, 1],
    "diagonal": lambda m: m.as_strided((5, 4), (14, 15)),
}


@pytest.mark.parametrize("view", STRIDED)
def test_unpad_takes_any_strides(view):
    base = torch.rand(11, 13, generator=torch.Generator().manual_seed(0)) < 0.6
    check(STRIDED[view](base))


def test_unpad_on_random_masks():
    chance = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        B, L = chance.randint(0, 9), chance.randint(0, 70)
        kept = chance.choice([0.02, 0.5, 0.98])
        mask = torch.rand(B, 2 * L, generator=generator) < kept
        check(mask[:, :: chance.choice([1, 2])])


def test_unpad_reads_no_poison():
    """Outputs are written in full: torch fills what `empty` returns with the largest values."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        check(lengths_mask([0, 3, 1, 0], 6))
        check(torch.ones(0, 3, dtype=torch.bool))
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(3).bool(), ValueError, r"mask: want \(B, L\) \[\*, \*\], got \[3\]"),
        (torch.ones(2, 3, 4).bool(), ValueError, r"mask: want \(B, L\) .*got \[2, 3, 4\]"),
        (torch.tensor(True), ValueError, r"mask: want \(B, L\) .*got \[\]"),
        (torch.ones(2, 3).long(), TypeError, r"mask: want bool, got torch\.int64"),
        (torch.ones(2, 3), TypeError, r"mask: want bool, got torch\.float32"),
        (torch.ones(2, 3).to(torch.uint8), TypeError, r"mask: want bool, got torch\.uint8"),
        (torch.ones(2, 3).bfloat16(), TypeError, r"mask: want bool, got torch\.bfloat16"),
    ],
)
def test_unpad_refuses(mask, error, message):
    with pytest.raises(error, match=message):
        unpad(mask)


@pytest.mark.long
def test_unpad_refuses_more_tokens_than_int32_counts():
    mask = torch.ones(1, 1, dtype=torch.bool).expand(2**15, 2**16)  # 2^31 True, one byte of memory
    with pytest.raises(ValueError, match=r"at most 2147483647 True .*got 2147483648"):
        unpad(mask)
