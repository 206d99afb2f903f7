"""From a padded batch to packed rows and back; the only file that knows the mask.

The tokens of a batch are packed once, before the embeddings, in the order of the flattened
(B, L): everything below works on T rows and `cu_seqlens`, whose host-side facts (T, max_len) are
known from here on, so that nothing below needs to wait for the device.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bert_fast import ops


@dataclass(frozen=True)
class Layout:
    """Where the T tokens of a batch stand: in B sequences, and in the padded batch.

    Attributes:
        shape: (B, L) of the padded batch; (1, T) where the caller packed.
        cu_seqlens: (B + 1,) int32; sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1].
        max_len: no sequence is longer.
        rows: (T,) int64, where each row stands in the flattened (B, L); None when nothing is
            padded: row t stands at t.
        packed: whether the caller packed; B is not shape[0] then.
        work: the order in which attention takes the tiles on a GPU; None on the CPU.
    """

    shape: tuple[int, int]
    cu_seqlens: Tensor
    max_len: int
    rows: Tensor | None = None
    packed: bool = False
    work: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.shape[0] * self.shape[1] if self.rows is None else self.rows.shape[0]

    @property
    def num_sequences(self) -> int:
        """B, empty sequences included."""
        return self.cu_seqlens.shape[0] - 1

    def gather(self, padded: Tensor) -> Tensor:
        """Return the rows (T, ...) of a tensor (B, L, ...)."""
        flat = padded.reshape(self.shape[0] * self.shape[1], *padded.shape[2:])
        return flat if self.rows is None else flat.index_select(0, self.rows)

    def unpack(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """Return rows x (T, ...) as (B, L, ...), with `fill` at the padding."""
        B, L = self.shape
        if self.rows is None:
            return x.view(B, L, *x.shape[1:])
        out = x.new_full((B * L, *x.shape[1:]), fill).index_copy_(0, self.rows, x)
        return out.view(B, L, *x.shape[1:])

    def mask(self) -> Tensor:
        """Return (B, L) bool, True where there is a token."""
        ones = torch.ones(self.num_tokens, dtype=torch.bool, device=self.cu_seqlens.device)
        return self.unpack(ones, fill=False)

    def columns(self) -> Tensor:
        """Return (T,) int64: each token's column, or its index in the sequence where packed."""
        if self.rows is not None:
            return self.rows % self.shape[1]
        index = torch.arange(self.num_tokens, device=self.cu_seqlens.device)
        if not self.packed:
            return index % self.shape[1] if self.shape[1] else index
        if not self.num_sequences:
            return index
        # not repeat_interleave, which stops a GPU where the borders do not add up to T
        ends = self.cu_seqlens[1:]
        sequence = torch.searchsorted(ends, index, right=True).clamp(max=self.num_sequences - 1)
        return index - self.cu_seqlens[sequence]

    def nonempty(self) -> Tensor | None:
        """Return (B,) bool, True where a sequence has a token; None when all have for certain."""
        if self.rows is None and not self.packed and self.shape[1]:
            return None
        return self.cu_seqlens.diff() > 0

    def first_rows(self, x: Tensor) -> Tensor:
        """Return the row (B, D) of each sequence's first token in x (T, D); 0 if it is empty."""
        nonempty = self.nonempty()
        if nonempty is None:
            return x.view(*self.shape, x.shape[1])[:, 0]
        if not torch.compiler.is_compiling() and not x.shape[0]:
            return x.new_zeros(self.num_sequences, x.shape[1])
        # an empty sequence at the end begins at T, past the last row
        first = x.index_select(0, self.cu_seqlens[:-1].clamp(min=0, max=x.shape[0] - 1))
        return torch.where(nonempty[:, None], first, 0)


@dataclass(frozen=True, kw_only=True)
class PackedBatch(Layout):
    """A batch without padding: what the embeddings of its T tokens are made of.

    Attributes:
        tokens: (T,) ids, or None with `embeds`.
        embeds: (T, D) rows in place of word embeddings, or None.
        positions: (T,) integers.
        types: (T,) integers.
    """

    tokens: Tensor | None
    embeds: Tensor | None
    positions: Tensor
    types: Tensor


