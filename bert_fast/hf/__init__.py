"""Models of Hugging Face, made fast where they are; transformers is imported when they are used."""

from bert_fast.hf.accelerate import accelerate, patch_transformers, restore
from bert_fast.hf.attention import register_attention

__all__ = ["accelerate", "patch_transformers", "register_attention", "restore"]
