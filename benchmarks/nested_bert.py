"""BERT on the fast path of `nn.TransformerEncoder`: nested tensors where there is padding.

The embeddings are plain PyTorch, padded; the layers see no padding.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812
import workload
from torch import Tensor, nn

from bert_fast import BertConfig

_LAYER = {  # its names and ours
    "self_attn.out_proj": "attention.output.dense",
    "linear1": "intermediate.dense",
    "linear2": "output.dense",
    "norm1": "attention.output.LayerNorm",
    "norm2": "output.LayerNorm",
}
_QKV = ("query", "key", "value")


class NestedBert(nn.Module):
    """A BERT in eval mode.

    Args:
        config: with GELU, as `nn.TransformerEncoder`'s fast path wants it.
        state: fp32 state dict of a BertForPreTraining.
    """

    def __init__(self, config: BertConfig, state: Mapping[str, Tensor]):
        super().__init__()
        own = workload.encoder_weights(state)
        for name in ("word", "position", "token_type"):
            self.register_buffer(name, own[f"embeddings.{name}_embeddings.weight"].clone())
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.norm.load_state_dict({n: own[f"embeddings.LayerNorm.{n}"] for n in ("weight", "bias")})
        layer = nn.TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=config.layer_norm_eps,
            batch_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, config.num_hidden_layers)
        for i, target in enumerate(self.encoder.layers):
            source = f"encoder.layer.{i}."
            values = {}
            for kind in ("weight", "bias"):
                for name, ours in _LAYER.items():
                    values[f"{name}.{kind}"] = own[f"{source}{ours}.{kind}"]
                parts = [own[f"{source}attention.self.{name}.{kind}"] for name in _QKV]
                values[f"self_attn.in_proj_{kind}"] = torch.cat(parts)
            target.load_state_dict(values)
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return hidden states (B, L, D), 0 at the padding, which stands on the right.

        Args:
            input_ids: (B, L) int64.
            attention_mask: (B, L) int64, 1 where there is a token; None: everywhere.
        """
        x = F.embedding(input_ids, self.word) + self.token_type[0]
        x = self.norm(x + self.position[: input_ids.shape[1]])
        padding = None if attention_mask is None else attention_mask == 0
        return self.encoder(x, src_key_padding_mask=padding)
