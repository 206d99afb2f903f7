"""The likeliest tokens where a text has masks."""

from typing import Any

import torch

from bert_fast.heads import BertForMaskedLM
from bert_fast.tokenizer import BertTokenizer


def fill_mask(
    model: BertForMaskedLM, tokenizer: BertTokenizer, text: str, top_k: int
) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
    """Return, for one text, what `Encoder.fill_mask` returns."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    masks = (ids[0] == tokenizer.mask_token_id).nonzero()[:, 0]
    most = model.config.max_position_embeddings
    if not len(masks):
        raise ValueError(f"fill_mask: want {tokenizer.mask_token} in the text, got {text!r:.200}")
    if ids.shape[1] > most:
        raise ValueError(f"fill_mask: want at most {most} tokens in the text, got {ids.shape[1]}")
    if not 1 <= top_k <= model.config.vocab_size:
        want = f"1 to {model.config.vocab_size}"
        raise ValueError(f"top_k: want {want}, got {top_k}")
    with torch.inference_mode():
        logits = model(ids.to(model.device)).logits[0, masks]
        scores, tokens = logits.float().softmax(-1).topk(top_k)
    found = []
    for mask, row, chosen in zip(masks.tolist(), scores.tolist(), tokens.tolist(), strict=True):
        here = []
        for score, token in zip(row, chosen, strict=True):
            filled = ids[0].clone()
            filled[mask] = token
            here.append(
                {
                    "score": score,
                    "token": token,
                    "token_str": tokenizer.decode([token]),
                    "sequence": tokenizer.decode(filled, skip_special_tokens=len(masks) == 1),
                }
            )
        found.append(here)
    return found[0] if len(found) == 1 else found
