"""A random BERT-base on a page of English: checked, and timed beside transformers.

    python benchmarks/demo.py [--sentences 96] [--batch-size 32] [--rounds 5] [--full]

The weights are random, so the answers mean nothing; the lengths are those of real sentences, so
the padding and the times do mean something. The vocabulary is learnt from the page itself.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn

import bert_fast
from bert_fast import reference_model

PAGE = Path(__file__).parent / "texts" / "pride_and_prejudice.txt"
Batch = tuple[Tensor, Tensor]  # input_ids and attention_mask, (B, L)


def tokenize(sentences: list[str], batch_size: int) -> list[Batch]:
    """Return padded batches of the sentences, in their order."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=8000, special_tokens=specials)
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding()
    batches = []
    for i in range(0, len(sentences), batch_size):
        encoded = tokenizer.encode_batch(sentences[i : i + batch_size])
        ids = torch.tensor([e.ids for e in encoded])
        batches.append((ids, torch.tensor([e.attention_mask for e in encoded])))
    return batches


def perturbed(model: nn.Module) -> nn.Module:
    """Move every parameter off its initial value: biases of 0 would hide a lost bias."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    return model.eval()


def largest_difference(out: Tensor, truth: Tensor, mask: Tensor) -> float:
    """Return the largest difference at real tokens."""
    return (out.double() - truth.double())[mask != 0].abs().max().item()


def interleaved(candidates: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return each candidate's median seconds, measured in turn."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(rounds + 1):  # the first warms up
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def timed(
    name: str, batches: list[Batch], models: dict[str, nn.Module], rounds: int
) -> list[tuple[str, ...]]:
    """Return a row of the table for each model: the median over rounds of all the batches."""

    def run_of(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                for ids, mask in batches:
                    model(ids, mask)

        return run

    medians = interleaved({kind: run_of(model) for kind, model in models.items()}, rounds)
    real = sum(int(mask.sum()) for _, mask in batches)
    first = next(iter(medians.values()))
    return [
        (
            name,
            kind,
            f"{1e3 * seconds:,.0f} ms",
            f"{real / seconds:,.0f}",
            f"{first / seconds:.2f}x",
        )
        for kind, seconds in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sentences", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="batches without padding too")
    args = parser.parse_args()
    console = Console(width=100)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sentences = PAGE.read_text(encoding="utf-8").split("\n")[: args.sentences]
    batches = [(i.to(device), m.to(device)) for i, m in tokenize(sentences, args.batch_size)]
    real = sum(int(mask.sum()) for _, mask in batches)
    padded = sum(mask.numel() for _, mask in batches)
    console.print(
        f"{len(sentences)} sentences, {real} tokens, padded to {padded}: {real / padded:.0%} filled"
    )

    ours = perturbed(bert_fast.BertModel(bert_fast.BertConfig.named("base"))).to(device)
    models = {}
    try:
        import transformers
    except ImportError:
        console.print("transformers is not installed: nothing to compare with")
    else:
        theirs = transformers.BertModel(transformers.BertConfig.from_dict(ours.config.to_dict()))
        theirs.load_state_dict(ours.state_dict())
        models[f"transformers {transformers.__version__} (SDPA)"] = theirs.to(device).eval()
    models[f"bert_fast {bert_fast.__version__}"] = ours

    ids, mask = (t[:4] for t in batches[0])
    wide = {name: p.double() for name, p in ours.state_dict().items()}
    with torch.inference_mode():
        truth = reference_model.encoder(wide, ours.config, ids, mask).last_hidden_state
        errors = {
            kind: largest_difference(model(ids, mask).last_hidden_state, truth, mask)
            for kind, model in models.items()
        }
    for kind, error in errors.items():
        console.print(f"{kind}: off float64 by {error:.1e} at most, on {int(mask.sum())} tokens")
    *peers, own = errors.values()
    if own > 2 * max(peers, default=0.0) + 1e-5:
        raise SystemExit("error to float64: want at most twice transformers' own")

    table = Table("BERT-base, fp32", "", "median", "tokens/s", "speed")
    cases = {f"the page, {real / padded:.0%} filled": batches}
    for B, L in ((1, 128), (8, 128), (2, 512)) if args.full else ():
        ids = torch.randint(5, ours.config.vocab_size, (B, L), device=device)
        cases[f"{B} x {L}, full"] = [(ids, torch.ones_like(ids))]
    for name, case in cases.items():
        for row in timed(name, case, models, args.rounds):
            table.add_row(*row)
    console.print(table)
    console.print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads,"
        f" torch {torch.__version__}, medians of {args.rounds} rounds in turn"
    )
    console.print(str(bert_fast.report(ours)))


if __name__ == "__main__":
    main()
