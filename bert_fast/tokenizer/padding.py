"""Rows of one length: what the arguments for padding and truncation mean, and padding by hand."""

import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

NO_LIMIT = int(1e30)  # what transformers says where a tokenizer has no model_max_length
_NO_LENGTH = int(1e20)  # what is above this is no length
_TRUNCATION = {
    True: "longest_first",
    False: None,
    None: None,
    "do_not_truncate": None,
    "longest_first": "longest_first",
    "only_first": "only_first",
    "only_second": "only_second",
}
_PADDING = {
    True: "longest",
    False: None,
    None: None,
    "do_not_pad": None,
    "longest": "longest",
    "max_length": "max_length",
}


def strategies(
    padding: bool | str | None,
    truncation: bool | str | None,
    max_length: int | None,
    pad_to_multiple_of: int | None,
    padding_side: str,
    model_max_length: int,
) -> tuple[str | None, str | None, int | None]:
    """Return what the arguments of a call mean: padding, truncation, max_length.

    Args:
        padding: True or "longest", "max_length"; False, None or "do_not_pad".
        truncation: True or "longest_first", "only_first", "only_second"; False or
            "do_not_truncate"; None is True where max_length is given without padding.
        max_length: None: model_max_length.
        pad_to_multiple_of: what max_length must be a multiple of if both are asked for.
        padding_side: "right" or "left".
        model_max_length: NO_LIMIT: then neither strategy that needs a length applies.

    Raises:
        ValueError: an argument has none of these values.
        TypeError: a length that is no int.
    """
    for name, value, known in (
        ("padding", padding, _PADDING),
        ("truncation", truncation, _TRUNCATION),
    ):
        if value not in known:
            raise ValueError(f"{name}: want one of {', '.join(map(repr, known))}, got {value!r}")
    if padding_side not in ("right", "left"):
        raise ValueError(f'padding_side: want "right" or "left", got {padding_side!r}')
    if max_length is not None and (max_length := operator.index(max_length)) < 0:
        raise ValueError(f"max_length: want at least 0, got {max_length}")
    if pad_to_multiple_of is not None and operator.index(pad_to_multiple_of) < 1:
        raise ValueError(f"pad_to_multiple_of: want at least 1, got {pad_to_multiple_of}")
    if max_length is not None and padding is False and truncation is None:
        truncation = True
    pad, cut = _PADDING[padding], _TRUNCATION[truncation]
    if padding is True and max_length is not None and cut is None:
        message = 'max_length: without effect beside padding=True; want padding="max_length"'
        warnings.warn(message, stacklevel=4)
    if max_length is None and (cut is not None or pad == "max_length"):
        if model_max_length > _NO_LENGTH:
            pad, cut = None if pad == "max_length" else pad, None
        else:
            max_length = model_max_length
    if None not in (cut, pad, pad_to_multiple_of, max_length) and max_length % pad_to_multiple_of:
        want = f"a multiple of pad_to_multiple_of={pad_to_multiple_of}"
        raise ValueError(f"max_length: want {want} where both are used, got {max_length}")
    return pad, cut, max_length


def pad_rows(
    encoded: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    main: str,
    fill: tuple[int, int],
    padding: str | None,
    max_length: int | None,
    pad_to_multiple_of: int | None,
    side: str,
    attention_mask: bool,
    return_tensors: str | None,
) -> tuple[dict[str, Any], str | None]:
    """Return entries padded to one length, as lists, and the kind of tensors to make of them.

    Args:
        encoded: entries by name, of one text or of several, or a list of such.
        main: the entry that says how long a row is.
        fill: what ids and token types are filled up with.
        padding: "longest", "max_length" or None.
        max_length: for "max_length".
        pad_to_multiple_of: padded lengths are multiples of this.
        side: "right" or "left".
        attention_mask: make one where there is none.
        return_tensors: None: as the entries are now.

    Raises:
        ValueError: main is not there, or the entries have different numbers of rows.
    """
    if isinstance(encoded, list | tuple) and encoded and isinstance(encoded[0], Mapping):
        encoded = {name: [example[name] for example in encoded] for name in encoded[0]}
    if not isinstance(encoded, Mapping) or main not in encoded:
        got = list(encoded) if isinstance(encoded, Mapping) else type(encoded).__name__
        raise ValueError(f"encoded_inputs: want {main} among the entries, got {got}")
    if len(encoded[main]) == 0:
        return {**encoded, **({"attention_mask": []} if attention_mask else {})}, return_tensors
    if return_tensors is None:
        return_tensors = _kind(encoded[main])
    data = {name: _lists(value) for name, value in encoded.items()}
    one = not isinstance(data[main][0], list | tuple)
    rows = {name: [value] for name, value in data.items()} if one else data
    count = len(rows[main])
    for name, value in rows.items():
        if len(value) != count:
            raise ValueError(f"encoded_inputs: want {count} rows of {name}, got {len(value)}")
    lengths = [len(ids) for ids in rows[main]]
    length = max(lengths) if padding == "longest" else max_length
    if length is not None and pad_to_multiple_of is not None:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
    padded = dict(rows)
    if attention_mask and "attention_mask" not in rows:
        padded["attention_mask"] = [[1] * n for n in lengths]
    if padding is not None:
        values = {"attention_mask": 0, "token_type_ids": fill[1], "special_tokens_mask": 1}
        values[main] = fill[0]
        if not attention_mask:
            del values["attention_mask"]
        for name in values.keys() & padded.keys():
            padded[name] = [
                _filled(row, [values[name]] * (length - n), side)
                for row, n in zip(padded[name], lengths, strict=True)
            ]
    return {n: v[0] for n, v in padded.items()} if one else padded, return_tensors


def _filled(row: list[int], fill: list[int], side: str) -> list[int]:
    """Return a row with the filling on one side."""
    return [*row, *fill] if side == "right" else [*fill, *row]


def _kind(value: Any) -> str | None:
    """Return "pt" or "np" where the ids are tensors or arrays, or a list of them."""
    for part in (value, value[0]):
        if isinstance(part, torch.Tensor):
            return "pt"
        if isinstance(part, np.ndarray | np.generic):
            return "np"
    return None


def _lists(value: Any) -> Any:
    """Return tensors and arrays as lists, also those in a list."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_lists(v) for v in value]
    return value
