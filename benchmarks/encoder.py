"""The encoder cases: one forward of a batch, or many texts to embeddings.

    python benchmarks/encoder.py --device cpu    the CPU's table, and how time grows with length
    python benchmarks/encoder.py --device cuda   cases 1 to 7 of the targets, and the same

It is suite `encoder` of run.py, whose options it takes.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import checkout  # noqa: F401
import our_bert
import peers
import text_in
import torch
import workload
from gate import Candidate, Case, Outputs, Prepared, Work
from specs import ENCODER as SPECS
from specs import Spec
from torch import Tensor
from workload import Batch, Texts

from bert_fast import BertConfig, reference_model
from bert_fast.accuracy import short
from bert_fast.train import flops

_SEED = 1234
_SMALL = {  # a rehearsal's model
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "vocab_size": workload.SMALL_VOCAB,
}
FP32, BF16 = torch.float32, torch.bfloat16

# Norm of a bf16 forward's error over the truth's, for one step of rounding: embeddings and layers
# add like random steps. transformers' bf16 on a CPU has 0.014 for 12 layers (torch 2.13), of 0.017.
_LIMIT_OF_A_STEP = 1.2 * 2.0**-8

# Whom the CPU's table compares with. Of the full list it leaves out what has no kernel there, and
# the forms of transformers that were at most 2 % faster than the faster of these two in any row:
# eager attention, compiled or not, and SDPA with its kernel forced (results, commit 17f7837).
CPU_PEERS = (
    "transformers sdpa",
    "transformers sdpa compile default",
    "onnxruntime plain",
    "onnxruntime",
    "nn.TransformerEncoder",
    "sentence-transformers",
)
# Whom the cases that show a trend compare with: of each kind the one that needs no compiling.
FEW_PEERS = (
    "transformers sdpa",
    "onnxruntime plain",
    "nn.TransformerEncoder",
    "varlen_attn",
    "sentence-transformers",
)


def config_of(model: str, longest: int, small: bool, **fields: Any) -> BertConfig:
    """Return the model's configuration; positions for sequences of that length."""
    positions = max(512, longest)
    if small:
        fields |= _SMALL
    return BertConfig.named(model, max_position_embeddings=positions, **fields)


def forward_flops(config: BertConfig, lengths: tuple[int, ...]) -> int:
    """Return the operations of one forward on real tokens: products and attention."""
    return flops.forward_flops(config, sum(lengths), sum(n * n for n in lengths))


@cache
def state_of(model: str, longest: int, small: bool) -> dict[str, Tensor]:
    """Return the weights all candidates share."""
    return workload.weights(config_of(model, longest, small))


@dataclass(frozen=True)
class Parts:
    """A case without the answers that it is checked by; its inputs are batches, or texts."""

    dtype: torch.dtype
    longest: int
    config: BertConfig
    state: dict[str, Tensor]
    inputs: list[Any]
    candidates: list[Candidate]


def dtype_of(spec: Spec, device: torch.device) -> torch.dtype:
    """Return what a case computes in: bf16 on a GPU, on a CPU only where it asks for that."""
    return BF16 if device.type == "cuda" or spec.dtype == "bf16" else FP32


def parts_of(name: str, device: torch.device, small: bool, full: bool) -> Parts:
    """Return the parts of an encoder case; the arguments are those of `case`."""
    spec = SPECS[name]
    lengths = (spec.small if small else spec.lengths).orders(_SEED, 2)
    longest = max(lengths[0])
    config, state = config_of(spec.model, longest, small), state_of(spec.model, longest, small)
    dtype = dtype_of(spec, device)
    what = state, config, device, dtype
    if spec.kind == "texts":
        inputs = [text_in.texts(n, _SEED + i) for i, n in enumerate(lengths)]
        ours = partial(text_in.ours, *what)
        other = partial(text_in.sentence_transformer, *what)
        theirs = [Candidate("sentence-transformers", other)]
    elif spec.kind == "ids":
        pin = device.type == "cuda"
        vocab = config.vocab_size
        inputs = [workload.texts(vocab, n, _SEED + i, pin) for i, n in enumerate(lengths)]
        ours, theirs = partial(_our_texts, *what), peers.text_peers(*what, full=full)
    else:
        inputs = [workload.batch(config, n, device, _SEED + i) for i, n in enumerate(lengths)]
        ours, theirs = partial(our_encoder, *what), peers.encoder_peers(*what, full=full)
    return Parts(dtype, longest, config, state, inputs, [Candidate("bert_fast", ours), *theirs])


