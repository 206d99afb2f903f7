"""Directories to convert, and how the results are compared."""

import json

import torch
import transformers
from against_transformers import batch, pair
from bundle_writer import google_state, with_adam, write_bundle

import bert_fast

NAME = "bert_model.ckpt"
GOOGLE_KEYS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act "
    "max_position_embeddings type_vocab_size hidden_dropout_prob attention_probs_dropout_prob "
    "initializer_range"
).split()
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<S>", *(f"w{i}" for i in range(40))]


def google(directory, name="BertForPreTraining", *, adam=True, prefix=NAME, change=dict, **fields):
    """Files as Google's code writes them, and transformers' model with the same weights.

    The fine-tuned models have a pooler there, whatever transformers' have.
    """
    theirs, _ = pair(name, **fields)
    state = theirs.state_dict()
    if name != "BertModel" and "bert.pooler.dense.weight" not in state:
        pooler = {"bert.pooler.dense.weight": torch.randn(32, 32)}
        state |= pooler | {"bert.pooler.dense.bias": torch.randn(32)}
    if name == "BertModel":
        state = {f"bert.{key}": tensor for key, tensor in state.items()}
    tensors = google_state(state)
    write_bundle(
        directory / prefix, change(with_adam(tensors) if adam else tensors), block_size=500
    )
    values = {key: theirs.config.to_dict()[key] for key in GOOGLE_KEYS}
    (directory / "bert_config.json").write_text(json.dumps(values | {"pooler_type": "first"}))
    (directory / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return theirs


def same_outputs(one, other, config):
    """With and without padding, where tokens are: transformers' own to 1e-6, ours to 1e-5."""
    tolerance = 1e-5 if isinstance(other, bert_fast.BertPreTrainedModel) else 1e-6
    for padding in ("none", "right"):
        inputs, real = batch(config, padding=padding)
        if "MultipleChoice" in type(one).__name__:
            inputs = {key: value[None] for key, value in inputs.items()}
        with torch.no_grad():
            for key, want in one(**inputs).items():
                got = other(**inputs)[key]
                if want.shape[:2] == real.shape:
                    got, want = got[real], want[real]
                assert (got - want).abs().max() <= tolerance, key


def opened(directory, name, strict=True):
    """transformers' model of a directory; nothing is missing, and nothing left over."""
    model, info = getattr(transformers, name).from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager"
    )
    assert not strict or not any(info.values()), info
    return model.eval()


def contents(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}
