"""An unpadded BERT as a PyTorch user can build it from PyTorch's own parts, at their best.

Padding is taken out once, before the embeddings; query, key and value come from one product and are
read in place; PyTorch's FlashAttention works on the packed rows; the masked-LM head sees only rows
with a label. The lengths are known to the host, so nothing waits for the device, but for the
number of labels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from gate import AbsentError
from torch import Tensor, nn

from bert_fast import BertConfig

# q, k, v (T, H, K), cu_seqlens (B + 1,) int32, length of the longest sequence, dropout -> (T, H, K)
Attention = Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]


def varlen_attention() -> Attention:
    """Return attention by `torch.nn.attention.varlen`, for inference: it has no dropout.

    Raises:
        ImportError: this version of PyTorch lacks it.
    """
    from torch.nn.attention.varlen import varlen_attn

    def attention(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, p: float
    ) -> Tensor:
        if p:
            raise ValueError(f"p: want 0, varlen_attn has no dropout, got {p}")
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_len, max_len)

    return attention


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, p: float
) -> Tensor:
    """Return attention with dropout by `aten::_flash_attention_forward`, which has a gradient."""
    return torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, max_len, max_len, p, False, False
    )[0]


def needs_flash(device: torch.device, dtype: torch.dtype) -> None:
    """Raise AbsentError where PyTorch has no FlashAttention over packed rows."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        raise AbsentError("needs CUDA and 16 bits")


