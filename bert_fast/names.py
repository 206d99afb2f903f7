"""Names of weights: what Hugging Face and Google call them, now and earlier, in one table.

bert.encoder.layer.0.output.LayerNorm.weight           Hugging Face, now
encoder.layer.0.output.LayerNorm.weight                the same in a file without a head
module.bert.encoder.layer.0.output.LayerNorm.gamma     Hugging Face, earlier, from DataParallel
bert/encoder/layer_0/output/LayerNorm/gamma            Google

All four are one weight, and `bare` gives the first three one name.
"""

import re
from collections.abc import Iterable

# Hugging Face's earlier names: each rule that fits is applied, in this order.
_EARLIER = (
    (re.compile(r"module\.(.+)"), r"\1"),
    (re.compile(r"(.*\bLayerNorm)\.gamma"), r"\1.weight"),
    (re.compile(r"(.*\bLayerNorm)\.beta"), r"\1.bias"),
)
_BUFFER = re.compile(r"(module\.)?(bert\.)?embeddings\.(position_ids|token_type_ids)")
_HEADS = ("cls.", "classifier.", "qa_outputs.")

# Google's: what the variables under a scope become, and whether they are to be transposed. Google
# multiplies by a dense layer's kernel (in, out), torch by the transpose of a weight (out, in); what
# is called output_weights, and embeddings, are as torch has them.
_TABLE = {"": ("weight", False)}
_NORM = {"/gamma": ("weight", False), "/beta": ("bias", False)}
_DENSE = {"/kernel": ("weight", True), "/bias": ("bias", False)}
_OUTPUT = {"/output_weights": ("weight", False), "/output_bias": ("bias", False)}
_IN_LAYER = (
    ("attention/self/query", "attention.self.query", _DENSE),
    ("attention/self/key", "attention.self.key", _DENSE),
    ("attention/self/value", "attention.self.value", _DENSE),
    ("attention/output/dense", "attention.output.dense", _DENSE),
    ("attention/output/LayerNorm", "attention.output.LayerNorm", _NORM),
    ("intermediate/dense", "intermediate.dense", _DENSE),
    ("output/dense", "output.dense", _DENSE),
    ("output/LayerNorm", "output.LayerNorm", _NORM),
)
_OUTSIDE = (
    ("bert/embeddings/word_embeddings", "bert.embeddings.word_embeddings", _TABLE),
    ("bert/embeddings/position_embeddings", "bert.embeddings.position_embeddings", _TABLE),
    ("bert/embeddings/token_type_embeddings", "bert.embeddings.token_type_embeddings", _TABLE),
    ("bert/embeddings/LayerNorm", "bert.embeddings.LayerNorm", _NORM),
    ("bert/pooler/dense", "bert.pooler.dense", _DENSE),
    ("cls/predictions/transform/dense", "cls.predictions.transform.dense", _DENSE),
    ("cls/predictions/transform/LayerNorm", "cls.predictions.transform.LayerNorm", _NORM),
    ("cls/predictions", "cls.predictions", {"/output_bias": ("bias", False)}),
    ("cls/seq_relationship", "cls.seq_relationship", _OUTPUT),
    ("cls/squad", "qa_outputs", _OUTPUT),  # run_squad.py
    ("", "classifier", _OUTPUT),  # run_classifier.py: variables outside any scope
)
_GOOGLE_IN_LAYER, _GOOGLE = (
    {
        (scope + variable).removeprefix("/"): (f"{module}.{parameter}", transposed)
        for scope, module, variables in scopes
        for variable, (parameter, transposed) in variables.items()
    }
    for scopes in (_IN_LAYER, _OUTSIDE)
)
_LAYER = re.compile(r"bert/encoder/layer_(0|[1-9]\d{0,5})/(.+)", re.ASCII)
_OPTIMIZER = re.compile(
    r"(.+/)?(adam_[mv]|lamb_[mv]|Adam(_1)?|(AdamWeightDecay|LAMB)Optimizer(_1)?"
    r"|beta[12]_power|global_step)"
)


def present(name: str) -> str:
    """Return the name that Hugging Face gives a weight now; `bert.` stays or not, as it was."""
    for pattern, replacement in _EARLIER:
        if found := pattern.fullmatch(name):
            name = found.expand(replacement)
    return name


def bare(name: str) -> str:
    """Return the present name without `bert.`: one for each weight, wherever it was saved."""
    return present(name).removeprefix("bert.")


def is_buffer(name: str) -> bool:
    """Return whether a name is one of Hugging Face's tensors that were never weights."""
    return _BUFFER.fullmatch(name) is not None


def is_head(name: str) -> bool:
    """Return whether a present name belongs to the pooler or a head, not to the encoder."""
    return not bare(name).startswith(("embeddings.", "encoder."))


def from_google(name: str) -> tuple[str, bool] | None:
    """Return the present name of one of Google's variables, and whether it is to be transposed.

    None for what is no weight of BERT; `is_optimizer` says whether that was to be expected.
    """
    if not (inside := _LAYER.fullmatch(name)):
        return _GOOGLE.get(name)
    found = _GOOGLE_IN_LAYER.get(inside[2])
    return found and (f"bert.encoder.layer.{inside[1]}.{found[0]}", found[1])


def is_optimizer(name: str) -> bool:
    """Return whether one of Google's variables is the optimizer's: moments, step, beta powers."""
    return _OPTIMIZER.fullmatch(name) is not None


def as_saved(found: Iterable[str]) -> dict[str, str]:
    """Return each name -> the one under which transformers saves such a set of weights today.

    That is with `bert.` where there is a head, without it where there is only the encoder (and
    pooler). Buffers are left out; names that are not BERT's stay as they are.

    Raises:
        ValueError: two names become one.
    """
    weights = [name for name in found if not is_buffer(name)]
    prefix = "bert." if any(bare(name).startswith(_HEADS) for name in weights) else ""
    renamed: dict[str, str] = {}
    origin: dict[str, str] = {}
    for name in weights:
        now = bare(name)
        if now.startswith(("embeddings.", "encoder.", "pooler.")):
            now = prefix + now
        elif not now.startswith(_HEADS):
            now = present(name)
        if (other := origin.setdefault(now, name)) != name:
            raise ValueError(f"want each weight once, got {other} and {name}")
        renamed[name] = now
    return renamed
