"""BertModel gives transformers' names, outputs and gradients."""

import dataclasses
import itertools

import pytest
import torch
import transformers
from against_transformers import (
    CLASSES,
    PADDINGS,
    above_twice_the_baseline,
    at_real_tokens,
    attention,
    batch,
    differences,
    hf_config,
    largest,
    outside,
    pair,
    run,
)

import bert_fast

HEAD_SIZES = (8, 16, 24, 32, 40, 64, 72, 80, 96, 128)
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration and the form of its input."""

    head_size: int
    act: str
    layers: int
    heads: int
    vocab: int
    types: int
    padding: str
    mask_dtype: torch.dtype
    positions: str
    token_types: bool
    embeds: bool
    eps: float
    pad_token_id: int | None

    def __str__(self) -> str:
        form = f"{self.padding}-{self.mask_dtype}".replace("torch.", "")
        flags = "-embeds" if self.embeds else ""
        return f"L{self.layers}-H{self.heads}-K{self.head_size}-{self.act}-{form}{flags}"

    def fields(self) -> dict:
        return {
            "hidden_size": self.heads * self.head_size,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "intermediate_size": 2 * self.heads * self.head_size + 3,
            "hidden_act": self.act,
            "vocab_size": self.vocab,
            "type_vocab_size": self.types,
            "layer_norm_eps": self.eps,
            "pad_token_id": self.pad_token_id,
        }

    def inputs(self, config, dtype):
        return batch(
            config,
            padding=self.padding,
            mask_dtype=self.mask_dtype,
            positions=self.positions,
            token_types=self.token_types,
            embeds_dtype=dtype if self.embeds else None,
        )


def make_case(index: int, head_size: int, act: str) -> Case:
    """Everything but head size and activation goes round in cycles of unlike lengths."""
    many = (1, 2, 3, 5, 4, 8, 7)[index % 7]
    mask_dtypes = (torch.int64, torch.bool, torch.float32, torch.int32, torch.uint8)
    return Case(
        head_size=head_size,
        act=act,
        layers=1 + index % 3,
        heads=min(many, 320 // head_size),
        vocab=(97, 1003, 30, 251, 333)[index % 5],
        types=1 + (index // 3) % 3,
        padding=(*PADDINGS, "right")[index % 5],
        mask_dtype=mask_dtypes[(index // 2) % 5],
        positions=("default", "each", "default", "one row")[(index // 4) % 4],
        token_types=index % 7 != 3,
        embeds=index % 9 == 4,
        eps=(1e-12, 1e-5, 1e-3)[index % 3],
        pad_token_id=(0, 7, None, 0)[(index // 3) % 4],
    )


CASES = [
    make_case(index, head_size, act)
    for index, (head_size, act) in enumerate(itertools.product(HEAD_SIZES, ACTIVATIONS))
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case, dtype):
    theirs, ours = pair(dtype=dtype, **case.fields())
    inputs, real = case.inputs(theirs.config, dtype)
    assert differences(theirs, ours, inputs, real) == {}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions", "both"])
@pytest.mark.parametrize("where", ["argument", "config"])
def test_hidden_states_and_attentions(where, asked, padding):
    """Every layer's output and every attention matrix, with their gradients."""
    names = ("output_hidden_states", "output_attentions") if asked == "both" else (asked,)
    flags = dict.fromkeys(names, True)
    theirs, ours = pair(num_hidden_layers=3)
    inputs, real = batch(theirs.config, padding=padding)
    expected = run(theirs, inputs | flags, real)
    if where == "config":
        for name in names:
            setattr(ours.config, name, True)
        assert outside(run(ours, inputs, real), expected) == {}
    else:
        assert outside(run(ours, inputs | flags, real), expected) == {}


@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("pooler", [True, False])
def test_tuple_output(pooler, flags):
    """`return_dict=False` gives transformers' tuple, by argument and by configuration."""
    asked = dict(zip(("output_hidden_states", "output_attentions"), flags, strict=True))
    theirs = transformers.BertModel(hf_config(), add_pooling_layer=pooler).eval()
    theirs.set_attn_implementation("eager")
    config = bert_fast.BertConfig.from_dict(theirs.config.to_dict())
    ours = bert_fast.BertModel(config, add_pooling_layer=pooler).eval()
    ours.load_state_dict(theirs.state_dict())
    inputs, _ = batch(theirs.config, padding="none")
    with torch.no_grad():
        expected = theirs(**inputs, **asked)
        named = ours(**inputs, **asked)
        got = ours(**inputs, **asked, return_dict=False)
        ours.config.return_dict = False
        configured = ours(**inputs, **asked)
    assert type(got) is type(configured) is tuple
    for parts in zip(got, configured, expected.values(), strict=True):
        tensors = [part if isinstance(part, tuple) else (part,) for part in parts]
        for one, two, reference in zip(*tensors, strict=True):
            torch.testing.assert_close(one, reference, rtol=1e-5, atol=1e-5)
            assert torch.equal(one, two)
    assert list(named.keys()) == list(expected)
    assert named[0] is named["last_hidden_state"] is named.last_hidden_state
    assert (named.pooler_output is not None) == pooler
    assert len(named.to_tuple()) == len(named) == len(expected)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", CLASSES)
