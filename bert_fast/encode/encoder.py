"""Encoder: texts in, a vector for each out, with sentence-transformers' arguments."""

import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bert_fast.encode.fill_mask import fill_mask
from bert_fast.encode.pooling import POOLING, Pipeline, pool, read_pipeline
from bert_fast.files import find_directory
from bert_fast.heads import BertForMaskedLM
from bert_fast.model import BertModel
from bert_fast.progress import Progress
from bert_fast.tokenizer import BertTokenizer

# Texts that are tokenized at a time: their ids are kept as arrays, tokenizers' objects are not.
_WINDOW = 1024
# Tokens of a batch on the CPU: of 512 to 8,192 the fastest (MiniLM, Wikipedia and STS sentences, 2
# cores of an AMD EPYC, 2026-11-21), and 1,024 to 4,096 hardly slower.
_CPU_TOKENS = 2048
_FILES = "*.json", "*/*.json", "vocab.txt"  # what is read beside the weights


class Encoder:
    """A BERT, its tokenizer, and how its rows become one vector a text.

    A literal "[MASK]" or "[SEP]" in a text to encode is text. Batches are packed, by tokens: texts
    of like length meet in one, equal ones are computed once, and the vector of a text is the same
    in any batch, within the bounds of docs/numerics.md.

    Args:
        model: the encoder, or a model with the masked-LM head, which `fill_mask` needs.
        tokenizer: of its vocabulary.
        pooling: "cls", "mean" or "max", or several, whose vectors are joined.
        normalize: whether vectors get length 1.
        max_seq_length: tokens that are kept of a text; None: as many as model and tokenizer take.
        prompts: texts that go before a text, by name.
        default_prompt_name: the one to use where `encode` is not told any.
        lower_case: whether a text is put into lower case before the tokenizer has it.

    Raises:
        ValueError: an argument is none of these, or the vocabularies differ in size.
    """

    def __init__(
        self,
        model: BertModel | BertForMaskedLM,
        tokenizer: BertTokenizer,
        pooling: str | Sequence[str] = "mean",
        normalize: bool = False,
        max_seq_length: int | None = None,
        prompts: dict[str, str] | None = None,
        default_prompt_name: str | None = None,
        lower_case: bool = False,
    ):
        self.masked_lm = model if isinstance(model, BertForMaskedLM) else None
        self.model = model.base_model
        self.tokenizer = tokenizer
        self.pipeline = Pipeline(
            pooling=_pooling(pooling),
            normalize=normalize,
            lower_case=lower_case,
            prompts=dict(prompts or {}),
            default_prompt_name=default_prompt_name,
        )
        if default_prompt_name is not None:
            self._prompt(default_prompt_name, None)
        config = self.model.config
        if len(tokenizer) > config.vocab_size:
            got = f"{len(tokenizer)} tokens"
            raise ValueError(f"tokenizer: want at most vocab_size = {config.vocab_size}, got {got}")
        most = config.max_position_embeddings
        self._most = min(most, tokenizer.model_max_length or most)
        self.max_seq_length = self._most if max_seq_length is None else max_seq_length

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = "auto",
        pooling: str | Sequence[str] | None = None,
        normalize: bool | None = None,
        max_seq_length: int | None = None,
        **where: Any,
    ) -> "Encoder":
        """Return the encoder in a directory or on the Hugging Face hub, in evaluation mode.

        Reads modules.json and what belongs to it, as sentence-transformers writes it; without it
        the mean of the tokens is taken.

        Args:
            name_or_path: a directory, or the id of a model on the hub.
            device: where it runs; None: the GPU if there is one, else the CPU.
            dtype: of the parameters; "auto" or None: as stored.
            pooling: in place of what the files say.
            normalize: in place of what the files say.
            max_seq_length: in place of what the files say.
            **where: revision, cache_dir, token, local_files_only, force_download, as
                `BertModel.from_pretrained`.

        Raises:
            FileNotFoundError: no such directory or files.
            ValueError: a file is damaged, or files do not fit each other.
            NotImplementedError: modules.json asks for a module that is not supported.
        """
        directory = find_directory(name_or_path, _FILES, **where)
        pipeline, subfolder = read_pipeline(directory)
        at = {"subfolder": subfolder, **where}
        # Heads are left out, pooler and all: what the encoder lacks raises all the same.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*(initialised, not in|in) the files.*")
            loaded, found = BertForMaskedLM.from_pretrained(
                name_or_path, dtype=dtype, output_loading_info=True, **at
            )
        model = loaded.bert if found["missing_keys"] else loaded
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        encoder = cls(
            model.to(device),
            BertTokenizer.from_pretrained(name_or_path, **at),
            pooling=pipeline.pooling if pooling is None else pooling,
            normalize=pipeline.normalize if normalize is None else normalize,
            max_seq_length=max_seq_length,
            prompts=pipeline.prompts,
            default_prompt_name=pipeline.default_prompt_name,
            lower_case=pipeline.lower_case,
        )
        if max_seq_length is None and pipeline.max_seq_length is not None:
            encoder.max_seq_length = min(pipeline.max_seq_length, encoder.max_seq_length)
        return encoder

    # --- what it is ------------------------------------------------------------------------------

    @property
    def max_seq_length(self) -> int:
        """Tokens that are kept of a text, [CLS] and [SEP] included."""
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, length: int) -> None:
        if type(length) is not int or not 3 <= length <= self._most:
            raise ValueError(f"max_seq_length: want 3 to {self._most}, got {length!r}")
        self._max_seq_length = length

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    def to(self, device: str | torch.device) -> "Encoder":
        """Move the model to a device."""
        (self.masked_lm or self.model).to(device)
        return self

    def get_sentence_embedding_dimension(self) -> int:
        """Return the size of a text's vector."""
        return self.model.config.hidden_size * len(self.pipeline.pooling)

    def __repr__(self) -> str:
        config, p = self.model.config, self.pipeline
        return (
            f"Encoder({config.num_hidden_layers} layers x {config.hidden_size},"
            f" pooling={'+'.join(p.pooling)}, normalize={p.normalize},"
            f" max_seq_length={self.max_seq_length}, {self.model.dtype}, {self.device})"
        )

    # --- texts to vectors ------------------------------------------------------------------------

    def encode(
        self,
        sentences: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: str = "sentence_embedding",
        precision: str = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | torch.device | None = None,
        normalize_embeddings: bool = False,
    ) -> np.ndarray | Tensor | list[Tensor]:
        """Return the vectors of texts, in their order.

        Args:
            sentences: N texts, or one.
            prompt_name: name of the prompt to put before each text.
            prompt: the prompt itself.
            batch_size: a batch has no more tokens than this many texts of max_seq_length have.
            show_progress_bar: whether to show one on stderr; None: where stderr is a terminal.
            output_value: "sentence_embedding", or "token_embeddings" for the rows themselves.
            precision: "float32".
            convert_to_numpy: return an array; False: a list of N tensors.
            convert_to_tensor: return one tensor, on the model's device.
            device: moves the model there first.
            normalize_embeddings: give vectors length 1, beside what `normalize` says.

        Returns:
            (N, D) fp32 (fp64 of a model in fp64), (D,) for one text. With token_embeddings a list
            of N tensors (tokens, D), one tensor for one text.

        Raises:
            TypeError: a sentence is not a text.
            ValueError: an argument is none of these, or a text has no Unicode.
        """
        one = isinstance(sentences, str)
        texts = [sentences] if one else list(sentences)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"sentences[{i}]: want str, got {type(text).__name__}")
        if output_value not in ("sentence_embedding", "token_embeddings"):
            want = "sentence_embedding or token_embeddings"
            raise ValueError(f"output_value: want {want}, got {output_value!r}")
        if precision != "float32":
            raise ValueError(f"precision: want float32, got {precision!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size: want 1 or more, got {batch_size}")
        if device is not None:
            self.to(device)
        ids, places = _distinct(self._tokenize(texts, self._prompt(prompt_name, prompt)))
        rows: list[Tensor | None] = [None] * len(ids)
        vectors = torch.empty(
            len(ids),
            self.get_sentence_embedding_dimension(),
            dtype=torch.promote_types(self.model.dtype, torch.float32),
            device=self.device if convert_to_tensor else "cpu",
        )
        normalize = self.pipeline.normalize or normalize_embeddings
        done = 0
        with Progress(len(ids), show_progress_bar) as progress, torch.no_grad():
            for batch in self._batches(ids, batch_size):
                x, lengths = self._forward([ids[i] for i in batch])
                if output_value == "token_embeddings":
                    for i, part in zip(batch, x.split(lengths.tolist()), strict=True):
                        rows[i] = part
                else:
                    pooled = pool(x, lengths, self.pipeline.pooling, normalize)
                    vectors[batch] = pooled.to(vectors.device)
                done += len(batch)
                progress.update(done, done, f"{done:,} of {len(ids):,} texts")
        if output_value == "token_embeddings":
            if len(ids) < len(texts):  # to write to one must not change another
                rows = [rows[place].clone() for place in places]
            return rows[0] if one else rows
        if len(ids) < len(texts):
            vectors = vectors[places]
        vectors = vectors[0] if one else vectors
        if convert_to_tensor:
            return vectors
        return vectors.numpy() if convert_to_numpy or one else list(vectors)

    def _prompt(self, name: str | None, prompt: str | None) -> str:
        """Return what goes before each text."""
        if prompt is not None:
            return prompt
        name = self.pipeline.default_prompt_name if name is None else name
        if name is None:
            return ""
        if name not in self.pipeline.prompts:
            want = ", ".join(sorted(self.pipeline.prompts)) or "none: there are no prompts"
            raise ValueError(f"prompt_name: want {want}, got {name!r}")
        return self.pipeline.prompts[name]

    def _tokenize(self, texts: list[str], prompt: str) -> list[np.ndarray]:
        """Return the ids (tokens,) of each text."""
        ids = []
        for first in range(0, len(texts), _WINDOW):
            part = [prompt + text for text in texts[first : first + _WINDOW]]
            if self.pipeline.lower_case:
                part = [text.lower() for text in part]
            found = self.tokenizer(
                part,
                truncation=True,
                max_length=self.max_seq_length,
                split_special_tokens=True,
                return_attention_mask=False,
                return_token_type_ids=False,
            )
            ids += [np.array(row, dtype=np.int64) for row in found["input_ids"]]
        return ids

    def _batches(self, ids: list[np.ndarray], batch_size: int) -> Iterator[list[int]]:
        """Yield which texts go together: the longest first, as many as their tokens allow."""
        budget = batch_size * self.max_seq_length
        if self.device.type == "cpu":
            budget = min(budget, _CPU_TOKENS)
        batch: list[int] = []
        tokens = 0
        for i in sorted(range(len(ids)), key=lambda i: -len(ids[i])):
            if batch and tokens + len(ids[i]) > budget:
                yield batch
                batch, tokens = [], 0
            batch.append(i)
            tokens += len(ids[i])
        if batch:
            yield batch

    def _forward(self, ids: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Return the rows (T, D) of a packed batch, and how many each text has."""
        lengths = torch.tensor([len(row) for row in ids])
        cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        tokens = torch.from_numpy(np.concatenate(ids))[None]
        tokens, cu_seqlens, lengths = (
            t.to(self.device, non_blocking=True) for t in (tokens, cu_seqlens, lengths)
        )
        encoded = self.model(
            tokens,
            cu_seq_lens_q=cu_seqlens,
            max_length_q=max(map(len, ids)),
            packed_output=True,
        )
        return encoded.rows, lengths

    def similarity(self, one: np.ndarray | Tensor, other: np.ndarray | Tensor) -> Tensor:
        """Return the cosines (N, M) of vectors (N, D) and (M, D); a vector alone counts as one."""
        one, other = (torch.atleast_2d(torch.as_tensor(v)) for v in (one, other))
        return nn.functional.normalize(one, dim=1) @ nn.functional.normalize(other, dim=1).mT

    # --- masks -----------------------------------------------------------------------------------

    def fill_mask(
        self, text: str | Sequence[str], top_k: int = 5
    ) -> list[dict[str, Any]] | list[list[Any]]:
        """Return the likeliest tokens at each mask, as transformers' pipeline does.

        Args:
            text: with one or more of the tokenizer's mask tokens; or several such texts.
            top_k: how many.

        Returns:
            For each text a list of dicts, the likeliest first: score (a probability), token (its
            id), token_str, sequence (the text with it). With several masks a list for each.

        Raises:
            ValueError: there is no masked-LM head, no mask, or the text is too long.
        """
        if self.masked_lm is None:
            raise ValueError("fill_mask: want a model with a masked-LM head, got none in its files")
        texts = [text] if isinstance(text, str) else list(text)
        found = [fill_mask(self.masked_lm, self.tokenizer, t, top_k) for t in texts]
        return found[0] if isinstance(text, str) else found


def _pooling(pooling: str | Sequence[str]) -> tuple[str, ...]:
    modes = (pooling,) if isinstance(pooling, str) else tuple(pooling)
    if not modes or any(mode not in POOLING for mode in modes):
        raise ValueError(f"pooling: want {', '.join(POOLING)} or several of them, got {pooling!r}")
    return modes


def _distinct(ids: list[np.ndarray]) -> tuple[list[np.ndarray], list[int]]:
    """Return each of the rows of ids once, and which of these every row is."""
    first: dict[bytes, int] = {}
    places = [first.setdefault(row.tobytes(), len(first)) for row in ids]
    return [np.frombuffer(row, dtype=np.int64) for row in first], places
