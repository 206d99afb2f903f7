"""The file of a run's settings: YAML with nothing twice in it and nothing that grows.

Its scalars are those of YAML 1.2's core schema. Of YAML 1.1, PyYAML's own, 1e-4 would be a text,
`no` a bool and 1:30 a number.
"""

import importlib.resources
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from bert_fast.train.rules import hint

SHIPPED = ("tiny", "mini", "base", "large", "adapt", "throughput")
MAX_BYTES = 100_000
_SCALARS = (  # tag, what it looks like, first characters
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?[0-9]+", [*"-+0123456789"]),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
)


class _Core:
    """What a scalar without quotes is, for the loader and the dumper."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012, filled below


class _Loader(_Core, yaml.SafeLoader):
    """Refuses a key that is there twice, and aliases, with which a small file makes a large one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem="an alias", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in keys:
                problem = f"the key {key!r:.200} twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            keys |= {key} if isinstance(key, Hashable) else set()
        return super().construct_mapping(node, deep)


class _Dumper(_Core, yaml.SafeDumper):
    """Quotes a text that the loader would take for something else."""


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), _first
        )
# Of decimal digits alone: PyYAML's own would read 010 as 8.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def read_config(config: str | Path) -> str:
    """Return the text of a file of settings, or of a shipped one of that name.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: it is not UTF-8.
    """
    if config in SHIPPED:
        configs = importlib.resources.files("bert_fast.train") / "configs"
        return (configs / f"{config}.yaml").read_text("utf-8")
    path = Path(config)
    if not path.is_file():
        want = f"a file, or one of {', '.join(SHIPPED)}{hint(str(config), SHIPPED)}"
        got = "something else" if path.exists() else "nothing"
        raise FileNotFoundError(f"{config}: want {want}, got {got}")
    with open(path, "rb") as file:
        raw = file.read(MAX_BYTES + 1)  # one more: `parse_yaml` refuses it
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: want UTF-8, got {error}") from error


def parse_yaml(text: str, what: str) -> Any:
    """Return what a YAML document holds: dicts, lists, texts, numbers, bools, None.

    Args:
        text: of at most MAX_BYTES characters.
        what: the name of its file, for errors.

    Raises:
        ValueError: it is no such document.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"{what}: want at most {MAX_BYTES} bytes of YAML, got {len(text)}")
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f":{mark.line + 1}"
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{what}{where}: want YAML, got {problem:.500}") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, lists in lists
        raise ValueError(f"{what}: want YAML, got {error}") from error


def dump_yaml(values: Any) -> str:
    """Return a YAML document that `parse_yaml` reads as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def override(values: dict[str, Any], assignment: str) -> None:
    """Set one value in a tree of dicts and lists.

    Args:
        values: the tree, changed in place; dicts that are missing on the way are made.
        assignment: path=value: names and, in lists, numbers from 0, with dots between them; the
            value is YAML.

    Raises:
        ValueError: it is no such assignment, or the path leads through what has no parts.
    """
    path, equals, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ValueError(f"{assignment!r:.200}: want name=value, as optimizer.lr=1e-4")
    value = parse_yaml(text, path)
    for i, key in enumerate(keys):
        here = ".".join(keys[:i])
        if isinstance(values, list):
            if not re.fullmatch("[0-9]{1,9}", key) or int(key) >= len(values):
                want = f"a number below {len(values)} behind {here}"
                raise ValueError(f"{path}: want {want}, got {key!r:.200}")
            key = int(key)
        elif not isinstance(values, dict):
            raise ValueError(f"{path}: want {here} to have parts, got {values!r:.200}")
        if i == len(keys) - 1:
            values[key] = value
            return
        if isinstance(values, dict) and values.get(key) is None:
            values[key] = {}
        values = values[key]
