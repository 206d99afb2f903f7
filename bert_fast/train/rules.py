"""What a setting may be, and dataclasses of settings made of trees of dicts, lists and scalars.

A field of such a dataclass is annotated with a rule, `steps: Annotated[int, integer(1)]`, or is a
section: such a dataclass again, or a tuple of them. A method `problems` yields what does not fit
together.
"""

import difflib
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, get_args, get_type_hints


@dataclass(frozen=True)
class Rule:
    """What is wanted, a test for it, and what is made of a value that passes."""

    want: str
    fits: Callable[[Any], bool]
    make: Callable[[Any], Any]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:  # NaN is below nothing
    return (_is_int(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max


def _same(value: Any) -> Any:
    return value


def integer(low: int, high: int = 2**31 - 1) -> Rule:
    """Want an int from low to high."""
    want = f"an int, {low} or more" if high == 2**31 - 1 else f"an int in {low} .. {high}"
    return Rule(want, lambda v: _is_int(v) and low <= v <= high, int)


def one_of(*words: str) -> Rule:
    """Want one of some words."""
    return Rule(f"one of {', '.join(words)}", lambda v: isinstance(v, str) and v in words, _same)


def optional(rule: Rule) -> Rule:
    """Want what another rule wants, or None."""
    return Rule(
        f"null or {rule.want}",
        lambda v: v is None or rule.fits(v),
        lambda v: None if v is None else rule.make(v),
    )


def several(rule: Rule, want: str, length: int | None = None) -> Rule:
    """Want a list of what another rule wants, of some length, or of any but 0; makes a tuple."""

    def fits(value: object) -> bool:
        right = isinstance(value, list | tuple) and len(value) == (length or max(len(value), 1))
        return right and all(map(rule.fits, value))

    return Rule(want, fits, lambda v: tuple(map(rule.make, v)))


SHARE = Rule("a number in 0 .. 1", lambda v: _is_number(v) and 0 <= v <= 1, float)
BELOW_1 = Rule("a number from 0 to below 1", lambda v: _is_number(v) and 0 <= v < 1, float)
POSITIVE = Rule("a number above 0", lambda v: _is_number(v) and v > 0, float)
NOT_NEGATIVE = Rule("a number, 0 or more", lambda v: _is_number(v) and v >= 0, float)
FLAG = Rule("true or false", lambda v: isinstance(v, bool), _same)
PATH = Rule("a path", lambda v: isinstance(v, str) and v != "" and "\0" not in v, _same)
COUNT_OR_SHARE = Rule(
    "a number of steps, or a share of all steps below 1",
    lambda v: _is_number(v) and v >= 0 and (_is_int(v) or v < 1),
    _same,
)
MAPPING = Rule(
    "values by name",
    lambda v: v is None or (isinstance(v, dict) and all(isinstance(k, str) for k in v)),
    lambda v: dict(v or {}),
)
DEVICE = Rule(
    "cpu, cuda or cuda:N",
    lambda v: isinstance(v, str) and re.fullmatch("cpu|cuda(:[0-9]{1,3})?", v) is not None,
    _same,
)


def parse(cls: type, values: Any, where: str, found: list[str]) -> Any:
    """Return a dataclass of settings made of a dict.

    Args:
        cls: the dataclass.
        values: dicts for sections, lists for several, scalars; None: nothing is given.
        where: the name of this section, for messages; "": it is the whole.
        found: to which each problem is added, as "name: want, got".

    Returns:
        None where problems were found.
    """
    prefix = f"{where}." if where else ""
    if values is not None and not isinstance(values, dict):
        found.append(f"{where or 'settings'}: want settings by name, got {values!r:.200}")
        return None
    values, before = values or {}, len(found)
    known = {entry.name: entry for entry in fields(cls)}
    found += [f"{prefix}{unknown_name(name, known)}" for name in values if name not in known]
    made, hints = {}, get_type_hints(cls, include_extras=True)
    for name, entry in known.items():
        at, value, kind = f"{prefix}{name}", values.get(name), hints[name]
        if is_dataclass(kind):
            made[name] = parse(kind, value, at, found)
            continue
        part, rule = get_args(kind)  # of tuple[part, ...] or of Annotated[type, rule]
        if rule is Ellipsis:
            if isinstance(value, list) and value:
                made[name] = tuple(parse(part, v, f"{at}.{i}", found) for i, v in enumerate(value))
            else:
                found.append(f"{at}: want a list of at least one, got {value!r:.200}")
        elif name not in values:
            if entry.default is MISSING and entry.default_factory is MISSING:
                found.append(f"{at}: want {rule.want}, got nothing")
        elif rule.fits(value):
            made[name] = rule.make(value)
        else:
            found.append(f"{at}: want {rule.want}, got {value!r:.200}")
    if len(found) > before:
        return None
    whole = cls(**made)
    if hasattr(whole, "problems"):
        found += [f"{prefix}{problem}" for problem in whole.problems()]
    return whole


def unknown_name(name: object, known: Iterable[str]) -> str:
    """Return the message for a name that no setting has."""
    return f"{name!s:.200}: want the name of a setting{hint(str(name), known)}, got this"


def hint(name: str, known: Iterable[str]) -> str:
    """Return the name that was meant, in brackets, "" where none is near."""
    near = difflib.get_close_matches(name, [*known], 1)
    return f" (did you mean {near[0]}?)" if near else ""
