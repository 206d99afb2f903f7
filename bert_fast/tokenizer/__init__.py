"""Text <-> token ids: BERT's tokenizer, in the form of transformers' BertTokenizer.

    tokenizer = BertTokenizer.from_pretrained("path-or-hub-id")
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    texts = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)

Names of arguments and results are those of transformers' fast tokenizer, and so are the results.
Where that one would run out of memory, change what a vocabulary means or give rows that are
longer than asked for, there is a ValueError or a warning here.
"""

from bert_fast.tokenizer.bert import BertTokenizer

__all__ = ["BertTokenizer"]
