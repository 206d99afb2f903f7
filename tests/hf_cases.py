"""transformers' encoders of five families, plain and accelerated, on the same input."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import transformers
from against_transformers import CLASSES, backward, batch, outside, perturb

import bert_fast
from bert_fast import functional

HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
FAMILIES = {  # prefix of the classes: all of them, then what its configuration has of its own
    "Bert": (CLASSES, {}),
    "Roberta": (("Model", "ForMaskedLM", *map("For{}".format, HEADS)), {"type_vocab_size": 2}),
    "XLMRoberta": (("Model", "ForMaskedLM", *map("For{}".format, HEADS)), {"type_vocab_size": 2}),
    "DistilBert": (("Model", "ForMaskedLM", *map("For{}".format, HEADS)), {}),
    "Electra": (
        ("Model", "ForPreTraining", "ForMaskedLM", *map("For{}".format, HEADS)),
        {"embedding_size": 24},
    ),
}
MODELS = {  # class: its family
    name if name.startswith(family) else family + name: family
    for family, (names, _) in FAMILIES.items()
    for name in names
}
BASES = tuple(f"{family}Model" for family in FAMILIES)
LAYERS = 2
V5 = int(transformers.__version__.partition(".")[0]) >= 5
_SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 52,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 1,
}
_DISTILBERT = {  # what DistilBERT's configuration calls them
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "hidden_act": "activation",
}


def config(name: str, **fields) -> transformers.PretrainedConfig:
    """A small configuration of a class, without dropout; a padding id that tokens may have."""
    family = MODELS.get(name) or next(f for f in FAMILIES if name.startswith(f))
    fields = _SIZES | FAMILIES[family][1] | fields
    if family == "DistilBert":
        fields = {_DISTILBERT.get(key, key): value for key, value in fields.items()}
        fields |= {"qa_dropout": 0.0, "seq_classif_dropout": 0.0}
    return getattr(transformers, f"{family}Config")(**fields)


def plain(
    name: str = "BertModel", dtype: torch.dtype = torch.float32, attention: str = "eager", **fields
) -> transformers.PreTrainedModel:
    """transformers' model with perturbed weights, the same at each call, in eval mode."""
    torch.manual_seed(5)
    cls = getattr(transformers, name)
    if not cls._supports_sdpa:  # ELECTRA's of transformers 4
        attention = "eager"
    made = cls._from_config(config(name, **fields), attn_implementation=attention)
    return perturb(made).to(dtype).eval()


def form(name: str, model: torch.nn.Module, **options) -> tuple[dict, torch.Tensor]:
    """Keyword arguments for a class, four rows of them, and where the real tokens are (4, L)."""
    types = not name.startswith("DistilBert") and options.pop("token_types", True)
    inputs, real = batch(model.config, **{"B": 4, "token_types": types} | options)
    if "inputs_embeds" in inputs and name.startswith("Electra"):
        inputs["inputs_embeds"] = inputs["inputs_embeds"][..., : model.config.embedding_size]
    if name.endswith("MultipleChoice"):
        inputs = {key: value.unflatten(0, (-1, 2)) for key, value in inputs.items()}
    return inputs, real


