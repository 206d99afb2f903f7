"""The compiled extension bert_fast._C: loaded once, and why it is not there."""

import functools
import importlib
import importlib.util
import os
import warnings
from types import ModuleType


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """Return the compiled extension, or None and the reason; BERT_FAST_EXT=0 leaves it out."""
    if os.environ.get("BERT_FAST_EXT") == "0":
        return None, "BERT_FAST_EXT=0 leaves the C++ extension out"
    if importlib.util.find_spec("bert_fast._C") is None:
        return None, "the C++ extension is not built"
    try:
        return importlib.import_module("bert_fast._C"), ""
    except ImportError as error:  # as after an upgrade of torch
        reason = f"the C++ extension does not load: {error}"
        warnings.warn(f"bert_fast: {reason}; build it again", stacklevel=2)
        return None, reason
