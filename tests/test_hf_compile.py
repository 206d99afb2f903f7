"""torch.compile takes accelerated models, and what it makes runs packed."""

import pytest
import torch
import torch._dynamo
from against_transformers import largest, outside
from functorch.compile import make_boxed_func
from hf_cases import V5, at_real_tokens, form, labels, measured, plain
from torch._dynamo.backends.common import aot_autograd

import bert_fast

NAMES = (
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "RobertaForTokenClassification",
    "DistilBertForQuestionAnswering",
    "ElectraModel",
)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def recording(ops):
    """A backend that keeps the names of each forward graph's ops."""

    def forward(graph, inputs):
        ops.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    def backward(graph, inputs):
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=forward, bw_compiler=backward, inference_compiler=forward)


def fast_ops(graphs):
    """How many attentions of ours there are in all graphs."""
    return sum(op == "bert_fast.attention.default" for graph in graphs for op in graph)


@pytest.mark.parametrize(
    ("name", "padding"), [*((name, "right") for name in NAMES), (NAMES[0], "none")]
)
def test_one_graph(name, padding):
    """Outputs and gradients are those of the original; there is one graph."""
    model = plain(name, num_hidden_layers=1)
    inputs, real = form(name, model, padding=padding)
    if padding == "none" or "Question" not in name:
        inputs |= labels(name, model, real)
    expected = measured(model, inputs, real)
    bert_fast.accelerate(model, strict=True)
    graphs = []
    model.compile(fullgraph=True, backend=recording(graphs))
    found = measured(model, inputs, real)
    assert len(graphs) == 1 and fast_ops(graphs) == 1
    assert [*found] == [*expected] and outside(found, expected) == {}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__)
def test_without_gradients(context):
    model = plain("BertForMaskedLM", num_hidden_layers=1)
    inputs, real = form("BertForMaskedLM", model)
    graphs = []
    with context():
        expected = at_real_tokens(model(**inputs), real)
        bert_fast.accelerate(model, strict=True)
        call = torch.compile(model, fullgraph=True, backend=recording(graphs))
        out = call(**inputs)
        assert outside(at_real_tokens(out, real), expected) == {}
    assert fast_ops(graphs) == 1
    padded = out.logits[~real]  # of rows of zeros
    assert largest(padded) > 0 and largest(padded - padded[:1]) < 1e-5


def test_outputs_asked_for():
    model = plain("BertModel", num_hidden_layers=1)
    inputs, real = form("BertModel", model)
    inputs["output_hidden_states"] = True
    expected = measured(model, inputs, real)
    bert_fast.accelerate(model, strict=True)
    graphs = []
    model.compile(backend=recording(graphs))
    assert outside(measured(model, inputs, real), expected) == {} and fast_ops(graphs) == 1


def test_dynamic_shapes():
    """Batches of other sizes do not compile again."""
    model = plain("BertForMaskedLM", num_hidden_layers=1)
    batches = [
        form("BertForMaskedLM", model, B=B, L=L) for B, L in ((3, 7), (4, 9), (5, 12), (2, 15))
    ]
    expected = [measured(model, *one) for one in batches]
    bert_fast.accelerate(model, strict=True)
    graphs = []
    model.compile(fullgraph=True, dynamic=True, backend=recording(graphs))
    for one, want in zip(batches, expected, strict=True):
        assert outside(measured(model, *one), want) == {}
    assert len(graphs) == 1 and fast_ops(graphs) == 1


def test_accelerated_and_restored_while_compiled():
    """The compiled model follows."""
    model = plain("BertModel", num_hidden_layers=1)
    inputs, real = form("BertModel", model)
    graphs = []
    model.compile(backend=recording(graphs))
    counts = []
    expected = measured(model, inputs, real)
    for change in (bert_fast.accelerate, bert_fast.restore):
        change(model)
        assert outside(measured(model, inputs, real), expected) == {}
        counts.append(fast_ops(graphs))
        del graphs[:]
    assert counts == [1, 0]


def test_refused():
    """What cannot be accelerated is compiled as it is."""
    model = plain("BertModel", num_hidden_layers=1)
    inputs, _ = form("BertModel", model, padding="none")
    mask = torch.ones(4, 11, 11).tril().long()
    inputs["attention_mask"] = mask[:, None].bool() if V5 else mask
    expected = model(**inputs).last_hidden_state
    bert_fast.accelerate(model)
    graphs = []
    model.compile(backend=recording(graphs))
    torch.testing.assert_close(model(**inputs).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    assert graphs and fast_ops(graphs) == 0


def test_accelerated_while_compiled_beside_another():
    """As above, where a model of the class is accelerated already."""
    other = bert_fast.accelerate(plain("BertModel", num_hidden_layers=1))
    model = plain("BertModel", num_hidden_layers=1)
    inputs, _ = form("BertModel", model)
    graphs, counts = [], []
    model.compile(backend=recording(graphs))
    for change in (lambda model: model, bert_fast.accelerate, bert_fast.restore):
        change(model)(**inputs)
        counts.append(fast_ops(graphs))
        del graphs[:]
    assert counts[:2] == [0, 1]
    assert bert_fast.restore(other) is other


@pytest.mark.filterwarnings("error:.*lru_cache")
def test_compiling_is_silent():
    model = bert_fast.accelerate(plain("BertModel", num_hidden_layers=1), strict=True)
    inputs, _ = form("BertModel", model)
    model.compile(backend="aot_eager", fullgraph=True)
    model(**inputs)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_dropout(training):
    """Another mask at each call of one graph; none in evaluation."""
    rates = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    model = plain("BertModel", num_hidden_layers=1, **rates).train(training)
    inputs, _ = form("BertModel", model)
    bert_fast.accelerate(model, strict=True)
    graphs = []
    model.compile(backend=recording(graphs), fullgraph=True)
    one, two = (model(**inputs).last_hidden_state for _ in range(2))
    assert torch.equal(one, two) != training
    assert len(graphs) == 1 and fast_ops(graphs) == 1


@pytest.mark.long
@pytest.mark.parametrize("padding", ["right", "none"])
def test_inductor(padding):
    """The default backend, where a C++ compiler works."""
    model = plain("BertForMaskedLM", num_hidden_layers=1)
    inputs, real = form("BertForMaskedLM", model, padding=padding)
    inputs |= labels("BertForMaskedLM", model, real)
    expected = measured(model, inputs, real)
    bert_fast.accelerate(model, strict=True)
    model.compile(fullgraph=True)
    try:
        found = measured(model, inputs, real)
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"no C++ compiler: {error}"[:200])
    assert outside(found, expected) == {} and largest(found["logits"]) > 0


@pytest.mark.parametrize(
    "name", ["BertForSequenceClassification", "DistilBertForTokenClassification"]
)
def test_rows_that_begin_with_padding(name):
    """Nobody can look, and what reads their column 0 is not wrong in silence."""
    model = plain(name, num_hidden_layers=1)
    inputs, real = form(name, model, padding="left")
    expected = model(**inputs).logits
    bert_fast.accelerate(model)
    model.compile(backend="aot_eager")
    found = model(**inputs).logits
    begins = ~real[:, 0]
    assert begins.any() and not begins.all()
    if found.ndim == 3:
        assert found[begins, 0].isnan().all()
        found, expected = found[real], expected[real]
    else:
        assert found[begins].isnan().all()
        found, expected = found[~begins], expected[~begins]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
