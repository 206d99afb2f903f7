"""What the encoder and pre-training cases work on: weights, batches, texts, lengths."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import bert_fast
from bert_fast import BertConfig

FIRST_ID = 5  # ids below are those of special tokens in every vocabulary here
SMALL_VOCAB = 500  # of a rehearsal's models


@dataclass(frozen=True)
class Batch:
    """A padded batch; padding stands on the right.

    Attributes:
        input_ids: (B, L) int64.
        attention_mask: (B, L) int64, 1 where there is a token; None where there is one everywhere.
        lengths: of the sequences, on the host.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    lengths: tuple[int, ...]

    def real(self, x: Tensor) -> Tensor:
        """Return the rows (T, ...) of x (B, L, ...) at real tokens."""
        return x.flatten(0, 1) if self.attention_mask is None else x[self.attention_mask != 0]


@dataclass(frozen=True)
class Texts:
    """Token ids ready in host memory, pinned where there is a GPU.

    Attributes:
        ids: (T,) int64, text after text.
        lengths: of the texts.
        sample: indices of the texts whose answers are checked.
    """

    ids: Tensor
    lengths: tuple[int, ...]
    sample: tuple[int, ...]


@dataclass(frozen=True)
class PretrainingBatch:
    """A batch of masked-LM and next-sentence examples, on the device.

    Attributes:
        input_ids: (B, L) int64.
        token_type_ids: (B, L) int64.
        attention_mask: (B, L) int64 or None, as in `Batch`.
        labels: (B, L) int64, -100 where the token is not masked.
        next_sentence_label: (B,) int64.
        lengths: of the sequences, on the host.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor
    next_sentence_label: Tensor
    lengths: tuple[int, ...]


def weights(config: BertConfig, seed: int = 0) -> dict[str, Tensor]:
    """Return the fp32 state dict of a random BertForPreTraining, no parameter at its initial value.

    Biases of 0 and LayerNorm weights of 1 would hide a bias that is lost or a wrong scale.
    """
    torch.manual_seed(seed)
    model = bert_fast.BertForPreTraining(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    return {name: t.detach() for name, t in model.state_dict().items()}


def encoder_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of the encoder alone, by the names it has there; without the pooler's."""
    encoder = {n.removeprefix("bert."): t for n, t in state.items() if n.startswith("bert.")}
    return {name: t for name, t in encoder.items() if not name.startswith("pooler.")}


def batch(
    config: BertConfig, lengths: Sequence[int], device: torch.device, seed: int, width: int = 0
) -> Batch:
    """Return a batch of random ids, padded to its longest sequence or to a larger `width`."""
    generator = torch.Generator().manual_seed(seed)
    B, L = len(lengths), max(width, *lengths)
    ids = torch.randint(FIRST_ID, config.vocab_size, (B, L), generator=generator)
    mask = (torch.arange(L)[None] < torch.tensor(lengths)[:, None]).long()
    ids = ids * mask + config.pad_token_id * (1 - mask)
    full = bool(mask.all())
    return Batch(ids.to(device), None if full else mask.to(device), tuple(lengths))


def texts(vocab_size: int, lengths: Sequence[int], seed: int, pin: bool, sample: int = 64) -> Texts:
    """Return texts of random ids; `sample` of them, spread over all lengths, are checked."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_ID, vocab_size, (sum(lengths),), generator=generator)
    by_length = sorted(range(len(lengths)), key=lambda i: lengths[i])
    step = max(1, (len(lengths) - 1) // max(1, sample - 1))
    chosen = {*by_length[::step], by_length[0], by_length[-1]}
    return Texts(ids.pin_memory() if pin else ids, tuple(lengths), tuple(sorted(chosen)))


def pretraining_batch(
    config: BertConfig, lengths: Sequence[int], device: torch.device, seed: int, share: float = 0.15
) -> PretrainingBatch:
    """Return a batch with `share` of its real tokens masked, sentence pairs half and half."""
    plain = batch(config, lengths, torch.device("cpu"), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    B, L = plain.input_ids.shape
    real = torch.arange(L)[None] < torch.tensor(lengths)[:, None]
    masked = (torch.rand(B, L, generator=generator) < share) & real
    masked[:, 1] = True  # no sequence without a label
    labels = torch.where(masked, plain.input_ids, -100)
    types = (torch.arange(L)[None] >= torch.tensor(lengths)[:, None] // 2).long() * real
    follows = torch.randint(2, (B,), generator=generator)
    mask = plain.attention_mask
    return PretrainingBatch(
        plain.input_ids.to(device),
        types.to(device),
        None if mask is None else mask.to(device),
        labels.to(device),
        follows.to(device),
        plain.lengths,
    )


def normal_lengths(n: int, mean: float, spread: float, low: int, high: int, seed: int) -> list[int]:
    """Return n lengths of N(mean, spread), clipped to low..high."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n, generator=generator) * spread + mean
    return [int(v) for v in drawn.round().clamp(low, high)]
