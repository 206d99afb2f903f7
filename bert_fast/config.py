"""BertConfig: what a BERT model is made of.

The fields are those of transformers, so that one config.json serves both. Values are checked when
they are read from a file and when a model is built from them, not when they are set. Of a file
only a fixed list of keys is read.
"""

import copy
import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch

from bert_fast.files import find_directory, read_json, staged

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
CONFIG_FILE = "config.json"
CONFIG_FILES = (CONFIG_FILE, "bert_config.json")  # the second is Google's

_PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
_FLOATS = ("float16", "bfloat16", "float32", "float64")
# What may stand for a dtype; a table, since a name from a file must not reach getattr(torch, ...).
DTYPES: dict[object, torch.dtype] = {  # the dtypes of models and ops, by name and by themselves
    key: getattr(torch, name)
    for name in _FLOATS
    for key in (name, f"torch.{name}", getattr(torch, name))
}
_NAMED = {  # layers, hidden size, heads, as Google published them
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "medium": (8, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}
_NUMERIC = (  # the fields that decide what a given set of weights computes
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act "
    "max_position_embeddings type_vocab_size layer_norm_eps pad_token_id tie_word_embeddings"
).split()
# Keys that Google's and transformers' files hold and that change nothing in an encoder. Any other
# key that is not a field is named in a warning; neither kind is acted on.
_HARMLESS = frozenset(
    """
    model_type name_or_path _name_or_path _commit_hash _num_labels gradient_checkpointing
    finetuning_task task_specific_params tokenizer_class torchscript tf_legacy_loss use_bfloat16
    output_past pruned_heads prefix sep_token_id decoder_start_token_id tie_encoder_decoder
    cross_attention_hidden_size directionality pooler_fc_size pooler_num_attention_heads
    pooler_num_fc_layers pooler_size_per_head pooler_type eos_token_ids bad_words_ids
    begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty
    max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_scores remove_invalid_values repetition_penalty return_dict_in_generate
    suppress_tokens temperature top_k top_p typical_p
    """.split()
)


def _int(value: object, low: int = 0, high: int = 2**31 - 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _real(value: object, high: float = sys.float_info.max) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= high


def _strings(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)


def _map(value: object, keys: Any) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(k, keys) and isinstance(v, str | int) for k, v in value.items())


def _dtype(value: object) -> torch.dtype | None:
    return DTYPES.get(value) if isinstance(value, str | torch.dtype) else None


def _by_index(labels: Any) -> Any:
    """JSON's keys are strings: a map whose keys are all numbers gets int keys."""
    if isinstance(labels, dict) and all(re.fullmatch("0|[1-9][0-9]{0,8}", str(k)) for k in labels):
        return {int(k): v for k, v in labels.items()}
    return labels


def _optional(rule: tuple[str, Callable]) -> tuple[str, Callable]:
    return f"None or {rule[0]}", lambda value: value is None or rule[1](value)


_SIZE = ("an int in 1 .. 2**31 - 1", lambda v: _int(v, 1))
_SHARE = ("a number in 0 .. 1", lambda v: _real(v, 1))
_FLAG = ("a bool", lambda v: isinstance(v, bool))
_TEXT = ("a str", lambda v: isinstance(v, str))
_COUNT = ("an int >= 0", _int)
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {  # field -> what is wanted, test
    "vocab_size": _SIZE,
    "hidden_size": _SIZE,
    # The bound stops a hostile file from building layers until memory runs out.
    "num_hidden_layers": ("an int in 1 .. 1024", lambda v: _int(v, 1, 1024)),
    "num_attention_heads": _SIZE,
    "intermediate_size": _SIZE,
    "hidden_act": (f"one of {', '.join(ACTIVATIONS)}", lambda v: v in ACTIVATIONS),
    "hidden_dropout_prob": _SHARE,
    "attention_probs_dropout_prob": _SHARE,
    "max_position_embeddings": _SIZE,
    "type_vocab_size": _SIZE,
    "initializer_range": ("a number >= 0", _real),
    "layer_norm_eps": ("a number > 0", lambda v: _real(v) and v > 0),
    "pad_token_id": _optional(_COUNT),
    "use_cache": _FLAG,
    "classifier_dropout": _optional(_SHARE),
    "is_decoder": _FLAG,
    "add_cross_attention": _FLAG,
    "bos_token_id": _optional(("an int", lambda v: isinstance(v, int))),  # this and eos: unused
    "eos_token_id": _optional(("an int or a list", lambda v: isinstance(v, int | list))),
    "tie_word_embeddings": _FLAG,
    "transformers_version": _optional(_TEXT),
    "architectures": _optional(("a list of str", _strings)),
    "output_hidden_states": _optional(_FLAG),
    "output_attentions": _optional(_FLAG),
    "return_dict": _optional(_FLAG),
    "dtype": _optional((f"one of {', '.join(_FLOATS)}", lambda v: _dtype(v) is not None)),
    "chunk_size_feed_forward": _COUNT,
    "is_encoder_decoder": _FLAG,
    "id2label": ("a map of int to label", lambda v: _map(v, int)),
    "label2id": _optional(("a map of label to int", lambda v: _map(v, str | int))),
    "problem_type": _optional((f"one of {', '.join(_PROBLEMS)}", lambda v: v in _PROBLEMS)),
    "position_embedding_type": _TEXT,
}
_LEGACY = {  # keys of older files that become a field
    "torch_dtype": _RULES["dtype"],
    "num_labels": _optional(("an int in 1 .. 1000000", lambda v: _int(v, 1, 10**6))),
}
_REFUSED = (
    ("is_decoder", False, "attention is not causal here"),
    ("add_cross_attention", False, "there is no cross attention here"),
    ("is_encoder_decoder", False, "there is no decoder here"),
    ("position_embedding_type", "absolute", "relative positions are not computed here"),
)
_LABELS = ("num_labels", "id2label", "label2id")
_WHERE = "subfolder revision cache_dir token local_files_only force_download".split()


@dataclass(kw_only=True, repr=False)
class BertConfig:
    """The configuration of a model, with transformers' fields, defaults and meanings.

    `num_labels` is the number of entries of `id2label`; setting it to another number gives the
    labels their default names. Setting `id2label` sets `label2id`. `position_embedding_type` of
    older files is kept, so that `validate` can refuse it.
    """

    model_type: ClassVar[str] = "bert"
    prefix: ClassVar[None] = None  # the pipelines of transformers 4 read this and the next
    task_specific_params: ClassVar[None] = None

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    use_cache: bool = True
    classifier_dropout: float | None = None
    is_decoder: bool = False
    add_cross_attention: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    transformers_version: str | None = field(default=None, compare=False)
    architectures: list[str] | None = None
    output_hidden_states: bool | None = False
    output_attentions: bool | None = False
    return_dict: bool | None = True
    dtype: torch.dtype | str | None = None
    chunk_size_feed_forward: int = 0
    is_encoder_decoder: bool = False
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None
    position_embedding_type: str = "absolute"
    name_or_path: str = field(default="", compare=False)
    num_labels: InitVar[int | None] = None

    def __post_init__(self, num_labels: int | None) -> None:
        if self.id2label is None:
            self.num_labels = 2 if num_labels is None else num_labels
        elif num_labels is not None and num_labels != self.num_labels:
            want = f"{self.num_labels} as in id2label"
            raise ValueError(f"num_labels: want {want}, got {num_labels!r:.200}")
        elif self.label2id is None:
            self.id2label = self.id2label  # sets the other

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "dtype":  # files and callers say "float16", who reads the field compares dtypes
            value = _dtype(value) or value
        elif name == "id2label":
            value = _by_index(value)
            if _map(value, int):
                object.__setattr__(self, "label2id", {label: i for i, label in value.items()})
        object.__setattr__(self, name, value)

    def __contains__(self, name: object) -> bool:
        return name in self.to_dict() or name == "num_labels"

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_dict()}"

    @property
    def _name_or_path(self) -> str:
        return self.name_or_path

    @property
    def torch_dtype(self) -> torch.dtype | str | None:
        """The older name of `dtype`, to be read."""
        return self.dtype

    @property
    def use_return_dict(self) -> bool | None:
        """The older name of `return_dict`, to be read."""
        return self.return_dict

    @classmethod
    def field_names(cls) -> frozenset[str]:
        """Return what __init__ takes: the fields and num_labels."""
        return frozenset(f.name for f in fields(cls)) | {"num_labels"}

    @classmethod
    def named(cls, name: str, **overrides: Any) -> "BertConfig":
        """Return one of Google's sizes: tiny, mini, small, medium, base or large.

        Raises:
            ValueError: another name.
            TypeError: an override that is not a field.
        """
        if name not in _NAMED:
            raise ValueError(f"name: want one of {', '.join(_NAMED)}, got {name!r}")
        layers, hidden, heads = _NAMED[name]
        sizes = {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "intermediate_size": 4 * hidden,
        }
        return cls(**sizes | overrides)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> "BertConfig":
        """Return the configuration in `values`, the content of a config.json.

        Keys that are not fields are ignored; those not known to be harmless are named in one
        warning.

        Args:
            values: as read from JSON, or from transformers' `to_dict`.
            **overrides: fields in place of those in `values`.

        Raises:
            ValueError: another model type, or a value of the wrong type or out of range.
            TypeError: an override that is not a field.
        """
        config, unknown = _parse(values, "config", overrides)
        _warn_of(unknown, "config")
        return config

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **overrides: Any
    ) -> "BertConfig":
        """Return the configuration of a directory or of a model on the hub.

        Args:
            pretrained_model_name_or_path: see `files.find_directory`.
            **overrides: fields in place of those in the file; and subfolder, revision,
                cache_dir, token, local_files_only, force_download for `files.find_directory`.

        Raises:
            OSError, ImportError: it cannot be found.
            ValueError, TypeError: as `from_dict`; the message names the file.
        """
        where = {name: overrides.pop(name) for name in _WHERE if name in overrides}
        directory = find_directory(pretrained_model_name_or_path, CONFIG_FILES, **where)
        config, unknown = read_config(directory, **overrides)
        _warn_of(unknown, str(directory / config_file(directory)))
        config.name_or_path = str(pretrained_model_name_or_path)
        return config

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write config.json into `directory`, which is made if need be; all of it or nothing.

        Raises:
            ValueError, NotImplementedError: as `validate`; nothing is written.
        """
        self.validate()
        Path(directory).mkdir(parents=True, exist_ok=True)
        with staged(Path(directory)) as write:
            write(CONFIG_FILE, [self.to_json_string().encode()])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and `model_type` in JSON's types, for `from_dict` here or there."""
        values = {f.name: copy.deepcopy(getattr(self, f.name)) for f in fields(self)}
        values["_name_or_path"] = values.pop("name_or_path")
        values["model_type"] = self.model_type
        if isinstance(self.dtype, torch.dtype):
            values["dtype"] = str(self.dtype).removeprefix("torch.")
        if self.position_embedding_type == "absolute":  # transformers 5 has no such field
            del values["position_embedding_type"]
        return values

    def to_json_string(self) -> str:
        """Return the text of config.json."""
        values = self.to_dict()
        del values["_name_or_path"]  # where it was read from concerns no other machine
        return json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n"

    def update(self, values: Mapping[str, Any]) -> None:
        """Set fields.

        Raises:
            TypeError: a name is not a field; nothing is set.
        """
        if unknown := sorted(values.keys() - self.field_names()):
            raise TypeError(f"want fields of {type(self).__name__}, got {', '.join(unknown)}")
        labels = [name for name in _LABELS if name in values]  # last, since each sets the next
        for name in [*(values.keys() - set(_LABELS)), *labels]:
            setattr(self, name, values[name])

    def get(self, name: str, default: Any = None) -> Any:
        """Return the field `name`, `default` where there is none."""
        return getattr(self, name) if name in self else default

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> "BertConfig":
        """Return self; transformers asks this of models that may have several parts."""
        return self

    def fingerprint(self) -> str:
        """Return the SHA-256 of the fields that decide what given weights compute.

        Sizes, heads, activation, epsilon, padding id and tying; not dropout, labels or dtype.
        """
        values = {name: getattr(self, name) for name in _NUMERIC}
        values["layer_norm_eps"] = float(self.layer_norm_eps)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def validate(self) -> None:
        """Check every field; models do this when they are built and when they run.

        Raises:
            ValueError: a field has the wrong type or range, or two do not fit together.
            NotImplementedError: the fields ask for what would be computed wrongly; the message
                lists all of it.
        """
        for name, (want, fits) in _RULES.items():
            if not fits(got := getattr(self, name)):
                raise ValueError(f"{name}: want {want}, got {got!r:.200}")
        if self.hidden_size % self.num_attention_heads:
            want = f"a divisor of hidden_size {self.hidden_size}"
            raise ValueError(f"num_attention_heads: want {want}, got {self.num_attention_heads}")
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            want = f"None or an int below vocab_size {self.vocab_size}"
            raise ValueError(f"pad_token_id: want {want}, got {self.pad_token_id}")
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError("num_labels: want 2 or more for single_label_classification, got 1")
        reasons = [
            f"{name}: want {want!r}, got {getattr(self, name)!r:.200}: {reason}"
            for name, want, reason in _REFUSED
            if getattr(self, name) != want
        ]
        if reasons:
            raise NotImplementedError("; ".join(reasons))


