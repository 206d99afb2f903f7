"""The loss of pre-training on packed batches: transformers' on padded ones, however divided."""

from itertools import pairwise

import pytest
import torch
import transformers
from against_transformers import outside, pair
from torch.nn.functional import cross_entropy
from training_cases import VOCABULARY, corpus, padded, settings

import bert_fast
from bert_fast.data.batches import Batches, Position, steps
from bert_fast.train.build import Texts
from bert_fast.train.distributed import Ranks
from bert_fast.train.objective import PreTrainingObjective
from bert_fast.train.step import evaluate


@pytest.fixture(scope="module")
def batches(tmp_path_factory) -> Batches:
    """Short pairs among them: no micro-batch is like another."""
    path = corpus(tmp_path_factory.mktemp("texts") / "corpus", documents=100)
    phases = [{"steps": 2, "max_length": 30, "tokens": 120}]
    given = settings(path, "nowhere", phases=phases, data__short_seq_prob=0.6)
    return Texts(given).batches(given.phases[0])


@pytest.fixture
def models() -> tuple[transformers.BertForPreTraining, bert_fast.BertForPreTraining]:
    """transformers' and ours of the same random weights, neither with dropout."""
    theirs, ours = pair("BertForPreTraining", vocab_size=len(VOCABULARY))
    return theirs.train(), ours.train()


def counts_of(*batches) -> torch.Tensor:
    names = "masked_labels", "next_sentence_label"
    return torch.tensor([sum(b[n].numel() for b in batches) for n in names]).float()


