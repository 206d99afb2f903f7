"""The steps of `reference.py`, compiled where the extension is built."""

from bert_fast import extension
from bert_fast.data import reference

_compiled, _why_not = extension.load()
if _compiled is not None and not hasattr(_compiled, "data_path"):
    _compiled, _why_not = None, "the C++ extension is older than this source: build it again"
_steps = reference if _compiled is None else _compiled.data_path

flatten = _steps.flatten
longest = _steps.longest
positions = _steps.positions
pad = _steps.pad
digests = _steps.digests
mask = _steps.mask


def implementation() -> tuple[str, str]:
    """Return "csrc" or "reference", and why it is not the first; the results are the same."""
    return ("csrc", "") if _compiled is not None else ("reference", _why_not)
