"""The encoder cases: one forward of a batch, or many texts to embeddings.

    python benchmarks/encoder.py --device cpu [ROW ...]    the CPU's table, or rows such as 1x128
    python benchmarks/encoder.py --device cuda [CASE ...]  cases 1 to 7 of the targets, or some

It starts the runs of `run.py`: `cpu`, and `case` for each case.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import checkout  # noqa: F401
import peers
import torch
import workload
from gate import Candidate, Case, Outputs, Prepared, Work
from torch import Tensor
from workload import Batch, Texts

import bert_fast
from bert_fast import BertConfig, reference_model
from bert_fast.accuracy import short
from bert_fast.extension import load as load_extension
from bert_fast.ops.products import cpu_library, cpu_library_times
from bert_fast.train import flops

_SEED = 1234
_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Spec:
    """What a case is made of.

    Attributes:
        model: "base" or "large".
        lengths: of the sequences, from a seed.
        small: the same for a rehearsal, in which the model is small too.
        dtype: of weights and arithmetic.
        on_cpu: the same on a CPU, where 16 bits are for those rows alone that ask for them.
        texts: they are texts in host memory, to be batched as the candidate likes.
    """

    model: str
    lengths: Callable[[int], list[int]]
    small: Callable[[int], list[int]]
    dtype: torch.dtype = torch.bfloat16
    on_cpu: torch.dtype = torch.float32
    texts: bool = False


def _full(n: int, length: int) -> Callable[[int], list[int]]:
    return lambda seed: [length] * n


def _normal(n: int, mean: float, spread: float, low: int, high: int) -> Callable[[int], list[int]]:
    return lambda seed: workload.normal_lengths(n, mean, spread, low, high, seed)


def _share(n: int, high: int, fill: float) -> Callable[[int], list[int]]:
    """Lengths from 2 to high whose mean is `fill` of high, one of them high."""

    def lengths(seed: int) -> list[int]:
        drawn = workload.normal_lengths(n - 1, fill * high, fill * high / 2, 2, high, seed)
        missing = round(fill * high * n) - high - sum(drawn)
        i = 0
        while missing:  # one token at a time, so that the fill is the same for every seed
            step = 1 if missing > 0 else -1
            if 2 <= drawn[i % (n - 1)] + step <= high:
                drawn[i % (n - 1)] += step
                missing -= step
            i += 1
        return [high, *drawn]

    return lengths


FP32, BF16 = torch.float32, torch.bfloat16
SPECS = {
    "case 1": Spec("base", _full(1, 128), _full(1, 16)),
    "case 2 s128": Spec("large", _full(1, 128), _full(1, 16)),
    "case 2 s384": Spec("large", _full(1, 384), _full(1, 24)),
    "case 3": Spec("base", _full(128, 128), _full(4, 16)),
    "case 4": Spec("large", _full(128, 384), _full(4, 24)),
    "case 5": Spec("base", _normal(8192, 256, 64, 16, 512), _normal(24, 16, 6, 2, 32), texts=True),
    "case 6": Spec("large", _normal(4096, 177, 50, 40, 384), _normal(24, 12, 5, 2, 24), texts=True),
    "case 7 s64": Spec("base", _share(16, 64, 0.6), _share(4, 16, 0.6)),
    "case 7": Spec("base", _share(16, 512, 0.6), _share(4, 32, 0.6)),
    "case 7 s1024": Spec("base", _share(16, 1024, 0.6), _share(4, 32, 0.6)),
    "cpu 1x128": Spec("base", _full(1, 128), _full(1, 16)),
    "cpu 8x128": Spec("base", _full(8, 128), _full(2, 16)),
    "cpu 2x512": Spec("base", _full(2, 512), _full(2, 32)),
    "cpu 16x128 33%": Spec("base", _share(16, 128, 0.33), _share(4, 32, 0.4)),
    "cpu 8x512 46%": Spec("base", _share(8, 512, 0.46), _share(4, 32, 0.5)),
    "cpu 8x128 bf16": Spec("base", _full(8, 128), _full(2, 16), on_cpu=BF16),
    "cpu 16x128 33% bf16": Spec("base", _share(16, 128, 0.33), _share(4, 32, 0.4), on_cpu=BF16),
}


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
)


def config_of(model: str, longest: int, small: bool, **fields: Any) -> BertConfig:
    """Return the model's configuration; positions for sequences of that length."""
    positions = max(512, longest)
    if small:
        fields |= _SMALL | {"intermediate_size": 128, "vocab_size": 500}
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


