"""Lengths of sequences by name: what real batches look like, without the texts.

    full        every sequence as long as the longest
    glue        tokens of GLUE's tasks: sentences of SST-2, pairs of MRPC and STS-b, a third each
    squad       question and paragraph of SQuAD 1.1, at most 384
    wikipedia   pairs for pre-training on English Wikipedia, at most 512
    normal      N(256, 64), at most 512
    lognormal   many short and few long: median 64, sigma 0.8 of the logarithm, at most 512

The first three of real data are kept as counts, special tokens included, in lengths.json. It is
made again from the data by

    python benchmarks/lengths.py --data DIRECTORY
"""

import argparse
import gzip
import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import torch
from workload import normal_lengths

from bert_fast import BertTokenizer
from bert_fast.data.instances import pairs_of
from bert_fast.data.prepare import prepare
from bert_fast.data.shards import Corpus

NAMES = ("full", "glue", "squad", "wikipedia", "normal", "lognormal")
LONGEST = {"glue": 128, "squad": 384, "wikipedia": 512, "normal": 512, "lognormal": 512}
FILE = Path(__file__).with_name("lengths.json")
_SEED = 1  # of the pairs
_SOURCES = {
    "glue": "SST-2 dev, MRPC val, STS-b dev; bert-base-uncased's vocabulary, cut at 128",
    "squad": "XQuAD en, of SQuAD 1.1 dev; bert-base-uncased's vocabulary, cut at 384",
    "wikipedia": "pairs of an epoch, pages of 2018; bert-base-uncased's vocabulary, 512 at most",
}


def _lognormal(n: int, median: float, sigma: float, low: int, high: int, seed: int) -> list[int]:
    """Return n lengths whose logarithm is N(log median, sigma), clipped to low..high."""
    drawn = torch.randn(n, generator=torch.Generator().manual_seed(seed)).mul(sigma).exp() * median
    return [int(v) for v in drawn.round().clamp(low, high)]


@cache
def histogram(name: str) -> dict[int, int]:
    """Return how many sequences of the data have each length.

    Args:
        name: "glue", "squad" or "wikipedia".
    """
    counts = json.loads(FILE.read_text("utf-8"))[name]["counts"]
    return {int(length): n for length, n in counts.items()}


def draw(name: str, n: int, seed: int, longest: int = 0) -> list[int]:
    """Return n lengths of a distribution.

    Args:
        name: in NAMES.
        n: how many.
        seed: of the draw.
        longest: none is longer; 0: as the distribution has it. "full" needs it.

    Raises:
        ValueError: there is no such distribution, or "full" without a length.
    """
    if name not in NAMES or (name == "full" and not longest):
        raise ValueError(f"lengths: want one of {', '.join(NAMES)}, and full with its length")
    if name == "full":
        return [longest] * n
    high = longest or LONGEST[name]
    if name == "normal":
        return normal_lengths(n, 256, 64, min(16, high), high, seed)
    if name == "lognormal":
        return _lognormal(n, 64, 0.8, min(8, high), high, seed)
    lengths, weights = zip(*histogram(name).items(), strict=True)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(torch.tensor(weights).double(), n, True, generator=generator)
    return [min(lengths[i], high) for i in drawn.tolist()]


def up_to(name: str, tokens: int, seed: int, longest: int = 0) -> list[int]:
    """Return as many lengths as fit into so many tokens, at least one; the rest as `draw`."""
    chosen: list[int] = []
    for length in draw(name, max(1, tokens), seed, longest):
        if chosen and sum(chosen) + length > tokens:
            break
        chosen.append(length)
    return chosen