def case(
    name: str, device: torch.device, *, small: bool = False, full: bool = False
) -> tuple[Case, list[Candidate]]:
    """Return an encoder case and its candidates.

    Args:
        name: in SPECS.
        device: where it runs.
        small: the rehearsal's sizes.
        full: every peer and mode; else the short list.
    """
    parts, spec = parts_of(name, device, small, full), SPECS[name]
    dtype, config, state = parts.dtype, parts.config, parts.state
    lengths = parts.inputs[0].lengths  # the others have the same in another order
    # batching texts is the candidate's own business: nothing is padded yet
    slots = parts.inputs[0].input_ids.numel() if spec.kind == "batch" else 0
    baseline_name, baseline = peers.baseline_encoder(state, config, device, dtype)
    exact = torch.float64 if device.type == "cpu" else FP32
    limit = {}
    if device.type == "cpu" and dtype == BF16:
        limit["limit"] = _LIMIT_OF_A_STEP * (config.num_hidden_layers + 1) ** 0.5
    facts = {
        "model": spec.model,
        "seed": _SEED,
        "lengths": str(spec.small if small else spec.lengths),
        "input": spec.kind,
        "longest": parts.longest,
        "small": small,
    }
    return Case(
        name=name,
        device=device,
        dtype=short(dtype),
        inputs=parts.inputs,
        truth=_on_sample(truth_of(state, config, device, exact), device),
        baseline=_on_sample(baseline, device),
        baseline_name=baseline_name,
        work=Work(sum(lengths), slots, len(lengths), flops=forward_flops(config, lengths)),
        facts=facts | limit,
        **limit,
    ), parts.candidates


# --- the truth -----------------------------------------------------------------------------------


def truth_of(
    state: dict[str, Tensor], config: BertConfig, device: torch.device, dtype: torch.dtype
) -> Callable[[Batch], Outputs]:
    """Return the hidden states of the padded reference in fp32 or fp64, TF32 being off."""
    params = {n: t.to(device, dtype) for n, t in state.items() if n.startswith("bert.")}

    def truth(batch: Batch) -> Outputs:
        with torch.inference_mode():
            out = reference_model.encoder(
                params, config, batch.input_ids, batch.attention_mask, prefix="bert."
            )
        return {"hidden": batch.real(out.last_hidden_state)}

    return truth


def _on_sample(
    answer: Callable[[Batch], Outputs], device: torch.device
) -> Callable[[Batch | Texts], Outputs]:
    """Return the same for texts: the first token's row of those in the sample, one at a time."""

    def answers(inputs: Batch | Texts) -> Outputs:
        if isinstance(inputs, Batch):
            return answer(inputs)
        rows = []
        parts = inputs.ids.split(list(inputs.lengths))
        for i in inputs.sample:
            batch = Batch(parts[i][None].to(device), None, (inputs.lengths[i],))
            rows.append(answer(batch)["hidden"][0])
        return {"embedding": torch.stack(rows)}

    return answers


# --- this project --------------------------------------------------------------------------------


def our_encoder(
    state: dict[str, Tensor], config: BertConfig, device: torch.device, dtype: torch.dtype
) -> Prepared:
    """Return this project's encoder for padded batches."""
    model = our_bert.encoder(state, config, device, dtype)
    notes = our_bert.notes(model)

    def run(batch: Batch) -> Tensor:
        with torch.inference_mode():
            return model(batch.input_ids, batch.attention_mask).last_hidden_state

    return Prepared(run, lambda batch: {"hidden": batch.real(run(batch))}, notes=notes)


def _our_texts(
    state: dict[str, Tensor],
    config: BertConfig,
    device: torch.device,
    dtype: torch.dtype,
    budget: int = 32768,
) -> Prepared:
    """Texts in their own order, packed up to `budget` tokens; lengths never leave the host."""
    model = our_bert.encoder(state, config, device, dtype)
    notes = our_bert.notes(model)

    def run(texts: Texts) -> Tensor:
        out = []
        first = 0
        with torch.inference_mode():
            for lengths in peers.budgeted(texts.lengths, budget):
                borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
                total = sum(lengths)
                ids = texts.ids[first : first + total].to(device, non_blocking=True)
                if device.type == "cuda":
                    borders = borders.pin_memory().to(device, non_blocking=True)
                hidden = model(
                    ids[None], cu_seq_lens_q=borders, max_length_q=max(lengths)
                ).last_hidden_state[0]
                out.append(hidden[borders[:-1]])
                first += total
        rows = torch.cat(out)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return rows

    return Prepared(
        run,
        lambda texts: {"embedding": run(texts)[list(texts.sample)]},
        notes=notes | {"token_budget": budget, "fill": 1.0},
    )


if __name__ == "__main__":
    from run import main

    raise SystemExit(main(["encoder", *sys.argv[1:]]))
