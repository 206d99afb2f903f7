"""Where transformers' encoders keep what our layers take: BERT and those that share its layer.

An encoder runs packed only while the modules between the model and its projections are
transformers' own, without a hook of a user's, who would find rows where padded batches were.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bert_fast import functional
from bert_fast.functional import Projections

_NO_DROPOUT = nn.Dropout(0.0)
_RECORDER = "transformers.utils.output_capturing"  # its hooks do nothing unless it records
_ACTIVATIONS = {
    name: functional.Activation(ours)
    for name, ours in {
        "transformers.activations.GELUActivation": "gelu",
        "transformers.activations.NewGELUActivation": "gelu_new",
        "transformers.activations.GELUTanh": "gelu_pytorch_tanh",
        "torch.nn.modules.activation.ReLU": "relu",
    }.items()
}
GELU = _ACTIVATIONS["transformers.activations.GELUActivation"]
_ATTENTIONS = "eager", "sdpa", "flash", "flex", "bert_fast"  # what compute the same


class Layer(NamedTuple):
    """The modules of a layer, as functional.py takes them.

    Attributes:
        projections: query, key, value.
        attention_p: the probability that attention drops with.
        heads: H.
        attention_output: dense, dropout, LayerNorm.
        intermediate: dense, activation.
        output: dense, dropout, LayerNorm.
    """

    projections: Projections
    attention_p: float
    heads: int
    attention_output: tuple[nn.Module, nn.Module, nn.Module]
    intermediate: tuple[nn.Module, nn.Module]
    output: tuple[nn.Module, nn.Module, nn.Module]


class Family(NamedTuple):
    """An architecture.

    Attributes:
        prefix: of its classes.
        embeddings: what `functional.embed` takes of a model: word, position, type, LayerNorm,
            dropout.
        blocks: the layers in a model.
        layer: a layer's modules.
        between: all modules of a model that are not called, with the names their class may have.
        after_padding: whether positions count from behind the padding id, as RoBERTa's.
        output: transformers' class of what the model returns.
    """

    prefix: str
    embeddings: Callable[[nn.Module], tuple[nn.Module | None, ...]]
    blocks: Callable[[nn.Module], Sequence[nn.Module]]
    layer: Callable[[nn.Module], Layer]
    between: Callable[[nn.Module, str], Iterator[tuple[nn.Module, tuple[str, ...]]]]
    after_padding: bool
    output: str


def activation(module: nn.Module) -> nn.Module:
    """Return the Activation that does what transformers' module does; itself if none does."""
    ours = _ACTIVATIONS.get(_full_name(type(module)))
    return module if ours is None or not functional.is_plain(module, type(module)) else ours


def _attention_p(own: nn.Module) -> float:
    """Return the probability in force in a self-attention.

    Who says whether it is in training is the attention itself from transformers 5 on, which keeps
    its scaling, and before that its dropout.
    """
    asked = own if hasattr(own, "scaling") else own.dropout
    return getattr(own.dropout, "p", 0.0) if asked.training else 0.0


# --- BERT, RoBERTa, XLM-RoBERTa, ELECTRA ---------------------------------------------------------


def _bert_embeddings(model: nn.Module) -> tuple[nn.Module | None, ...]:
    own = model.embeddings
    tables = own.word_embeddings, own.position_embeddings, own.token_type_embeddings
    return *tables, own.LayerNorm, own.dropout


def _bert_blocks(model: nn.Module) -> Sequence[nn.Module]:
    return model.encoder.layer


def _bert_layer(layer: nn.Module) -> Layer:
    attention, output, up = layer.attention, layer.output, layer.intermediate
    own, after = attention.self, attention.output
    return Layer(
        Projections(own.query, own.key, own.value),
        _attention_p(own),
        own.num_attention_heads,
        (after.dense, after.dropout, after.LayerNorm),
        (up.dense, activation(up.intermediate_act_fn)),
        (output.dense, output.dropout, output.LayerNorm),
    )


def _bert_between(model: nn.Module, prefix: str) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    yield model.embeddings, (f"{prefix}Embeddings",)
    yield model.encoder, (f"{prefix}Encoder",)
    attention = f"{prefix}SelfAttention", f"{prefix}SdpaSelfAttention"
    for layer in model.encoder.layer:
        yield layer, (f"{prefix}Layer",)
        yield layer.attention, (f"{prefix}Attention",)
        yield layer.attention.self, attention
        yield layer.attention.output, (f"{prefix}SelfOutput",)
        yield layer.intermediate, (f"{prefix}Intermediate",)
        yield layer.output, (f"{prefix}Output",)


def _bert(prefix: str, after_padding: bool, output: str) -> Family:
    parts = _bert_embeddings, _bert_blocks, _bert_layer, _bert_between
    return Family(prefix, *parts, after_padding, output)


# --- DistilBERT ----------------------------------------------------------------------------------


def _distilbert_embeddings(model: nn.Module) -> tuple[nn.Module | None, ...]:
    own = model.embeddings
    return own.word_embeddings, own.position_embeddings, None, own.LayerNorm, own.dropout


def _distilbert_layer(layer: nn.Module) -> Layer:
    own, ffn = layer.attention, layer.ffn
    return Layer(
        Projections(own.q_lin, own.k_lin, own.v_lin),
        _attention_p(own),
        own.n_heads,
        (own.out_lin, _NO_DROPOUT, layer.sa_layer_norm),
        (ffn.lin1, activation(ffn.activation)),
        (ffn.lin2, ffn.dropout, layer.output_layer_norm),
    )


