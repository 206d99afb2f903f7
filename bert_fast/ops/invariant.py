"""The batch-invariant mode: a row's product has the same bits whatever rows stand beside it.

A matrix library chooses its kernel, and with it the order of a sum, by the number of rows it is
given. In the mode it is always given as many: products on the CPU are made in calls of `ROWS` rows,
the last one filled up with zeros, so that a weight meets one kernel. That a row's place among them
does not matter either is tried out for each shape; where it does, that shape's rows are multiplied
one at a time. On a GPU the products are those of kernels/linear.py, whose tile is fixed.

What runs reads the mode when it runs, so that compiled graphs and backward passes follow it.
"""

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Of BERT-base's products by oneDNN, weights packed, fp32 and bf16, 2 cores of an AMD EPYC that were
# not idle, 2026-11-22: calls of 32 rows take 1,024 rows 7 and 16 % more time than one call, 128
# rows 10 and 16 %, and 16 rows 2.2 times as much. Calls of 16: 18 and 33 %, 19 and 34 %, 8 %. Of
# 64: 2 and 8 %, 5 and 8 %, four times.
ROWS = 32
_ALIGNED = 64  # bytes; libraries may sum rows that begin elsewhere in another order
_DRAWN = 2**16 + 1  # numbers of a trial, which larger ones repeat
_SMALL = 2.0**-20  # of a bias, beside sums that cancel

Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x, w, b) -> x w^T + b

_is_on = os.environ.get("BERT_FAST_BATCH_INVARIANT", "") not in ("", "0")


class Setting:
    """What `batch_invariant` returns: as a context manager it puts back the mode from before."""

    def __init__(self, before: bool):
        self._before = before

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        batch_invariant(self._before)


def batch_invariant(on: bool = True) -> Setting:
    """Turn the batch-invariant mode on or off, for the whole process.

    While it is on, the embedding of a text, every hidden state of its tokens and its logits have
    the same bits alone and in any batch, at any place and with any padding; and so has the gradient
    of `inputs_embeds`. That holds for one device, its library of products and its number of
    threads; on the CPU attention and GELU must be the compiled extension's, or they refuse. Not
    promised are the gradients of weights, which are sums over the batch, losses, and modules that
    are not this package's.

    On the CPU an inference of BERT-base took 1.15 to 1.2 times the time for 128 tokens and more,
    and for 16 tokens 1.8 times in fp32, 1.4 in bf16 (by oneDNN, 2 cores of an AMD EPYC,
    2026-11-22); `benchmarks/invariant.py` measures it. On a GPU, where matrix products of our own
    take the place of cuBLAS's, neither cost nor bits have been measured yet.

    The environment variable BERT_FAST_BATCH_INVARIANT=1 turns it on from the start.

        bert_fast.batch_invariant(True)
        with bert_fast.batch_invariant(True):  # on inside the block alone
            ...

    Args:
        on: whether it is to be on.

    Returns:
        A context manager that puts back the mode from before this call when the block ends.

    Raises:
        TypeError: `on` is not a bool.
    """
    global _is_on
    if not isinstance(on, bool):
        raise TypeError(f"batch_invariant: want True or False, got {on!r:.200}")
    before, _is_on = _is_on, on
    return Setting(before)


def is_batch_invariant() -> bool:
    """Return whether the batch-invariant mode is on."""
    return _is_on


def notes() -> Iterator[str]:
    """Yield what `report` says of the mode; nothing while it is off."""
    if not _is_on:
        return
    yield (
        f"batch-invariant: products on the CPU in calls of {ROWS} rows, on a GPU by a kernel of"
        " ours in place of cuBLAS"
    )
    if _one_by_one:
        shapes = ", ".join(sorted(_one_by_one))
        yield f"batch-invariant: rows multiplied one at a time, by weights of {shapes}"


# --- products on the CPU -------------------------------------------------------------------------


class Schedule(NamedTuple):
    """How products by a weight are made.

    Attributes:
        rows: of each call.
        packs: whether the weight's packed form gives the same bits as the plain one.
    """

    rows: int
    packs: bool


_one_by_one: set[str] = set()  # what `notes` says of schedules of one row


