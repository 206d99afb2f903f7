"""What a small masked-LM knows: hidden words of a text, and whether its vectors see likeness.

    python benchmarks/masked_words.py MODEL --texts FILE [--most 2000] [--sts sts-dev.csv]
    python benchmarks/masked_words.py MODEL --texts CORPUS

The second one takes the documents that a corpus of `bert-fast data prepare` holds out. Of each
sentence one word that is a token of its own is hidden; counted is how often it is the likeliest
word, or among the five likeliest, beside always guessing the most frequent of the hidden words. For
STS-B's dev or test file: Spearman's correlation of people's scores with the cosines of mean
vectors, and with the share of common words.
"""

import argparse
import gzip
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import checkout  # noqa: F401
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from bert_fast import BertTokenizer, Encoder
from bert_fast.data.inspect import first_documents
from bert_fast.data.sentences import split_sentences

_WORD = re.compile(r"[^\W\d_]{2,}")


def sentences_of(path: Path, tokenizer: BertTokenizer) -> list[str]:
    """Return the sentences of a text, of one in a .gz, or of a corpus's held-out documents."""
    if path.is_dir():
        everything = 1 << 62
        documents = first_documents(
            path, tokenizer, everything, split="held_out", sentences=everything
        )
        return [sentence for document in documents for sentence in document]
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [s for line in file for s in split_sentences(line.strip())]


def hidden_words(
    sentences: Sequence[str], tokenizer: BertTokenizer, seed: int, most: int
) -> list[tuple[str, str]]:
    """Return (sentence with [MASK], the word as a token) for each sentence that has such a word.

    Sentences of more than `most` tokens are left out.
    """
    chance, found = random.Random(seed), []
    vocabulary = tokenizer.get_vocab()
    for sentence in sentences:
        words = [w for w in _WORD.finditer(sentence) if _token(w[0], tokenizer) in vocabulary]
        if len(words) > 4:
            word = chance.choice(words)
            hidden = f"{sentence[: word.start()]}{tokenizer.mask_token}{sentence[word.end() :]}"
            if len(tokenizer(hidden)["input_ids"]) <= most:
                found.append((hidden, _token(word[0], tokenizer)))
    return found


def _token(word: str, tokenizer: BertTokenizer) -> str:
    tokens = tokenizer.tokenize(word)
    return tokens[0] if len(tokens) == 1 else ""


def guessed(encoder: Encoder, hidden: Sequence[tuple[str, str]]) -> tuple[float, float]:
    """Return how often the word is the likeliest, and among the five likeliest."""
    first = among = 0
    for text, word in hidden:
        tokens = [entry["token_str"] for entry in encoder.fill_mask(text, top_k=5)]
        first += tokens[0] == word
        among += word in tokens
    return first / len(hidden), among / len(hidden)


def most_frequent(hidden: Sequence[tuple[str, str]]) -> tuple[float, float]:
    """Return how often the most frequent of the hidden words is right, and the five of them."""
    counts = [count for _, count in Counter(word for _, word in hidden).most_common(5)]
    return counts[0] / len(hidden), sum(counts) / len(hidden)


def likeness(encoder: Encoder, path: Path) -> tuple[float, float]:
    """Return Spearman's correlation of cosines, and of common words, with people's scores."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    scores = [float(row[4]) for row in rows]
    ours, theirs = (
        encoder.encode([row[i] for row in rows], normalize_embeddings=True) for i in (5, 6)
    )
    words = [[{*_WORD.findall(row[i].lower())} for i in (5, 6)] for row in rows]
    common = [len(a & b) / max(len(a | b), 1) for a, b in words]
    cosines = (ours * theirs).sum(-1)
    return float(spearmanr(scores, cosines)[0]), float(spearmanr(scores, common)[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--most", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sts", type=Path)
    args = parser.parse_args()
    encoder = Encoder.from_pretrained(args.model, dtype="float32")
    sentences = sentences_of(args.texts, encoder.tokenizer)
    random.Random(args.seed).shuffle(sentences)
    longest = encoder.model.config.max_position_embeddings
    hidden = hidden_words(sentences[: args.most], encoder.tokenizer, args.seed, longest)
    table = Table("", "likeliest", "among five", title=f"{len(hidden):,} hidden words")
    first, among = guessed(encoder, hidden)
    table.add_row("the model", f"{first:.1%}", f"{among:.1%}")
    table.add_row("the most frequent", *(f"{share:.1%}" for share in most_frequent(hidden)))
    console = Console(width=100)
    console.print(table)
    if args.sts is not None:
        cosines, common = likeness(encoder, args.sts)
        console.print(f"{args.sts.name}: Spearman {cosines:.3f}, of common words {common:.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
