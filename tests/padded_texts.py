"""Texts in a batch: padded on either side or in holes, or packed, and where their tokens stand."""

import dataclasses

import torch

LAYOUTS = ("right", "left", "holes", "packed")


@dataclasses.dataclass(frozen=True)
class Text:
    """Ids and segments of one text; its positions count from 0."""

    ids: torch.Tensor
    types: torch.Tensor

    @property
    def length(self) -> int:
        return len(self.ids)


def make_text(length: int) -> Text:
    return Text(torch.randint(0, 101, (length,)), torch.randint(0, 2, (length,)))


def columns_of(text: Text, layout: str, L: int) -> torch.Tensor:
    """The columns of a row of L in which the text's tokens stand."""
    if layout == "right":
        return torch.arange(text.length)
    if layout == "left":
        return torch.arange(L - text.length, L)
    return torch.randperm(L)[: text.length].sort().values


def padded(texts: list[Text], layout: str, L: int | None = None) -> tuple[dict, torch.Tensor]:
    """The texts as rows of L columns, and where they are; at padding stand ids of other tokens."""
    L = max(text.length for text in texts) if L is None else L
    shape = (len(texts), L)
    inputs = {
        "input_ids": torch.randint(0, 101, shape),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "token_type_ids": torch.randint(0, 2, shape),
        "position_ids": torch.randint(0, 20, shape),
    }
    for row, text in enumerate(texts):
        columns = columns_of(text, layout, L)
        inputs["input_ids"][row, columns] = text.ids
        inputs["attention_mask"][row, columns] = 1
        inputs["token_type_ids"][row, columns] = text.types
        inputs["position_ids"][row, columns] = torch.arange(text.length)
    return inputs, inputs["attention_mask"].bool()


def packed(texts: list[Text]) -> tuple[dict, torch.Tensor]:
    """The texts one after the other in one row, with their borders."""
    lengths = [text.length for text in texts]
    none = torch.zeros(0, dtype=torch.int64)
    inputs = {
        "input_ids": torch.cat([none, *(text.ids for text in texts)])[None],
        "token_type_ids": torch.cat([none, *(text.types for text in texts)])[None],
        "position_ids": torch.cat([none, *(torch.arange(length) for length in lengths)])[None],
        "cu_seq_lens_q": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        "max_length_q": max(lengths, default=0),
    }
    return inputs, torch.ones(1, sum(lengths), dtype=torch.bool)


def lay_out(texts: list[Text], layout: str, L: int | None = None) -> tuple[dict, torch.Tensor]:
    return packed(texts) if layout == "packed" else padded(texts, layout, L)
