"""The pre-training cases: one whole step, dropout, both heads and the optimizer included.

    python benchmarks/pretraining.py --device cpu    the CPU's rows: small models in fp32
    python benchmarks/pretraining.py --device cuda   cases 8 to 10 of the targets

It is suite `pretraining` of run.py, whose options it takes.
"""

import sys
from collections.abc import Callable, Mapping

import checkout  # noqa: F401
import our_bert
import torch
import torch.nn.functional as F  # noqa: N812
import training_peers
import workload
from encoder import FP32, Parts, config_of, dtype_of, state_of
from gate import Candidate, Case, Outputs, Prepared, Work
from specs import PRETRAINING as SPECS
from torch import Tensor
from workload import PretrainingBatch

import bert_fast
from bert_fast import BertConfig, reference_model
from bert_fast.accuracy import short
from bert_fast.train import flops
from bert_fast.train.optim import LAMB, AdamW

_SEED = 4321
_MASKED = 0.15
_TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


# Whom the CPU's rows compare with; the others of the full list have no dropout there or no kernel.
CPU_PEERS = ("transformers eager", "transformers sdpa", "transformers sdpa compile default")


def step_flops(config: BertConfig, lengths: tuple[int, ...]) -> int:
    """Return the operations of one step: three times those of a forward, and of the MLM head's.

    The head counts on its masked rows only, wherever a candidate computes it.
    """
    tokens, squares = sum(lengths), sum(n * n for n in lengths)
    return round(flops.training_flops(config, tokens, squares, _MASKED * tokens))


def parts_of(name: str, device: torch.device, small: bool, full: bool) -> Parts:
    """Return the parts of a pre-training case; the arguments are those of `case`."""
    spec = SPECS[name]
    lengths = (spec.small if small else spec.lengths).orders(_SEED, 2)
    longest, dtype = max(lengths[0]), dtype_of(spec, device)
    config, state = config_of(spec.model, longest, small), state_of(spec.model, longest, small)
    inputs = [
        workload.pretraining_batch(config, n, device, _SEED + i, _MASKED)
        for i, n in enumerate(lengths)
    ]
    ours = Candidate("bert_fast", lambda: _ours(state, config, device, dtype, spec.optimizer))
    theirs = training_peers.pretraining_peers(state, config, device, dtype, full=full)
    return Parts(dtype, longest, config, state, inputs, [ours, *theirs])


def case(
    name: str, device: torch.device, *, small: bool = False, full: bool = False
) -> tuple[Case, list[Candidate]]:
    """Return a pre-training case and its candidates.

    Args:
        name: in SPECS.
        device: where it runs.
        small: the rehearsal's sizes.
        full: every peer and mode; else the short list.
    """
    parts, spec = parts_of(name, device, small, full), SPECS[name]
    dtype, config, state = parts.dtype, parts.config, parts.state
    lengths = parts.inputs[0].lengths  # the others have the same in another order
    slots = parts.inputs[0].input_ids.numel()
    baseline_name, baseline = training_peers.baseline_pretraining(state, config, device, dtype)
    return Case(
        name=name,
        device=device,
        dtype=short(dtype),
        inputs=parts.inputs,
        truth=_truth(state, config, device, torch.float64 if dtype == FP32 else FP32),
        baseline=baseline,
        baseline_name=baseline_name,
        work=Work(sum(lengths), slots, len(lengths), flops=step_flops(config, lengths)),
        facts={
            "model": spec.model,
            "seed": _SEED,
            "lengths": str(spec.small if small else spec.lengths),
            "longest": parts.longest,
            "small": small,
            "optimizer": spec.optimizer,
            "dropout": config.hidden_dropout_prob,
            "masked": _MASKED,
            "checked": "loss and gradients without dropout",
        },
    ), parts.candidates


def _truth(
    state: Mapping[str, Tensor], config: BertConfig, device: torch.device, dtype: torch.dtype
) -> Callable[[PretrainingBatch], Outputs]:
    """Return loss and gradients of the padded reference in fp32 or fp64, TF32 being off."""

    def truth(batch: PretrainingBatch) -> Outputs:
        params = {name: t.to(device, dtype, copy=True) for name, t in state.items()}
        for name, of in _TIED.items():
            params[name] = params[of]
        names = training_peers.gradient_names(config)
        wanted = [params[name].requires_grad_() for name in names]
        hidden = reference_model.encoder(
            params,
            config,
            batch.input_ids,
            batch.attention_mask,
            batch.token_type_ids,
            prefix="bert.",
        ).last_hidden_state
        masked = batch.labels != -100
        logits = reference_model.masked_lm_logits(params, config, hidden[masked])
        pooled = reference_model.pooled(params, hidden[:, 0], "bert.")
        follows = reference_model.next_sentence_logits(params, pooled)
        loss = F.cross_entropy(logits, batch.labels[masked])
        loss = loss + F.cross_entropy(follows, batch.next_sentence_label)
        grads = torch.autograd.grad(loss, wanted)
        return {"loss": loss.detach(), **dict(zip(names, grads, strict=True))}

    return truth


def _ours(
    state: Mapping[str, Tensor],
    config: BertConfig,
    device: torch.device,
    dtype: torch.dtype,
    optimizer: str,
) -> Prepared:
    """Return this project's model and optimizer; on a GPU AdamW is PyTorch's fused one."""
    model = bert_fast.BertForPreTraining(config)
    model.load_state_dict(state)
    model = model.to(device, torch.promote_types(dtype, FP32)).train()

    def loss_of(batch: PretrainingBatch) -> Tensor:
        with training_peers.precision(device, dtype):
            return model(
                batch.input_ids,
                batch.attention_mask,
                batch.token_type_ids,
                labels=batch.labels,
                next_sentence_label=batch.next_sentence_label,
            ).loss

    notes, made = our_bert.notes(model), None
    if device.type == "cpu" or optimizer == "lamb":
        of = {"adamw": AdamW, "lamb": LAMB}[optimizer]
        rates = training_peers.LEARNING_RATE, training_peers.WEIGHT_DECAY
        made = of(model.parameters(), lr=rates[0], weight_decay=rates[1])
        notes["optimizer"] = f"bert_fast.train.optim.{of.__name__}"
    return training_peers.prepared(
        model,
        loss_of,
        lambda name: model.get_parameter(name).grad.clone(),
        config,
        device,
        notes,
        made,
    )


if __name__ == "__main__":
    from run import main

    raise SystemExit(main(["pretraining", *sys.argv[1:]]))
