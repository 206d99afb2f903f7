"""How large a run is before it begins: what a dry run shows."""

import torch

from bert_fast.heads import BertForPreTraining
from bert_fast.train.flops import formula, training_flops
from bert_fast.train.sections import Phase
from bert_fast.train.settings import PretrainSettings

# Of a parameter, with AdamW or LAMB: weight, gradient and two moments in fp32; in 16 bits weight
# and gradient, with an fp32 master and two moments.
_BYTES_OF_STATE = 16


def sizes(settings: PretrainSettings, vocab_size: int) -> list[str]:
    """Return lines that say how large a run is, without making its model.

    Args:
        settings: of the run.
        vocab_size: of its corpus.

    Raises:
        ValueError, OSError, ImportError: as `PretrainSettings.bert_config`.
    """
    config = settings.bert_config(vocab_size)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in BertForPreTraining(config).parameters())
    words, state = vocab_size * config.hidden_size, _BYTES_OF_STATE * parameters / 1e9
    lines = [
        f"{parameters:,} parameters, {words:,} of them word embeddings;"
        f" {state:,.2f} GB with gradients and moments"
    ]
    total = 0
    for number, phase in enumerate(settings.phases):
        tokens = settings.micro_batches * _tokens(phase)
        labels = round(settings.data.mlm_probability * tokens)
        flops = training_flops(config, tokens, tokens * phase.max_length, labels)
        total += phase.steps * flops
        lines.append(
            f"phase {number}: {phase.steps:,} steps of {settings.micro_batches:,} x"
            f" {_content(phase)}: {tokens:,} tokens, {flops:.3g} FLOP at most"
        )
    lines.append(f"all {settings.steps:,} steps: {total:.3g} FLOP at most")
    return [*lines, f"FLOP of a step: {formula(config)}"]


def _tokens(phase: Phase) -> int:
    """Return how many tokens a micro-batch has at most."""
    return phase.tokens or phase.sequences * phase.max_length


def _content(phase: Phase) -> str:
    if phase.tokens is not None:
        return f"{phase.tokens:,} tokens in sequences of at most {phase.max_length}"
    return f"{phase.sequences:,} sequences of at most {phase.max_length} tokens"
