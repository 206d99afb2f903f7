"""Tokenizers <-> files: tokenizer.json, vocab.txt and what stands beside them.

tokenizer.json is the truth where it is there: vocabulary, rules and added tokens are taken from it.
tokenizer_config.json decides what it says in so many words about lower case, accents and Chinese
characters, as in transformers, and names the special tokens. A directory of Google's has vocab.txt
alone.
"""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

from bert_fast.files import MAX_JSON_BYTES, parse_json, plain_file, read_json, staged
from bert_fast.tokenizer.vocabulary import read_vocab, vocab_bytes

TOKENIZER_FILE, VOCAB_FILE = "tokenizer.json", "vocab.txt"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE, ADDED_FILE = "special_tokens_map.json", "added_tokens.json"
FILES = (TOKENIZER_FILE, VOCAB_FILE, CONFIG_FILE, SPECIAL_FILE, ADDED_FILE)
SPECIAL_TOKENS = (  # in the order in which transformers adds those that a vocabulary lacks
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
RULES = {  # our name: the name in tokenizers' BertNormalizer
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes that change no rule
_BOOLS = ("do_lower_case", "tokenize_chinese_chars", "split_special_tokens")
_SIDES = ("padding_side", "truncation_side")
_TOKEN_KEYS = {"content", "single_word", "lstrip", "rstrip", "normalized"}


def build(vocab: Mapping[str, int], *, unk_token: str, **rules: bool | None) -> Tokenizer:
    """Return BERT's tokenizer of a vocabulary, without special tokens and post-processor.

    Args:
        vocab: token -> id.
        unk_token: what a word becomes that has no pieces in the vocabulary.
        **rules: do_lower_case, strip_accents, tokenize_chinese_chars.

    Raises:
        ValueError: unk_token is not in vocab.
    """
    if unk_token not in vocab:
        raise ValueError(f"vocab: want {unk_token} among the tokens, got {len(vocab)} without it")
    backend = Tokenizer(WordPiece(dict(vocab), unk_token=unk_token))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True, **{RULES[name]: value for name, value in rules.items()}
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def bert_template(cls: tuple[str, int], sep: tuple[str, int]) -> processors.TemplateProcessing:
    """Return what makes [CLS] A [SEP] and [CLS] A [SEP] B [SEP] of encodings.

    Args:
        cls: the token in front and its id.
        sep: the token behind each text and its id.
    """
    single = f"{cls[0]}:0 $A:0 {sep[0]}:0"
    return processors.TemplateProcessing(
        single=single, pair=f"{single} $B:1 {sep[0]}:1", special_tokens=[cls, sep]
    )


def read_tokenizer(
    directory: str | os.PathLike, given: Mapping[str, Any]
) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the tokenizer of a directory, and the arguments of BertTokenizer that go with it.

    Args:
        directory: as `files.find_directory` returns it.
        given: arguments of the caller, which come before those in the files.

    Raises:
        FileNotFoundError: neither tokenizer.json nor vocab.txt.
        ValueError: a file is damaged, is no tokenizer of WordPiece, or contradicts itself.
    """
    directory = Path(directory)
    found = read_settings(directory)
    settings = {**found, **given}
    rules = {name: settings.pop(name) for name in RULES if name in settings}
    generic = settings.pop("tokenizer_class", None) in _GENERIC
    if os.path.lexists(directory / TOKENIZER_FILE):
        backend, sides = _read_backend(directory)
        settings = {**sides, **settings}
        if generic:  # such a class takes the rules as they are; the caller may still ask
            rules = {name: given[name] for name in RULES if name in given}
        elif "do_lower_case" not in rules and rules_of(backend).get("do_lower_case") is False:
            warnings.warn(
                f"{directory}: {TOKENIZER_FILE} keeps capital letters, and so do we; transformers "
                f"does not, because {CONFIG_FILE} does not say so: pass do_lower_case",
                stacklevel=3,
            )
        _override(backend, rules)
    else:
        path = directory / VOCAB_FILE
        if not os.path.lexists(path):
            raise FileNotFoundError(f"{directory}: want {TOKENIZER_FILE} or {VOCAB_FILE}, got none")
        unk = str(settings.get("unk_token", "[UNK]"))
        rules = {"do_lower_case": True, "tokenize_chinese_chars": True, **rules}
        vocab = read_vocab(plain_file(directory, VOCAB_FILE))
        try:
            backend = build(vocab, unk_token=unk, **rules)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return backend, settings


def read_settings(directory: Path) -> dict[str, Any]:
    """Return what the files beside vocabulary and rules say; keys that we do not know are left out.

    Raises:
        ValueError: a file is no JSON, or a value is of the wrong type.
    """
    config = _optional(directory, CONFIG_FILE)
    where = directory / CONFIG_FILE
    added = config.get("added_tokens_decoder")
    if added is None:  # as older versions of transformers write it
        config.update(_optional(directory, SPECIAL_FILE))
    named = {}
    for name in SPECIAL_TOKENS:
        if config.get(name) is not None:
            named[name] = _token(config[name], f"{where}: {name}")
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(more, list):  # a dict names tokens of models that see and hear
        named["extra_special_tokens"] = [_token(t, f"{where}: extra special tokens") for t in more]
    if added is None:
        special = {str(token) for name, token in named.items() if name in SPECIAL_TOKENS}
        special |= set(map(str, named.get("extra_special_tokens", ())))
        legacy, where = _optional(directory, ADDED_FILE), directory / ADDED_FILE
        added = {
            i: {"content": t, "normalized": t not in special, "special": t in special}
            for t, i in legacy.items()
        }
    if not isinstance(added, dict):
        raise ValueError(f"{where}: added_tokens_decoder: want an object, got {added!r:.200}")
    try:
        decoder = {int(i): _token(t, f"{where}: added token") for i, t in added.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: added tokens: want them by id, got {error}") from error
    settings, where = {**named, "added_tokens_decoder": decoder}, directory / CONFIG_FILE
    for name in (*_BOOLS, "strip_accents", "clean_up_tokenization_spaces"):
        value = config.get(name)
        if value is not None and type(value) is not bool:
            raise ValueError(f"{where}: {name}: want true or false, got {value!r:.200}")
        if value is not None or (name == "strip_accents" and name in config):
            settings[name] = value
    for name in _SIDES:
        if name in config:
            settings[name] = config[name]
    longest = config.get("model_max_length", config.get("max_len"))
    if longest is not None:
        if type(longest) not in (int, float) or longest <= 0:
            raise ValueError(f"{where}: model_max_length: want a number, got {longest!r:.200}")
        settings["model_max_length"] = int(longest)
    names = config.get("model_input_names")
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        settings["model_input_names"] = names
    if isinstance(config.get("tokenizer_class"), str):
        settings["tokenizer_class"] = config["tokenizer_class"]
    return settings


def write_tokenizer(
    directory: Path,
    backend: Tokenizer,
    *,
    special: Mapping[str, str],
    extra: list[str],
    settings: Mapping[str, Any],
    legacy_format: bool,
    prefix: str,
) -> tuple[str, ...]:
    """Write a tokenizer's files, all or none, as transformers reads them, and return their paths.

    Args:
        directory: made if need be.
        backend: vocabulary, rules and added tokens.
        special: name -> special token.
        extra: special tokens without a name.
        settings: further entries of tokenizer_config.json.
        legacy_format: no tokenizer.json; added tokens in a file of their own.
        prefix: in front of the names of the files, with "-".

    Raises:
        ValueError: legacy_format, and vocab.txt cannot hold the vocabulary.
        OSError: the files cannot be written; what was there is left as it was.
    """
    rules = rules_of(backend)
    # a class BertTokenizer would have BERT's own rules there, whatever tokenizer.json says
    kind = "BertTokenizer" if rules else _GENERIC[0]
    config = {**settings, **special, **rules, "tokenizer_class": kind}
    if extra:
        config["extra_special_tokens"] = extra
    files = {SPECIAL_FILE: _json(special), CONFIG_FILE: _json(config)}
    vocab = backend.get_vocab(with_added_tokens=False)
    try:
        files[VOCAB_FILE] = vocab_bytes(vocab)
    except ValueError:
        if legacy_format:
            raise
    if not legacy_format:
        files[TOKENIZER_FILE] = backend.to_str(pretty=True).encode()
    else:
        added = sorted(backend.get_added_tokens_decoder().items())
        files[ADDED_FILE] = _json({t.content: i for i, t in added if t.content not in vocab})
    return _write(directory, files, prefix)


def write_vocab(directory: Path, backend: Tokenizer, prefix: str) -> tuple[str, ...]:
    """Write vocab.txt alone, and return its path; Args and Raises as write_tokenizer."""
    raw = vocab_bytes(backend.get_vocab(with_added_tokens=False))
    return _write(directory, {VOCAB_FILE: raw}, prefix)


def _write(directory: Path, files: Mapping[str, bytes], prefix: str) -> tuple[str, ...]:
    """Write all files or none, and return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    named = {f"{prefix}-{name}" if prefix else name: raw for name, raw in files.items()}
    with staged(directory) as write:
        for name, raw in named.items():
            write(name, [raw])
    return tuple(str(directory / name) for name in named)


def _json(value: Mapping[str, Any]) -> bytes:
    """Return a JSON file that people can read."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def rules_of(backend: Tokenizer) -> dict[str, bool | None]:
    """Return do_lower_case, strip_accents and tokenize_chinese_chars; {} of rules not BERT's."""
    normalizer = backend.normalizer
    bert = isinstance(normalizer, normalizers.BertNormalizer)
    if not bert or not isinstance(backend.pre_tokenizer, pre_tokenizers.BertPreTokenizer):
        return {}
    return {name: getattr(normalizer, theirs) for name, theirs in RULES.items()}


def _read_backend(directory: Path) -> tuple[Tokenizer, dict[str, str]]:
    """Return what tokenizer.json holds, and the sides of the padding and truncation in it."""
    path = plain_file(directory, TOKENIZER_FILE)
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path}: want at most {MAX_JSON_BYTES} bytes, got {size}")
    state = parse_json(path.read_bytes(), str(path))
    sides = {}
    for name, key in (("truncation", "truncation_side"), ("padding", "padding_side")):
        kept = state.get(name)
        if isinstance(kept, dict) and isinstance(kept.get("direction"), str):
            sides[key] = kept["direction"].lower()
    model = state.get("model")
    kind = model.get("type", "WordPiece") if isinstance(model, dict) else type(model).__name__
    if kind != "WordPiece":
        raise ValueError(f"{path}: model: want WordPiece, got {kind!r:.200}")
    vocab, unk = model.get("vocab"), model.get("unk_token")
    if not isinstance(vocab, dict) or unk not in vocab:
        raise ValueError(f"{path}: model: want {unk!r:.200} in the vocabulary, which has it not")
    try:
        backend = Tokenizer.from_str(json.dumps(state))
    except BaseException as error:  # also a panic of the library's, which is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise ValueError(f"{path}: want a tokenizer, got {error!s:.500}") from error
    for token in state.get("added_tokens") or []:
        if (got := backend.token_to_id(token["content"])) != token["id"]:
            want = f"{token['content']!r:.200} with id {token['id']}"
            raise ValueError(f"{path}: added_tokens: want {want}, got {got}")
    return backend, sides


def _override(backend: Tokenizer, rules: Mapping[str, bool | None]) -> None:
    """Change BERT's rules as asked; others stay."""
    own = rules_of(backend)
    if own and any(own[name] != value for name, value in rules.items()):
        own.update(rules)
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=backend.normalizer.clean_text, **{RULES[n]: v for n, v in own.items()}
        )


def _optional(directory: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in a file, {} where there is no such file."""
    return read_json(directory, name) if os.path.lexists(directory / name) else {}


def _token(value: Any, where: str) -> str | AddedToken:
    """Return a token as a file says it: text, or an object with its settings."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {key: value[key] for key in _TOKEN_KEYS if key in value}
        if all(type(flag) is bool for key, flag in flags.items() if key != "content"):
            return AddedToken(**flags, special=bool(value.get("special", True)))
    raise ValueError(f"{where}: want a token, got {value!r:.200}")
