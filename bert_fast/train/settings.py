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
from bert_fast.train.rules import DEVICE, FLAG, PATH, integer, one_of, optional, parse
from bert_fast.train.schedule import learning_rate
from bert_fast.train.sections import (
    SYNTHETIC,
    DataSettings,
    EvaluateSettings,
    LogSettings,
    ModelSettings,
    OptimizerSettings,
    Phase,
    SaveSettings,
)

if TYPE_CHECKING:
    from bert_fast.config import BertConfig

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
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    save: SaveSettings = field(default_factory=SaveSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    log: LogSettings = field(default_factory=LogSettings)
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