def _distilbert_between(
    model: nn.Module, prefix: str
) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    yield model.embeddings, ("Embeddings",)
    yield model.transformer, ("Transformer",)
    attention = f"{prefix}SelfAttention", "MultiHeadSelfAttention", f"{prefix}SdpaAttention"
    for layer in model.transformer.layer:
        yield layer, ("TransformerBlock",)
        yield layer.attention, attention
        yield layer.ffn, ("FFN",)


_CROSS = "BaseModelOutputWithPastAndCrossAttentions"
_POOLED = "BaseModelOutputWithPoolingAndCrossAttentions"
_MODELS = {  # of transformers.models: module and base model
    ("bert", "BertModel"): _bert("Bert", False, _POOLED),
    ("roberta", "RobertaModel"): _bert("Roberta", True, _POOLED),
    ("xlm_roberta", "XLMRobertaModel"): _bert("XLMRoberta", True, _POOLED),
    ("electra", "ElectraModel"): _bert("Electra", False, _CROSS),
    ("distilbert", "DistilBertModel"): Family(
        "DistilBert",
        _distilbert_embeddings,
        lambda model: model.transformer.layer,
        _distilbert_layer,
        _distilbert_between,
        False,
        "BaseModelOutput",
    ),
}
_HEADS = {  # masked-LM heads, which score the vocabulary at every token
    ("bert", "BertLMPredictionHead"),
    ("roberta", "RobertaLMHead"),
    ("xlm_roberta", "XLMRobertaLMHead"),
}
# as keys of the tables above, by the full name of the class
_NAMES = {
    f"transformers.models.{name}.modeling_{name}.{cls}": (name, cls)
    for name, cls in (*_MODELS, *_HEADS)
}


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _name(cls: type) -> tuple[str, str] | None:
    return _NAMES.get(_full_name(cls))


def known(cls: type) -> type | None:
    """Return the class of transformers that `cls` is or is made of, and that is known here."""
    return next((c for c in cls.__mro__ if _name(c) is not None), None)


def family(cls: type) -> Family | None:
    """Return the family of a base model's class; None for another class."""
    return _MODELS.get(_name(cls))


def is_head(cls: type) -> bool:
    """Return whether a class is that of a masked-LM head."""
    return _name(cls) in _HEADS


# --- what is asked of a model before it runs packed ----------------------------------------------


def why_not(model: nn.Module, cls: type, family: Family) -> str:
    """Return why a model has to run its original code whatever its inputs; empty: it has not."""
    config = model.config
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return "it is a decoder"
    if getattr(config, "is_causal", False):
        return "its attention is causal"
    if getattr(config, "position_embedding_type", None) not in ("absolute", None):
        return f"its positions are {config.position_embedding_type}"
    attention = getattr(config, "_attn_implementation", None) or "eager"
    if not any(known in attention for known in _ATTENTIONS):
        return f"its attention is {attention}"
    for module, names in family.between(model, family.prefix):
        reason = not_own(module, names, cls.__module__)
        if reason:
            return reason
    if nn.modules.module._has_any_global_hook():
        return "hooks are registered for all modules"
    if "peft" in sys.modules and _goes_by_rows(model):
        return "adapters are chosen for each row of the batch"
    return ""


def not_own(module: nn.Module, names: tuple[str, ...], source: str) -> str:
    """Return why a module is not just what its class in transformers is; empty: it is.

    Args:
        module: one that is not to be called.
        names: of the classes it may have.
        source: the module of transformers that defines them.
    """
    kind = type(module)
    if kind.__name__ not in names or kind.__module__ != source:
        return f"a {_full_name(kind)} stands where want {names[0]}"
    compiling = torch.compiler.is_compiling()  # what it traces it cannot look at
    if not compiling and _file(kind.forward) != sys.modules[source].__file__:
        return f"the forward of {names[0]} is not transformers'"
    hooks = module._forward_hooks
    if functional.is_watched(module) or any(h.__module__ != _RECORDER for h in hooks.values()):
        return f"a {names[0]} has hooks or a forward of its own"
    return ""


_files: dict[Callable, str] = {}


def _file(method: Callable) -> str:
    """Return the file that a method comes from."""
    if method not in _files:
        code = getattr(inspect.unwrap(method), "__code__", None)
        _files[method] = getattr(code, "co_filename", "")
    return _files[method]


def _goes_by_rows(model: nn.Module) -> bool:
    """Return whether PEFT's adapters are told which row of the batch is whose."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return any("adapter_names" in (getattr(hook, "keywords", None) or ()) for hook in hooks)


def positions_after_padding(
    table: nn.Embedding, input_ids: Tensor | None, shape: tuple[int, int], device: torch.device
) -> Tensor:
    """Return RoBERTa's positions (B, L) or (1, L): counted from behind the padding id.

    A token with the padding id has that position itself, and is not counted.
    """
    pad = table.padding_idx
    if input_ids is None:
        return torch.arange(pad + 1, pad + 1 + shape[1], device=device)[None]
    counted = input_ids.ne(pad).long()
    return counted.cumsum(1) * counted + pad
