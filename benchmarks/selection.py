"""Choosing cases and peers by name; nothing here imports torch."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

SUITES = ("kernels", "encoder", "pretraining", "all")
_DEVICES = ("case ", "cpu ", "gpu ")  # what the name of a case may begin with


def _begins(name: str, word: str) -> bool:
    return name.startswith((f"{word} ", f"{word},")) or fnmatchcase(name, word)


def cases(names: Sequence[str], asked: Sequence[str]) -> list[str]:
    """Return the cases that are asked for, in the order of the names; all if nothing is asked.

    Args:
        names: of all cases.
        asked: each a name, with or without "case", "cpu" or "gpu" before it, or how it begins,
            up to a space or a comma; "*" stands for any letters. A number means all its parts.

    Raises:
        ValueError: nothing is called so.
    """
    if not asked:
        return [*names]
    found: set[str] = set()
    for word in asked:
        bare = {n: next((n.removeprefix(d) for d in _DEVICES if n.startswith(d)), n) for n in names}
        some = [n for n in names if word in (n, bare[n])]
        if word.isdigit() or not some:
            some += [n for n in names if _begins(n, word) or _begins(bare[n], word)]
        if not some:
            raise ValueError(f"--case: want one of {', '.join(names)}, got {word}")
        found.update(some)
    return [name for name in names if name in found]


def peers(names: Sequence[str], asked: Sequence[str]) -> list[str]:
    """Return the peers that are asked for: each by its name, or how it begins, or by "all"."""

    def is_asked(name: str, word: str) -> bool:
        return word in ("all", name) or (word not in names and _begins(name, word))

    return [name for name in names if any(is_asked(name, word) for word in asked)]
