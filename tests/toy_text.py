"""A language of a few words, with a WordPiece tokenizer for it: what needs text in the tests."""

import random

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

ANIMALS = "cat dog bird horse mouse fox".split()
PLACES = "house mat tree river bridge road".split()
VERBS = "saw met left found heard".split()
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "on", "under", "who", "?", "."]
VOCABULARY = [*PIECES, *ANIMALS, *PLACES, *VERBS, "##s", "##ly", "##ed", "quick", "slow"]


def tokenizer(padding_side: str = "right") -> transformers.PreTrainedTokenizerFast:
    """BERT's tokenizer, made of the vocabulary alone."""
    ids = {piece: index for index, piece in enumerate(VOCABULARY)}
    made = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return transformers.BertTokenizerFast(
        tokenizer_object=made, model_max_length=40, padding_side=padding_side
    )


def sentence(chance: random.Random, nouns: list[str] = ANIMALS) -> str:
    """Of 6 to 10 words, as 'the quick cats saw a mouse under the tree.'"""
    words = ["the", chance.choice(nouns) + chance.choice(["", "s"]), chance.choice(VERBS)]
    words += ["a", chance.choice(nouns)]
    if chance.random() < 0.7:
        words += [chance.choice(["on", "under"]), "the", chance.choice(nouns)]
    if chance.random() < 0.5:
        words.insert(1, chance.choice(["quick", "slow"]))
    return " ".join(words) + "."


def sentences(count: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [sentence(chance) for _ in range(count)]


def examples(kind: str, count: int, seed: int = 0) -> list[dict]:
    """Tokenized sentences with labels that can be learned, of very unlike lengths.

    Of "masked_lm" the collator makes the labels. A "sequence" is of class 1 if its nouns are
    places. Of the "tokens" those of animals are of class 1, and [CLS] and [SEP] have no label.
    """
    chance, tokenize = random.Random(seed), tokenizer()
    made = []
    for index in range(count):
        label = index % 2
        nouns = PLACES if kind == "sequence" and label else ANIMALS
        encoded = dict(tokenize(sentence(chance, nouns)))
        if kind == "sequence":
            encoded["labels"] = label
        elif kind == "tokens":
            pieces = tokenize.convert_ids_to_tokens(encoded["input_ids"])
            special = ("[CLS]", "[SEP]")
            encoded["labels"] = [-100 if p in special else int(p in ANIMALS) for p in pieces]
        made.append(encoded)
    return made