@dataclass(frozen=True)
class Places:
    """Where packed rows stand.

    Attributes:
        cu_seqlens: (B + 1,) int32.
        positions: (T,) int64, the index of each row in its sequence.
        max_len: the longest sequence.
        rows: (T,) int64, where each row stands in the flattened (B, L) of a batch padded on the
            right; None where nothing is padded.
    """

    cu_seqlens: Tensor
    positions: Tensor
    max_len: int
    rows: Tensor | None

    def take(self, padded: Tensor) -> Tensor:
        """Return the rows (T,) of a padded tensor (B, L)."""
        flat = padded.flatten()
        return flat if self.rows is None else flat.index_select(0, self.rows)

    def unpack(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return rows x (T, D) as (B, L, D), 0 at the padding."""
        if self.rows is not None:
            x = x.new_zeros(shape[0] * shape[1], x.shape[1]).index_copy_(0, self.rows, x)
        return x.view(*shape, x.shape[1])


def places(lengths: Sequence[int], device: torch.device, width: int = 0) -> Places:
    """Return the places of sequences of these lengths, without waiting for the device.

    Args:
        lengths: of the sequences.
        device: where the places are wanted.
        width: L of the padded batch; 0: there is none.
    """
    B, T, max_len = len(lengths), sum(lengths), max(lengths)
    if min(lengths) == max_len and width in (0, max_len):
        ends = torch.arange(0, T + 1, max_len, dtype=torch.int32, device=device)
        return Places(ends, torch.arange(max_len, device=device).repeat(B), max_len, None)
    counts = torch.tensor(lengths, pin_memory=device.type == "cuda")
    counts = counts.to(device, non_blocking=True)
    ends = F.pad(counts.cumsum(0), (1, 0))
    sequences = torch.arange(B, device=device).repeat_interleave(counts, output_size=T)
    positions = torch.arange(T, device=device) - ends.index_select(0, sequences)
    rows = sequences * width + positions if width else None
    return Places(ends.to(torch.int32), positions, max_len, rows)


class Layer(nn.Module):
    """One layer of the encoder on packed rows."""

    def __init__(self, config: BertConfig, attention: Attention):
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.heads, self.attention = config.num_attention_heads, attention
        self.p, self.attention_p = config.hidden_dropout_prob, config.attention_probs_dropout_prob
        self.qkv = nn.Linear(D, 3 * D)
        self.out = nn.Linear(D, D)
        self.out_norm = nn.LayerNorm(D, eps=eps)
        self.up = nn.Linear(D, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, D)
        self.down_norm = nn.LayerNorm(D, eps=eps)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        """Return the layer's rows (T, D) for rows x (T, D)."""
        T, D = x.shape
        q, k, v = self.qkv(x).view(T, 3, self.heads, D // self.heads).unbind(1)
        p = self.attention_p if self.training else 0.0
        context = self.attention(q, k, v, cu_seqlens, max_len, p).reshape(T, D)
        x = self.out_norm(F.dropout(self.out(context), self.p, self.training) + x)
        inner = self.down(F.gelu(self.up(x)))
        return self.down_norm(F.dropout(inner, self.p, self.training) + x)


class VarlenBert(nn.Module):
    """BERT on packed rows, with the two heads of pre-training if wanted.

    Args:
        config: sizes and dropout; the activation is GELU.
        attention: of packed rows.
        heads: whether there are the pooler and the heads.
    """

    def __init__(self, config: BertConfig, attention: Attention, heads: bool = False):
        super().__init__()
        if config.hidden_act != "gelu":
            raise ValueError(f"hidden_act: want 'gelu', got {config.hidden_act!r}")
        D, V, eps = config.hidden_size, config.vocab_size, config.layer_norm_eps
        self.p = config.hidden_dropout_prob
        self.words = nn.Embedding(V, D, padding_idx=config.pad_token_id)
        self.positions = nn.Embedding(config.max_position_embeddings, D)
        self.types = nn.Embedding(config.type_vocab_size, D)
        self.norm = nn.LayerNorm(D, eps=eps)
        layers = (Layer(config, attention) for _ in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        if heads:
            self.pooler = nn.Linear(D, D)
            self.transform = nn.Linear(D, D)
            self.transform_norm = nn.LayerNorm(D, eps=eps)
            self.bias = nn.Parameter(torch.zeros(V))  # the decoder's; its weight is the words'
            self.next_sentence = nn.Linear(D, 2)
        self._names = stock_names(config.num_hidden_layers, heads)

    def load(self, state: Mapping[str, Tensor]) -> "VarlenBert":
        """Take the weights of a BertForPreTraining by Hugging Face's names; returns the model."""
        own = {
            name: torch.cat([state[part] for part in parts]) for name, parts in self._names.items()
        }
        self.load_state_dict(own)
        return self

    def gradient(self, name: str) -> Tensor:
        """Return a copy of the gradient of the parameter that Hugging Face calls `name`."""
        for own, parts in self._names.items():
            if name in parts:
                gradient = self.get_parameter(own).grad
                return gradient.chunk(len(parts))[parts.index(name)].clone()
        raise KeyError(name)

    def encode(
        self,
        tokens: Tensor,
        positions: Tensor,
        types: Tensor | None,
        cu_seqlens: Tensor,
        max_len: int,
    ) -> Tensor:
        """Return the last hidden states (T, D).

        Args:
            tokens: (T,) int64.
            positions: (T,) int64, the index of each token in its sequence.
            types: (T,) int64; None: 0.
            cu_seqlens: (B + 1,) int32.
            max_len: the longest sequence.
        """
        x = self.words(tokens) + (self.types.weight[0] if types is None else self.types(types))
        x = F.dropout(self.norm(x + self.positions(positions)), self.p, self.training)
        for layer in self.layers:
            x = layer(x, cu_seqlens, max_len)
        return x

    def loss(self, x: Tensor, labels: Tensor, cu_seqlens: Tensor, follows: Tensor) -> Tensor:
        """Return masked-LM loss + next-sentence loss of hidden states x (T, D).

        Args:
            x: (T, D).
            labels: (T,) int64, -100 where there is none; the host waits for their number.
            cu_seqlens: (B + 1,) int32.
            follows: (B,) int64, the label of the next sentence.
        """
        labelled = (labels != -100).nonzero().flatten()
        h = self.transform_norm(F.gelu(self.transform(x.index_select(0, labelled))))
        logits = F.linear(h, self.words.weight, self.bias)
        pooled = torch.tanh(self.pooler(x.index_select(0, cu_seqlens[:-1])))
        sentences = F.cross_entropy(self.next_sentence(pooled), follows)
        return F.cross_entropy(logits, labels.index_select(0, labelled)) + sentences


_EMBEDDINGS = {
    "words": "word_embeddings",
    "positions": "position_embeddings",
    "types": "token_type_embeddings",
}
_LAYER = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "out": ("attention.output.dense",),
    "out_norm": ("attention.output.LayerNorm",),
    "up": ("intermediate.dense",),
    "down": ("output.dense",),
    "down_norm": ("output.LayerNorm",),
}
_HEADS = {
    "pooler": "bert.pooler.dense",
    "transform": "cls.predictions.transform.dense",
    "transform_norm": "cls.predictions.transform.LayerNorm",
    "next_sentence": "cls.seq_relationship",
}


def stock_names(layers: int, heads: bool) -> dict[str, tuple[str, ...]]:
    """Return, for each parameter of `VarlenBert`, Hugging Face's whose rows it holds in order."""
    modules = {"norm": ("bert.embeddings.LayerNorm",)}
    for i in range(layers):
        for own, parts in _LAYER.items():
            names = tuple(f"bert.encoder.layer.{i}.{part}" for part in parts)
            modules[f"layers.{i}.{own}"] = names
    if heads:
        modules |= {own: (name,) for own, name in _HEADS.items()}
    found = {f"{own}.weight": (f"bert.embeddings.{n}.weight",) for own, n in _EMBEDDINGS.items()}
    for own, parts in modules.items():
        for kind in ("weight", "bias"):
            found[f"{own}.{kind}"] = tuple(f"{part}.{kind}" for part in parts)
    if heads:
        found["bias"] = ("cls.predictions.bias",)
    return found