def unequal(batches: Batches, count: int) -> list:
    """Micro-batches of which no two have equally many masked tokens; nor have all as many pairs."""
    by_labels = {}
    for number in range(batches.count(0)):
        batch = batches[0, number]
        by_labels.setdefault(len(batch["masked_labels"]), batch)
    found = sorted(by_labels.values(), key=lambda batch: len(batch["next_sentence_label"]))
    found = [found[0], *found[len(found) - count + 1 :]]
    assert len(found) == count and counts_of(found[0])[1] < counts_of(found[-1])[1]
    return found


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def joined(batches) -> dict[str, torch.Tensor]:
    """Micro-batches as one padded batch."""
    each = [padded(batch) for batch in batches]
    length = max(one["labels"].shape[1] for one in each)
    for one in each:
        for name, value in one.items():
            if value.dim() == 2:
                extra = length - value.shape[1]
                fill = -100 if name == "labels" else 0
                one[name] = torch.nn.functional.pad(value, (0, extra), value=fill)
    return {name: torch.cat([one[name] for one in each]) for name in each[0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_transformers(batches, models, dtype):
    theirs, ours = (model.to(dtype) for model in models)
    for number in range(5):
        batch = batches[0, number]
        expected = theirs(**padded(batch)).loss
        loss, sums = PreTrainingObjective(ours)(batch, counts_of(batch))
        counts = counts_of(batch)
        assert loss.dtype == sums.mlm.dtype == dtype
        torch.testing.assert_close(sums.mlm / counts[0] + sums.nsp / counts[1], loss.detach())
        for model, value in ((theirs, expected), (ours, loss)):
            model.zero_grad()
            value.backward()
        assert outside({"loss": loss.detach()}, {"loss": expected.detach()}) == {}
        assert outside(gradients(ours), gradients(theirs)) == {}


@pytest.mark.parametrize("count", [2, 5])
def test_micro_batches_are_one_batch(batches, models, count):
    """Summed over micro-batches with unequal counts, loss and gradients are those of all pairs."""
    theirs, ours = models
    parts = unequal(batches, count)
    expected = theirs(**joined(parts)).loss
    expected.backward()
    objective, counts = PreTrainingObjective(ours), counts_of(*parts)
    total = torch.zeros(())
    for batch in parts:
        loss, _ = objective(batch, counts)
        loss.backward()
        total += loss.detach()
    assert outside({"loss": total}, {"loss": expected.detach()}) == {}
    assert outside(gradients(ours), gradients(theirs)) == {}


def test_a_mean_of_means_is_not(batches, models):
    """The classic mistake: each micro-batch divides by its own counts."""
    theirs, ours = models
    parts = unequal(batches, 3)
    expected = theirs(**joined(parts)).loss
    expected.backward()
    total = torch.zeros(())
    for batch in parts:
        loss, _ = PreTrainingObjective(ours)(batch, counts_of(batch) * len(parts))
        loss.backward()
        total += loss.detach()
    assert abs(total - expected.detach()) > 1e-3
    assert len(outside(gradients(ours), gradients(theirs))) > 20


def test_sums_and_what_is_right(batches, models):
    """Counted by hand from transformers' logits."""
    theirs, ours = models
    for number in range(4):
        batch = batches[0, number]
        inputs = padded(batch)
        out = theirs(**inputs)
        chosen = inputs["labels"] != -100
        logits, labels = out.prediction_logits[chosen], inputs["labels"][chosen]
        follows = batch["next_sentence_label"]
        # Some are made right: else at random weights hardly one is.
        batch["masked_labels"][::2] = logits.argmax(-1)[::2]
        labels = batch["masked_labels"]
        _, sums = PreTrainingObjective(ours)(batch, counts_of(batch), True)
        found = cross_entropy(logits, labels, reduction="sum")
        torch.testing.assert_close(sums.mlm, found.detach(), rtol=1e-5, atol=1e-5)
        found = cross_entropy(out.seq_relationship_logits, follows, reduction="sum")
        torch.testing.assert_close(sums.nsp, found.detach(), rtol=1e-5, atol=1e-5)
        assert sums.mlm_correct == (logits.argmax(-1) == labels).sum() >= len(labels) // 2
        assert sums.mlm_correct < len(labels)
        assert sums.nsp_correct == (out.seq_relationship_logits.argmax(-1) == follows).sum()
        assert not any(value.requires_grad for value in sums)


def test_counting_changes_nothing_else(batches, models):
    _, ours = models
    found = []
    for count_correct in (False, True):
        ours.zero_grad()
        loss, sums = PreTrainingObjective(ours)(
            batches[0, 0], counts_of(batches[0, 0]), count_correct
        )
        loss.backward()
        found.append([loss, sums.mlm, sums.nsp, sums.nsp_correct, *gradients(ours).values()])
        assert sums.mlm_correct.isnan() == (not count_correct)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("others", [False, True], ids=["alone", "beside another"])
def test_a_micro_batch_without_a_label(batches, models, others):
    """It adds what its pairs do, and gradients that are there: other processes wait for them."""
    _, ours = models
    empty = {**batches[0, 0]}
    for name in ("masked_positions", "masked_labels"):
        empty[name] = empty[name][:0]
    counts = counts_of(empty, batches[0, 1]) if others else counts_of(empty).clamp(min=1)
    loss, sums = PreTrainingObjective(ours)(empty, counts, True)
    loss.backward()
    assert sums.mlm == sums.mlm_correct == 0
    torch.testing.assert_close(loss.detach(), sums.nsp / counts[1])
    for name, gradient in gradients(ours).items():
        assert gradient is not None and gradient.isfinite().all(), name
        assert (gradient == 0).all() or not name.startswith("cls.predictions.transform"), name


def test_other_pairs_of_a_batch_do_not_matter(batches, models):
    """A pair's share of the loss does not depend on what is packed beside it."""
    _, ours = models
    objective, batch = PreTrainingObjective(ours.double().eval()), batches[0, 0]
    counts = counts_of(batch)
    borders, total = batch["cu_seq_lens_q"].tolist(), torch.zeros((), dtype=torch.float64)
    for i, (a, b) in enumerate(pairwise(borders)):
        inside = (batch["masked_positions"] >= a) & (batch["masked_positions"] < b)
        alone = {
            **{n: batch[n][:, a:b] for n in ("input_ids", "token_type_ids", "position_ids")},
            **{n: torch.tensor([0, b - a]).int() for n in ("cu_seq_lens_q", "cu_seq_lens_k")},
            **{n: b - a for n in ("max_length_q", "max_length_k")},
            "masked_positions": batch["masked_positions"][inside] - a,
            "masked_labels": batch["masked_labels"][inside],
            "next_sentence_label": batch["next_sentence_label"][i : i + 1],
        }
        total += objective(alone, counts)[0].detach()
    torch.testing.assert_close(objective(batch, counts)[0].detach(), total, rtol=1e-12, atol=1e-12)


def test_a_step_without_any_label(batches, models):
    """Divided by its counts, which are 1 at least."""
    _, ours = models
    empty = {**batches[0, 0]}
    for name in ("masked_positions", "masked_labels"):
        empty[name] = empty[name][:0]
    loss, _ = PreTrainingObjective(ours)(empty, counts_of(empty).clamp(min=1))
    loss.backward()
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients(ours).values())


def test_evaluation_is_the_mean_over_all(batches, models):
    """Of all labels and pairs, without dropout; the model trains on as before."""
    theirs, ours = models
    ours.config.hidden_dropout_prob = 0.5
    parts = unequal(batches, 4)
    inputs = joined(parts)
    out = theirs(**inputs)
    objective = PreTrainingObjective(ours).train()
    counted = [(parts[0], False), *((part, True) for part in parts), (parts[1], False)]
    found = evaluate(objective, counted, Ranks(0, 1, torch.device("cpu")))
    assert abs(found["mlm_loss"] + found["nsp_loss"] - out.loss.item()) < 1e-5
    chosen = inputs["labels"] != -100
    right = (out.prediction_logits.argmax(-1) == inputs["labels"])[chosen].sum().item()
    follow = (out.seq_relationship_logits.argmax(-1) == inputs["next_sentence_label"]).sum().item()
    labels, pairs = int(chosen.sum()), len(inputs["labels"])
    assert found["labels"] == labels and found["sequences"] == pairs
    assert found["mlm_accuracy"] == right / labels and found["nsp_accuracy"] == follow / pairs
    assert ours.training and all(p.grad is None for p in ours.parameters())


def test_batches_of_a_step_are_those_of_the_settings(batches):
    """What the tests above compare is what a run trains on."""
    made = next(steps(batches, Position(0, 0), 3))
    for number, batch in made.batches:
        assert torch.equal(batch["input_ids"], batches[0, number]["input_ids"])
