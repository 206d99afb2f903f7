"""What every model has around its forward: loading, saving, resizing, initialisation."""

import copy
import os
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from bert_fast import checkpoint
from bert_fast.config import BertConfig
from bert_fast.layers import BertEncoder
from bert_fast.outputs import ModelOutput

Model = TypeVar("Model", bound="BertPreTrainedModel")

# arguments of transformers' from_pretrained that ask for what cannot be had or is so anyway
_WITHOUT_EFFECT = ("attn_implementation", "low_cpu_mem_usage", "trust_remote_code")


class BertPreTrainedModel(nn.Module):
    """Base of the models; the state dict has transformers' names, shapes and order.

    Args:
        config: sizes and more; validated here, and again at every forward.
    """

    config_class: ClassVar[type] = BertConfig
    base_model_prefix: ClassVar[str] = "bert"
    main_input_name: ClassVar[str] = "input_ids"
    supports_gradient_checkpointing: ClassVar[bool] = True
    tied_weights: ClassVar[dict[str, str]] = {}  # parameter -> the one that it is
    _keys_to_ignore_on_save: ClassVar[None] = None  # transformers' Trainer asks when it resumes

    def __init__(self, config: BertConfig):
        super().__init__()
        if not isinstance(config, BertConfig):
            raise TypeError(f"config: want bert_fast.BertConfig, got {type(config).__name__}")
        config.validate()
        self.config = config
        self.register_state_dict_post_hook(_copy_tied)
        self.register_load_state_dict_post_hook(_tie_again)

    def post_init(self) -> None:
        """Initialise the parameters and tie those that are one; ends each model's __init__."""
        with torch.no_grad():
            for module, name, parameter in _own_parameters(self):
                self._init_parameter(module, name, parameter)
        self.tie_weights()

    def _init_parameter(self, module: nn.Module, name: str, parameter: Tensor) -> None:
        """Draw weights from N(0, initializer_range); biases 0, LayerNorm 1, padding row 0."""
        if name == "bias":
            parameter.zero_()
        elif isinstance(module, nn.LayerNorm):
            parameter.fill_(1)
        else:
            parameter.normal_(0.0, self.config.initializer_range)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                parameter[module.padding_idx].zero_()

    # --- files -----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls: type[Model],
        name_or_path: str | os.PathLike,
        *,
        config: BertConfig | None = None,
        dtype: torch.dtype | str | None = "auto",
        torch_dtype: torch.dtype | str | None = None,
        device_map: str | torch.device | None = None,
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
        transformers writes them. A head or pooler that the files lack is initialised and named in
        a warning, tensors that the model lacks are named in another.

        Args:
            name_or_path: a directory, or the id of a model on the hub.
            config: in place of the config.json.
            dtype: of the parameters; "auto" or None: as stored.
            torch_dtype: older name of `dtype`.
            device_map: the one device to load to.
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
        known = BertConfig.__dataclass_fields__
        fields = {name: kwargs.pop(name) for name in list(kwargs) if name in known}
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
            new_allowed=_is_head,
            strict=strict,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            source=name_or_path,
        )
        _warn(match, cls.__name__, name_or_path)
        model._fill(match, dtype)
        config.dtype = dtype
        model.eval()
        if device_map is not None:
            model.to(device_map)
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
        tied = {self._owner(name) for name in match.tied}
        with torch.no_grad():
            for module, name, parameter in list(_own_parameters(self)):
                if parameter.is_meta and (module, name) not in tied:
                    made = nn.Parameter(torch.empty_like(parameter, dtype=dtype, device="cpu"))
                    self._init_parameter(module, name, made)
                    setattr(module, name, made)
        for name, original in match.tied.items():
            self._tie(name, original)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write config.json and model.safetensors, which transformers opens too.

        Args:
            save_directory: made if need be.
            is_main_process: False: write nothing.
            state_dict: in place of the model's own.
            max_shard_size: bytes, or a string such as "2GB", above which the file is split.
            safe_serialization: True; pickles are not written.

        Raises:
            ValueError: safe_serialization=False.
            OSError: the files cannot be written; what was there is left as it was.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization: want True, got False: pickles are not written")
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
        checkpoint.save_tensors(
            save_directory, tensors, config=config, max_shard_size=max_shard_size
        )

    # --- weights ---------------------------------------------------------------------------------

    @property
    def base_model(self) -> nn.Module:
        """The BertModel inside, or the model itself."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating parameter."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of elements of all parameters, tied ones counted once.

        Args:
            only_trainable: count those that require gradients.
            exclude_embeddings: leave out the weights of nn.Embedding modules.
        """
        left_out = set()
        if exclude_embeddings:
            left_out = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        return sum(
            p.numel()
            for p in self.parameters()
            if id(p) not in left_out and (p.requires_grad or not only_trainable)
        )

    def tie_weights(self) -> None:
        """Make each tied parameter the one it is tied to, if the config says so."""
        if self.config.tie_word_embeddings:
            for name, original in self.tied_weights.items():
                self._tie(name, original)

    def _tie(self, name: str, original: str) -> None:
        setattr(*self._owner(name), self.get_parameter(original))

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        """Return the module that holds a parameter, and its name there."""
        module, _, attribute = name.rpartition(".")
        return self.get_submodule(module), attribute

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embeddings."""
        return self.base_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings; call tie_weights afterwards where they are tied."""
        self.base_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the layer that scores the vocabulary, None where there is none."""
        return None

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Change the vocabulary's size; return the word embeddings.

        Args:
            new_num_tokens: rows; None: as many as there are.
            pad_to_multiple_of: round the rows up.
            mean_resizing: give new rows the mean of the old ones, so that they are as likely as
                an average token; False: draw them as in a new model.
        """
        old = self.get_input_embeddings()
        size = old.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if size < 1:
            raise ValueError(f"new_num_tokens: want at least 1, got {size}")
        if size == old.num_embeddings:
            return old
        padding = old.padding_idx
        if padding is not None and padding >= size:
            padding = None
        new = nn.Embedding(size, old.embedding_dim, padding_idx=padding)
        self._resize(new, "weight", old.weight, size, mean_resizing)
        self.set_input_embeddings(new)
        decoder = self.get_output_embeddings()
        if decoder is not None:
            resized = nn.Linear(decoder.in_features, size)
            self._resize(resized, "weight", decoder.weight, size, mean_resizing)
            self._resize(resized, "bias", decoder.bias, size, False)
            self.set_output_embeddings(resized)
        self.config.vocab_size = size
        self.tie_weights()
        return self.get_input_embeddings()

    @torch.no_grad()
    def _resize(self, module: nn.Module, name: str, old: Tensor, size: int, mean: bool) -> None:
        """Give `module` a parameter of `size` rows: the old ones, and as many more as needed."""
        made = nn.Parameter(old.new_empty(size, *old.shape[1:]), requires_grad=old.requires_grad)
        self._init_parameter(module, name, made)
        if mean:
            made[:] = old.mean(0)
        kept = min(size, old.shape[0])
        made[:kept] = old[:kept]
        setattr(module, name, made)

    # --- training --------------------------------------------------------------------------------

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Keep only each layer's input in training, and compute the rest again in backward.

        Args:
            gradient_checkpointing_kwargs: of torch.utils.checkpoint; use_reentrant is False
                unless given.
        """
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        for encoder in self._encoders():
            encoder.checkpoint_options = options

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations in training again."""
        for encoder in self._encoders():
            encoder.checkpoint_options = None

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are computed again in backward."""
        return any(encoder.checkpoint_options is not None for encoder in self._encoders())

    def _encoders(self) -> Iterator[BertEncoder]:
        return (m for m in self.modules() if isinstance(m, BertEncoder))

    def enable_input_require_grads(self) -> None:
        """Make the embeddings require gradients though their weights are frozen.

        What reentrant checkpointing needs under an adapter (PEFT calls this).
        """

        def require(_module: nn.Module, _args: Any, output: Tensor) -> None:
            output.requires_grad_(True)

        self.disable_input_require_grads()
        self._input_hook = self.base_model.embeddings.register_forward_hook(require)

    def disable_input_require_grads(self) -> None:
        """Take back `enable_input_require_grads`."""
        hook = self.__dict__.pop("_input_hook", None)
        if hook is not None:
            hook.remove()

    # --- forward ---------------------------------------------------------------------------------

    def can_generate(self) -> bool:
        """Return False: an encoder does not generate text."""
        return False

    def wants_dict(self, return_dict: bool | None) -> bool:
        """Return whether forward returns a dict rather than a tuple."""
        return bool(self.config.return_dict if return_dict is None else return_dict)

    def output(
        self,
        cls: type[ModelOutput],
        encoded: Any,
        return_dict: bool | None,
        **fields: Tensor | None,
    ) -> ModelOutput | tuple[Tensor, ...]:
        """Return a head's fields with the encoder's hidden states and attentions."""
        extras = {"hidden_states": encoded.hidden_states, "attentions": encoded.attentions}
        out = cls(**fields, **extras)
        return out if self.wants_dict(return_dict) else out.to_tuple()


def _own_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield each parameter with its module and its name there."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield module, name, parameter


def _copy_tied(
    model: BertPreTrainedModel, state: dict[str, Tensor], prefix: str, _metadata: dict
) -> None:
    """Give tied names of a state dict a copy: savers of safetensors refuse shared memory.

    transformers' Trainer is one. With keep_vars=True parameters stay what they are.
    """
    for name, original in model.tied_weights.items():
        tied = state.get(prefix + name)
        if tied is not None and not isinstance(tied, nn.Parameter):
            shared = state.get(prefix + original)
            if shared is not None and shared.data_ptr() == tied.data_ptr():
                state[prefix + name] = tied.clone()


def _tie_again(model: BertPreTrainedModel, _keys: object) -> None:
    """Tie after load_state_dict: with assign=True it gives tied names parameters of their own."""
    model.tie_weights()


def _is_head(name: str) -> bool:
    """Return whether a parameter belongs to the pooler or a head, not to the encoder."""
    return not name.removeprefix("bert.").startswith(("embeddings.", "encoder."))


def _warn(match: checkpoint.Match, model: str, source: str | os.PathLike) -> None:
    """Name what the files lack and what the model lacks, in a warning each."""
    if match.new:
        names = ", ".join(match.new)
        message = f"{source}: initialised, not in the files: {names}; train before use"
        warnings.warn(message, stacklevel=3)
    if match.unexpected:
        names = ", ".join(match.unexpected)
        warnings.warn(f"{source}: in the files, not used by {model}: {names}", stacklevel=3)


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return a floating dtype from it or its name; None for "auto".

    Raises:
        ValueError: not a floating dtype.
    """
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f'dtype: want "auto" or a floating dtype, got {dtype!r}')
    return found
