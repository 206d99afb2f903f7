"""Our models under torch's and accelerate's wrappers, and as whole pickled files."""

import io

import accelerate
import distributed_worker as worker
import pytest
import torch
import torch.nn.utils.prune
from accelerate.state import AcceleratorState
from against_transformers import batch, outside, pair
from head_cases import HEADS
from run_ranks import run_ranks

import bert_fast


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes on the CPU ended with, by scenario."""
    return run_ranks(worker.__file__, worker.RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("scenario", worker.SCENARIOS)
def test_data_parallel(ranks, scenario):
    """Two ranks end each step with the weights of one process that has both their batches.

    One rank has no label in one step: its gradients are zeros and not absent, or the other rank
    would wait for them. Without `find_unused_parameters` none may be unused.
    """
    one, two = (rank[scenario] for rank in ranks)
    assert not isinstance(one, str), one
    alone = worker.train(scenario, None)
    assert len(one) == len(two) == len(alone) == worker.STEPS
    for step in range(worker.STEPS):
        for name in alone[step]:
            assert torch.equal(one[step][name], two[step][name]), f"step {step}: {name}"
        assert outside(one[step], alone[step]) == {}


def test_comparison_sees_an_unsynchronised_rank(ranks):
    """Each rank alone would end elsewhere, by far more than the bound."""
    together = ranks[0]["sequence"][-1]
    model = worker.build("BertForSequenceClassification")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(worker.STEPS):
        optimizer.zero_grad()
        model(**worker.share("BertForSequenceClassification", step, 0)).loss.backward()
        optimizer.step()
    assert len(outside(dict(model.named_parameters()), together)) > 10


# --- accelerate ----------------------------------------------------------------------------------


@pytest.fixture
def _fresh():
    """accelerate keeps one state for a process, the Trainer's among them."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerator(precision, tmp_path):
    """Prepared, trained with accumulation, saved, and taken up again where it was."""
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
    )
    _, ours = pair("BertForMaskedLM", hidden_dropout_prob=0.1)
    inputs, labels, _ = HEADS["masked_lm"].inputs(ours.config)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(ours.train(), optimizer)

    def train(steps):
        for _ in range(steps):
            with accelerator.accumulate(model):
                out = model(**inputs, **labels)
                assert out.loss.dtype == torch.float32
                accelerator.backward(out.loss)
                optimizer.step()
                optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    before = train(2)
    accelerator.save_state(tmp_path)
    end = train(4)
    assert any(not torch.equal(p, q) for p, q in zip(before, end, strict=True))
    accelerator.load_state(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(train(4), end, strict=True))
    logits = model.eval()(**inputs).logits
    assert logits.dtype == torch.float32 and type(accelerator.unwrap_model(model)) is type(ours)


@pytest.mark.usefixtures("_fresh")
def test_model_saved_by_accelerate(tmp_path):
    """`save_model` writes a file that opens here, tied weights once."""
    _, ours = pair("BertForMaskedLM")
    accelerate.Accelerator(cpu=True).save_model(ours, tmp_path)
    ours.config.save_pretrained(tmp_path)
    back = bert_fast.BertForMaskedLM.from_pretrained(tmp_path, strict=True)
    inputs, _ = batch(ours.config)
    assert torch.equal(back(**inputs).logits, ours(**inputs).logits)
    assert back.get_output_embeddings().weight is back.get_input_embeddings().weight


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_offloading(name, where, tmp_path):
    """Weights that come to the device for their module alone: every module is really called."""
    _, ours = pair(name)
    inputs, _ = batch(ours.config)
    with torch.no_grad():
        expected = ours(**inputs)[0]
        if where == "memory":
            accelerate.cpu_offload(ours, execution_device=torch.device("cpu"))
        else:
            accelerate.disk_offload(ours, tmp_path, execution_device=torch.device("cpu"))
        assert {p.device.type for p in ours.parameters()} == {"meta"}
        torch.testing.assert_close(ours(**inputs)[0], expected, rtol=1e-5, atol=1e-5)


def test_empty_weights_and_dispatch(tmp_path):
    """Made without memory, filled from files by accelerate."""
    _, ours = pair("BertForSequenceClassification")
    ours.save_pretrained(tmp_path)
    with accelerate.init_empty_weights():
        empty = bert_fast.BertForSequenceClassification(ours.config)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    filled = accelerate.load_checkpoint_and_dispatch(empty, tmp_path, device_map={"": "cpu"})
    inputs, _ = batch(ours.config)
    torch.testing.assert_close(filled.eval()(**inputs).logits, ours(**inputs).logits)


# --- torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", HEADS)
def test_whole_model_in_a_file(key):
    """`torch.save(model)`: class, weights, ties, mode and configuration come back."""
    _, ours = HEADS[key].pair()
    inputs, labels, _ = HEADS[key].inputs(ours.config)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    back = torch.load(file, weights_only=False)
    assert type(back) is type(ours) and back.config == ours.config and not back.training
    assert back.num_parameters() == ours.num_parameters()
    expected, found = (model(**inputs, **labels).to_tuple() for model in (ours, back))
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_state_dict_in_a_file():
    """`torch.save(model.state_dict())` and back, as always strict."""
    _, ours = pair("BertForPreTraining")
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    fresh = bert_fast.BertForPreTraining(ours.config).eval()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    inputs, _ = batch(ours.config)
    assert torch.equal(fresh(**inputs)[0], ours(**inputs)[0])
    assert fresh.get_output_embeddings().weight is fresh.get_input_embeddings().weight


def test_averaged_model():
    _, ours = pair("BertForMaskedLM")
    inputs, _ = batch(ours.config)
    averaged = torch.optim.swa_utils.AveragedModel(ours)
    averaged.update_parameters(ours)
    assert torch.equal(averaged(**inputs).logits, ours(**inputs).logits)
    decoder = averaged.module.get_output_embeddings()
    assert decoder.weight is averaged.module.get_input_embeddings().weight


def test_weights_given_for_one_call():
    """`torch.func.functional_call` runs with the weights it is given."""
    _, ours = pair()
    _, other = pair(initializer_range=0.05)
    inputs, _ = batch(ours.config)
    found = torch.func.functional_call(ours, dict(other.named_parameters()), (), inputs)
    assert torch.equal(found.last_hidden_state, other(**inputs).last_hidden_state)
    assert not torch.equal(found.last_hidden_state, ours(**inputs).last_hidden_state)


@pytest.mark.parametrize("name", ["weight_norm", "orthogonal", "pruned"])
def test_parametrized_weights(name):
    """Weights that are made anew at each call are made anew here too."""
    theirs, ours = pair()
    inputs, real = batch(ours.config)
    for model in (theirs, ours):
        torch.manual_seed(4)
        query = model.get_submodule("encoder.layer.0.attention.self.query")
        if name == "pruned":
            torch.nn.utils.prune.random_unstructured(query, "weight", 0.5)
        else:
            getattr(torch.nn.utils.parametrizations, name)(query)
        with torch.no_grad():
            next(query.parameters()).mul_(1.5)
    expected, found = (model(**inputs).last_hidden_state[real] for model in (theirs, ours))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