def test_tree_is_transformers(name, tied):
    """Names, order, shapes and dtypes of parameters and state dict, and what is counted."""
    config = hf_config(num_labels=3, tie_word_embeddings=tied)
    theirs = getattr(transformers, name)(config)
    ours = getattr(bert_fast, name)(bert_fast.BertConfig.from_dict(config.to_dict()))

    def described(named):
        return [(key, tuple(value.shape), value.dtype) for key, value in named]

    assert described(ours.named_parameters()) == described(theirs.named_parameters())
    assert described(ours.state_dict().items()) == described(theirs.state_dict().items())
    assert all(parameter.requires_grad for parameter in ours.parameters())
    assert ours.training and ours.base_model_prefix == theirs.base_model_prefix
    for arguments in itertools.product((True, False), repeat=2):
        assert ours.num_parameters(*arguments) == theirs.num_parameters(*arguments)


@pytest.mark.parametrize("name", CLASSES)
def test_modules_are_transformers(name):
    """Hooks, adapters and quantisers find modules by these names."""
    config = hf_config()
    theirs = getattr(transformers, name)(config)
    ours = getattr(bert_fast, name)(bert_fast.BertConfig.from_dict(config.to_dict()))
    assert [key for key, _ in ours.named_modules()] == [key for key, _ in theirs.named_modules()]


def test_first_weights_are_transformers():
    """Fresh weights have transformers' distribution: zeros, ones, and noise of its width."""
    config = hf_config(hidden_size=96, initializer_range=0.05)
    theirs = transformers.BertForPreTraining(config).state_dict()
    ours = bert_fast.BertForPreTraining(bert_fast.BertConfig.from_dict(config.to_dict()))
    for name, tensor in ours.state_dict().items():
        if theirs[name].std() == 0 or tensor.dim() == 1:
            assert torch.equal(tensor, theirs[name]), name
        else:
            assert abs(tensor.std().item() / 0.05 - 1) < 0.25, name
            assert abs(tensor.mean().item()) < 0.01, name
    embeddings = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(ours.state_dict()[embeddings][0], theirs[embeddings][0])


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])
def test_comparison_sees_every_tensor(gradients):
    """A comparison that passes with a tensor dropped would prove nothing about that tensor.

    Only the key bias cannot be seen: it adds one number to all scores of a query, and softmax
    takes no notice.
    """
    theirs, ours = pair("BertForPreTraining")
    inputs, real = batch(theirs.config)

    def outputs(model):
        with torch.set_grad_enabled(gradients):
            found = at_real_tokens(model(**inputs), real)
        return {name: value.detach() for name, value in found.items()}

    expected = outputs(theirs)
    unseen = set()
    for name, parameter in ours.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.fill_(1.0 if name.endswith("LayerNorm.weight") else 0.0)
        if not outside(outputs(ours), expected):
            unseen.add(name)
        with torch.no_grad():
            parameter.copy_(kept)
    assert unseen == {name for name, _ in ours.named_parameters() if name.endswith("key.bias")}
    assert outside(outputs(ours), expected) == {}


def test_comparison_sees_every_gradient():
    """Every gradient that is compared is large enough for its loss to be noticed."""
    theirs, _ = pair("BertForPreTraining")
    inputs, real = batch(theirs.config)
    for name, value in run(theirs, inputs, real).items():
        assert largest(value) > 0.01 or name.endswith("key.bias"), name


@pytest.mark.parametrize(
    "frozen", ["query.weight", "key.bias", "value", "embeddings", "LayerNorm", "layer.0"]
)
def test_frozen_parameters(frozen):
    """Freezing some parameters changes no other's gradient."""
    theirs, ours = pair()
    inputs, real = batch(theirs.config)
    for model in (theirs, ours):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen not in name)
    assert differences(theirs, ours, inputs, real) == {}
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (frozen in name), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_low_precision(act, dtype):
    """No output and no gradient is twice as far from the truth as transformers' is.

    transformers' distance is the larger one of its two attentions: the fused one, its default,
    rounds elsewhere than the eager one.
    """
    theirs, ours = pair(dtype=dtype, hidden_act=act, hidden_size=64, intermediate_size=128)
    batches = [batch(theirs.config, B=4, L=24) for _ in range(8)]
    got = [run(ours, *one) for one in batches]
    baselines = [[run(theirs, *one) for one in batches]]
    with attention(theirs, "sdpa"):
        baselines.append([run(theirs, *one) for one in batches])
    truth = [run(theirs.double(), *one) for one in batches]  # the rounded weights, exact
    assert {value.dtype for value in got[0].values()} == {dtype}
    assert above_twice_the_baseline(got, baselines, truth) == {}


def test_gradients_accumulate():
    """A second backward adds to the gradients of the first."""
    _, ours = pair()
    inputs, real = batch(ours.config)
    first = run(ours, inputs, real)
    ours(**inputs).last_hidden_state[real].square().sum().backward()
    summed = {name: parameter.grad for name, parameter in ours.encoder.named_parameters()}
    ours.zero_grad()
    ours(**inputs).last_hidden_state[real].square().sum().backward()
    for name, parameter in ours.encoder.named_parameters():
        expected = first[f"grad encoder.{name}"] + parameter.grad
        torch.testing.assert_close(summed[name], expected, rtol=1e-5, atol=1e-4)
