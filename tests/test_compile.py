"""torch.compile takes a whole model in one graph, which computes what eager does."""

import copy
import dataclasses
import random

import pytest
import torch
import torch._dynamo
from against_transformers import batch, flatten, gradients, largest, outside, pair, projection
from head_cases import HEADS, some, with_head
from torch._dynamo.testing import CompileCounterWithBackend

import bert_fast


@pytest.fixture(autouse=True)
def _fresh():
    """Nothing compiled before decides what is compiled in a test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def shallow(head):
    """The head on one layer: tracing costs time by the layer."""
    return dataclasses.replace(head, fields=head.fields | {"num_hidden_layers": 1}).pair()[1]


def compiled(model, backend="aot_eager", **options):
    return torch.compile(model, fullgraph=True, backend=backend, **options)


def step(call, model, inputs, seed=3):
    """Outputs and gradients of one training step, or of a projection of outputs without a loss."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    out = call(**inputs)
    found = {name: value.detach() for name, value in flatten(out).items()}
    loss = out.loss if "loss" in out else projection(flatten(out).values())
    loss.backward()
    return found | gradients(dict(model.named_parameters()))


def check_bits(call, model, inputs):
    expected, found = step(model, model, inputs), step(call, model, inputs)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{name}: {largest(found[name] - value):.2e}"


@pytest.mark.parametrize("padding", ["right", "none"])
@some("masked_lm", "one_class", "questions")
def test_training_step(head, padding):
    """Loss, logits and all gradients are eager's to the bit."""
    ours = shallow(head) if padding == "none" else head.pair()[1]
    inputs, labels, _ = head.inputs(ours.config, padding=padding)
    check_bits(compiled(ours.train()), ours, inputs | labels)


@pytest.mark.long
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("padding", ["none", "holes"])
@with_head
def test_every_head(head, padding, labelled, training):
    ours = shallow(head)
    inputs, labels, _ = head.inputs(ours.config, padding=padding)
    check_bits(compiled(ours.train(training)), ours, inputs | labels if labelled else inputs)


