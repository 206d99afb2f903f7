"""Training: the optimizers."""

from bert_fast.train.optim import LAMB, AdamW, decay_groups

__all__ = ["LAMB", "AdamW", "decay_groups"]
