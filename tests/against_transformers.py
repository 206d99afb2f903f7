"""Hugging Face's BERT and ours: the same weights on the same input, and how far they are apart."""

import contextlib
from collections.abc import Callable, Iterator

import torch
import transformers

import bert_fast

CLASSES = (
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "BertForMultipleChoice",
)
# Absolute and relative; sums of a few hundred rounded terms stay inside in a correct model.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
PADDINGS = ("none", "right", "left", "holes")


def hf_config(**fields) -> transformers.BertConfig:
    """A small configuration without dropout; no size is a multiple of 8 but the hidden size."""
    sizes = {
        "vocab_size": 101,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 52,
        "max_position_embeddings": 40,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return transformers.BertConfig(**sizes | fields)


@torch.no_grad()
def perturb(model: torch.nn.Module) -> torch.nn.Module:
    """Noise on every parameter: fresh weights have biases of 0 and LayerNorms of 1."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        scale = 0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def pair(
    name: str = "BertModel", dtype: torch.dtype = torch.float32, **fields
) -> tuple[transformers.PreTrainedModel, bert_fast.BertPreTrainedModel]:
    """transformers' model (eager attention) and ours, equal perturbed weights, in eval mode."""
    config = hf_config(**fields)
    theirs = perturb(getattr(transformers, name)(config)).to(dtype).eval()
    theirs.set_attn_implementation("eager")
    ours = getattr(bert_fast, name)(bert_fast.BertConfig.from_dict(config.to_dict()))
    ours = ours.to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def real_tokens(padding: str, B: int, L: int) -> torch.Tensor:
    """(B, L) bool, True where a token is; no row is empty, and one row is full."""
    lengths = torch.randint(1, L + 1, (B, 1))
    lengths[0] = L
    columns = torch.arange(L).expand(B, L)
    if padding == "none":
        return torch.ones(B, L, dtype=torch.bool)
    if padding == "right":
        return columns < lengths
    if padding == "left":
        return columns >= L - lengths
    real = torch.rand(B, L) < 0.6  # "holes"; the first column stays, for transformers' pooler
    real[:, 0] = True
    return real


def batch(
    config: transformers.BertConfig,
    *,
    B: int = 3,
    L: int = 11,
    padding: str = "right",
    mask_dtype: torch.dtype = torch.int64,
    positions: str = "default",
    token_types: bool = True,
    embeds_dtype: torch.dtype | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Keyword arguments for a forward, and where its real tokens are.

    Ids are drawn from the whole vocabulary, the padding id included: a real token may have it.
    """
    real = real_tokens(padding, B, L)
    inputs = {"input_ids": torch.randint(0, config.vocab_size, (B, L))}
    inputs["input_ids"][0, L // 2] = config.pad_token_id or 0
    if embeds_dtype is not None:
        inputs = {"inputs_embeds": torch.randn(B, L, config.hidden_size, dtype=embeds_dtype)}
    if padding != "none":
        inputs["attention_mask"] = real.to(mask_dtype)
    if token_types:
        inputs["token_type_ids"] = torch.randint(0, config.type_vocab_size, (B, L))
    if positions != "default":
        rows = 1 if positions == "one row" else B
        inputs["position_ids"] = torch.randint(0, config.max_position_embeddings, (rows, L))
    return inputs, real


def flatten(output) -> dict[str, torch.Tensor]:
    """The tensors of a model output by name, tuples as `name.index`."""
    flat = {}
    for name, value in output.items():
        if isinstance(value, tuple | list):
            flat |= {f"{name}.{index}": tensor for index, tensor in enumerate(value)}
        elif value is not None:
            flat[name] = value
    return flat


def at_real_tokens(output, real: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every output, without the rows of padding tokens, about which transformers says nothing.

    transformers pools the first column; the pooler's row is left out where that is padding.
    """
    found = {}
    for name, value in flatten(output).items():
        if name.startswith("attentions"):  # (B, H, L, L): a row for each query that is real
            found[name] = value.transpose(1, 2)[real]
        elif value.dim() == 3 or name in ("start_logits", "end_logits"):
            found[name] = value[real]
        elif name != "pooler_output" or real[:, 0].all():
            found[name] = value
    return found


Named = dict[str, torch.Tensor]


def backward(
    model: torch.nn.Module, inputs: dict, chosen: Callable[..., Named]
) -> tuple[Named, Named]:
    """What `chosen` takes of the outputs, and the leaves, which have their gradients.

    These are of the model's own loss where it returns one, else of a random projection of all that
    is taken. The leaves are the parameters and `inputs_embeds`.
    """
    model.zero_grad(set_to_none=True)
    leaves = dict(model.named_parameters())
    if "inputs_embeds" in inputs:
        leaves["inputs_embeds"] = inputs["inputs_embeds"].clone().requires_grad_()
        inputs = inputs | {"inputs_embeds": leaves["inputs_embeds"]}
    found = chosen(model(**inputs))
    loss = found["loss"] if "loss" in found else projection(found.values())
    loss.backward()
    return {name: value.detach() for name, value in found.items()}, leaves


def run(
    model: torch.nn.Module, inputs: dict, real: torch.Tensor, only: tuple[str, ...] = ()
) -> Named:
    """Outputs at real tokens and all gradients, as `grad NAME`; `only` keeps these outputs."""

    def chosen(output) -> Named:
        found = at_real_tokens(output, real)
        return {name: found[name] for name in only or found}

    found, leaves = backward(model, inputs, chosen)
    return found | gradients(leaves)


def gradients(leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy of each leaf's gradient as `grad NAME`, zeros where there is none."""
    found = {}
    for name, leaf in leaves.items():
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        found[f"grad {name}"] = gradient.detach().clone()
    return found


def alone(inputs: dict, real: torch.Tensor, row: int) -> dict[str, torch.Tensor]:
    """One text of a padded batch without its padding; its tokens keep their positions."""
    columns = real[row].nonzero().flatten()
    text = {key: value[row : row + 1, columns] for key, value in inputs.items()}
    text.pop("attention_mask", None)
    text.setdefault("position_ids", columns[None])
    return text


def projection(tensors) -> torch.Tensor:
    """A scalar whose gradient with respect to each of the tensors is random, and fixed."""
    generator = torch.Generator().manual_seed(2)
    weighted = (
        value * torch.randn(value.shape, generator=generator).to(value.dtype) for value in tensors
    )
    return sum(product.sum() for product in weighted)


def largest(tensor: torch.Tensor) -> float:
    """The largest magnitude; 0 for no elements."""
    return tensor.abs().max().item() if tensor.numel() else 0.0


def outside(
    got: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    other: dict[str, torch.Tensor] | None = None,
) -> dict[str, str]:
    """The tensors of `got` farther from `expected` than the bound allows, with the figures.

    The bound is the dtype's tolerance times max(1, the largest value); in float32 also twice the
    distance between `expected` and `other`, a second implementation that counts as right.
    """
    found = {}
    for name, reference in expected.items():
        if name not in got or got[name].shape != reference.shape:
            shape = tuple(got[name].shape) if name in got else "nothing"
            found[name] = f"want shape {tuple(reference.shape)}, got {shape}"
            continue
        bound = TOLERANCE[reference.dtype] * max(1.0, largest(reference))
        if other is not None and reference.dtype == torch.float32:
            bound = max(bound, 2 * largest(reference - other[name]))
        error = largest(got[name] - reference)
        if not error <= bound:  # a NaN is outside
            found[name] = f"error {error:.2e} above {bound:.2e}"
    return found


@contextlib.contextmanager
def attention(model: transformers.PreTrainedModel, implementation: str) -> Iterator[None]:
    """transformers' model with another attention implementation, eager again afterwards."""
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation("eager")


def differences(
    theirs: transformers.PreTrainedModel,
    ours: bert_fast.BertPreTrainedModel,
    inputs: dict,
    real: torch.Tensor,
    only: tuple[str, ...] = (),
) -> dict[str, str]:
    """What our model computes otherwise than transformers': outputs and gradients."""
    eager = run(theirs, inputs, real, only)
    with attention(theirs, "sdpa"):
        sdpa = run(theirs, inputs, real, only)
    return outside(run(ours, inputs, real, only), eager, sdpa)


def above_twice_the_baseline(
    got: list[dict[str, torch.Tensor]],
    baselines: list[list[dict[str, torch.Tensor]]],
    truth: list[dict[str, torch.Tensor]],
) -> dict[str, str]:
    """The tensors whose error is above 2 x the worst baseline's + one unit in the last place.

    Errors are norms over several runs. The largest error of one run turns on single numbers: a
    ReLU that rounding opens in one implementation and not in the other.
    """
    found = {}
    for name in truth[0]:
        exact = torch.cat([run[name].flatten() for run in truth])

        def error(runs, name=name, exact=exact):
            return (torch.cat([run[name].double().flatten() for run in runs]) - exact).norm().item()

        ulp = torch.finfo(got[0][name].dtype).eps * largest(exact)
        allowed = 2 * max(error(runs) for runs in baselines) + ulp
        if not error(got) <= allowed:
            found[name] = f"error {error(got):.2e} above {allowed:.2e}"
    return found
