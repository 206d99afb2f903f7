"""Checkpoints from one form into another, as directories that transformers opens.

    from_tf("uncased_L-12_H-768_A-12", "bert-base")     Google's, of TensorFlow
    to_hf("mine", "theirs", dtype="float16")            any that is read here
    legacy_names("old", "present")                      the same tensors under today's names

Each reads the whole source with all its checks before it writes anything, writes into a new or
empty directory, and gives the files their names when all of them are on the disk. Weights become
safetensors; no bert_fast.json is written. The tokenizer's files that lie beside them go along as
they are.
"""

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bert_fast import checkpoint, heads
from bert_fast.config import CONFIG_FILE, DTYPES, BertConfig, config_file
from bert_fast.files import MAX_JSON_BYTES, plain_file, read_json, staged
from bert_fast.model import BertModel
from bert_fast.names import as_saved, is_buffer, is_head, is_optimizer
from bert_fast.pretrained import BertPreTrainedModel
from bert_fast.weights import BUNDLE, bundle_file, google_items, nonfinite, some, weight_file

HEADS: dict[str, type[BertPreTrainedModel]] = {
    "none": BertModel,
    "pretraining": heads.BertForPreTraining,
    "masked-lm": heads.BertForMaskedLM,
    "next-sentence": heads.BertForNextSentencePrediction,
    "sequence-classification": heads.BertForSequenceClassification,
    "token-classification": heads.BertForTokenClassification,
    "multiple-choice": heads.BertForMultipleChoice,
    "question-answering": heads.BertForQuestionAnswering,
}
VOCAB_FILE, TOKENIZER_FILE = "vocab.txt", "tokenizer_config.json"
_JSON = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json")
_BUFFER, _OPTIMIZER, _UNKNOWN = "a buffer", "the optimizer's", "no weight of BERT"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was read, written and ignored.

    Attributes:
        source: the directory that was read, or the prefix of TensorFlow's files.
        target: the directory that was written.
        architecture: the name of the model class whose weights these are.
        written: name of a tensor -> the name it had in the source.
        ignored: name of a tensor in the source -> why it was not written.
        missing: tensors of the architecture that the source lacks: whoever loads the result
            initialises them.
        files: the names of the files that were written.
    """

    source: Path
    target: Path
    architecture: str
    written: dict[str, str]
    ignored: dict[str, str]
    missing: list[str]
    files: list[str]


def from_tf(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    head: str | None = None,
    do_lower_case: bool | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write Google's checkpoint as config.json, model.safetensors and the tokenizer's files.

    The result has every weight of its architecture and no other. What run_classifier.py and
    run_squad.py add is a head too; the number of labels is that of the weights where
    bert_config.json names none.

    Args:
        src: a directory with bert_config.json and bert_model.ckpt.* (or the files of one other
            checkpoint), or the path of a checkpoint without `.index`, beside bert_config.json.
        dst: new or empty.
        head: a key of HEADS; None: the one whose weights there are.
        do_lower_case: for the tokenizer; None: True unless a word of vocab.txt has a capital.
        overwrite: write into a directory that holds files. Files of the same names are replaced,
            weights and manifest of an earlier save removed, when the new ones are complete.

    Raises:
        FileNotFoundError: there is no such checkpoint, configuration or shard.
        FileExistsError, NotADirectoryError: dst holds files, or is one.
        ValueError: a file is damaged or does not fit the others, or the head's weights are not
            all there.
        NotImplementedError: a configuration that is not computed here.
    """
    if head is not None and head not in HEADS:
        raise ValueError(f"head: want one of {', '.join(HEADS)}, got {head!r:.200}")
    target = _target(dst, overwrite)
    prefix = _prefix(Path(src))
    source = _read_google(prefix)
    model = HEADS[head] if head else _architecture(source)
    match = _fit(source, model)
    if match.new:
        raise ValueError(f"{prefix}: want all of {model.__name__}, got none for {some(match.new)}")
    ignored = source.ignored | {
        source.origin[name]: f"not of {model.__name__}" for name in match.unexpected
    }
    beside = _tokenizer_files(source)
    if VOCAB_FILE in beside and TOKENIZER_FILE not in beside:
        lower = _is_lower(beside[VOCAB_FILE]) if do_lower_case is None else do_lower_case
        beside[TOKENIZER_FILE] = _tokenizer_config(source.config, lower)
    elif do_lower_case is not None:
        want = f"{VOCAB_FILE} and no {TOKENIZER_FILE}"
        raise ValueError(f"do_lower_case: want {want} in {source.directory}, got {some(beside)}")
    source.config.architectures = [model.__name__]
    return _write(source, target, model, match.tensors, beside, ignored=ignored)