def pack(
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    max_len: int | Tensor | None = None,
    max_positions: int,
) -> PackedBatch:
    """Take the padding out of a batch, or accept one whose caller has.

    Args:
        input_ids: (B, L) int64 or int32, or None with inputs_embeds.
        attention_mask: (B, L) bool, int or float: above 0 where there is a token. None: everywhere.
        token_type_ids: (B, L) or (1, L) integers; None: 0.
        position_ids: (B, L) or (1, L) integers; None: the column, or the index in the sequence
            where the caller packed.
        inputs_embeds: (B, L, D) floating, or None with input_ids.
        cu_seqlens: (B + 1,) integers from 0 to T, for inputs of shape (1, T) that are packed.
        max_len: the longest of those sequences; None: found here.
        max_positions: rows of the position table.

    Raises:
        ValueError: both or neither of input_ids and inputs_embeds, a shape that does not fit, a
            sequence longer than max_positions, a negative value in the mask (seen on the CPU).
        TypeError: ids are not integers.
        NotImplementedError: a 3-D or 4-D mask.
    """
    if (input_ids is None) == (inputs_embeds is None):
        got = "neither" if input_ids is None else "both"
        raise ValueError(f"want exactly one of input_ids and inputs_embeds, got {got}")
    given = inputs_embeds if input_ids is None else input_ids
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
        "position_ids": position_ids,
        "inputs_embeds": inputs_embeds,
        "cu_seq_lens_q": cu_seqlens,
    }
    for name, value in inputs.items():
        if value is not None:
            check_tensor(name, value)
            if value.device != given.device:
                raise ValueError(f"{name}: want it on {given.device}, got {value.device}")
    if input_ids is not None:
        check_integers("input_ids", input_ids)
    if input_ids is not None and input_ids.ndim != 2:
        raise ValueError(f"input_ids: want (B, L), got {[*input_ids.shape]}")
    if inputs_embeds is not None and inputs_embeds.ndim != 3:
        raise ValueError(f"inputs_embeds: want (B, L, D), got {[*inputs_embeds.shape]}")
    shape = given.shape[0], given.shape[1]
    if shape[0] * shape[1] >= 2**31:
        raise ValueError(f"batch: want less than 2**31 columns in all rows, got {[*shape]}")
    types = _per_token("token_type_ids", token_type_ids, shape)
    positions = _per_token("position_ids", position_ids, shape)
    if cu_seqlens is not None and attention_mask is not None:
        raise ValueError("attention_mask: want None beside cu_seq_lens_q, got a mask")
    layout = find_layout(shape, given.device, attention_mask, cu_seqlens, max_len)
    longest = shape[1]
    if layout.packed:  # an unknown length passes: compiling, it is not looked at
        longest = layout.max_len if max_len is not None or not torch.compiler.is_compiling() else 0
    if positions is None and longest > max_positions:
        raise ValueError(
            f"sequence length: want at most max_position_embeddings = {max_positions},"
            f" got {longest}"
        )
    columns = layout.columns() if positions is None else layout.gather(positions)
    return PackedBatch(
        **vars(layout),
        tokens=None if input_ids is None else layout.gather(input_ids),
        embeds=None if inputs_embeds is None else layout.gather(inputs_embeds),
        positions=columns,
        types=torch.zeros_like(columns) if types is None else layout.gather(types),
    )


def find_layout(
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_len: int | Tensor | None = None,
) -> Layout:
    """Return where the tokens of a batch (B, L) stand, by its mask or borders, as `pack` has them.

    Raises:
        ValueError: the mask or the borders do not fit.
        TypeError: they have the wrong dtype.
        NotImplementedError: a 3-D or 4-D mask.
    """
    if cu_seqlens is not None:
        layout = _packed_layout(cu_seqlens, max_len, shape)
    elif attention_mask is None:
        layout = _full_layout(shape, device)
    else:
        layout = _masked_layout(attention_mask, shape)
    if layout.cu_seqlens.is_cuda and layout.work is None:
        layout = replace(layout, work=ops.work_list(layout.cu_seqlens, layout.num_tokens))
    return layout


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless the argument is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: want a Tensor, got {type(value).__name__}")


def check_integers(name: str, value: object) -> None:
    """Raise TypeError unless the argument is a tensor of integers."""
    check_tensor(name, value)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: want integers, got {value.dtype}")


def _per_token(name: str, ids: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """Return ids (B, L), from ids (B, L) or (1, L)."""
    if ids is None:
        return None
    check_integers(name, ids)
    if (
        ids.ndim != 2
        or ids.shape[1] != shape[1]
        or (ids.shape[0] != 1 and ids.shape[0] != shape[0])
    ):
        raise ValueError(f"{name}: want {[*shape]} or {[1, shape[1]]}, got {[*ids.shape]}")
    return ids.expand(shape)


def _full_layout(shape: tuple[int, int], device: torch.device) -> Layout:
    B, L = shape
    # made on the device, not copied there
    cu_seqlens = torch.arange(B + 1, dtype=torch.int32, device=device) * L
    return Layout(shape, cu_seqlens, L)


def _masked_layout(mask: Tensor, shape: tuple[int, int]) -> Layout:
    if mask.ndim in (3, 4):
        raise NotImplementedError(
            f"attention_mask: want (B, L), got {[*mask.shape]}; a mask by query and key is not"
            " supported: use transformers for it"
        )
    if mask.shape != shape:
        raise ValueError(f"attention_mask: want {[*shape]}, got {[*mask.shape]}")
    compiling = torch.compiler.is_compiling()
    if mask.dtype != torch.bool:
        if mask.is_complex():
            raise TypeError(f"attention_mask: want bool, integers or floating, got {mask.dtype}")
        if mask.device.type == "cpu" and not compiling and not (mask >= 0).all():
            raise ValueError(
                "attention_mask: want 1 for a token and 0 for padding, got a negative value or"
                " NaN (an additive mask?)"
            )
        mask = mask > 0
    work = None
    if mask.is_cuda:
        rows, cu_seqlens, work, max_len = ops.unpad_work(mask)
    else:
        rows, cu_seqlens, max_len = ops.unpad(mask)
    if compiling:  # a bound is enough, and reading max_len would break the graph
        return Layout(shape, cu_seqlens, shape[1], rows, work=work)
    full = rows.shape[0] == shape[0] * shape[1]
    return Layout(shape, cu_seqlens, int(max_len), None if full else rows, work=work)


def _packed_layout(
    cu_seqlens: Tensor, max_len: int | Tensor | None, shape: tuple[int, int]
) -> Layout:
    check_integers("cu_seq_lens_q", cu_seqlens)
    if shape[0] != 1:
        raise ValueError(f"inputs beside cu_seq_lens_q: want (1, T), got {[*shape]}")
    compiling = torch.compiler.is_compiling()
    if max_len is None and compiling:  # a bound is enough, and reading one would break the graph
        max_len = shape[1]
    elif max_len is None:
        max_len = int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0
    elif int(max_len) != max_len:
        raise TypeError(f"max_length_q: want an integer, got {max_len}")
    check = ops.Checks()
    ops.check_cu_seqlens(check, "cu_seq_lens_q", cu_seqlens, shape[1], int(max_len), slack=False)
    check.done()
    return Layout(shape, cu_seqlens.to(torch.int32), int(max_len), packed=True)
