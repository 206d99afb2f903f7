"""The sections of a pretraining run's settings; `settings.PretrainSettings` holds them all."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from bert_fast.train.rules import (
    BELOW_1,
    COUNT_OR_SHARE,
    FLAG,
    MAPPING,
    NOT_NEGATIVE,
    PATH,
    POSITIVE,
    SHARE,
    integer,
    one_of,
    optional,
    several,
    unknown_name,
)
from bert_fast.train.schedule import SCHEDULES

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
    """When the model is tried on the documents that were held out; one of `init` at the start, too.

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