@some("masked_lm")
def test_evaluation(head):
    """Without gradients, with full logits; a tuple stays a tuple."""
    ours = shallow(head)
    inputs, _, _ = head.inputs(ours.config)
    call = compiled(ours)
    with torch.no_grad():
        out, expected = call(**inputs), ours(**inputs)
        assert type(out) is type(expected) and torch.equal(out.logits, expected.logits)
        (logits,) = call(**inputs, return_dict=False)
        assert torch.equal(logits, expected.logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout(checkpointing):
    """The same masks as eager under the same seed, new ones each step, and no recompilation."""
    rates = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    _, ours = pair("BertForMaskedLM", num_hidden_layers=1, **rates)
    if checkpointing:
        ours.gradient_checkpointing_enable()
    inputs, labels, _ = HEADS["masked_lm"].inputs(ours.config)
    counter = CompileCounterWithBackend("aot_eager")
    call = compiled(ours.train(), counter)
    check_bits(call, ours, inputs | labels)
    frames = counter.frame_count
    losses = {call(**inputs, **labels).loss.item() for _ in range(4)}
    assert len(losses) == 4 and counter.frame_count == frames


def test_autocast():
    ours = shallow(HEADS["masked_lm"])
    inputs, labels, _ = HEADS["masked_lm"].inputs(ours.config)
    call = compiled(ours.train())
    with torch.autocast("cpu", torch.bfloat16):
        check_bits(call, ours, inputs | labels)


def test_hidden_states_and_attentions():
    _, ours = pair()
    inputs, _ = batch(ours.config)
    inputs |= {"output_hidden_states": True, "output_attentions": True}
    check_bits(compiled(ours), ours, inputs)


def check_shapes(key, count, training):
    """Random shapes: eager's bits, and few graphs."""
    head = HEADS[key]
    ours = shallow(head).train(training)
    counter = CompileCounterWithBackend("aot_eager")
    call = compiled(ours, counter, dynamic=True)
    chance = random.Random(0)
    for _ in range(count):
        B, L = chance.randint(2, 6), chance.randint(2, 40)
        inputs, labels, _ = head.inputs(ours.config, B=B, L=L)
        if training:
            check_bits(call, ours, inputs | labels)
        else:
            with torch.no_grad():
                assert torch.equal(call(**inputs).logits, ours(**inputs).logits)
    assert counter.frame_count <= 4


def test_random_shapes():
    check_shapes("one_class", 20, training=False)


@pytest.mark.long
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("key", ["masked_lm", "one_class", "tokens"])
def test_many_random_shapes(key, training):
    check_shapes(key, 60, training)


def test_arguments_that_come_later():
    """Other shapes, then an argument that was not given at first."""
    _, ours = pair(num_hidden_layers=1)
    call = compiled(ours)
    for B, L, types in ((1, 12, False), (3, 11, False), (3, 11, True), (2, 9, True), (1, 5, True)):
        ids = torch.randint(0, 101, (B, L))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if types:
            inputs["token_type_ids"] = ids % 2
            inputs["position_ids"] = ids[:1] % 40
        expected = ours(**inputs).last_hidden_state
        assert torch.equal(call(**inputs).last_hidden_state, expected)


@pytest.mark.parametrize("given", ["borders", "length", "keys", "all"])
def test_packed(given):
    """Packed by the caller: with as much as the caller knows of the borders."""
    _, ours = pair()
    borders = torch.tensor([0, 5, 12], dtype=torch.int32)
    inputs = {"input_ids": torch.randint(0, 101, (1, 12)), "cu_seq_lens_q": borders}
    if given in ("length", "all"):
        inputs["max_length_q"] = 7
    if given in ("keys", "all"):
        inputs["cu_seq_lens_k"] = borders.clone()
    if given == "all":
        inputs["max_length_k"] = 7
        inputs["position_ids"] = torch.cat([torch.arange(5), torch.arange(7)])[None]
    check_bits(compiled(ours), ours, inputs)


def test_in_place():
    """`model.compile()` keeps the names of the parameters."""
    ours = shallow(HEADS["masked_lm"])
    inputs, _ = batch(ours.config)
    expected, names = ours(**inputs).logits, [name for name, _ in ours.named_parameters()]
    ours.compile(fullgraph=True, backend="aot_eager")
    assert torch.equal(ours(**inputs).logits, expected)
    assert [name for name, _ in ours.named_parameters()] == names


def test_changed_weights_are_used():
    """Weights are inputs of the graph, not part of it."""
    _, ours = pair()
    inputs, _ = batch(ours.config)
    call = compiled(ours)
    with torch.no_grad():
        before = call(**inputs).last_hidden_state
        for parameter in ours.parameters():
            parameter.mul_(1.1)
        after = call(**inputs).last_hidden_state
        assert torch.equal(after, ours(**inputs).last_hidden_state)
    assert not torch.equal(before, after)


def test_optimizer_steps():
    """Five steps of AdamW through the compiled model end with eager's weights."""
    ours = shallow(HEADS["masked_lm"])
    inputs, labels, _ = HEADS["masked_lm"].inputs(ours.config)
    ends = []
    for wrap in (lambda model: model, compiled):
        model = copy.deepcopy(ours).train()
        call, optimizer = wrap(model), torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            call(**inputs, **labels).loss.backward()
            optimizer.step()
        ends.append(dict(model.named_parameters()))
    for name, parameter in ends[0].items():
        assert torch.equal(parameter, ends[1][name]), name


def test_inductor():
    """Generated code for the CPU: eager's numbers but for rounding."""
    ours = shallow(HEADS["masked_lm"])
    inputs, labels, _ = HEADS["masked_lm"].inputs(ours.config)
    inputs |= labels
    expected = step(ours.train(), ours, inputs)
    found = step(compiled(ours, "inductor"), ours, inputs)
    assert outside(found, expected) == {}


@pytest.mark.long
@some("pretraining", "one_class", "multi_label", "tokens", "questions", "choices")
def test_inductor_for_every_head(head):
    ours = shallow(head)
    inputs, labels, _ = head.inputs(ours.config)
    expected = step(ours.train(), ours, inputs | labels)
    assert outside(step(compiled(ours, "inductor"), ours, inputs | labels), expected) == {}


def test_refusals_reach_the_caller():
    """What eager refuses by shape, the compiled model refuses by the same words."""
    ours = bert_fast.BertModel(pair()[1].config).eval()
    for inputs, words in (
        ({"input_ids": torch.zeros(1, 41, dtype=torch.int64)}, "max_position_embeddings"),
        ({"input_ids": torch.zeros(2, 5, dtype=torch.int64), "unknown": 1}, "unknown"),
    ):
        with pytest.raises(Exception, match=words):
            compiled(ours)(**inputs)