def read_config(directory: Path, **overrides: Any) -> tuple[BertConfig, list[str]]:
    """Return the configuration in a local directory, and the keys of its file that mean nothing.

    Raises:
        FileNotFoundError: there is none.
        ValueError, TypeError: as `BertConfig.from_dict`; the message names the file.
    """
    name = config_file(directory)
    return _parse(read_json(directory, name), str(directory / name), overrides)


def config_file(directory: Path) -> str:
    """Return config.json, or Google's bert_config.json where only that is there."""
    return next((n for n in CONFIG_FILES if os.path.lexists(directory / n)), CONFIG_FILE)


def _parse(
    values: Mapping[str, Any], where: str, overrides: Mapping[str, Any]
) -> tuple[BertConfig, list[str]]:
    if (kind := values.get("model_type", "bert")) != "bert":
        raise ValueError(f"{where}: model_type: want 'bert', got {kind!r:.200}")
    read: dict[str, Any] = {}
    for name, (want, fits) in (_RULES | _LEGACY).items():
        value = _by_index(values.get(name)) if name == "id2label" else values.get(name)
        if name not in values or name in overrides or (name == "id2label" and value is None):
            continue
        if not fits(value):
            raise ValueError(f"{where}: {name}: want {want}, got {value!r:.200}")
        read[name] = copy.deepcopy(value)
    dtype, num_labels = read.pop("torch_dtype", None), read.pop("num_labels", None)
    if dtype is not None and read.get("dtype") is None and "dtype" not in overrides:
        read["dtype"] = dtype
    if "id2label" not in read:
        read["num_labels"] = num_labels
    count = len(read.get("id2label", ())) or num_labels
    if "id2label" in overrides or overrides.get("num_labels", count) != count:
        for name in _LABELS:  # all are the caller's, or all the file's
            read.pop(name, None)
    unknown = sorted(map(str, values.keys() - _RULES.keys() - _LEGACY.keys() - _HARMLESS))
    return BertConfig(**read | dict(overrides)), unknown


def _warn_of(unknown: list[str], where: str) -> None:
    if unknown:
        warnings.warn(f"{where}: ignored the keys {', '.join(unknown):.1000}", stacklevel=3)


def _get_num_labels(config: BertConfig) -> int:
    return len(config.id2label) if isinstance(config.id2label, dict) else 0


def _set_num_labels(config: BertConfig, count: int) -> None:
    if not _int(count, 1):
        raise ValueError(f"num_labels: want an int >= 1, got {count!r:.200}")
    if count != _get_num_labels(config):
        config.id2label = {i: f"LABEL_{i}" for i in range(count)}


# An argument of __init__ and an attribute under one name: dataclasses make only the argument.
BertConfig.num_labels = property(_get_num_labels, _set_num_labels)
