"""BERT's modules on packed rows (T, D), with Hugging Face's names for classes and parameters.

Query, key and value stay separate parameters; that one product computes all three, that a bias
and an activation are one op, is a matter of execution: functional.py's.
"""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bert_fast import functional
from bert_fast.config import BertConfig
from bert_fast.functional import Activation, Projections
from bert_fast.packing import Layout, PackedBatch


class BertEmbeddings(nn.Module):
    """Word + position + type embeddings, LayerNorm, dropout."""

    def __init__(self, config: BertConfig):
        super().__init__()
        D = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, D, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, D)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, D)
        self.LayerNorm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, batch: PackedBatch, seed: Tensor | None = None) -> Tensor:
        """Return the embeddings (T, D) of a packed batch."""
        tables = self.word_embeddings, self.position_embeddings, self.token_type_embeddings
        return functional.embed(*tables, self.LayerNorm, self.dropout, batch, seed)


class BertSelfAttention(nn.Module):
    """Query, key and value projections and attention within each sequence."""

    def __init__(self, config: BertConfig, site: int):
        super().__init__()
        D = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = D // config.num_attention_heads
        self.site = site
        self.query, self.key, self.value = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(
        self, x: Tensor, layout: Layout, seed: Tensor | None, output_attentions: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the context (T, D) and, if wanted, the probabilities (B, H, L, L)."""
        parts = Projections(self.query, self.key, self.value)
        p = functional.dropout_p(self.dropout, seed)
        args = x, layout, seed, self.site, output_attentions
        return functional.self_attention(parts, p, self.num_attention_heads, *args)


class BertSelfOutput(nn.Module):
    """Projection, dropout, residual, LayerNorm."""

    def __init__(self, width: int, config: BertConfig, site: int):
        super().__init__()
        D = config.hidden_size
        self.site = site
        self.dense = nn.Linear(width, D)
        self.LayerNorm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor, seed: Tensor | None) -> Tensor:
        """Return LayerNorm(dropout(dense(x)) + residual), rows (T, D)."""
        parts = self.dense, self.dropout, self.LayerNorm
        return functional.linear_add_layer_norm(*parts, x, residual, seed, self.site)


class BertOutput(BertSelfOutput):
    """The same behind the feed-forward."""


class BertAttention(nn.Module):
    """Self-attention and its output."""

    def __init__(self, config: BertConfig, site: int):
        super().__init__()
        self.self = BertSelfAttention(config, site)
        self.output = BertSelfOutput(config.hidden_size, config, site + 1)

    def forward(
        self, x: Tensor, layout: Layout, seed: Tensor | None, output_attentions: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return rows (T, D) and, if wanted, the probabilities (B, H, L, L)."""
        context, probs = self.self(x, layout, seed, output_attentions)
        return self.output(context, x, seed), probs


class BertIntermediate(nn.Module):
    """The feed-forward's first projection and its activation."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = Activation(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        """Return activation(dense(x)), rows (T, F)."""
        return functional.linear_gelu(self.dense, self.intermediate_act_fn, x)


class BertLayer(nn.Module):
    """One layer of the encoder."""

    def __init__(self, config: BertConfig, layer_idx: int):
        super().__init__()
        site = 1 + 3 * layer_idx  # 0 is the embeddings'
        self.attention = BertAttention(config, site)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config.intermediate_size, config, site + 2)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        seed: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return rows (T, D) and, if wanted, the probabilities (B, H, L, L)."""
        x, probs = self.attention(x, layout, seed, output_attentions)
        return self.output(self.intermediate(x), x, seed), probs


class BertEncoder(nn.Module):
    """The layers, in order."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config, i) for i in range(config.num_hidden_layers))
        self.checkpoint_options: dict | None = None  # of torch.utils.checkpoint; None: do not

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        seed: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the last rows (T, D), the hidden states and the attentions of each layer.

        Hidden states are the rows before each layer and after the last, attentions (B, H, L, L);
        either list is empty where it is not wanted.
        """
        hidden_states, attentions = [], []
        for layer in self.layer:
            if output_hidden_states:
                hidden_states.append(x)
            args = x, layout, seed, output_attentions
            if self.checkpoint_options is not None and self.training:
                x, probs = checkpoint(layer, *args, **self.checkpoint_options)
            else:
                x, probs = layer(*args)
            if output_attentions:
                attentions.append(probs)
        if output_hidden_states:
            hidden_states.append(x)
        return x, hidden_states, attentions


class BertPooler(nn.Module):
    """tanh of a projection of each sequence's first row."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, first: Tensor, nonempty: Tensor | None = None) -> Tensor:
        """Return (B, D) from the first rows (B, D); 0 for an empty sequence."""
        return functional.pool(self.dense, self.activation, first, nonempty)
