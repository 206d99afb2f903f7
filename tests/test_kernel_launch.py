"""common.launch and the launch rules: what holds on every GPU, shown without one."""

from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton")

from bert_fast.kernels import common


class Kernel:
    """Notes its launches, and on which device they were."""

    def __init__(self):
        self.launches = []
        self.device = "of whoever was last"

    def __getitem__(self, grid):
        def run(*args, **options):
            self.launches.append((grid, args, options, self.device))

        return run

    @contextmanager
    def device_of(self, tensor):
        before, self.device = self.device, tensor.device
        yield
        self.device = before


@pytest.fixture
def kernel(monkeypatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(torch.cuda, "device_of", kernel.device_of)
    return kernel


def test_launch(kernel):
    """On the device of the first argument; fusion is said, for its default changes."""
    x, y = torch.ones(3, device="meta"), torch.ones(3)
    common.launch(kernel, (2, 3), x, y, 7, num_warps=8, BLOCK=16)
    ((grid, args, options, device),) = kernel.launches
    assert grid == (2, 3) and args[0] is x and args[1:] == (y, 7)
    assert options == {"num_warps": 8, "enable_fp_fusion": True, "BLOCK": 16}
    assert device == torch.device("meta")


@pytest.mark.parametrize("grid", [(0,), (0, 4), (4, 0)], ids=str)
def test_an_empty_grid_launches_nothing(grid, kernel):
    """CUDA would refuse it."""
    common.launch(kernel, grid, torch.ones(3))
    assert not kernel.launches


RULES = {80: "A100", 86: "A10", 90: "H100"}


@pytest.mark.parametrize(
    ("generation", "entry"),
    [(75, "A100"), (80, "A100"), (86, "A10"), (89, "A10"), (90, "H100"), (120, "H100")],
)
def test_an_entry_serves_later_generations(generation, entry, monkeypatch):
    """Until one of their own; the first serves those before it too."""
    monkeypatch.setattr(common, "generation", lambda _: generation)
    assert common.by_generation(RULES, torch.ones(3)) == entry
    assert common.by_generation(dict(reversed(RULES.items())), torch.ones(3)) == entry


def test_generation(monkeypatch):
    """Of the tensor's own GPU; the interpreter's is Hopper."""
    assert common.generation(torch.ones(3)) == 90
    on_gpu = torch.ones(3, device="meta")
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    capabilities = {on_gpu.device: (8, 6)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    assert common.generation(on_gpu) == 86
