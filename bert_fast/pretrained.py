"""Models from files and back: from_pretrained and save_pretrained."""

import copy
import os
import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bert_fast import checkpoint
from bert_fast.base import BertBase, own_parameters
from bert_fast.config import DTYPES, BertConfig
from bert_fast.names import is_head

Model = TypeVar("Model", bound="BertPreTrainedModel")

# arguments of transformers' from_pretrained that ask for what cannot be had or is so anyway
_WITHOUT_EFFECT = (
    "attn_implementation",
    "low_cpu_mem_usage",
    "trust_remote_code",
    "use_safetensors",
    "weights_only",
)


class BertPreTrainedModel(BertBase):
    """Base of the models; the state dict has transformers' names, shapes and order.

    Args:
        config: sizes and more; validated here, and again at every forward.
    """

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        config: BertConfig | str | os.PathLike | None = None,
        dtype: torch.dtype | str | None = "auto",
        torch_dtype: torch.dtype | str | None = None,
        device_map: str | torch.device | dict | None = None,
        strict: bool = False,
        ignore_mismatched_sizes: bool = False,
        allow_nonfinite: bool = False,
        output_loading_info: bool = False,
        subfolder: str = "",
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **kwargs: Any,
    ) -> Model:
        """Return the model in a directory or on the Hugging Face hub, in evaluation mode.

        Reads config.json and model.safetensors (or its shards, or pytorch_model.bin) as
        transformers writes them, or bert_config.json and bert_model.ckpt.* as Google does. A head
        or pooler that the files lack is initialised and named in a warning, tensors that the model
        lacks are named in another.

        Args:
            pretrained_model_name_or_path: a directory, or the id of a model on the hub.
            config: in place of the config.json; a directory or id: the one there.
            dtype: of the parameters; "auto" or None: as stored.
            torch_dtype: older name of `dtype`.
            device_map: the one device to load to; "auto": the GPU if there is one.
            strict: raise where a warning would be given.
            ignore_mismatched_sizes: initialise a head whose stored tensors have another shape.
            allow_nonfinite: accept weights that are NaN or infinite.
            output_loading_info: return (model, dict of what was missing, unexpected, mismatched).
            subfolder: of the directory or repository.
            revision: branch, tag or commit on the hub.
            cache_dir: the hub's cache.
            token: for private models on the hub.
            local_files_only: take what the cache has, ask nobody.
            force_download: download again what the cache has.
            **kwargs: fields of the config (num_labels, id2label, ...) that replace those of
                config.json; the rest goes to the model's __init__ (add_pooling_layer).

        Raises:
            FileNotFoundError: no such directory or files.
            ValueError: a file is damaged or inconsistent, an encoder weight is missing or of
                another shape than the config says, a weight is not finite.
            TypeError: an unknown argument.
        """
        name_or_path = pretrained_model_name_or_path
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        ignored = [name for name in _WITHOUT_EFFECT if kwargs.pop(name, None) is not None]
        if ignored:
            names = ", ".join(ignored)
            warnings.warn(f"from_pretrained: without effect here: {names}", stacklevel=2)
        where = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
            "force_download": force_download,
        }
        directory = checkpoint.locate(name_or_path, subfolder=subfolder, **where)
        known = BertConfig.field_names()
        fields = {name: kwargs.pop(name) for name in list(kwargs) if name in known}
        if isinstance(config, str | os.PathLike):
            config = BertConfig.from_pretrained(config, **where)
        elif config is not None and not isinstance(config, BertConfig):
            config = BertConfig.from_dict(config.to_dict())
        if config is None:
            config = BertConfig.from_pretrained(directory, **fields)
        else:
            config = copy.deepcopy(config)
            config.update(fields)
        config.name_or_path = str(name_or_path)
        tensors = checkpoint.read_tensors(directory, allow_nonfinite=allow_nonfinite)
        dtype = _as_dtype(dtype if torch_dtype is None else torch_dtype)
        dtype = checkpoint.checkpoint_dtype(tensors) if dtype is None else dtype
        with torch.device("meta"):
            model = cls(config, **kwargs)
        match = checkpoint.match(
            tensors,
            model.state_dict(),
            tied=cls.tied_weights if config.tie_word_embeddings else {},
            new_allowed=is_head,
            strict=strict,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            source=name_or_path,
        )
        _warn(match, cls.__name__, name_or_path)
        model._fill(match, dtype)
        config.dtype = dtype
        model.eval()
        if device_map is not None:
            model.to(_one_device(device_map))
        if not output_loading_info:
            return model
        return model, {
            "missing_keys": match.new,
            "unexpected_keys": match.unexpected,
            "mismatched_keys": match.mismatched,
        }

    def _fill(self, match: checkpoint.Match, dtype: torch.dtype) -> None:
        """Give a model made on the meta device its tensors, and initialise what is left."""
        if match.untied:  # said in the config too, so that a saved model is loaded as it is
            self.config.tie_word_embeddings = False
        loaded = {name: t.to(dtype) for name, t in match.tensors.items()}
        self.load_state_dict(loaded, strict=False, assign=True)
        tied = {self.owner(name) for name in match.tied}
        with torch.no_grad():
            for module, name, parameter in list(own_parameters(self)):
                if parameter.is_meta and (module, name) not in tied:
                    made = nn.Parameter(torch.empty_like(parameter, dtype=dtype, device="cpu"))
                    self.init_parameter(module, name, made)
                    setattr(module, name, made)
        for name, original in match.tied.items():
            self.tie(name, original)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        push_to_hub: bool = False,
        **_: Any,
    ) -> None:
        """Write config.json and model.safetensors, which transformers opens too.

        Args:
            save_directory: made if need be.
            is_main_process: False: write nothing.
            state_dict: in place of the model's own.
            max_shard_size: bytes, or a string such as "2GB", above which the file is split.
            safe_serialization: True; pickles are not written.
            push_to_hub: False; nothing is uploaded.
            **_: other arguments of transformers' (save_function, token, ...), without effect.

        Raises:
            ValueError: safe_serialization=False or push_to_hub=True.
            OSError: the files cannot be written; what was there is left as it was.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization: want True, got False: pickles are not written")
        if push_to_hub:
            raise ValueError("push_to_hub: want False, got True: upload the directory yourself")
        if not is_main_process:
            return
        config = self.config
        config.architectures, config.dtype = [type(self).__name__], self.dtype
        tensors = dict(self.state_dict() if state_dict is None else state_dict)
        if config.tie_word_embeddings:
            for name, original in self.tied_weights.items():
                if {name, original} <= tensors.keys():
                    if torch.equal(tensors[name], tensors[original]):
                        del tensors[name]
                    else:  # untied by hand: the config must not tie it again
                        config.tie_word_embeddings = False
        checkpoint.save_tensors(
            save_directory, tensors, config=config, max_shard_size=max_shard_size
        )


def _warn(match: checkpoint.Match, model: str, source: str | os.PathLike) -> None:
    """Name what the files lack and what the model lacks, in a warning each."""
    if match.new:
        names = ", ".join(match.new)
        message = f"{source}: initialised, not in the files: {names}; train before use"
        warnings.warn(message, stacklevel=3)
    if match.unexpected:
        names = ", ".join(match.unexpected)
        warnings.warn(f"{source}: in the files, not used by {model}: {names}", stacklevel=3)


def _one_device(device_map: str | torch.device | dict) -> torch.device | str | int:
    """Return the one device of transformers' device_map.

    Raises:
        ValueError: it names several.
    """
    if device_map == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device_map, dict):
        if len(device_map) != 1:
            raise ValueError(f"device_map: want one device, got {device_map}")
        return next(iter(device_map.values()))
    return device_map


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return a dtype that the ops take, from it or its name; None for "auto".

    Raises:
        ValueError: another.
    """
    if dtype is None or dtype == "auto":
        return None
    if dtype not in DTYPES:
        raise ValueError(f'dtype: want "auto", fp32, fp16, bf16 or fp64, got {dtype!r}')
    return DTYPES[dtype]