def schedule(
    multiply: Multiply, w: Tensor, b: Tensor | None, pack: Callable[[Tensor], Tensor] | None = None
) -> Schedule:
    """Return how a library multiplies rows by w, as it was found out for weights of its kind.

    Args:
        multiply: the library's product.
        w: (F, D), contiguous or the transpose of what is.
        b: (F,) or None.
        pack: makes a weight's packed form, which `multiply` takes too; None: there is none.

    Raises:
        RuntimeError: the library gives equal rows other bits whatever is done.
    """
    F, D = w.shape
    threads = torch.get_num_threads()
    return _schedule(multiply, pack, w.dtype, F, D, w.is_contiguous(), b is not None, threads)


@functools.cache
def _schedule(
    multiply: Multiply,
    pack: Callable[[Tensor], Tensor] | None,
    dtype: torch.dtype,
    F: int,
    D: int,
    is_contiguous: bool,
    with_bias: bool,
    threads: int,
) -> Schedule:
    x, w = _cancelling(ROWS, D, -1, dtype), _cancelling(F, D, 1, dtype)
    w = w if is_contiguous else w.T.contiguous().T
    b = _numbers(1, F, dtype)[0] * _SMALL if with_bias else None
    with torch.no_grad():
        for rows in (ROWS, 1):
            if _is_fixed(lambda x, rows=rows: in_calls(rows, multiply, x, w, b), x):
                if rows == 1:
                    _one_by_one.add(f"({F}, {D}) {str(dtype).removeprefix('torch.')}")
                packs = rows > 1 and pack is not None
                packs = packs and torch.equal(multiply(x, pack(w), b), multiply(x, w, b))
                return Schedule(rows, packs)
    raise RuntimeError(
        "batch-invariant: want a product that gives equal rows equal bits, got other bits for a"
        f" weight ({F}, {D}) in {dtype}: the mode cannot be kept on this machine with this library"
        " of products (bert_fast.set_cpu_library)"
    )


def _numbers(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return numbers of many sizes, so that sums of few of them are rounded in any dtype."""
    generator = torch.Generator().manual_seed(rows)
    n = rows * columns
    size = {"size": (min(n, _DRAWN),), "generator": generator, "dtype": torch.float64}
    few = torch.randn(**size) * torch.exp2(8 * torch.rand(**size) - 4)
    return few.to(dtype).repeat(-(-n // _DRAWN))[:n].view(rows, columns)


def _cancelling(rows: int, columns: int, sign: int, dtype: torch.dtype) -> Tensor:
    """Return rows whose second half is `sign` times the first.

    Of products of such rows and others with the other sign nothing is left but the rounding on the
    way: another in every other order, which a cast to 16 bits does not hide.
    """
    t, half = _numbers(rows, columns, dtype), columns // 2
    t[:, half : 2 * half] = sign * t[:, :half]
    if half:
        t[:, 2 * half :] = 0  # an odd one has no counterpart
    return t


def _is_fixed(product: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Return whether each of the rows x has the same bits at any place and beside any others."""
    y = product(x)
    order = torch.arange(len(x))
    moved = all(torch.equal(product(x[o]), y[o]) for o in (order.flip(0), order.roll(1)))
    return moved and torch.equal(product(x[:1].expand_as(x)), y[:1].expand_as(y))


def in_calls(rows: int, multiply: Multiply, x: Tensor, w: Any, b: Tensor | None) -> Tensor:
    """Return x w^T + b (T, F), each call of `multiply` given that many rows.

    Args:
        rows: of each call.
        multiply: the product.
        x: (T, D), T of 1 or more.
        w: as `multiply` takes it.
        b: (F,) or None.
    """
    y = None
    for first in range(0, len(x), rows):
        part = x[first : first + rows]
        n = len(part)
        if n < rows:
            part = torch.cat((part, part.new_zeros(rows - n, part.shape[1])))
        elif not part.is_contiguous() or part.data_ptr() % _ALIGNED:
            part = part.clone(memory_format=torch.contiguous_format)
        found = multiply(part, w, b)
        if y is None:
            y = found.new_empty(len(x), found.shape[1])
        y[first : first + n] = found[:n]
    return y
