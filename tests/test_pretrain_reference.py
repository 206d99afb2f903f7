"""A run beside transformers' BertForPreTraining with torch's optimizer on the same batches."""

from itertools import islice
from pathlib import Path

import pytest
import torch
import transformers
from training_cases import SIZES, corpus, folder, one_thread, padded, records, run, settings

from bert_fast.data.batches import Position, steps
from bert_fast.train.build import Texts, build_model
from bert_fast.train.settings import PretrainSettings

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# What is right is apart by at most 2e-6 after 50 steps; what `test_the_comparison_sees` plants, as
# a learning rate that is 0.1 % off, by more than the bound.
CLOSE, AFTER = 1e-4, 50
# Norms of the gradients are 1.2 to 2.5: some steps are clipped, some are not.
CHANGES = {
    "save__every": None,
    "optimizer__lr": 5e-3,
    "optimizer__max_grad_norm": 1.7,
    "optimizer__weight_decay": 0.1,
}


@pytest.fixture(scope="module")
def texts():
    with folder() as path:
        yield corpus(path / "corpus", documents=100)


def reference(given: PretrainSettings, optimize) -> list[float]:
    """The losses of transformers' model on the batches of a run.

    Args:
        given: the run's.
        optimize: makes an optimizer of groups of parameters.
    """
    texts = Texts(given)
    config = given.model.bert_config(texts.vocab_size)
    hf = transformers.BertConfig(**{k: v for k, v in config.to_dict().items() if k != "dtype"})
    hf._attn_implementation = "eager"
    model = transformers.BertForPreTraining(hf)
    model.load_state_dict(build_model(given, config, texts).state_dict())
    model.train()
    plain = {n for n, _ in model.named_parameters() if "bias" in n or "LayerNorm" in n}
    decayed = [p for n, p in model.named_parameters() if n not in plain]
    rest = [p for n, p in model.named_parameters() if n in plain]
    decay = given.optimizer.weight_decay
    optimizer = optimize([{"params": decayed, "weight_decay": decay}, {"params": rest}])
    made, losses = steps(texts.batches(given.phases[0]), Position(0, 0), given.micro_batches), []
    for number, step in enumerate(islice(made, given.steps)):
        batches = [padded(batch) for _, batch in step.batches]
        labels = sum(int((b["labels"] != -100).sum()) for b in batches)
        pairs = sum(len(b["labels"]) for b in batches)
        total = 0.0
        for batch in batches:
            out = model(**{k: v for k, v in batch.items() if "label" not in k})
            mlm = torch.nn.functional.cross_entropy(
                out.prediction_logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum"
            )
            nsp = torch.nn.functional.cross_entropy(
                out.seq_relationship_logits, batch["next_sentence_label"], reduction="sum"
            )
            loss = mlm / labels + nsp / pairs
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), given.optimizer.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate(number, given)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def rate(step: int, given: PretrainSettings) -> float:
    """The learning rate, written out: up to the highest, then down to 0 at the last step."""
    warmup, highest = given.optimizer.warmup * given.steps, given.optimizer.lr
    if step < warmup:
        return highest * (step + 1) / warmup
    return highest * (given.steps - 1 - step) / (given.steps - warmup)


def settings_of(texts: Path, output: Path, count: int, **changes) -> PretrainSettings:
    config = {**SIZES, "max_position_embeddings": 32, **NO_DROPOUT}
    phases = [{"steps": count, "max_length": 30, "tokens": 200}]
    given = {**CHANGES, "model__config": config, "phases": phases, **changes}
    return settings(texts, output, **given)


def trained(texts: Path, count: int, **changes) -> list[float]:
    """The losses of a run."""
    with folder() as output:
        assert run(settings_of(texts, output, count, **changes)) == 0
        return [record["loss"] for record in records(output)]


def compared(texts: Path, count: int, **changes) -> tuple[list[float], list[float]]:
    """The losses of a run, and the reference's."""
    given = settings_of(texts, Path("nowhere"), count, **changes)
    with one_thread():
        want = reference(given, OPTIMIZERS[given.optimizer.name])
    got = trained(texts, count, **changes)
    assert len(got) == len(want) == count and want[-1] < want[0]
    return got, want


def farthest(got: list[float], want: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(got, want, strict=True))


def adamw(groups):
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0)


class LAMB(torch.optim.Optimizer):
    """You et al. 2020, written out; layers without weight decay are not adapted."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                state = self.state[w]
                if not state:
                    state.update(t=0, m=torch.zeros_like(w), v=torch.zeros_like(w))
                state["t"] += 1
                state["m"] = 0.9 * state["m"] + 0.1 * w.grad
                state["v"] = 0.999 * state["v"] + 0.001 * w.grad**2
                m = state["m"] / (1 - 0.9 ** state["t"])
                v = state["v"] / (1 - 0.999 ** state["t"])
                u, trust = m / (v.sqrt() + 1e-6) + group["weight_decay"] * w, 1.0
                if group["weight_decay"] and w.norm() > 0 and u.norm() > 0:
                    trust = w.norm() / u.norm()
                w -= group["lr"] * trust * u


OPTIMIZERS = {"adamw": adamw, "lamb": LAMB}


@pytest.mark.parametrize(("name", "micro_batches"), [("adamw", 1), ("adamw", 3), ("lamb", 2)])
def test_the_same_losses(texts, name, micro_batches):
    got, want = compared(texts, AFTER, optimizer__name=name, micro_batches=micro_batches)
    assert farthest(got, want) <= CLOSE


@pytest.mark.long
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("seed", range(3))
def test_the_same_losses_of_300_steps(texts, name, seed):
    """To 1e-4 over the first 50; then rounding grows, and the mean of the last 100 agrees."""
    got, want = compared(texts, 300, optimizer__name=name, seed=seed, micro_batches=2)
    assert farthest(got[:AFTER], want[:AFTER]) <= CLOSE
    assert sum(want[-20:]) < sum(want[:20]) - 20 * 0.1
    assert abs(sum(got[-100:]) / sum(want[-100:]) - 1) < 0.005


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer__lr": 5e-3 * 1.001},
        {"optimizer__max_grad_norm": 1.72},
        {"optimizer__weight_decay": 0.09},
        {"optimizer__eps": 1e-5},
        {"optimizer__betas": [0.9, 0.998]},
        {"data__mlm_probability": 0.16},
    ],
    ids=lambda change: next(iter(change)).split("__")[1],
)
def test_the_comparison_sees(texts, change):
    assert farthest(trained(texts, AFTER), trained(texts, AFTER, **change)) > CLOSE
