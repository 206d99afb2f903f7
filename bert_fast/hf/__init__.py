"""Models of Hugging Face, made fast where they are; transformers is imported when they are used."""

from bert_fast.hf.accelerate import accelerate, patch_transformers, restore
from bert_fast.hf.attention import register_attention
from bert_fast.hf.verify import VerificationError, VerifyReport, verify

__all__ = [
    "VerificationError",
    "VerifyReport",
    "accelerate",
    "patch_transformers",
    "register_attention",
    "restore",
    "verify",
]
