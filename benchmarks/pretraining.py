"""The pre-training cases: one whole step, dropout, both heads and the optimizer included.

    python benchmarks/pretraining.py --device cpu [ROW ...]    the CPU's rows: small models in fp32
    python benchmarks/pretraining.py --device cuda [CASE ...]  cases 8 and 10 of the targets

It starts the runs of `run.py`: `cpu` with these rows, and `case` for each case.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import checkout  # noqa: F401
import torch
import torch.nn.functional as F  # noqa: N812
import training_peers
import workload
from encoder import FP32, Parts, config_of, our_notes, state_of
from gate import Candidate, Case, Outputs, Prepared, Work
from torch import Tensor
from workload import PretrainingBatch

import bert_fast
from bert_fast import BertConfig, reference_model
from bert_fast.accuracy import short
from bert_fast.train import flops
from bert_fast.train.optim import AdamW

_SEED = 4321
_MASKED = 0.15
_TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


@dataclass(frozen=True)
class Spec:
    """What a case is made of: `n` full sequences of one length for a model.

    It is in bf16 autocast on a GPU, in fp32 on a CPU.
    """

    model: str
    n: int
    length: int


SPECS = {
    "case 8": Spec("large", 64, 128),
    "case 10 s128": Spec("base", 256, 128),
    "case 10 s512": Spec("base", 64, 512),
    "cpu mini 32x128": Spec("mini", 32, 128),
    "cpu small 32x128": Spec("small", 32, 128),
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
    spec = replace(spec, n=4, length=16) if small else spec
    dtype = torch.bfloat16 if device.type == "cuda" else FP32
    config = config_of(spec.model, spec.length, small)
    state = state_of(spec.model, spec.length, small)
    lengths = (spec.length,) * spec.n
    inputs = [
        workload.pretraining_batch(config, lengths, device, _SEED + i, _MASKED) for i in range(2)
    ]
    ours = Candidate("bert_fast", lambda: _ours(state, config, device, dtype))
    theirs = training_peers.pretraining_peers(state, config, device, dtype, full=full)
    return Parts(dtype, spec.length, config, state, inputs, [ours, *theirs])


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
    parts = parts_of(name, device, small, full)
    dtype, config, state = parts.dtype, parts.config, parts.state
    n, length = len(parts.inputs[0].lengths), parts.longest
    baseline_name, baseline = training_peers.baseline_pretraining(state, config, device, dtype)
    return Case(
        name=name,
        device=device,
        dtype=short(dtype),
        inputs=parts.inputs,
        truth=_truth(state, config, device, torch.float64 if dtype == FP32 else FP32),
        baseline=baseline,
        baseline_name=baseline_name,
        work=Work(n * length, n * length, n, flops=step_flops(config, (length,) * n)),
        facts={
            "model": SPECS[name].model,
            "seed": _SEED,
            "longest": length,
            "small": small,
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
    state: Mapping[str, Tensor], config: BertConfig, device: torch.device, dtype: torch.dtype
) -> Prepared:
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

    notes, optimizer = our_notes(model), None
    if device.type == "cpu":
        optimizer = AdamW(
            model.parameters(),
            lr=training_peers.LEARNING_RATE,
            weight_decay=training_peers.WEIGHT_DECAY,
        )
        notes["optimizer"] = "bert_fast.train.optim.AdamW"
    return training_peers.prepared(
        model,
        loss_of,
        lambda name: model.get_parameter(name).grad.clone(),
        config,
        device,
        notes,
        optimizer,
    )


def main(argv: list[str] | None = None) -> int:
    """Start the runs of these cases; return 1 if one of them found a wrong answer of ours."""
    from run import CPU_TRAINING
    from run import main as run

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--out", help="where the files go")
    parser.add_argument("what", nargs="*", metavar="ROW", help="rows, or numbers of cases")
    args = parser.parse_args(argv)
    out = [] if args.out is None else ["--out", args.out]
    if args.device == "cpu":
        return run(["cpu", *(args.what or CPU_TRAINING), *out])
    return max(run(["case", number, *out]) for number in args.what or ("8", "10"))


if __name__ == "__main__":
    raise SystemExit(main())
