"""From settings to what a run consists of: texts, model, optimizer."""

import os
import warnings
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from bert_fast.config import BertConfig
from bert_fast.data.batches import Batch, Batches
from bert_fast.data.masking import MaskingRule
from bert_fast.data.shards import Corpus
from bert_fast.data.synthetic import SyntheticBatches
from bert_fast.heads import BertForPreTraining
from bert_fast.tokenizer import BertTokenizer
from bert_fast.train.distributed import Ranks, ShardedAdamW, wrap
from bert_fast.train.objective import PreTrainingObjective
from bert_fast.train.optim import LAMB, AdamW, decay_groups
from bert_fast.train.sections import Phase
from bert_fast.train.settings import PretrainSettings
from bert_fast.train.state import TrainingState, restore

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SYNTHETIC_VOCABULARY = 30522  # the published models'
_HELD_OUT_SEED = 0  # of the pairs and masks of every evaluation


class HeldOut(NamedTuple):
    """What a model is tried on.

    Attributes:
        corpus: directory of its documents.
        digest: what the corpus is known by, wherever it lies.
        unigram_entropy: of that corpus's training tokens in nats: the loss of guessing by
            frequency; None: unknown.
        batches: this process's share of the micro-batches, and whether it counts: all processes
            have equally many, since sharded parameters are gathered by all of them.
    """

    corpus: str
    digest: str
    unigram_entropy: float | None
    batches: list[tuple[Batch, bool]]


