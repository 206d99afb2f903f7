"""The settings of a pretraining run: from YAML and the command line, checked, all problems at once.

Training is a function of these settings, the corpus and the number of the step. `fingerprint` is
of those among them that decide what is computed; the others say where, how fast, and what is kept.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from bert_fast.train.config_file import dump_yaml, override, parse_yaml, read_config
from bert_fast.train.rules import (
    BELOW_1,
    COUNT_OR_SHARE,
    DEVICE,
    FLAG,
    MAPPING,
    NOT_NEGATIVE,
    PATH,
    POSITIVE,
    SHARE,
    integer,
    one_of,
    optional,
    parse,
    several,
    unknown_name,
)
from bert_fast.train.schedule import SCHEDULES, learning_rate

if TYPE_CHECKING:
    from bert_fast.config import BertConfig

SYNTHETIC = "synthetic"
SIZES = ("tiny", "mini", "small", "medium", "base", "large")
# What may differ from the checkpoint to go on from: the weights mean the same without it.
_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
_OF_CORPUS = {"vocab_size", "pad_token_id"}
_SHORTEST = 5  # [CLS] a [SEP] b [SEP]
_LENGTHS = several(integer(_SHORTEST), f"a list of ints, {_SHORTEST} or more")
_BETAS = several(BELOW_1, "two numbers from 0 to below 1", 2)
# The settings that decide what is computed. Not among them: data.corpus (its digest is), and
# data.workers, compile, activation_checkpointing, fsdp, device, threads, save, evaluate, log,
# output, which leave the mathematics as it is, if not each rounding.
MATHEMATICS = (
    *("data.short_seq_prob", "data.mlm_probability", "data.mask_replace_prob"),
    *("data.random_replace_prob", "data.whole_word_mask", "data.max_predictions"),
    *("data.vocab_size", "data.lengths"),
    *("model", "phases", "micro_batches", "optimizer", "precision", "seed"),
)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What is learned from.

    Attributes:
        corpus: directory that `bert-fast data prepare` made, or "synthetic": random ids.
        workers: processes that make batches; 0: the main one does.
        short_seq_prob: share of the examples that are meant to be shorter than max_length.
        mlm_probability: share of an example's tokens that are to be predicted.
        mask_replace_prob: share of these that [MASK] replaces.
        random_replace_prob: share of these that a random token replaces; the rest stays.
        whole_word_mask: whether whole words are chosen instead of single tokens.
        max_predictions: tokens chosen in an example at most; None: no limit.
        vocab_size: of synthetic data; None: 30,522, as the published models.
        lengths: tokens of synthetic sequences, in turn, cut to a phase's max_length; None: all have
            max_length.
    """

    corpus: Annotated[str, PATH]
    workers: Annotated[int, integer(0, 1024)] = 2
    short_seq_prob: Annotated[float, SHARE] = 0.1
    mlm_probability: Annotated[float, SHARE] = 0.15
    mask_replace_prob: Annotated[float, SHARE] = 0.8
    random_replace_prob: Annotated[float, SHARE] = 0.1
    whole_word_mask: Annotated[bool, FLAG] = False
    max_predictions: Annotated[int | None, optional(integer(1))] = None
    vocab_size: Annotated[int | None, optional(integer(100, 2**24))] = None
    lengths: Annotated[tuple[int, ...] | None, optional(_LENGTHS)] = None

    @property
    def synthetic(self) -> bool:
        """Whether ids are random."""
        return self.corpus == SYNTHETIC

    def problems(self) -> Iterator[str]:
        """Yield what does not fit together, each beginning with the name of a setting here."""
        if self.mask_replace_prob + self.random_replace_prob > 1 + 1e-9:
            both = f"{self.mask_replace_prob} + {self.random_replace_prob}"
            yield f"random_replace_prob: want at most 1 with mask_replace_prob, got {both}"
        for name in ("vocab_size", "lengths") if not self.synthetic else ():
            if (got := getattr(self, name)) is not None:
                yield f"{name}: want null with a corpus that is not {SYNTHETIC}, got {got!r:.200}"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What is trained: either of the two, size or init.

    Attributes:
        size: tiny, mini, small, medium, base or large, as Google published them, with new weights.
        init: directory or hub id of a checkpoint to go on from.
        output_bias: of the vocabulary, what new weights begin with: zeros, or unigram: the
            logarithm of each token's share of the corpus, so that no step is spent on learning it.
        positions: what new position embeddings begin as: random, or sinusoidal, so that near
            positions are alike from the first step on.
        config: fields of BertConfig in place of the size's; of a checkpoint's, those of dropout.
    """

    size: Annotated[str | None, optional(one_of(*SIZES))] = None
    init: Annotated[str | None, optional(PATH)] = None
    output_bias: Annotated[str, one_of("zeros", "unigram")] = "zeros"
    positions: Annotated[str, one_of("random", "sinusoidal")] = "random"
    config: Annotated[dict[str, Any], MAPPING] = field(default_factory=dict)

    def bert_config(self, vocab_size: int, pad_token_id: int | None = None) -> "BertConfig":
        """Return the model's configuration.

        Args:
            vocab_size: of the corpus's tokenizer.
            pad_token_id: likewise; None: whatever it is.

        Raises:
            ValueError: the checkpoint has another vocabulary; an invalid configuration.
            OSError, ImportError: the checkpoint cannot be found.
        """
        from bert_fast.config import BertConfig

        if self.init is None:
            fields = self.config if pad_token_id is None else {"pad_token_id": pad_token_id}
            return BertConfig.named(self.size, vocab_size=vocab_size, **{**self.config, **fields})
        config = BertConfig.from_pretrained(self.init, **self.config)
        if config.vocab_size != vocab_size:
            want = f"a vocabulary of {vocab_size} tokens, as the corpus has"
            raise ValueError(f"model.init: {self.init}: want {want}, got {config.vocab_size}")
        if pad_token_id is not None and config.pad_token_id not in (pad_token_id, None):
            want = f"pad_token_id {pad_token_id}, as the corpus has"
            raise ValueError(f"model.init: {self.init}: want {want}, got {config.pad_token_id}")
        return config

    def problems(self) -> Iterator[str]:
        """Yield what does not fit together, each beginning with the name of a setting here."""
        from bert_fast.config import BertConfig

        if (self.size is None) == (self.init is None):
            got = "neither" if self.size is None else "both"
            yield f"size, init: want one of them, got {got}"
            return
        for name, usual in (("output_bias", "zeros"), ("positions", "random")):
            if self.size is None and (got := getattr(self, name)) != usual:
                yield f"{name}: want {usual} with init, whose weights are not new, got {got}"
        known = _DROPOUT if self.size is None else BertConfig.field_names() - _OF_CORPUS
        unknown = [name for name in self.config if name not in known]
        for name in unknown:
            if name in _OF_CORPUS:
                yield f"config.{name}: want it left out, as it is the corpus's, got a value"
            elif self.size is None:
                yield f"config.{name:.200}: want {', '.join(_DROPOUT)} alone with init, got it"
            else:
                yield f"config.{unknown_name(name, known)}"
        if not unknown:
            try:
                BertConfig.named(self.size or "tiny", **self.config).validate()
            except (ValueError, TypeError, NotImplementedError) as error:
                yield f"config.{error}"


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of the run: its length, and what a micro-batch holds, by either of two measures.

    Attributes:
        steps: optimizer steps.
        max_length: tokens of a sequence at most.
        sequences: of a micro-batch; None: it is filled up to `tokens`.
        tokens: of a micro-batch at most, real ones; None: it has `sequences`.
    """

    steps: Annotated[int, integer(1)]
    max_length: Annotated[int, integer(_SHORTEST, 2**16)]
    sequences: Annotated[int | None, optional(integer(1))] = None
    tokens: Annotated[int | None, optional(integer(_SHORTEST))] = None

    def problems(self) -> Iterator[str]:
        """Yield what does not fit together, each beginning with the name of a setting here."""
        if (self.sequences is None) == (self.tokens is None):
            got = "neither" if self.tokens is None else "both"
            yield f"sequences, tokens: want one of them, got {got}"
        elif self.tokens is not None and self.tokens < self.max_length:
            yield f"tokens: want {self.max_length} or more, as max_length is, got {self.tokens}"


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """How weights change; the defaults are the paper's.

    Attributes:
        name: adamw or lamb.
        lr: the highest learning rate.
        betas: decay of the mean of gradients and of their squares, per step.
        eps: added to the root of the latter.
        weight_decay: of matrices and embeddings; biases and LayerNorm have none.
        max_grad_norm: to which the norm of all gradients is scaled down; None: never.
        warmup: steps until lr is reached; below 1: their share of all steps.
        schedule: linear, down to lr_end at the last step, or constant.
        lr_end: learning rate of the last step.
    """

    name: Annotated[str, one_of("adamw", "lamb")] = "adamw"
    lr: Annotated[float, POSITIVE] = 1e-4
    betas: Annotated[tuple[float, float], _BETAS] = (0.9, 0.999)
    eps: Annotated[float, POSITIVE] = 1e-6
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.01
    max_grad_norm: Annotated[float | None, optional(POSITIVE)] = 1.0
    warmup: Annotated[int | float, COUNT_OR_SHARE] = 0.01
    schedule: Annotated[str, one_of(*SCHEDULES)] = "linear"
    lr_end: Annotated[float, NOT_NEGATIVE] = 0.0

    def problems(self) -> Iterator[str]:
        """Yield what does not fit together, each beginning with the name of a setting here."""
        if self.lr_end > self.lr:
            yield f"lr_end: want at most lr {self.lr}, got {self.lr_end}"


