"""Tokens and ids: the vocabulary, the tokens with a name, ids -> text, and rows of one length."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer

from bert_fast.batch_encoding import BatchEncoding
from bert_fast.tokenizer.engine import Engine
from bert_fast.tokenizer.files import SPECIAL_TOKENS, rules_of
from bert_fast.tokenizer.padding import pad_rows, strategies

_GLUED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class TokenizerBase:
    """What BertTokenizer knows of tokens and ids; texts are encoded in the subclass.

    Args:
        backend: the tokenizers' object; special tokens that it lacks are added to it.
        special: name -> token, or None.
        extra: special tokens without a name.
        added: tokens outside the vocabulary by id.

    Raises:
        ValueError: a token gets another id than `added` says.
    """

    is_fast = True
    pad_token_type_id = 0
    model_max_length: int
    model_input_names: list[str]
    padding_side: str
    clean_up_tokenization_spaces: bool

    def __init__(
        self,
        backend: Tokenizer,
        special: Mapping[str, str | AddedToken | None],
        extra: Sequence[str | AddedToken],
        added: Mapping[int, str | AddedToken],
    ):
        self._tokenizer, self._engine = backend, Engine(backend)
        self._special, self._extra = dict(special), list(extra)
        tokens = [token for _, token in sorted(added.items())]
        tokens += [token for token in (*special.values(), *extra) if token is not None]
        known = {token.content for token in self.added_tokens_decoder.values()}
        for token in tokens:
            if str(token) not in known:
                known.add(str(token))
                if isinstance(token, str):
                    token = AddedToken(token, special=True, normalized=False)
                elif token.content in self.all_special_tokens:
                    token.special = True
                backend.add_tokens([token])
        for i, token in added.items():
            if (got := backend.token_to_id(str(token))) != i:
                raise ValueError(f"added_tokens_decoder: want {token} with id {i}, got {got}")

    # --- tokens with a name ----------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """Return a special token by its name, `mask_token`, or its id, `mask_token_id`."""
        of = name.removesuffix("_id")
        if of not in SPECIAL_TOKENS:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        token = self.__dict__.get("_special", {}).get(of)
        if token is None:
            return None
        return str(token) if of == name else self.convert_tokens_to_ids(str(token))

    def __setattr__(self, name: str, value: Any) -> None:
        """Name another token, or its id, `pad_token`; it is not added to the vocabulary."""
        of = name.removesuffix("_id")
        if of not in SPECIAL_TOKENS:
            super().__setattr__(name, value)
            return
        if of != name and value is not None:
            value = self.convert_ids_to_tokens(int(value))
        if value is not None and not isinstance(value, str | AddedToken):
            raise ValueError(f"{name}: want a token or None, got {value!r}")
        self._special[of] = value

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The tokens with a name, by name."""
        return {name: str(t) for name, t in self._special.items() if t is not None}

    @property
    def extra_special_tokens(self) -> list[str]:
        """The special tokens without a name."""
        return [str(token) for token in self._extra]

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens, each once, those with a name first."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self.extra_special_tokens]))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of all_special_tokens."""
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def add_tokens(
        self,
        new_tokens: str | AddedToken | Sequence[str | AddedToken],
        special_tokens: bool = False,
    ) -> int:
        """Add tokens behind the vocabulary; a model needs resize_token_embeddings afterwards.

        Args:
            new_tokens: one or several; they are found in texts before these are split into words.
            special_tokens: decode leaves them out with skip_special_tokens.

        Returns:
            How many there were not before.
        """
        if not new_tokens:
            return 0
        tokens = list(new_tokens) if isinstance(new_tokens, list | tuple) else [new_tokens]
        backend = self._tokenizer
        try:
            return (backend.add_special_tokens if special_tokens else backend.add_tokens)(tokens)
        finally:
            self._engine.forget()

    def add_special_tokens(
        self,
        special_tokens_dict: Mapping[str, str | AddedToken | Sequence[str | AddedToken]],
        replace_extra_special_tokens: bool = True,
    ) -> int:
        """Name special tokens, and add those that are not in the vocabulary.

        Args:
            special_tokens_dict: name -> token; "extra_special_tokens" -> list of tokens.
            replace_extra_special_tokens: of the extra ones only these are special from now on.

        Returns:
            How many tokens there were not before.

        Raises:
            ValueError: a name that no special token has.
        """
        tokens = []
        for name, value in special_tokens_dict.items():
            if name in ("extra_special_tokens", "additional_special_tokens"):
                more = [_special(name, token) for token in value]
                kept = [] if replace_extra_special_tokens and more else self._extra
                known = {str(token) for token in kept}
                self._extra = [*kept, *(token for token in more if str(token) not in known)]
                tokens += more
            elif name in SPECIAL_TOKENS:
                self._special[name] = _special(name, value)
                tokens.append(self._special[name])
            else:
                want = ", ".join((*SPECIAL_TOKENS, "extra_special_tokens"))
                raise ValueError(f"special_tokens_dict: want names among {want}, got {name!r}")
        return self.add_tokens(tokens, special_tokens=True)

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Return how many special tokens a text, or a pair of texts, gets."""
        return self._tokenizer.num_special_tokens_to_add(pair)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Return [CLS] A [SEP], or [CLS] A [SEP] B [SEP], of ids."""
        first = [self.cls_token_id, *token_ids_0, self.sep_token_id]
        return first if token_ids_1 is None else [*first, *token_ids_1, self.sep_token_id]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Return 0 for [CLS] A [SEP] and 1 for B [SEP], given the ids of A and B."""
        second = 0 if token_ids_1 is None else len(token_ids_1) + 1
        return [0] * (len(token_ids_0) + 2) + [1] * second

    def get_special_tokens_mask(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: Sequence[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """Return 1 where a token is special, else 0.

        Args:
            token_ids_0: ids of A, or of a whole row.
            token_ids_1: ids of B.
            already_has_special_tokens: token_ids_0 is a whole row; else the mask is that of the
                row that build_inputs_with_special_tokens makes.

        Raises:
            ValueError: a whole row, and token_ids_1 beside it.
        """
        if already_has_special_tokens:
            if token_ids_1 is not None:
                raise ValueError("token_ids_1: want None beside a whole row, got ids")
            special = set(self.all_special_ids)
            return [int(int(i) in special) for i in token_ids_0]
        first = [1, *[0] * len(token_ids_0), 1]
        return first if token_ids_1 is None else [*first, *[0] * len(token_ids_1), 1]

    # --- the vocabulary --------------------------------------------------------------------------

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The tokenizers' object, without truncation and padding."""
        return self._tokenizer

    @property
    def do_lower_case(self) -> bool | None:
        """Whether capital letters become small ones; None where the rules are not BERT's."""
        return rules_of(self._tokenizer).get("do_lower_case")

    @property
    def strip_accents(self) -> bool | None:
        """Whether accents go; None: as do_lower_case."""
        return rules_of(self._tokenizer).get("strip_accents")

    @property
    def tokenize_chinese_chars(self) -> bool | None:
        """Whether each Chinese character is a word; None where the rules are not BERT's."""
        return rules_of(self._tokenizer).get("tokenize_chinese_chars")

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary, without added ones."""
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        """Return the number of tokens with the added ones."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def __bool__(self) -> bool:
        """Return True: a tokenizer is something, whatever is in it."""
        return True

    def get_vocab(self) -> dict[str, int]:
        """Return token -> id, with the added tokens."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    vocab = property(get_vocab)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Id -> token that is found in a text before it is split into words, special or not."""
        return self._tokenizer.get_added_tokens_decoder()

    def get_added_vocab(self) -> dict[str, int]:
        """Return token -> id of added_tokens_decoder."""
        return {token.content: i for i, token in sorted(self.added_tokens_decoder.items())}

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """Token -> id of added_tokens_decoder."""
        return self.get_added_vocab()

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """Return the id of a token, or of each; what is not in the vocabulary is unk_token."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        found = self._tokenizer.token_to_id(tokens)
        return self.unk_token_id if found is None and tokens != self.unk_token else found

    def convert_ids_to_tokens(
        self, ids: int | Sequence[int], skip_special_tokens: bool = False
    ) -> str | list[str | None] | None:
        """Return the token of an id, or of each; None where there is no such id.

        Args:
            ids: one, or several, as a tensor too.
            skip_special_tokens: leave special ones out of several.
        """
        if isinstance(ids, int):
            return self._tokenizer.id_to_token(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        return [self._tokenizer.id_to_token(i) for i in map(int, ids) if i not in skipped]

    # --- ids -> text -----------------------------------------------------------------------------

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Return the text of tokens: "##ing" joins what is in front of it."""
        decoder = self._tokenizer.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(list(tokens))

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str | list[str]:
        """Return the text of ids, or of each row of ids.

        Args:
            token_ids: an id, ids, or rows of them, as list, array or tensor.
            skip_special_tokens: leave special ones out.
            clean_up_tokenization_spaces: join "do n't"; None: the tokenizer's.

        Raises:
            ValueError: an id below 0.
        """
        if isinstance(token_ids, torch.Tensor | np.ndarray | np.generic):
            token_ids = token_ids.tolist()
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        if ids and not isinstance(ids[0], int | np.integer):
            settings = (skip_special_tokens, clean_up_tokenization_spaces)
            return [self.decode(row, *settings) for row in ids]
        if ids and min(ids) < 0:
            raise ValueError(f"token_ids: want ids from 0, got {min(ids)}")
        text = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        for glued in _GLUED if clean_up_tokenization_spaces else ():
            text = text.replace(glued, glued.strip())
        return text

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """Return the text of each row of ids; Args and Raises as decode."""
        texts = self.decode(sequences, skip_special_tokens, clean_up_tokenization_spaces)
        return [texts] if isinstance(texts, str) else texts

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Return encoded texts with rows of one length.

        Args:
            encoded_inputs: what a call returned, or a list of such, with lists, arrays or tensors;
                entries other than ids, types and masks stay as they are.
            padding: True or "longest", "max_length", or False.
            max_length: for "max_length"; None: model_max_length. Longer rows stay as they are.
            pad_to_multiple_of: padded lengths are multiples of this.
            padding_side: in place of the tokenizer's.
            return_attention_mask: None: if among model_input_names.
            return_tensors: "pt" or "np"; None: what encoded_inputs has.
            verbose: without effect.

        Raises:
            ValueError: no input_ids, entries of different lengths, no pad_token.
        """
        padding_side = padding_side or self.padding_side
        asked = (padding, False, max_length, pad_to_multiple_of, padding_side)
        pad, _, max_length = self._strategies(*asked)
        data, return_tensors = pad_rows(
            encoded_inputs,
            main=self.model_input_names[0],
            fill=(self.pad_token_id, self.pad_token_type_id),
            padding=pad,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            side=padding_side,
            attention_mask="attention_mask" in self.model_input_names
            if return_attention_mask is None
            else return_attention_mask,
            return_tensors=return_tensors,
        )
        return BatchEncoding(data, tensor_type=return_tensors)

    def __repr__(self) -> str:
        """Return the settings."""
        return (
            f"{type(self).__name__}(vocab_size={self.vocab_size}, tokens={len(self)}, "
            f"do_lower_case={self.do_lower_case}, model_max_length={self.model_max_length}, "
            f"special_tokens={self.special_tokens_map}, extra={self.extra_special_tokens})"
        )

    def _strategies(self, *asked: Any) -> tuple[str | None, str | None, int | None]:
        """Return what the arguments of a call mean, as `strategies` does for this tokenizer."""
        found = strategies(*asked, self.model_max_length)
        if found[0] is not None and self.pad_token is None:
            raise ValueError("padding: want a pad_token, got None")
        return found


def _special(name: str, token: str | AddedToken) -> AddedToken:
    """Return a special token as the library takes it: found as it is written.

    Raises:
        ValueError: it is no token.
    """
    if not isinstance(token, str | AddedToken):
        raise ValueError(f"{name}: want a token, got {token!r}")
    return AddedToken(token, special=True, normalized=False) if isinstance(token, str) else token