def to_hf(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Conversion:
    """Write any checkpoint that is read here as the files that transformers writes today.

    All weights are kept, also those that the architecture has no use for. Left out are buffers,
    the second of two tied tensors that are equal, and what an optimizer left in Google's files.

    Args:
        src: a directory or the id of a model on the hub, with safetensors, pytorch_model.bin or
            shards of either, under names of any age, or with Google's files.
        dst: new or empty.
        dtype: of the floating tensors; None: as they are.
        max_shard_size: bytes, or a text such as "2GB", above which the weights are split.
        overwrite: as in `from_tf`.

    Raises:
        OSError: as in `from_tf`, or the hub cannot be asked.
        ValueError: a file is damaged or does not fit the others, a weight is too large for the
            dtype.
        TypeError, NotImplementedError: a weight is no floating number; as in `from_tf`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: want fp32, fp16, bf16 or fp64, got {dtype!r:.200}")
    target = _target(dst, overwrite)
    source = _read(checkpoint.locate(src))
    config = source.config
    named = [m for m in HEADS.values() if m.__name__ in (config.architectures or ())]
    model = named[0] if named else _architecture(source)
    match = _fit(source, model)
    if match.untied:
        config.tie_word_embeddings = False
    found = match.tensors | {name: source.tensors[name] for name in match.unexpected}
    tensors = {now: found[name] for name, now in as_saved(found).items()}
    kept = {id(tensor) for tensor in tensors.values()}
    ignored = source.ignored | {
        source.origin[n]: "tied to an equal one"
        for n, t in source.tensors.items()
        if id(t) not in kept
    }
    return _write(
        *(source, target, model, tensors, _tokenizer_files(source)),
        ignored=ignored,
        missing=match.new,
        dtype=None if dtype is None else DTYPES[dtype],
        max_shard_size=max_shard_size,
    )


def legacy_names(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Conversion:
    """Write the tensors of a checkpoint, untouched, under the names they have today.

    LayerNorm's gamma and beta become weight and bias, `module.` of DataParallel goes, and `bert.`
    stands before the encoder's names where there is a head and nowhere else. Values, dtypes, other
    tensors and config.json stay as they are; only buffers are left out. A configuration without
    model_type, which transformers does not open, is written anew.

    Args:
        src: a directory or the id of a model on the hub, with safetensors or pytorch_model.bin.
        dst: new or empty.
        max_shard_size: as in `to_hf`.
        overwrite: as in `from_tf`.

    Raises:
        OSError: as in `to_hf`.
        ValueError: a file is damaged, two names become one, or the files are Google's.
    """
    target = _target(dst, overwrite)
    directory = checkpoint.locate(src)
    if (file := weight_file(directory)).endswith(".index"):
        raise ValueError(f"{directory}: want Hugging Face's files, got {file}: see from_tf")
    source = _read(directory)
    tensors = {now: source.tensors[name] for name, now in as_saved(source.tensors).items()}
    beside = _tokenizer_files(source, check=False)
    name = config_file(directory)
    if "model_type" in read_json(directory, name):
        beside[CONFIG_FILE] = plain_file(directory, name).read_bytes()
    return _write(
        *(source, target, _architecture(source), tensors, beside),
        ignored=source.ignored,
        max_shard_size=max_shard_size,
    )


# --- reading -------------------------------------------------------------------------------------


@dataclass
class _Source:
    path: Path  # of the directory, or a prefix in it
    directory: Path
    config: BertConfig
    tensors: dict[str, Tensor]
    origin: dict[str, str]  # name in `tensors` -> name in the file
    ignored: dict[str, str]


def _prefix(path: Path) -> Path:
    """Return the prefix of the one checkpoint that a path means."""
    if path.is_dir():
        if file := bundle_file(path):
            return path / file.removesuffix(".index")
        got = some(os.listdir(path))
        raise FileNotFoundError(f"{path}: want {BUNDLE}.index, got {got}")
    prefix = path.with_name(path.name.removesuffix(".index"))
    plain_file(prefix.parent, f"{prefix.name}.index")
    return prefix


def _read(directory: Path) -> _Source:
    if (file := weight_file(directory)).endswith(".index"):
        return _read_google(directory / file.removesuffix(".index"))
    config = BertConfig.from_pretrained(directory)
    found = checkpoint.read_tensors(directory)
    tensors = {name: tensor for name, tensor in found.items() if not is_buffer(name)}
    try:
        as_saved(tensors)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    ignored = {name: _BUFFER for name in found if name not in tensors}
    return _Source(directory, directory, config, tensors, {n: n for n in tensors}, ignored)


def _read_google(prefix: Path) -> _Source:
    config = BertConfig.from_pretrained(prefix.parent)
    tensors: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    ignored: dict[str, str] = {}
    for name, now, tensor in google_items(prefix):
        if now is None:
            ignored[name] = _OPTIMIZER if is_optimizer(name) else _UNKNOWN
        else:
            tensors[now], origin[now] = tensor, name
    if bad := nonfinite(tensors):
        names = some(origin[name] for name in bad)
        raise ValueError(f"{prefix}.index: want finite weights, got NaN or infinity in {names}")
    values = read_json(prefix.parent, config_file(prefix.parent))
    classifier = tensors.get("classifier.bias", torch.empty(0))
    if not values.keys() & {"num_labels", "id2label"} and 1 <= classifier.numel() <= 10**6:
        config.num_labels = classifier.numel()
    return _Source(prefix, prefix.parent, config, tensors, origin, ignored)


def _architecture(source: _Source) -> type[BertPreTrainedModel]:
    """Return the class whose weights these are, by the heads there are."""
    names = as_saved(source.tensors).values()

    def has(part: str) -> bool:
        return any(name.startswith(part) for name in names)

    relationship = has("cls.seq_relationship.")
    if has("cls.predictions."):
        return HEADS["pretraining" if relationship else "masked-lm"]
    if has("qa_outputs."):
        return HEADS["question-answering"]
    if has("classifier."):
        if not has("bert.pooler."):
            return HEADS["token-classification"]
        # One output for several labels is a score for each choice.
        outputs = {t.shape[:1] for n, t in source.tensors.items() if "classifier." in n}
        choice = outputs == {(1,)} and source.config.num_labels > 1
        return HEADS["multiple-choice" if choice else "sequence-classification"]
    return HEADS["next-sentence" if relationship else "none"]


def _fit(source: _Source, model: type[BertPreTrainedModel]) -> checkpoint.Match:
    """Compare the tensors with the model that the configuration describes."""
    with torch.device("meta"):
        wanted = model(source.config).state_dict()
    return checkpoint.match(
        source.tensors,
        wanted,
        tied=model.tied_weights if source.config.tie_word_embeddings else {},
        new_allowed=is_head,
        source=source.path,
    )


# --- writing -------------------------------------------------------------------------------------


def _target(dst: str | os.PathLike, overwrite: bool) -> Path:
    target = Path(dst)
    if target.is_dir():
        if not overwrite and (there := os.listdir(target)):
            want = "a new or empty directory (overwrite=True takes others)"
            raise FileExistsError(f"{target}: want {want}, got {some(there)}")
    elif os.path.lexists(target):
        raise NotADirectoryError(f"{target}: want a directory, got a file")
    return target


def _tokenizer_files(source: _Source, check: bool = True) -> dict[str, bytes]:
    """Return the content of the tokenizer's files that lie beside the weights."""
    files: dict[str, bytes] = {}
    for name in (VOCAB_FILE, TOKENIZER_FILE, *_JSON):
        if os.path.lexists(source.directory / name):
            path = plain_file(source.directory, name)
            if (size := path.stat().st_size) > MAX_JSON_BYTES:
                raise ValueError(f"{path}: want at most {MAX_JSON_BYTES} bytes, got {size}")
            files[name] = path.read_bytes()
    if check and VOCAB_FILE in files:
        path, rows = source.directory / VOCAB_FILE, source.config.vocab_size
        try:
            count = len(_words(files[VOCAB_FILE]))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: want UTF-8, got another byte at {error.start}") from error
        if count > rows:
            want = f"at most {rows} lines, as many as word embeddings"
            raise ValueError(f"{path}: want {want}, got {count}")
    return files


def _words(vocab: bytes) -> list[str]:
    return vocab.decode().removesuffix("\n").split("\n")


def _is_lower(vocab: bytes) -> bool:
    """Return whether no word has a capital; [CLS] and <S> are no words."""
    words = (w.strip() for w in _words(vocab))
    return not any(w != w.lower() for w in words if not re.fullmatch(r"\[.*\]|<.*>", w))


def _tokenizer_config(config: BertConfig, lower: bool) -> bytes:
    values = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": lower,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "model_max_length": config.max_position_embeddings,
        **{f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")},
    }
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _write(
    source: _Source,
    target: Path,
    model: type[BertPreTrainedModel],
    tensors: dict[str, Tensor],
    beside: dict[str, bytes],
    *,
    ignored: dict[str, str],
    missing: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> Conversion:
    """Write weights, configuration (unless it is in `beside`) and other files; all or none."""
    by_id = {id(tensor): source.origin[name] for name, tensor in source.tensors.items()}
    written = {name: by_id[id(tensor)] for name, tensor in tensors.items()}
    if dtype is not None:
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        if bad := nonfinite(tensors):
            raise ValueError(f"{source.path}: want weights that {dtype} holds, got {some(bad)}")
    if CONFIG_FILE not in beside:
        config = source.config
        config.architectures = config.architectures or [model.__name__]
        config.dtype = checkpoint.checkpoint_dtype(tensors)
        config.validate()
        beside = {CONFIG_FILE: config.to_json_string().encode(), **beside}
    shards = checkpoint.weight_shards(tensors, max_shard_size)
    new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        with staged(target) as write:
            names = [*checkpoint.write_weights(write, shards), *beside]
            for name, content in beside.items():
                write(name, [content])
    except BaseException:
        if new:
            with suppress(OSError):
                target.rmdir()
        raise
    checkpoint.remove_other_weights(target, names)
    (target / checkpoint.MANIFEST).unlink(missing_ok=True)
    return Conversion(
        source=source.path,
        target=target,
        architecture=model.__name__,
        written=written,
        ignored=ignored,
        missing=[*missing],
        files=names,
    )