def parts_of(name: str, device: torch.device, small: bool, full: bool) -> Parts:
    """Return the parts of an encoder case; the arguments are those of `case`."""
    spec = SPECS[name]
    draw = spec.small if small else spec.lengths
    lengths = [draw(_SEED + i) for i in range(2)]
    longest = max(map(max, lengths))
    config, state = config_of(spec.model, longest, small), state_of(spec.model, longest, small)
    dtype = spec.dtype if device.type == "cuda" else spec.on_cpu
    what = state, config, device, dtype
    if spec.texts:
        pin = device.type == "cuda"
        inputs = [workload.texts(config, n, _SEED + i, pin) for i, n in enumerate(lengths)]
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
    parts = parts_of(name, device, small, full)
    dtype, config, state = parts.dtype, parts.config, parts.state
    lengths = [one.lengths for one in parts.inputs]
    # batching texts is the candidate's own business: nothing is padded yet
    slots = 0 if SPECS[name].texts else parts.inputs[0].input_ids.numel()
    tokens = sum(map(sum, lengths)) // len(lengths)
    operations = sum(forward_flops(config, n) for n in lengths) // len(lengths)
    baseline_name, baseline = peers.baseline_encoder(state, config, device, dtype)
    exact = torch.float64 if device.type == "cpu" else FP32
    limit = {}
    if device.type == "cpu" and dtype == BF16:
        limit["limit"] = _LIMIT_OF_A_STEP * (config.num_hidden_layers + 1) ** 0.5
    facts = {"model": SPECS[name].model, "seed": _SEED, "longest": parts.longest, "small": small}
    return Case(
        name=name,
        device=device,
        dtype=short(dtype),
        inputs=parts.inputs,
        truth=_on_sample(truth_of(state, config, device, exact), device),
        baseline=_on_sample(baseline, device),
        baseline_name=baseline_name,
        work=Work(tokens, slots, len(lengths[0]), flops=operations),
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


def _our_model(
    state: dict[str, Tensor], config: BertConfig, device: torch.device, dtype: torch.dtype
) -> tuple[bert_fast.BertModel, dict[str, Any]]:
    """Return the model and what its row should say of it."""
    model = bert_fast.BertModel(config, add_pooling_layer=False)
    encoder = {n.removeprefix("bert."): t for n, t in state.items() if n.startswith("bert.")}
    model.load_state_dict({n: t for n, t in encoder.items() if not n.startswith("pooler.")})
    model = model.to(device, dtype).eval()
    return model, our_notes(model)


def our_notes(model: torch.nn.Module) -> dict[str, Any]:
    """Return what the row of our model should say of it: what serves each op, and on a CPU how."""
    notes = {"ops": {entry.op: entry.implementation for entry in bert_fast.report(model).ops}}
    dtypes = {(p.device.type, p.dtype) for p in model.parameters()}
    extension, why = load_extension()
    if ("cpu", FP32) in dtypes:
        notes |= {"cpu_library": cpu_library(), "cpu_library_ms": cpu_library_times()}
    if "cpu" in {kind for kind, _ in dtypes}:
        notes["extension"] = why if extension is None else extension.cpu_capability()
    return notes


def our_encoder(
    state: dict[str, Tensor], config: BertConfig, device: torch.device, dtype: torch.dtype
) -> Prepared:
    """Return this project's encoder for padded batches."""
    model, notes = _our_model(state, config, device, dtype)

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
    model, notes = _our_model(state, config, device, dtype)

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


def main(argv: list[str] | None = None) -> int:
    """Start the runs of these cases; return 1 if one of them found a wrong answer of ours."""
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
        return run(["cpu", *args.what, *out])
    return max(run(["case", number, *out]) for number in args.what or "1234567")


if __name__ == "__main__":
    raise SystemExit(main())