@dataclass(frozen=True)
class Lengths:
    """The lengths of a case's sequences.

    Attributes:
        name: in NAMES.
        n: how many.
        longest: none is longer; 0: as the distribution has it.
        fill: their mean as a share of `longest`, exactly: normal ones, of which one is the longest.
    """

    name: str
    n: int
    longest: int = 0
    fill: float | None = None

    def draw(self, seed: int) -> list[int]:
        """Return the lengths for a seed."""
        if self.fill is None:
            return draw(self.name, self.n, seed, self.longest)
        n, high, fill = self.n, self.longest, self.fill
        drawn = normal_lengths(n - 1, fill * high, fill * high / 2, 2, high, seed)
        missing = round(fill * high * n) - high - sum(drawn)
        if not high + 2 * (n - 1) <= round(fill * high * n) <= high * n:
            raise ValueError(f"{self}: want a fill that lengths of 2 to {high} can have")
        i = 0
        while missing:  # one token at a time, so that the fill is the same for every seed
            step = 1 if missing > 0 else -1
            if 2 <= drawn[i % (n - 1)] + step <= high:
                drawn[i % (n - 1)] += step
                missing -= step
            i += 1
        return [high, *drawn]

    def orders(self, seed: int, n: int) -> list[list[int]]:
        """Return n orders of the lengths: batches of one shape and as much work."""
        lengths, generator = self.draw(seed), torch.Generator().manual_seed(seed)
        orders = [torch.randperm(len(lengths), generator=generator).tolist() for _ in range(n)]
        return [[lengths[i] for i in order] for order in orders]

    def __str__(self) -> str:
        if self.name == "full":
            return f"{self.n} x {self.longest}, full"
        if self.fill is not None:
            return f"{self.n} x {self.longest}, {100 * self.fill:.0f} % filled"
        return f"{self.n} of {self.name}, at most {self.longest or LONGEST[self.name]}"


# --- from the data -------------------------------------------------------------------------------


def _read(path: Path) -> str:
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes()).decode()
    return path.read_text("utf-8")


def _glue(data: Path) -> list[list[tuple[str, ...]]]:
    """Return the sequences of each task, a sequence being one text or two."""
    sst2 = [line.split("\t")[:1] for line in _read(data / "sst2/dev.tsv").splitlines()[1:]]
    mrpc = [line.split("\t")[3:5] for line in _read(data / "mrpc/val.tsv").splitlines()[1:]]
    stsb = [line.split("\t")[5:7] for line in _read(data / "stsb/sts-dev.csv").splitlines()]
    return [[tuple(texts) for texts in task] for task in (sst2, mrpc, stsb)]


def _squad(data: Path) -> list[tuple[str, ...]]:
    articles = json.loads(_read(data / "qa/xquad_en.json.gz"))["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    return [(q["question"], p["context"]) for p in paragraphs for q in p["qas"]]


def _count(tokenizer: BertTokenizer, sequences: list[tuple[str, ...]], longest: int) -> Counter:
    """Return how many of the sequences have each length; longer ones are cut."""
    first, *second = (list(texts) for texts in zip(*sequences, strict=True))
    ids = tokenizer(first, *second, truncation=True, max_length=longest)["input_ids"]
    return Counter(len(one) for one in ids)


def _wikipedia(tokenizer: BertTokenizer, data: Path, longest: int) -> Counter:
    """Return how long the pairs of one epoch of pre-training are."""
    with tempfile.TemporaryDirectory() as folder:
        text, corpus = Path(folder) / "wikipedia.txt", Path(folder) / "corpus"
        text.write_text(_read(data / "pretrain/wiki_en_2018.txt.gz"), "utf-8")
        prepare(text, corpus, tokenizer, held_out=0)
        split = Corpus(corpus).split("train")
        return Counter(pairs_of(split, seed=_SEED, epoch=0, max_length=longest).lengths.tolist())


def made(data: Path) -> dict[str, Any]:
    """Return what lengths.json holds, from the data.

    Args:
        data: a directory with sst2, mrpc, stsb, qa, pretrain and vocab.
    """
    tokenizer = BertTokenizer(data / "vocab/bert-base-uncased-vocab.txt")
    tasks = [_count(tokenizer, task, LONGEST["glue"]) for task in _glue(data)]
    most = max(task.total() for task in tasks)  # each task has the same weight
    glue = Counter()
    for task in tasks:
        glue.update({length: round(n * most / task.total()) for length, n in task.items()})
    squad = _count(tokenizer, _squad(data), LONGEST["squad"])
    wikipedia = _wikipedia(tokenizer, data, LONGEST["wikipedia"])
    found = {"glue": glue, "squad": squad, "wikipedia": wikipedia}
    return {
        name: {
            "source": _SOURCES[name],
            "mean": round(sum(n * length for length, n in counts.items()) / counts.total(), 1),
            "counts": {str(length): counts[length] for length in sorted(counts)},
        }
        for name, counts in found.items()
    }


def main() -> int:
    """Write lengths.json."""
    parser = argparse.ArgumentParser(description="Count the lengths of real data again.")
    parser.add_argument("--data", type=Path, required=True, help="where the data sets lie")
    found = made(parser.parse_args().data)
    FILE.write_text(json.dumps(found, indent=None, separators=(",", ":")) + "\n", "utf-8")
    for name, of in found.items():
        print(f"{name}: {sum(of['counts'].values())} sequences, mean {of['mean']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
