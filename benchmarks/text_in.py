"""Texts in, vectors out, tokenizing included: our `Encoder` beside sentence-transformers."""

import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import our_bert
import stock_bert
import torch
import workload
from gate import AbsentError, Outputs, Prepared
from torch import Tensor
from workload import Texts

from bert_fast import BertConfig, BertTokenizer, Encoder
from bert_fast.accuracy import short

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CLS, _SEP = 2, 3
_LONGEST = 512


@cache
def tokenizer() -> BertTokenizer:
    """Return a tokenizer of made-up words, each of which is one token."""
    syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprst", "aeiou")]
    words = map("".join, itertools.product(syllables, repeat=2))
    return BertTokenizer([*_SPECIAL, *itertools.islice(words, workload.SMALL_VOCAB - 5)])


@dataclass(frozen=True)
class Lines(Texts):
    """Texts, beside the ids that a tokenizer makes of them.

    Attributes:
        lines: one string a text.
    """

    lines: tuple[str, ...] = ()


def texts(lengths: Sequence[int], seed: int) -> Lines:
    """Return texts of random words that have these numbers of tokens, special ones included."""
    made = workload.texts(len(tokenizer()), [max(3, n) for n in lengths], seed, pin=False)
    words, lines, parts = tokenizer().convert_ids_to_tokens, [], []
    for ids in made.ids.split(list(made.lengths)):
        lines.append(" ".join(words(ids[1:-1].tolist())))
        parts += [ids.new_tensor([_CLS]), ids[1:-1], ids.new_tensor([_SEP])]
    return Lines(torch.cat(parts), made.lengths, made.sample, tuple(lines))


def _prepared(
    encode: Callable[[Sequence[str]], Tensor], device: torch.device, notes: Mapping[str, Any]
) -> Prepared:
    def run(texts: Lines) -> Tensor:
        vectors = encode(texts.lines)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return vectors

    def check(texts: Lines) -> Outputs:
        return {"embedding": run(texts)[list(texts.sample)].clone()}

    return Prepared(run, check, notes={"pooling": "cls", **notes})


def ours(
    state: Mapping[str, Tensor], config: BertConfig, device: torch.device, dtype: torch.dtype
) -> Prepared:
    """Return this project's `Encoder`, with its defaults."""
    body = our_bert.encoder(state, config, device, dtype)
    encoder = Encoder(body, tokenizer(), pooling="cls", max_seq_length=_LONGEST)
    encode = partial(encoder.encode, convert_to_tensor=True, show_progress_bar=False)
    return _prepared(lambda lines: encode(list(lines)), device, {"weights": short(dtype)})


def sentence_transformer(
    state: Mapping[str, Tensor], config: BertConfig, device: torch.device, dtype: torch.dtype
) -> Prepared:
    """Return sentence-transformers with its defaults: sorted by length, padded batches of 32."""
    library = stock_bert.need("sentence_transformers")
    try:
        modules = stock_bert.need("sentence_transformers.sentence_transformer.modules")
    except AbsentError:  # before 6
        modules = stock_bert.need("sentence_transformers.models")
    with tempfile.TemporaryDirectory() as folder:
        ours = our_bert.encoder(state, config, torch.device("cpu"), torch.float32)
        ours.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        body = modules.Transformer(str(Path(folder)), max_seq_length=_LONGEST)
    head = modules.Pooling(config.hidden_size, pooling_mode="cls")
    whole = library.SentenceTransformer(modules=[body, head], device=str(device)).to(dtype)
    encode = partial(whole.encode, convert_to_tensor=True, show_progress_bar=False)
    return _prepared(lambda lines: encode(list(lines)), device, {"weights": short(dtype)})