@dataclass(frozen=True, kw_only=True)
class SaveSettings:
    """When checkpoints are written, and from which the run goes on.

    Attributes:
        every: steps between checkpoints; None: there is none.
        keep: how many are kept, the last ones.
        on_error: what a full or broken disk does: exit, or warn and go on.
        resume: auto: from the last valid one in the output, if any; no: from the start; or a path.
    """

    every: Annotated[int | None, optional(integer(1))] = 1000
    keep: Annotated[int, integer(1)] = 3
    on_error: Annotated[str, one_of("exit", "warn")] = "exit"
    resume: Annotated[str, PATH] = "auto"


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """When the model is tried on the documents that were held out.

    Attributes:
        every: steps between evaluations; None: there is none.
        batches: micro-batches of one.
        also: directory of a second corpus on whose held-out documents it is tried too, as that of
            a checkpoint to go on from: what is forgotten.
    """

    every: Annotated[int | None, optional(integer(1))] = 1000
    batches: Annotated[int, integer(1)] = 20
    also: Annotated[str | None, optional(PATH)] = None


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """What is told of the run.

    Attributes:
        every: steps between records.
        tensorboard: whether records go to TensorBoard too.
        plot: whether the curves are drawn at the end, as curves.png.
    """

    every: Annotated[int, integer(1)] = 10
    tensorboard: Annotated[bool, FLAG] = False
    plot: Annotated[bool, FLAG] = True


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """A pretraining run. Relative paths are relative to the current directory.

    `load` and `from_dict` check what they read; a value that is set otherwise is not checked.

    Attributes:
        data: what is learned from.
        model: what is trained.
        phases: one after the other, under one schedule.
        optimizer: how weights change.
        save: when checkpoints are written.
        evaluate: when the model is tried on held-out documents.
        log: what is told.
        output: directory of the run.
        micro_batches: of a step, of all processes together; their number must divide it.
        precision: fp32, bf16 or fp16.
        seed: of weights, order, masks and dropout.
        device: cpu, cuda or cuda:N; None: a GPU if there is one.
        threads: of the CPU; None: as torch chooses.
        compile: whether torch.compile makes the step.
        activation_checkpointing: whether layers run again in the backward pass, to save memory.
        fsdp: whether parameters are sharded over the processes; else each has all.
    """

    data: DataSettings
    model: ModelSettings
    phases: tuple[Phase, ...]
    optimizer: OptimizerSettings = OptimizerSettings()
    save: SaveSettings = SaveSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    log: LogSettings = LogSettings()
    output: Annotated[str, PATH]
    micro_batches: Annotated[int, integer(1, 2**20)] = 1
    precision: Annotated[str, one_of("fp32", "bf16", "fp16")] = "fp32"
    seed: Annotated[int, integer(0, 2**63 - 1)] = 0
    device: Annotated[str | None, optional(DEVICE)] = None
    threads: Annotated[int | None, optional(integer(1, 4096))] = None
    compile: Annotated[bool, FLAG] = False
    activation_checkpointing: Annotated[bool, FLAG] = False
    fsdp: Annotated[bool, FLAG] = False

    @classmethod
    def from_dict(cls, values: Any, what: str = "settings") -> "PretrainSettings":
        """Return the settings in a tree of dicts, lists and scalars.

        Args:
            values: sections and settings by name.
            what: where they are from, for errors.

        Raises:
            ValueError: names all settings that are unknown, missing, of a wrong type or out of
                range, and what does not fit together.
        """
        found: list[str] = []
        made = parse(cls, values, "", found)
        if found:
            raise ValueError(f"{what}: {'; '.join(found)}")
        return made

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return sum(phase.steps for phase in self.phases)

    @property
    def warmup_steps(self) -> int:
        """Steps until the highest learning rate."""
        warmup = self.optimizer.warmup
        return warmup if isinstance(warmup, int) else round(warmup * self.steps)

    def place_of(self, step: int) -> tuple[int, int]:
        """Return the number of a step's phase and that of the step in it, both from 0.

        Raises:
            ValueError: the run has no such step.
        """
        if not 0 <= step < self.steps:
            raise ValueError(f"step: want 0 to {self.steps - 1}, got {step}")
        number, within = 0, step
        while within >= self.phases[number].steps:
            within -= self.phases[number].steps
            number += 1
        return number, within

    def phase_at(self, step: int) -> Phase:
        """Return the phase of a step, counted from 0.

        Raises:
            ValueError: the run has no such step.
        """
        return self.phases[self.place_of(step)[0]]

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0; see `schedule.learning_rate`."""
        given = self.optimizer
        return learning_rate(
            step,
            steps=self.steps,
            lr=given.lr,
            warmup=self.warmup_steps,
            schedule=given.schedule,
            lr_end=given.lr_end,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all settings in JSON's types, for `from_dict`."""
        return json.loads(json.dumps(asdict(self)))

    def to_yaml(self) -> str:
        """Return all settings as YAML, for `load`."""
        return dump_yaml(self.to_dict())

    def mathematics(self) -> dict[str, Any]:
        """Return what decides what is computed, in JSON's types: MATHEMATICS by dotted name."""
        values = self.to_dict()
        return {name: _at(values, name) for name in MATHEMATICS}

    def fingerprint(self, corpus: str = "") -> str:
        """Return the SHA-256 of `mathematics` and of the corpus.

        Args:
            corpus: its digest.
        """
        text = json.dumps(self.mathematics() | {"corpus": corpus}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def problems(self) -> Iterator[str]:
        """Yield what does not fit together, each beginning with the name of a setting here."""
        if self.warmup_steps >= self.steps:
            got = self.optimizer.warmup
            yield f"optimizer.warmup: want fewer than all {self.steps} steps, got {got}"
        if self.data.synthetic and self.save.every is not None:
            want = f"null with data.corpus={SYNTHETIC}, whose ids have no tokenizer"
            yield f"save.every: want {want}, got {self.save.every}"
        if self.data.synthetic and self.model.output_bias == "unigram":
            yield f"model.output_bias: want zeros with data.corpus={SYNTHETIC}, got unigram"
        if self.model.size is not None:
            yield from self._unfit(self.model.bert_config(30522))

    def _unfit(self, config: "BertConfig") -> Iterator[str]:
        """Yield why pairs do not fit into a model."""
        most = config.max_position_embeddings
        for i, phase in enumerate(self.phases):
            if phase.max_length > most:
                want = f"at most {most}, as the model's max_position_embeddings is"
                yield f"phases.{i}.max_length: want {want}, got {phase.max_length}"
        if config.type_vocab_size < 2:
            yield f"model: want type_vocab_size 2 for pairs, got {config.type_vocab_size}"

    def bert_config(self, vocab_size: int, pad_token_id: int | None = None) -> "BertConfig":
        """Return the model's configuration; see `ModelSettings.bert_config`.

        Raises:
            ValueError: also where a phase's pairs do not fit into the model.
        """
        config = self.model.bert_config(vocab_size, pad_token_id)
        if found := [*self._unfit(config)]:
            raise ValueError("; ".join(found))
        return config


def load(config: str | Path, overrides: Sequence[str] = ()) -> PretrainSettings:
    """Return the settings of a YAML file with some of them replaced.

    Args:
        config: path of the file, or the name of one that is shipped: tiny, mini, base, large,
            adapt or throughput.
        overrides: each as optimizer.lr=1e-4 or phases.0.steps=100, with YAML for the value; a later
            one wins.

    Raises:
        FileNotFoundError: there is no such file, nor one of that name.
        ValueError: it is no YAML, or as `PretrainSettings.from_dict`.
    """
    values = parse_yaml(read_config(config), str(config))
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{config}: want settings by name, got {values!r:.200}")
    found: list[str] = []
    for assignment in overrides:
        try:
            override(values, assignment)
        except ValueError as error:
            found.append(str(error))
    if found:
        raise ValueError(f"{config}: {'; '.join(found)}")
    return PretrainSettings.from_dict(values, str(config))


def _at(values: Any, name: str) -> Any:
    for key in name.split("."):
        values = values[key]
    return values
