"""Texts -> encodings, by the `tokenizers` library, without state between calls.

The library keeps truncation and padding in the tokenizer object. Here each combination of settings
has an object of its own, which shares the vocabulary and never changes, so that threads may ask
for different things at once and a forked process finds nothing half done.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from bert_fast.tokenizer.vocabulary import SURROGATE

MAX_CHARACTERS = 5_000_000  # of a text that is encoded whole, which takes 1 to 2 GB then
MAX_PIECES = 4_000_000  # tokens in all pieces of a pair, of 100 to 200 bytes each
MAX_KEPT = 64  # objects for combinations of settings

Text = str | Sequence[str]  # or a text that is split into words
Item = Text | tuple[Text, Text]

# A word ends before each of these: white space, stops and commas, and those of Chinese.
_BREAKS = " \t\n\r.,!?\u3002\uff0c\u3001\uff01\uff1f"
_CHINESE = re.compile("[\u4e00-\u9fff]")  # and before these, where each is a word
_ENTRIES = {  # of a call's result: from an Encoding
    "input_ids": attrgetter("ids"),
    "token_type_ids": attrgetter("type_ids"),
    "attention_mask": attrgetter("attention_mask"),
    "special_tokens_mask": attrgetter("special_tokens_mask"),
    "offset_mapping": attrgetter("offsets"),
    "length": len,
}


class Engine:
    """Encodes by a tokenizer's vocabulary and rules, under settings given with each call.

    Args:
        backend: has rules, vocabulary, added tokens and post-processor, neither truncation nor
            padding; what is changed in it is followed, added tokens after `forget`.
    """

    def __init__(self, backend: Tokenizer):
        self.backend = backend
        self._made: dict[Any, Tokenizer] = {}
        self._plain: WordPiece | None = None

    def __reduce__(self) -> tuple[type, tuple[Tokenizer]]:
        """Return what is pickled and copied: the backend alone."""
        return Engine, (self.backend,)

    def forget(self) -> None:
        """Drop what was made before tokens were added to the backend."""
        self._made, self._plain = {}, None

    def encode(
        self,
        items: Sequence[Item],
        *,
        is_split_into_words: bool,
        add_special_tokens: bool,
        truncation: Mapping[str, Any] | None,
        padding: Mapping[str, Any] | None,
        plain: bool,
        whole: bool,
    ) -> list[Encoding]:
        """Return an Encoding for each item.

        Where only the first tokens of a text are wanted, only so much of it is encoded as those
        depend on.

        Args:
            items: texts, or pairs of texts.
            is_split_into_words: a text is a sequence of words.
            add_special_tokens: put [CLS] and [SEP] where they belong.
            truncation: of enable_truncation in `tokenizers`; None: do not.
            padding: of enable_padding; None: do not.
            plain: special and added tokens in a text are text: their ids do not come from it.
            whole: what truncation cuts off is wanted too, in `overflowing`.

        Raises:
            TypeError: an item is neither a text nor a pair of them.
            ValueError: a text is not valid Unicode or too long, or cannot be truncated as asked.
        """
        pairs = [_pair(i, item, is_split_into_words) for i, item in enumerate(items)]
        if truncation and add_special_tokens:
            least = self.backend.num_special_tokens_to_add(any(len(pair) == 2 for pair in pairs))
            if truncation["max_length"] < least:  # the library would not truncate at all
                want = f"at least {least} for the special tokens"
                raise ValueError(f"max_length: want {want}, got {truncation['max_length']}")
        if truncation and truncation["direction"] == "right" and not whole:
            pairs = [self._cut(i, pair, truncation, plain) for i, pair in enumerate(pairs)]
        for i, pair in enumerate(pairs):
            _refuse_long(i, pair)
            if truncation:
                self._refuse_many(i, pair, truncation, plain)
        try:
            return self._with(truncation, padding, plain).encode_batch(
                [pair if len(pair) == 2 else pair[0] for pair in pairs],
                is_pretokenized=is_split_into_words,
                add_special_tokens=add_special_tokens,
            )
        except TypeError:
            for i, pair in enumerate(pairs):
                _explain(i, pair)
            raise
        except Exception as error:  # the library has no class of its own
            raise ValueError(f"text: {error}") from error
        except BaseException as error:  # it panics where a stride does not fit a pair
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"stride, max_length: {error}") from error

    def _with(
        self,
        truncation: Mapping[str, Any] | None,
        padding: Mapping[str, Any] | None,
        plain: bool,
    ) -> Tokenizer:
        """Return the object with these settings."""
        backend = self.backend
        rules = backend.normalizer, backend.pre_tokenizer, backend.post_processor
        settings = [tuple((given or {}).items()) for given in (truncation, padding)]
        key = (*settings, plain, *map(repr, rules))
        if (found := self._made.get(key)) is not None:
            return found
        made = Tokenizer(self._plain_model() if plain else backend.model)
        made.normalizer, made.pre_tokenizer, made.post_processor = rules
        if not plain:
            made.add_tokens([token for _, token in sorted(self._added().items())])
        if truncation:
            made.enable_truncation(**truncation)
        if padding:
            made.enable_padding(**padding)
        if len(self._made) >= MAX_KEPT:
            self._made = {}
        self._made[key] = made
        return made

    def _added(self) -> dict[int, AddedToken]:
        """Return the added tokens, special ones among them, by id."""
        return self.backend.get_added_tokens_decoder()

    def _plain_model(self) -> WordPiece:
        """Return the model without the special tokens, but with the unknown one."""
        if self._plain is None:
            model = self.backend.model
            special = {token.content for token in self._added().values() if token.special}
            vocab = self.backend.get_vocab(with_added_tokens=False)
            self._plain = WordPiece(
                {t: i for t, i in vocab.items() if t == model.unk_token or t not in special},
                unk_token=model.unk_token,
                continuing_subword_prefix=model.continuing_subword_prefix,
                max_input_chars_per_word=model.max_input_chars_per_word,
            )
        return self._plain

    def _breaks(self, plain: bool) -> re.Pattern | None:
        """Return what finds a place in front of which no token reaches across; None: no way.

        BERT's rules look at a word and nothing around it. An added token ends a word as well; it
        must not hold the place itself, nor take up the white space around it.
        """
        rules = self.backend.normalizer, self.backend.pre_tokenizer
        if not isinstance(rules[0], BertNormalizer) or not isinstance(rules[1], BertPreTokenizer):
            return None
        added = [] if plain else list(self._added().values())
        if any(t.lstrip or t.rstrip or any(map(str.isspace, t.content)) for t in added):
            return None
        held = "".join(t.content for t in added)
        chinese = rules[0].handle_chinese_chars and not _CHINESE.search(held)
        found = re.escape("".join(c for c in _BREAKS if c not in held))
        return re.compile(f"[{found}{_CHINESE.pattern[1:-1] if chinese else ''}]")

    def _cut(
        self, i: int, pair: tuple[Text, ...], truncation: Mapping[str, Any], plain: bool
    ) -> tuple[Text, ...]:
        """Return the texts without what cannot reach the tokens that truncation keeps.

        A cut text has more tokens than may stay, so nothing of what stays is missing. Where both
        texts of a pair give, it also matters which is longer, and that is kept so.
        """
        most = truncation["max_length"]
        rivals = len(pair) == 2 and truncation["strategy"] == "longest_first"
        longest = _first_size(most) * (2 if rivals else 8)  # shorter ones are not worth it
        breaks = self._breaks(plain)
        cut = [len(t) > longest and (breaks is not None or not isinstance(t, str)) for t in pair]
        if not any(cut) or (all(cut) and rivals and max(map(len, pair)) > MAX_CHARACTERS):
            return pair
        if all(isinstance(text, str) for text in pair):
            _explain(i, pair)  # what is wrong behind the cut is wrong, too
        parts = [
            self._part(text, most, breaks, plain) if yes else text
            for text, yes in zip(pair, cut, strict=True)
        ]
        if rivals:
            j = int(cut[1])
            if all(cut):
                j = int(self._count(pair[0], plain) <= self._count(pair[1], plain))
            need = max(most, self._count(parts[1 - j], plain))
            parts[j] = self._part(pair[j], need, breaks, plain)
        return tuple(parts)

    def _part(self, text: Text, need: int, breaks: re.Pattern | None, plain: bool) -> Text:
        """Return the start of a text that has more than `need` tokens, the same as in the whole.

        Where there is no such part of at most MAX_CHARACTERS, it is the whole.
        """
        size = _first_size(need)
        while size < len(text):
            if isinstance(text, str):
                found = breaks.search(text, size)
                size = found.start() if found else len(text)
            if size >= len(text) or size > MAX_CHARACTERS:
                break
            if self._count(text[:size], plain) > need:
                return text[:size]
            size *= 2
        return text

    def _refuse_many(
        self, i: int, pair: tuple[Text, ...], truncation: Mapping[str, Any], plain: bool
    ) -> None:
        """Raise where the pieces of what is cut off would take too much memory.

        The library makes them, wanted or not, and joins each of one text with each of the other.
        """
        most, stride = truncation["max_length"], truncation["stride"]
        if len(pair) == 2 and truncation["strategy"] != "longest_first":
            return
        kept = max(0, most - 3) // len(pair)

        def tokens(sizes: Iterable[int]) -> int:
            pieces = [1 + max(0, size - kept) // max(1, kept - stride) for size in sizes]
            return (most + 3) * math.prod(pieces)

        # characters are quickly counted, and tokens hardly ever more
        if tokens(map(_characters, pair)) <= MAX_PIECES:
            return
        if (found := tokens(self._count(text, plain) for text in pair)) > MAX_PIECES:
            name = "text" if len(pair) == 1 else "text and text_pair"
            raise ValueError(
                f"{name}[{i}]: want at most {MAX_PIECES} tokens in the pieces that truncation "
                f"makes, got about {found}; a smaller stride makes fewer, for pairs also "
                f'"only_first" or "only_second"'
            )

    def _count(self, text: Text, plain: bool) -> int:
        """Return how many tokens a text has; 0 where it cannot be encoded, and is refused later."""
        if len(text) > MAX_CHARACTERS:
            return 0
        words = not isinstance(text, str)
        try:
            return len(self._with(None, None, plain).encode(text, None, words, False))
        except TypeError:
            return 0


def as_batch(text: Any, text_pair: Any, is_split_into_words: bool) -> tuple[bool, list[Any]]:
    """Return whether there is one text only, and the elements of the batch.

    Raises:
        TypeError: text is none, nor a list of any; it is a batch, and text_pair is none.
        ValueError: as many second texts as first ones are wanted.
    """
    if not isinstance(text, str | list | tuple):
        raise TypeError(f"text: want a str or a list, got {type(text).__name__}")
    if is_split_into_words:
        batched = not isinstance(text, str) and bool(text) and isinstance(text[0], list | tuple)
    else:
        batched = not isinstance(text, str)
    if not batched:  # an empty second text counts as none here, as in transformers
        return True, [(text, text_pair)] if text_pair else [text]
    if text_pair is None:
        return False, list(text)
    if not isinstance(text_pair, list | tuple):
        raise TypeError(f"text_pair: want a list, as text is one, got {type(text_pair).__name__}")
    if len(text) != len(text_pair):
        raise ValueError(f"text_pair: want {len(text)} texts, as in text, got {len(text_pair)}")
    return False, list(zip(text, text_pair, strict=True))


def as_entries(
    encodings: Sequence[Encoding], names: Sequence[str], overflowing: bool
) -> tuple[dict[str, list], list[Encoding]]:
    """Return a list for each name, with an element for each row, and the Encoding of each row.

    Args:
        encodings: one for each element of the batch.
        names: the entries to make.
        overflowing: what was cut off makes rows, too, and `overflow_to_sample_mapping` says which
            element of the batch a row belongs to.
    """
    rows, samples = list(encodings), None
    if overflowing:
        parts = [(i, row) for i, e in enumerate(encodings) for row in (e, *e.overflowing)]
        rows, samples = [row for _, row in parts], [i for i, _ in parts]
    entries = {name: list(map(_ENTRIES[name], rows)) for name in names}
    if samples is not None:
        entries["overflow_to_sample_mapping"] = samples
    return entries, rows


def _pair(i: int, item: Item, is_split_into_words: bool) -> tuple[Text, ...]:
    """Return an item as (text,) or (text, text)."""
    if is_split_into_words:
        if isinstance(item, list | tuple):
            if not item or isinstance(item[0], str):
                return (item,)
            if len(item) == 2 and all(isinstance(text, list | tuple) for text in item):
                return tuple(item)
        want = "a list of words, or two of them"
    else:
        if isinstance(item, str):
            return (item,)
        if isinstance(item, list | tuple) and len(item) == 2:
            for name, text in zip(("text", "text_pair"), item, strict=True):
                if not isinstance(text, str):
                    raise TypeError(f"{name}[{i}]: want a str, got {type(text).__name__}")
            return tuple(item)
        want = "a str, or two of them"
    raise TypeError(f"text[{i}]: want {want}, got {type(item).__name__}: {item!r:.50}")


def _first_size(tokens: int) -> int:
    """Return how much of a text to try first, for so many tokens."""
    return 64 + 4 * tokens


def _characters(text: Text) -> int:
    """Return the length of a text; what is no word counts nothing, and is refused later."""
    return len(text) if isinstance(text, str) else sum(len(w) for w in text if isinstance(w, str))


def _refuse_long(i: int, pair: tuple[Text, ...]) -> None:
    """Raise where a text would take too much memory."""
    for name, text in zip(("text", "text_pair"), pair, strict=False):
        if (size := _characters(text)) > MAX_CHARACTERS:
            raise ValueError(
                f"{name}[{i}]: want at most {MAX_CHARACTERS} characters, or truncation and a place "
                f"to cut before, got {size}"
            )


def _explain(i: int, pair: tuple[Text, ...]) -> None:
    """Raise the error that says where a text, number i of the batch, is no valid Unicode."""
    for name, text in zip(("text", "text_pair"), pair, strict=False):
        for j, word in enumerate([text] if isinstance(text, str) else text):
            where = f"{name}[{i}]" if isinstance(text, str) else f"{name}[{i}][{j}]"
            if not isinstance(word, str):
                raise TypeError(f"{where}: want a str, got {type(word).__name__}")
            if bad := SURROGATE.search(word):
                got = f"the lone surrogate U+{ord(bad[0]):04X} at character {bad.start()}"
                raise ValueError(f"{where}: want valid Unicode, got {got}")
