"""From token ids to the batches a model is trained on: masking, packing, collating.

collator = MaskedLMCollator(tokenizer, seed=0)
loader = DataLoader(examples, batch_size=32, collate_fn=collator, num_workers=2)
for epoch in range(epochs):
    collator.set_epoch(epoch)
    for batch in loader:
        loss = model(**batch).loss
"""

from bert_fast.data.collate import MaskedLMCollator
from bert_fast.data.masking import MaskingRule, mask_tokens
from bert_fast.data.packing import PackingCollator, pack_rows
from bert_fast.data.steps import implementation

__all__ = [
    "MaskedLMCollator",
    "MaskingRule",
    "PackingCollator",
    "implementation",
    "mask_tokens",
    "pack_rows",
]
