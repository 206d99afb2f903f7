"""What a tokenizer returns: lists or tensors by name, and the way back to words and characters.

Names and meanings are those of transformers' BatchEncoding. A place in a batch of one is given by
one index, `enc.token_to_chars(3)`; in a larger batch by two, `enc.token_to_chars(row, 3)`.
"""

from collections import UserDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Encoding


class CharSpan(NamedTuple):
    """Characters `start` up to, not including, `end` of a text."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """Tokens `start` up to, not including, `end` of a row."""

    start: int
    end: int


class BatchEncoding(UserDict):
    """A dict of `input_ids` and more, whose entries are attributes as well.

    `enc["input_ids"]` is an entry, `enc[0]` the tokenizers' Encoding of the first row.

    Args:
        data: lists, arrays or tensors by name.
        encoding: the Encoding of each row, or the only one; None: the methods that need it raise.
        tensor_type: "pt" or "np"; None leaves the lists.
        prepend_batch_axis: with tensor_type, put each value into a batch of one.
        n_sequences: texts in a row, 1 or 2; None: ask the first Encoding.

    Raises:
        ValueError: the values cannot be made tensors.
    """

    def __init__(
        self,
        data: Mapping[str, Any] | None = None,
        encoding: Encoding | Sequence[Encoding] | None = None,
        tensor_type: str | None = None,
        prepend_batch_axis: bool = False,
        n_sequences: int | None = None,
    ):
        super().__init__(data)
        encodings = [encoding] if isinstance(encoding, Encoding) else encoding
        if n_sequences is None and encodings:
            n_sequences = encodings[0].n_sequences
        self._encodings, self._n_sequences = encodings, n_sequences
        self.convert_to_tensors(tensor_type, prepend_batch_axis)

    def __getitem__(self, key: str | int | slice) -> Any:
        """Return an entry by name, the Encoding of a row, or of a slice of rows.

        A slice of an object without Encodings gives a dict of the sliced entries.
        """
        if isinstance(key, str):
            return self.data[key]
        if self._encodings is not None:
            return self._encodings[key]
        if isinstance(key, slice):
            return {name: value[key] for name, value in self.data.items()}
        raise KeyError(f"want a name, or a row's number where there are encodings, got {key!r}")

    def __getattr__(self, name: str) -> Any:
        """Return the entry `name`."""
        if name != "data" and name in self.data:  # "data" itself is absent while unpickling
            return self.data[name]
        raise AttributeError(f"{type(self).__name__} has no entry {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled."""
        return {"data": self.data, "encodings": self._encodings, "n": self._n_sequences}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was pickled."""
        self.data, self._encodings = state["data"], state["encodings"]
        self._n_sequences = state["n"]

    @property
    def n_sequences(self) -> int | None:
        """Texts in a row: 1, 2 for pairs, None where it is not known."""
        return self._n_sequences

    @property
    def is_fast(self) -> bool:
        """Whether there are Encodings, which the methods below need."""
        return self._encodings is not None

    @property
    def encodings(self) -> list[Encoding] | None:
        """The tokenizers' Encoding of each row."""
        return self._encodings

    def tokens(self, batch_index: int = 0) -> list[str]:
        """Return the tokens of a row."""
        return self._row(batch_index).tokens

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """Return the number of each token's word in its text, None for special tokens."""
        return self._row(batch_index).word_ids

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """Return 0 for tokens of the first text, 1 for the second, None for special ones."""
        return self._row(batch_index).sequence_ids

    def token_to_sequence(
        self, batch_or_token_index: int, token_index: int | None = None
    ) -> int | None:
        """Return which text a token is of: 0, 1, or None for special tokens."""
        row, token = self._token(batch_or_token_index, token_index)
        return row.token_to_sequence(token)

    def token_to_word(
        self, batch_or_token_index: int, token_index: int | None = None
    ) -> int | None:
        """Return the number of a token's word, None for special tokens."""
        row, token = self._token(batch_or_token_index, token_index)
        return row.token_to_word(token)

    def token_to_chars(
        self, batch_or_token_index: int, token_index: int | None = None
    ) -> CharSpan | None:
        """Return the characters of a token, None for special tokens."""
        row, token = self._token(batch_or_token_index, token_index)
        span = row.token_to_chars(token)
        return None if span is None else CharSpan(*span)

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        """Return the tokens of a word, None where there are none.

        Args:
            batch_or_word_index: the row, or the word where word_index is None.
            word_index: the word's number in its text.
            sequence_index: 0 for the first text, 1 for the second.
        """
        row, word = self._place(batch_or_word_index, word_index)
        span = row.word_to_tokens(word, sequence_index)
        return None if span is None else TokenSpan(*span)

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan | None:
        """Return the characters of a word, None where it has no token; Args as word_to_tokens."""
        row, word = self._place(batch_or_word_index, word_index)
        span = row.word_to_chars(word, sequence_index)
        return None if span is None else CharSpan(*span)

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """Return the token that holds a character, None where none does; Args as word_to_tokens."""
        row, char = self._place(batch_or_char_index, char_index)
        return row.char_to_token(char, sequence_index)

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """Return the word that holds a character, None where none does; Args as word_to_tokens."""
        row, char = self._place(batch_or_char_index, char_index)
        return row.char_to_word(char, sequence_index)

    def convert_to_tensors(
        self, tensor_type: str | None = None, prepend_batch_axis: bool = False
    ) -> "BatchEncoding":
        """Make tensors of the lists, in place.

        Args:
            tensor_type: "pt" or "np"; None changes nothing.
            prepend_batch_axis: put each value into a batch of one.

        Returns:
            This object. Rows of several lengths become a numpy array of objects under "np".

        Raises:
            ValueError: another tensor_type, or "pt" and rows of several lengths.
        """
        if tensor_type is None:
            return self
        if tensor_type not in ("pt", "np"):
            raise ValueError(f'return_tensors: want "pt", "np" or None, got {tensor_type!r}')
        made, kind = (_torch, torch.Tensor) if tensor_type == "pt" else (_numpy, np.ndarray)
        for name, value in self.data.items():
            value = [value] if prepend_batch_axis else value
            if isinstance(value, kind):
                continue
            try:
                self.data[name] = made(value)
            except (ValueError, TypeError, RuntimeError) as error:
                raise ValueError(
                    f"return_tensors: want {name} with rows of one length, which padding=True and "
                    f"truncation=True give, got {error}"
                ) from error
        return self

    def to(
        self, device: str | torch.device | int, *, non_blocking: bool = False
    ) -> "BatchEncoding":
        """Move the tensors to a device, in place; what is no tensor stays.

        Args:
            device: where to.
            non_blocking: do not wait for the copies.

        Returns:
            This object.

        Raises:
            TypeError: not a device, a dtype say: ids must stay integers.
        """
        if not isinstance(device, str | torch.device | int):
            raise TypeError(f"device: want a str, int or torch.device, got {device!r}")
        self.data = {
            name: value.to(device, non_blocking=non_blocking)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in self.data.items()
        }
        return self

    def _row(self, batch_index: int) -> Encoding:
        """Return the Encoding of a row."""
        if not self._encodings:
            raise ValueError("want an object with encodings, as a tokenizer's call returns it")
        return self._encodings[batch_index]

    def _place(self, row: int, index: int | None) -> tuple[Encoding, int]:
        """Return the Encoding and the index in it; where there is one index, it is of row 0."""
        return (self._row(0), row) if index is None else (self._row(row), index)

    def _token(self, row: int, index: int | None) -> tuple[Encoding, int]:
        """Return the Encoding and the token's index in it; below 0 it counts from the end."""
        encoding, token = self._place(row, index)
        return encoding, token + len(encoding) if token < 0 else token


def _torch(value: Any) -> torch.Tensor:
    """Return lists or arrays as a tensor; without any number in them it is of int64."""
    if isinstance(value, list) and value and isinstance(value[0], np.ndarray):
        value = np.array(value)
    elif lengths := _lengths(value):  # torch drops what stands beside an empty first row
        raise ValueError(f"rows of lengths {lengths}")
    tensor = torch.tensor(value)
    return tensor if tensor.numel() else tensor.long()


def _lengths(value: Any) -> list[int]:
    """Return the lengths of the rows where they differ, else nothing."""
    nested = isinstance(value, list | tuple) and value and hasattr(value[0], "__len__")
    lengths = {len(row) for row in value} if nested else ()
    return sorted(lengths) if len(lengths) > 1 else []


def _numpy(value: Any) -> np.ndarray:
    """Return lists or tensors as an array; of objects where the rows differ in length."""
    if _lengths(value):
        array = np.empty(len(value), dtype=object)
        array[:] = [np.asarray(row) for row in value]
        return array
    array = np.asarray(value)
    return array if array.size else array.astype(np.int64)