def labels(name: str, model: torch.nn.Module, real: torch.Tensor) -> dict[str, torch.Tensor]:
    """Labels that a class has a loss for, none of them at padding; nothing for a base model."""
    rows = torch.arange(len(real))
    if name.endswith("Model"):
        return {}
    if name.endswith("QuestionAnswering"):
        last = real.sum(1) - 1
        return {"start_positions": last // 2, "end_positions": last}
    if name.endswith("ForMultipleChoice"):
        return {"labels": rows[: len(real) // 2] % 2}
    if name.endswith(("SequenceClassification", "NextSentencePrediction")):
        return {"labels": rows % 2}
    classes = model.config.vocab_size if name.endswith(("MaskedLM", "BertForPreTraining")) else 2
    if name.startswith("ElectraForPreTraining"):
        return {"labels": torch.randint(0, 2, real.shape)}  # its loss reads the mask
    found = {"labels": torch.randint(0, classes, real.shape).masked_fill(~real, -100)}
    if name == "BertForPreTraining":
        found["next_sentence_label"] = rows % 2
    return found


def at_real_tokens(output, real: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every tensor of an output, be it a tuple, without the rows of padding."""
    found = {}
    for name, value in output.items() if hasattr(output, "items") else enumerate(output):
        several = isinstance(value, tuple | list)
        for index, tensor in enumerate(value if several else [value]):
            if tensor is None:
                continue
            if tensor.dim() == 4:  # (B, H, L, L): a row for each query that is real
                tensor = tensor.transpose(1, 2)[real]
            elif tensor.shape[:2] == real.shape:
                tensor = tensor[real]
            found[f"{name}.{index}" if several else str(name)] = tensor
    return found


def structure(output):
    """Types, names, lengths and dtypes of an output, without a number."""
    if hasattr(output, "items"):
        return type(output), [(name, structure(value)) for name, value in output.items()]
    if isinstance(output, tuple | list):
        return type(output), [structure(value) for value in output]
    return None if output is None else (output.dtype, output.shape)


def measured(model, inputs: dict, real: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs at real tokens and `grad NAME` of each parameter that gets a gradient."""
    found, leaves = backward(model, inputs, lambda output: at_real_tokens(output, real))
    return found | {f"grad {n}": p.grad.clone() for n, p in leaves.items() if p.grad is not None}


@contextlib.contextmanager
def packed() -> Iterator[list[int]]:
    """The number of rows of each self-attention that runs packed inside the block."""
    rows, original = [], functional.self_attention

    def counted(projections, dropout, heads, x, *rest, **more):
        assert x.dim() == 2
        rows.append(len(x))
        return original(projections, dropout, heads, x, *rest, **more)

    with mock.patch.object(functional, "self_attention", counted):
        yield rows


def widened(inputs: dict) -> dict:
    """Inputs for a model in float64."""
    wide = {
        k: v.double() for k, v in inputs.items() if torch.is_tensor(v) and v.is_floating_point()
    }
    return inputs | wide


def check(model, inputs: dict, real: torch.Tensor, layers: int = LAYERS) -> dict:
    """An accelerated model has its original's outputs and gradients, from rows without padding.

    It is left accelerated.
    """
    bert_fast.restore(model)
    with packed() as rows:
        expected = measured(model, inputs, real)
    assert not rows
    assert bert_fast.accelerate(model, strict=True) is model
    with packed() as rows:
        found = measured(model, inputs, real)
    assert rows == [int(real.sum())] * layers, rows
    assert [*found] == [*expected], {*found} ^ {*expected}
    if different := outside(found, expected):
        # as far as the original is from what is exact: gradients that should be 0 are all rounding
        exact = measured(copy.deepcopy(bert_fast.restore(model)).double(), widened(inputs), real)
        bert_fast.accelerate(model, strict=True)
        exact = {key: value.to(expected[key].dtype) for key, value in exact.items()}
        different = outside(found, expected, exact)
    assert not different, different
    return found


def register(module: torch.nn.Module, kind: str, fired: list) -> Callable[[], None]:
    """Hook a module, so that it is noted in `fired` at every call; return what removes the hook."""
    if kind == "pre":
        return module.register_forward_pre_hook(lambda m, args: fired.append(m)).remove
    if kind == "forward":
        return module.register_forward_hook(lambda m, args, out: fired.append(m)).remove
    if kind == "backward":
        return module.register_full_backward_hook(lambda m, grad, out: fired.append(m)).remove
    original = module.forward

    def forward(*args, **kwargs):
        fired.append(module)
        return original(*args, **kwargs)

    module.forward = forward
    return functools.partial(delattr, module, "forward")
