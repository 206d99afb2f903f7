"""A small model, whole, on the kernels alone: right, and the same bits packed as padded."""

from collections import Counter
from contextlib import nullcontext
from functools import partial
from unittest import mock

import op_cases
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from interpreter_tools import in_interpreter, in_long, kernels_on_cpu
from op_cases import assert_as_good, assert_same_bits

import bert_fast
from bert_fast import reference
from bert_fast.ops import registry

poison = op_cases.poison
B, L, V = 3, 11, 101
WITHOUT_KERNEL = {"unpad"}  # PyTorch's sums and nonzero_static; it ends in a copy to the host
HEADS = {  # class: (fields of its configuration, labels by name)
    "BertForPreTraining": ({}, ("labels", "next_sentence_label")),
    "BertForMaskedLM": ({"hidden_act": "relu"}, ("labels",)),
    "BertForNextSentencePrediction": ({"hidden_act": "gelu_new"}, ("labels",)),
    "BertForSequenceClassification": ({"num_labels": 3}, ("labels",)),
    "BertForTokenClassification": ({"num_labels": 5}, ("labels",)),
    "BertForQuestionAnswering": ({}, ("start_positions", "end_positions")),
    "BertForMultipleChoice": ({}, ("labels",)),
}
MASKED_LM = ("BertForPreTraining", "BertForMaskedLM")
CUBLAS = {"linear", "linear_bwd"}  # PyTorch's products are what serves them
STEPS = {"embed", "embed_bwd", "add_layer_norm", "add_layer_norm_bwd", *CUBLAS}
STEPS |= {"attention", "attention_bwd", "linear_gelu", "bias_gelu_bwd"}
every_head = pytest.mark.parametrize("name", HEADS)


def build(name, dropout=0.0, layers=2):
    """Two layers, two heads of 16, and noise on every parameter: fresh biases are 0."""
    torch.manual_seed(3)
    config = bert_fast.BertConfig(
        vocab_size=V,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=52,
        max_position_embeddings=40,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        classifier_dropout=0.0,  # the head's is PyTorch's
        **HEADS.get(name, ({},))[0],
    )
    model = getattr(bert_fast, name)(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3 if p.dim() == 1 else p.shape[1] ** -0.5)
    return model.train()


def mask_of(padding):
    """(B, L) bool: lengths 11, 4 and 7; a hole is anywhere but in the first column."""
    columns, lengths = torch.arange(L), torch.tensor([[L], [4], [7]])
    if padding == "left":
        return columns >= L - lengths
    if padding == "holes":
        order = torch.rand(B, L).argsort(1).argsort(1)
        order[:, 0] = -1
        return order.argsort(1).argsort(1) < lengths
    return columns < lengths


def inputs_of(name, padding="right"):
    torch.manual_seed(5)
    mask = mask_of(padding)
    inputs = {
        "input_ids": torch.randint(0, V, (B, L)),
        "attention_mask": mask.long(),
        "token_type_ids": torch.randint(0, 2, (B, L)),
    }
    token = torch.randint(0, 5, (B, L)).masked_fill(~mask | (torch.rand(B, L) < 0.3), -100)
    token[:, 0] = torch.where(mask[:, 0], 1, -100)
    sequence = torch.tensor([1, 0, 1])
    per_token = name in ("BertForPreTraining", "BertForMaskedLM", "BertForTokenClassification")
    if name == "BertForMultipleChoice":
        inputs = {key: value[None] for key, value in inputs.items()}
        sequence = torch.tensor([1])
    if name == "BertForQuestionAnswering":  # columns, of a token and not of padding
        sequence = mask.int().argmax(1)
    for label in HEADS.get(name, ({}, ()))[1]:
        inputs[label] = token if per_token and label == "labels" else sequence
    return inputs


def floats(output):
    """The floating tensors of an output, by name."""
    found = {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}
    return {name: value for name, value in found.items() if value.is_floating_point()}


