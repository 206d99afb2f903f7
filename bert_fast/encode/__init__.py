"""Texts in, vectors and predictions out."""

from bert_fast.encode.encoder import Encoder

__all__ = ["Encoder"]
