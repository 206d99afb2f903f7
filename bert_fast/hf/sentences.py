"""sentence-transformers' encode, which computes a text that it is given twice once."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def known(cls: type) -> type | None:
    """Return the class SentenceTransformer that `cls` is or is made of."""
    for c in cls.__mro__:
        if c.__name__ == "SentenceTransformer" and c.__module__.startswith("sentence_transformers"):
            return c
    return None


def encode(
    self: nn.Module, _mark: Any, to: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Encode each text once, and give every place of it its vector."""
    name = to.names[0]
    texts = args[0] if args else kwargs.get(name)
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return to.original(self, *args, **kwargs)
    first: dict[str, int] = {}
    places = [first.setdefault(text, len(first)) for text in texts]
    if len(first) == len(texts):
        return to.original(self, *args, **kwargs)
    args, kwargs = args[1:], {k: v for k, v in kwargs.items() if k != name}
    found = to.original(self, list(first), *args, **kwargs)
    if isinstance(found, np.ndarray | Tensor):
        return found[places]
    return [_copy(found[place]) for place in places]


def _copy(value: Any) -> Any:
    """Return what one text gave, for another place: to write to one must not change the other."""
    if isinstance(value, dict):
        return {key: _copy(v) for key, v in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value