def on_kernels(device):
    return kernels_on_cpu() if device == "cpu" else nullcontext()


def run(model, inputs, device="cpu", seed=11):
    """The output, and the gradients of the loss or of a weighted sum of outputs; on the CPU."""
    model.to(device).zero_grad()
    inputs = {key: value.to(device) for key, value in inputs.items()}
    fixed = torch.tensor([seed], device=device)
    with mock.patch.object(torch, "randint", lambda *_, **__: fixed):  # the model's dropout seed
        output = floats(model(**inputs))
    if "last_hidden_state" in output:
        # what is by token as rows without padding, in either layout
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        output["last_hidden_state"] = output["last_hidden_state"][mask]
    loss = output.get("loss")
    if loss is None:
        rng = torch.Generator().manual_seed(1)
        weights = [torch.randn(o.shape, generator=rng).to(o) for o in output.values()]
        loss = sum((o * w).sum() for o, w in zip(output.values(), weights, strict=True))
    loss.backward()
    grads = {f"d_{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: t.detach().cpu().clone() for n, t in (output | grads).items()}


# --- right ---------------------------------------------------------------------------------------


def assert_right(name, dtype, device, dropout=0.1, padding="right", layers=2):
    """At most twice as far from float64 as the same model on the eager path of the CPU.

    In fp32 and 1e-5 of the largest number: that path makes its probabilities anew in the backward,
    more exactly than a kernel does from the log-sum-exp.
    """
    model, inputs = build(name, dropout, layers).to(dtype), inputs_of(name, padding)
    baseline = run(model, inputs)
    truth = run(model.double(), inputs)
    with on_kernels(device):
        got = run(model.to(dtype), inputs, device)
    assert got.keys() == truth.keys()
    if dtype != torch.float32:
        if name == "BertForMultipleChoice":  # its choices' gradients add up to 0, but for rounding
            for found in (got, baseline, truth):
                assert found.pop("d_classifier.bias").abs().max() < 1e-3
        return assert_as_good(got, baseline, truth, norm=2)
    for key, exact in truth.items():
        error, allowed = ((t[key].double() - exact).abs().max() for t in (got, baseline))
        largest = exact.abs().max().clamp(min=0.1)  # a key's bias has a gradient of 0
        assert error <= 2 * allowed + 1e-5 * largest, f"{key}: {error:.2e}"
    return None


@every_head
def test_heads(name, device):
    """Forward and backward, dropout 0.1 in training, a padded batch."""
    assert_right(name, torch.float32, device, layers=2 if name == "BertForPreTraining" else 1)


def test_float16(device):
    assert_right("BertForPreTraining", torch.float16, device)


@pytest.mark.long
@every_head
@op_cases.kernel_dtype
@pytest.mark.parametrize("padding", ["right", "left", "holes"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_head(name, dtype, padding, dropout, device):
    assert_right(name, dtype, device, dropout, padding)


# --- packed, padded, recomputed: the same bits ---------------------------------------------------


def with_positions(inputs):
    """Each token's number in its sequence, wherever the padding is."""
    mask = inputs["attention_mask"]
    return inputs | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def padded(rows, mask):
    """The same tokens where the mask has ones; at the padding numbers that nobody may read."""
    inputs = {"attention_mask": mask.long()}
    for key, value in rows.items():
        inputs[key] = torch.ones(B, L, dtype=torch.int64)
        inputs[key][mask] = value
    return inputs


def test_packed_is_padded(device):
    """Right, left and with holes, and packed by the caller: outputs and gradients to the bit."""
    model = build("BertModel", dropout=0.1, layers=1)
    first = with_positions(inputs_of("BertModel"))
    mask = mask_of("right")
    rows = {n: t[mask] for n, t in first.items() if n != "attention_mask"}
    packed = {n: t[None] for n, t in rows.items()}
    packed["cu_seq_lens_q"] = op_cases.borders(mask.sum(1).tolist())
    with on_kernels(device):
        expected = run(model, packed, device)
        for padding in ("right", "left", "holes"):
            assert_same_bits(run(model, padded(rows, mask_of(padding)), device), expected)
        # what the comparison is for shows: the sequences in another order
        with pytest.raises(AssertionError):
            assert_same_bits(run(model, {n: t.flip(0) for n, t in first.items()}, device), expected)


@pytest.mark.parametrize("use_reentrant", [False, *in_long(True)])
def test_checkpointing(use_reentrant, device):
    """A layer computed again in the backward draws the same masks."""
    inputs = inputs_of("BertForMaskedLM")
    with on_kernels(device):
        expected = run(build("BertForMaskedLM", 0.1, layers=1), inputs, device)
        model = build("BertForMaskedLM", 0.1, layers=1)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        assert_same_bits(run(model, inputs, device), expected)


def test_every_forward_draws_another_mask(device):
    """In training two forwards differ, and one is repeated by its seed; in evaluation none does."""
    model, inputs = build("BertModel", 0.1, layers=1).to(device), inputs_of("BertModel")
    inputs = {key: value.to(device) for key, value in inputs.items()}

    def forward(seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        with torch.no_grad():
            return model(**inputs).last_hidden_state

    with on_kernels(device):
        first, second = forward(1), forward()
        assert not torch.equal(first, second) and torch.equal(forward(1), first)
        model.eval()
        assert torch.equal(forward(), forward())


# --- on kernels alone ----------------------------------------------------------------------------


class Called(TorchDispatchMode):
    """Which operators of bert_fast are called."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "bert_fast":
            self.names[function._opname] += 1
        return function(*args, **kwargs or {})


def test_every_op_has_a_kernel():
    """But those that need none, as their constant says."""
    # csrc's where it is built with CUDA, else PyTorch's operators
    others = {"adamw_", "grad_norm", "lamb_", "unpad_work"}
    kernels = registry.kernels.keys() | others
    assert registry.implementations().keys() - kernels == WITHOUT_KERNEL
    on_cuda = {op: by_device["cuda"].name for op, by_device in registry.implementations().items()}
    assert {op for op in registry.kernels if on_cuda[op] == "cublas"} == CUBLAS
    assert not [op for op, f in registry.kernels.items() if f.__module__ == reference.__name__]


@in_interpreter
@pytest.mark.parametrize("name", [*MASKED_LM[:1], *in_long(*list(HEADS)[1:])])
def test_nothing_takes_the_eager_implementation(name, monkeypatch):
    """Each call of an op that has a kernel runs it, and the eager ones are gone meanwhile."""
    served, called = Counter(), Called()

    def counted(op, kernel, *args):
        served[op] += 1
        return kernel(*args)

    def gone(op, *args):
        raise AssertionError(f"{op}: the eager implementation ran")

    for op, kernel in registry.kernels.items():
        monkeypatch.setitem(registry.kernels, op, partial(counted, op, kernel))
        if op not in CUBLAS:
            monkeypatch.setattr(reference, op, partial(gone, op))
    with kernels_on_cpu(), called:
        run(build(name, dropout=0.1), inputs_of(name))
    assert called.names.keys() - served.keys() == WITHOUT_KERNEL
    # an implementation may call an op of its own accord: that is seen where it is served alone
    assert all(served[op] >= count for op, count in called.names.items() if op != "unpad")
    assert served.keys() >= STEPS
    assert ("linear_cross_entropy" in served) == (name in MASKED_LM)


def test_the_eager_implementation_shows():
    """The technique sees what it is for: an op that no kernel serves."""
    called = Called()
    with kernels_on_cpu(), called:
        bert_fast.ops.unpad(torch.ones(2, 3, dtype=torch.bool))
    assert called.names == {"unpad": 1}
