"""A random BERT-base on a page of English: checked, and timed beside transformers.

    python benchmarks/demo.py [--sentences 96] [--batch-size 32] [--rounds 5]

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
from torch import Tensor

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


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sentences", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
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

    model = perturbed(bert_fast.BertModel(bert_fast.BertConfig.named("base"))).to(device)
    ids, mask = (t[:4] for t in batches[0])
    with torch.inference_mode():
        wide = {name: p.double() for name, p in model.state_dict().items()}
        truth = reference_model.encoder(wide, model.config, ids, mask).last_hidden_state
        ours = largest_difference(model(ids, mask).last_hidden_state, truth, mask)
    table = Table("BERT-base, fp32", "median", "tokens/s", "speed", "error to float64")
    candidates: dict[str, tuple[torch.nn.Module, float]] = {}
    try:
        import transformers
    except ImportError:
        console.print("transformers is not installed: nothing to compare with")
    else:
        hf = transformers.BertModel(transformers.BertConfig.from_dict(model.config.to_dict()))
        hf.load_state_dict(model.state_dict())
        hf.to(device).eval()
        with torch.inference_mode():
            theirs = largest_difference(hf(ids, mask).last_hidden_state, truth, mask)
        candidates[f"transformers {transformers.__version__} (SDPA)"] = hf, theirs
    candidates[f"bert_fast {bert_fast.__version__}"] = model, ours

    def over_the_page(candidate: torch.nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                for ids, mask in batches:
                    candidate(ids, mask)

        return run

    runs = {name: over_the_page(candidate) for name, (candidate, _) in candidates.items()}
    medians = interleaved(runs, args.rounds)
    slowest = next(iter(medians.values()))
    for name, (_, error) in candidates.items():
        seconds = medians[name]
        speed = f"{slowest / seconds:.2f}x"
        table.add_row(name, f"{seconds:.3f} s", f"{real / seconds:,.0f}", speed, f"{error:.1e}")
    console.print(table)
    console.print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads,"
        f" torch {torch.__version__}, {args.rounds} rounds in turn;"
        f" error: largest difference on {int(mask.sum())} tokens"
    )
    console.print(str(bert_fast.report(model)))
    if candidates and ours > 2 * max(e for _, e in candidates.values()) + 1e-5:
        raise SystemExit(f"error to float64: want at most 2x transformers', got {ours:.1e}")


if __name__ == "__main__":
    main()
