"""BertTokenizer: how it is made, called and written; tokens and ids are in `base`."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from bert_fast.batch_encoding import BatchEncoding
from bert_fast.files import find_directory
from bert_fast.tokenizer.base import TokenizerBase
from bert_fast.tokenizer.engine import as_batch, as_entries
from bert_fast.tokenizer.files import (
    FILES,
    RULES,
    SPECIAL_TOKENS,
    bert_template,
    build,
    read_tokenizer,
    write_tokenizer,
    write_vocab,
)
from bert_fast.tokenizer.padding import NO_LIMIT
from bert_fast.tokenizer.vocabulary import read_vocab, train_vocab


class BertTokenizer(TokenizerBase):
    """BERT's tokenizer; calls from several threads at once do not disturb each other.

    Each of the special tokens is an attribute (`mask_token`), and so is its id (`mask_token_id`);
    one that was never named is None.

    Args:
        vocab: path of a vocab.txt, token -> id, or the tokens in order; None: the special tokens.
        do_lower_case: "Paris" is "paris".
        strip_accents: "é" is "e"; None: as do_lower_case.
        tokenize_chinese_chars: each Chinese character is a word.
        unk_token: what a word becomes that has no pieces in the vocabulary; must be in it.
        sep_token: behind each text.
        pad_token: fills up rows.
        cls_token: in front of each row.
        mask_token: what a masked language model has to guess.
        bos_token: has a name only.
        eos_token: has a name only.
        extra_special_tokens: further ones.
        added_tokens_decoder: tokens outside the vocabulary by id.
        model_max_length: the length for truncation=True without max_length; None: none.
        padding_side: "right" or "left".
        truncation_side: "right" or "left": where what is too long is cut off.
        split_special_tokens: a "[MASK]" in a text is text.
        clean_up_tokenization_spaces: decode joins "do n't".
        model_input_names: entries of a call's result.
        name_or_path: where it came from.
        tokenizer_object: in place of vocab and the rules; it is taken over.

    Raises:
        FileNotFoundError: no file vocab.
        ValueError: vocab lacks unk_token, or an argument has none of the values above.
    """

    def __init__(
        self,
        vocab: str | os.PathLike | Mapping[str, int] | Sequence[str] | None = None,
        *,
        do_lower_case: bool = True,
        strip_accents: bool | None = None,
        tokenize_chinese_chars: bool = True,
        unk_token: str | AddedToken = "[UNK]",
        sep_token: str | AddedToken = "[SEP]",
        pad_token: str | AddedToken = "[PAD]",
        cls_token: str | AddedToken = "[CLS]",
        mask_token: str | AddedToken = "[MASK]",
        bos_token: str | AddedToken | None = None,
        eos_token: str | AddedToken | None = None,
        extra_special_tokens: Sequence[str | AddedToken] = (),
        added_tokens_decoder: Mapping[int, str | AddedToken] | None = None,
        model_max_length: int | None = None,
        padding_side: str = "right",
        truncation_side: str = "right",
        split_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
        model_input_names: Sequence[str] = ("input_ids", "token_type_ids", "attention_mask"),
        name_or_path: str = "",
        tokenizer_object: Tokenizer | None = None,
    ):
        for name, side in (("padding_side", padding_side), ("truncation_side", truncation_side)):
            if side not in ("right", "left"):
                raise ValueError(f'{name}: want "right" or "left", got {side!r}')
        if vocab is None:
            vocab = [str(t) for t in (pad_token, unk_token, cls_token, sep_token, mask_token)]
        if tokenizer_object is None:
            if isinstance(vocab, str | os.PathLike):
                vocab = read_vocab(vocab)
            elif not isinstance(vocab, Mapping):
                vocab = {token: i for i, token in enumerate(vocab)}
            rules = (do_lower_case, strip_accents, tokenize_chinese_chars)
            rules = dict(zip(RULES, rules, strict=True))
            tokenizer_object = build(vocab, unk_token=str(unk_token), **rules)
        backend = tokenizer_object
        backend.no_truncation()
        backend.no_padding()
        named = (bos_token, eos_token, unk_token, sep_token, pad_token, cls_token, mask_token)
        super().__init__(
            backend,
            dict(zip(SPECIAL_TOKENS, named, strict=True)),
            extra_special_tokens,
            added_tokens_decoder or {},
        )
        ends = [(str(t), backend.token_to_id(str(t))) for t in (cls_token, sep_token)]
        template = repr(backend.post_processor)
        if not all(token in template for token, _ in ends):
            backend.post_processor = bert_template(*ends)
        self.model_max_length = NO_LIMIT if model_max_length is None else model_max_length
        self.padding_side, self.truncation_side = padding_side, truncation_side
        self.split_special_tokens = split_special_tokens
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.model_input_names = list(model_input_names)
        self.name_or_path = name_or_path

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        subfolder: str = "",
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **kwargs: Any,
    ) -> "BertTokenizer":
        """Return the tokenizer in a directory or on the Hugging Face hub.

        tokenizer.json is read, else vocab.txt; `bert_fast.tokenizer.files` has what decides what.

        Args:
            pretrained_model_name_or_path: a directory, or the id of a model on the hub.
            subfolder: of the directory or repository.
            revision: branch, tag or commit on the hub.
            cache_dir: the hub's cache.
            token: for private models on the hub.
            local_files_only: take what the cache has, ask nobody.
            force_download: download again what the cache has.
            **kwargs: arguments of BertTokenizer in place of what the files say.

        Raises:
            FileNotFoundError: no such directory, or no tokenizer in it.
            ValueError: a file is damaged, outside the directory or no tokenizer of WordPiece.
            TypeError: an unknown argument.
        """
        directory = find_directory(
            pretrained_model_name_or_path,
            FILES,
            subfolder=subfolder,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        backend, settings = read_tokenizer(directory, kwargs)
        settings.setdefault("name_or_path", str(pretrained_model_name_or_path))
        return cls(tokenizer_object=backend, **settings)

    @classmethod
    def train(
        cls,
        texts_or_files: Iterable[str | os.PathLike] | os.PathLike,
        vocab_size: int = 30522,
        min_frequency: int = 2,
        limit_alphabet: int = 1000,
        special_tokens: Sequence[str] = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        **kwargs: Any,
    ) -> "BertTokenizer":
        """Return a tokenizer with a vocabulary learned from texts; the same texts, the same ids.

        Args:
            texts_or_files: texts (str), and files (Path) with one text on each line.
            vocab_size: ids to give.
            min_frequency: how often a pair of pieces must be there to be joined.
            limit_alphabet: characters to keep, the most frequent.
            special_tokens: what gets the first ids.
            **kwargs: further arguments of BertTokenizer.

        Raises:
            TypeError: something that is neither text nor file.
            ValueError: no word in the texts, or vocab_size is less than the characters take.
        """
        pipeline = cls(list(special_tokens), **kwargs).backend_tokenizer
        vocab = train_vocab(
            pipeline,
            texts_or_files,
            special_tokens=special_tokens,
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            limit_alphabet=limit_alphabet,
        )
        return cls(vocab, **kwargs)

    # --- encoding --------------------------------------------------------------------------------

    def __call__(
        self,
        text: str | Sequence[Any],
        text_pair: str | Sequence[Any] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str | None = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        split_special_tokens: bool | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Return the ids of one text or of a batch.

        Args:
            text: a text, or a list of texts; with is_split_into_words a list of words, or a list
                of those. An element of a batch may be a pair, too.
            text_pair: the second text, or as many as there are texts.
            add_special_tokens: put [CLS] and [SEP] where they belong.
            padding: True or "longest", "max_length", or False.
            truncation: True or "longest_first", "only_first", "only_second", or False. Of a long
                text only what is kept is encoded, and its Encoding's `overflowing` is not complete.
            max_length: in tokens; None: model_max_length. Alone it means truncation=True.
            stride: tokens that two pieces of one text share, with return_overflowing_tokens.
            is_split_into_words: texts are lists of words.
            pad_to_multiple_of: padded lengths are multiples of this.
            padding_side: in place of the tokenizer's.
            return_tensors: "pt" or "np"; None: lists.
            return_token_type_ids: None: if among model_input_names.
            return_attention_mask: None: if among model_input_names.
            return_overflowing_tokens: further rows for what truncation cuts off, with
                `overflow_to_sample_mapping`.
            return_special_tokens_mask: 1 where a token is special.
            return_offsets_mapping: (start, end) of each token in its text, in characters.
            return_length: the length of each row.
            split_special_tokens: special and added tokens in a text are text, and their ids
                never come from it; None: the tokenizer's.
            verbose: without effect.

        Returns:
            Lists by name for one text without return_tensors, else lists of rows or tensors.

        Raises:
            TypeError: an input is no text; bytes are none.
            ValueError: a text is not valid Unicode, or has more than 5,000,000 characters without
                truncation on the right; a setting that is not possible.
        """
        one, items = as_batch(text, text_pair, is_split_into_words)
        padding_side = padding_side or self.padding_side
        asked = (padding, truncation, max_length, pad_to_multiple_of, padding_side)
        pad, cut, max_length = self._strategies(*asked)
        wanted = {
            "input_ids": True,
            "token_type_ids": return_token_type_ids,
            "attention_mask": return_attention_mask,
            "special_tokens_mask": return_special_tokens_mask,
            "offset_mapping": return_offsets_mapping,
            "length": return_length,
        }
        plain = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        encodings = self._engine.encode(
            items,
            is_split_into_words=is_split_into_words,
            add_special_tokens=add_special_tokens,
            truncation=cut
            and {
                "max_length": max_length,
                "stride": stride,
                "strategy": cut,
                "direction": self.truncation_side,
            },
            padding=pad
            and {
                "length": max_length if pad == "max_length" else None,
                "direction": padding_side,
                "pad_id": self.pad_token_id,
                "pad_token": self.pad_token,
                "pad_type_id": self.pad_token_type_id,
                "pad_to_multiple_of": pad_to_multiple_of,
            },
            plain=plain,
            whole=return_overflowing_tokens,
        )
        names = [n for n, v in wanted.items() if (n in self.model_input_names if v is None else v)]
        data, encodings = as_entries(encodings, names, return_overflowing_tokens)
        if one and return_tensors is None and not return_overflowing_tokens:
            data = {n: v[0] if isinstance(v[0], list) else v for n, v in data.items()}
        return BatchEncoding(data, encodings, tensor_type=return_tensors)

    def encode(
        self, text: Any, text_pair: Any = None, *, add_special_tokens: bool = True, **kwargs: Any
    ) -> Any:
        """Return the ids of a text or pair; Args, Returns and Raises as the call's input_ids."""
        got = self(text, text_pair, add_special_tokens=add_special_tokens, **kwargs)
        return got["input_ids"]

    def tokenize(
        self, text: str, pair: str | None = None, *, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """Return the tokens of a text or pair as str; Args and Raises as the call's."""
        return self(text, pair, add_special_tokens=add_special_tokens, **kwargs).tokens()

    # --- files -----------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
        push_to_hub: bool = False,
    ) -> tuple[str, ...]:
        """Write tokenizer.json, tokenizer_config.json and more, which transformers opens too.

        Args:
            save_directory: made if need be.
            legacy_format: True writes no tokenizer.json.
            filename_prefix: in front of the names of the files, with "-".
            push_to_hub: False; nothing is uploaded.

        Returns:
            The paths of the files; vocab.txt is among them where it can hold the vocabulary.

        Raises:
            ValueError: push_to_hub=True; legacy_format=True, and vocab.txt cannot hold it.
            OSError: the files cannot be written; what was there is left as it was.
        """
        if push_to_hub:
            raise ValueError("push_to_hub: want False, got True: upload the directory yourself")
        kept = ("model_max_length", "padding_side", "truncation_side", "split_special_tokens")
        kept += ("clean_up_tokenization_spaces", "model_input_names")
        return write_tokenizer(
            Path(save_directory),
            self.backend_tokenizer,
            special=self.special_tokens_map,
            extra=self.extra_special_tokens,
            settings={name: getattr(self, name) for name in kept},
            legacy_format=bool(legacy_format),
            prefix=filename_prefix or "",
        )

    def save_vocabulary(
        self, save_directory: str | os.PathLike, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write vocab.txt, without added tokens; Args, Returns and Raises as save_pretrained."""
        return write_vocab(Path(save_directory), self.backend_tokenizer, filename_prefix or "")