class Texts:
    """What a run learns from: a corpus with its tokenizer, or random ids.

    Args:
        settings: of the run.
        verify: compare the corpus's files with its manifest.

    Attributes:
        corpus: None: the ids are random.
        tokenizer: as it was when the corpus was made; None with random ids.

    Raises:
        FileNotFoundError, ValueError: there is no corpus, or it is damaged.
    """

    def __init__(self, settings: PretrainSettings, *, verify: bool = True) -> None:
        self._settings = settings
        self.corpus: Corpus | None = None
        self.tokenizer: BertTokenizer | None = None
        self._also: Corpus | None = None
        if settings.data.synthetic:
            return
        self.corpus = Corpus(settings.data.corpus, verify=verify)
        self.tokenizer = BertTokenizer.from_pretrained(self.corpus.path)
        if settings.evaluate.also is not None:
            self._also = Corpus(settings.evaluate.also, verify=verify)
            self.check_vocabulary("evaluate.also", settings.evaluate.also)

    @property
    def vocab_size(self) -> int:
        """Every id is less."""
        if self.corpus is None:
            return self._settings.data.vocab_size or _SYNTHETIC_VOCABULARY
        return self.corpus.vocab_size

    @property
    def pad_token_id(self) -> int | None:
        """The corpus's; None with random ids, which have none."""
        return None if self.tokenizer is None else self.tokenizer.pad_token_id

    @property
    def digest(self) -> str:
        """What the corpus is known by."""
        return "" if self.corpus is None else self.corpus.digest

    def batches(self, phase: Phase) -> Batches | SyntheticBatches:
        """Return the micro-batches of a phase."""
        data, seed = self._settings.data, self._settings.seed
        if self.corpus is None:
            return SyntheticBatches(
                self.vocab_size,
                [min(n, phase.max_length) for n in data.lengths or [phase.max_length]],
                mlm_probability=data.mlm_probability,
                seed=seed,
                sequences=phase.sequences,
                tokens=phase.tokens,
            )
        return self._of(self.corpus, "train", phase, seed, data.short_seq_prob)

    def held_out(self, phase: Phase, rank: int, world: int) -> list[HeldOut]:
        """Return what evaluations in a phase are of, each time; nothing with random ids.

        A corpus with fewer than two documents that are held out is left out, with a warning.
        """
        found = []
        for corpus in (self.corpus, self._also):
            if corpus is None:
                continue
            if (got := corpus.num_documents("held_out")) < 2:
                want = f"{corpus.path}: want 2 documents or more that are held out, to evaluate on"
                warnings.warn(f"{want}, got {got}: nothing is evaluated there", stacklevel=2)
            else:
                batches = self._of(corpus, "held_out", phase, _HELD_OUT_SEED, 0.0)
                count = min(self._settings.evaluate.batches, batches.count(0))
                own = [
                    (batches[0, min(number, count - 1)], number < count)
                    for number in range(rank, -(-count // world) * world, world)
                ]
                entropy = corpus.manifest.get("unigram_entropy")
                found.append(HeldOut(str(corpus.path), corpus.digest, entropy, own))
        return found

    def check_vocabulary(self, setting: str, directory: str) -> None:
        """Raise a ValueError where a directory has a tokenizer of another vocabulary."""
        try:
            theirs = BertTokenizer.from_pretrained(directory).get_vocab()
        except FileNotFoundError:  # there is none to compare with
            return
        if self.tokenizer is not None and theirs != self.tokenizer.get_vocab():
            want = f"the vocabulary of data.corpus, {self.corpus.path}"
            raise ValueError(f"{setting}: {directory}: want {want}, got another")

    @cached_property
    def _rule(self) -> MaskingRule:
        data = self._settings.data
        return MaskingRule(
            self.tokenizer,
            data.mlm_probability,
            mask_replace_prob=data.mask_replace_prob,
            random_replace_prob=data.random_replace_prob,
            whole_word_mask=data.whole_word_mask,
            max_predictions=data.max_predictions,
        )

    def _of(
        self, corpus: Corpus, split: str, phase: Phase, seed: int, short_seq_prob: float
    ) -> Batches:
        return Batches(
            corpus.split(split),
            self._rule,
            cls_id=self.tokenizer.cls_token_id,
            sep_id=self.tokenizer.sep_token_id,
            max_length=phase.max_length,
            seed=seed,
            sequences=phase.sequences,
            tokens=phase.tokens,
            short_seq_prob=short_seq_prob,
        )


def build_model(settings: PretrainSettings, config: BertConfig, texts: Texts) -> BertForPreTraining:
    """Return the model in fp32 on the CPU, in training mode.

    Raises:
        ValueError: a checkpoint to go on from has another tokenizer than the corpus.
    """
    source = settings.model.init
    if source is None:
        torch.manual_seed(settings.seed)
        model = BertForPreTraining(config)
        _begin(model, settings, texts)
        return model.train()
    texts.check_vocabulary("model.init", source)
    torch.manual_seed(settings.seed)  # of heads that the checkpoint lacks
    model = BertForPreTraining.from_pretrained(source, config=config, dtype=torch.float32)
    return model.train()


@torch.no_grad()
def _begin(model: BertForPreTraining, settings: PretrainSettings, texts: Texts) -> None:
    """Give new weights the values that the settings ask for in place of the usual ones."""
    if settings.model.output_bias == "unigram":
        counts = torch.from_numpy(texts.corpus.split("train").token_counts(texts.vocab_size))
        shares = (counts + 1).double().log()  # 1: of tokens that are not there, too
        model.cls.predictions.bias.copy_(shares - shares.mean())
    if settings.model.positions == "sinusoidal":
        weight = model.bert.embeddings.position_embeddings.weight
        weight.copy_(_sinusoids(*weight.shape) * model.config.initializer_range)


def _sinusoids(positions: int, width: int) -> torch.Tensor:
    """Return (positions, width) sines and cosines with a mean square of 1.

    Vaswani et al. 2017, arXiv 1706.03762, section 3.5.
    """
    pair = torch.arange(width) // 2
    angles = torch.arange(positions)[:, None] / 10000 ** (2 * pair / width)
    return 2**0.5 * torch.where(torch.arange(width) % 2 == 0, angles.sin(), angles.cos())


class Trained(NamedTuple):
    """What is trained.

    Attributes:
        model: the model itself.
        objective: with its loss, for evaluation.
        module: the same, wrapped for several processes, for training.
        optimizer: of the model's parameters.
    """

    model: BertForPreTraining
    objective: PreTrainingObjective
    module: nn.Module
    optimizer: torch.optim.Optimizer


def build(settings: PretrainSettings, model: BertForPreTraining, ranks: Ranks) -> Trained:
    """Bring a model in fp32 to its device and precision, and make its optimizer.

    Raises:
        NotImplementedError: sharded parameters with LAMB or fp16.
        ValueError: sharded parameters without torchrun.
    """
    given, dtype = settings.optimizer, DTYPES[settings.precision]
    if settings.fsdp and (given.name != "adamw" or settings.precision == "fp16"):
        got = f"{given.name} in {settings.precision}"
        raise NotImplementedError(f"fsdp: want adamw in fp32 or bf16 with it, got {got}")
    if settings.fsdp and "RANK" not in os.environ:
        raise ValueError("fsdp: want processes that torchrun starts, got one alone")
    model.to(ranks.device)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    if not settings.fsdp:  # which casts on the way
        model.to(dtype)
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable()
    objective = PreTrainingObjective(model)
    if settings.compile:
        # lengths vary, eps and p do not; dropout's seeds are drawn as without compiling
        from torch._dynamo import config as dynamo
        from torch._inductor import config as inductor

        dynamo.specialize_float = inductor.fallback_random = True
        objective.compile(dynamic=True)
    module = wrap(objective, ranks, sharded=settings.fsdp, dtype=dtype)
    groups = decay_groups(model, given.weight_decay)
    options: dict[str, Any] = {"lr": given.lr, "betas": given.betas, "eps": given.eps}
    options["max_grad_norm"] = given.max_grad_norm
    if settings.fsdp:
        return Trained(model, objective, module, ShardedAdamW(groups, **options))
    kind = {"adamw": AdamW, "lamb": LAMB}[given.name]
    optimizer = kind(groups, skip_nonfinite=True, **options)
    if dtype != torch.float32:  # the masters begin as what was there before it was rounded
        start = TrainingState(step=0, position={}, facts={}, weights=weights, moments={})
        restore(start, model, optimizer)
    return Trained(model, objective, module, optimizer)
