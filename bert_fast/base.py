"""What every model has around its forward, but for files: weights, ties, sizes, training."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bert_fast.config import BertConfig
from bert_fast.layers import BertEncoder
from bert_fast.ops import kept
from bert_fast.outputs import ModelOutput


class BertBase(nn.Module):
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
            for module, name, parameter in own_parameters(self):
                if not parameter.is_meta:  # from_pretrained fills those
                    self.init_parameter(module, name, parameter)
        self.tie_weights()

    def init_parameter(self, module: nn.Module, name: str, parameter: Tensor) -> None:
        """Draw weights from N(0, initializer_range); biases 0, LayerNorm 1, padding row 0."""
        if name == "bias":
            parameter.zero_()
        elif isinstance(module, nn.LayerNorm):
            parameter.fill_(1)
        else:
            parameter.normal_(0.0, self.config.initializer_range)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                parameter[module.padding_idx].zero_()

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
                self.tie(name, original)

    def tie(self, name: str, original: str) -> None:
        """Make the parameter `name` the one that is `original`.

        Raises:
            ValueError: their shapes differ, as after set_input_embeddings with another size.
        """
        want, got = self.get_parameter(name).shape, self.get_parameter(original).shape
        if want != got:
            raise ValueError(
                f"{name}: want {[*want]} to tie it to {original}, got {[*got]};"
                " resize_token_embeddings changes both"
            )
        setattr(*self.owner(name), self.get_parameter(original))

    def owner(self, name: str) -> tuple[nn.Module, str]:
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
            padding = self.config.pad_token_id = None
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
        self.init_parameter(module, name, made)
        if mean:
            made[:] = old.mean(0)
        kept = min(size, old.shape[0])
        made[:kept] = old[:kept]
        setattr(module, name, made)

    # --- training --------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> "BertBase":
        """Set the mode; what was made of weights is dropped (docs/numerics.md)."""
        kept.forget()
        return super().train(mode)

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
        self.disable_input_require_grads()
        self._input_hook = self.base_model.embeddings.register_forward_hook(_require_grad)

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


def own_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield each parameter with its module and its name there."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield module, name, parameter


def _require_grad(_module: nn.Module, _args: Any, output: Tensor) -> None:
    output.requires_grad_(True)


def _copy_tied(model: BertBase, state: dict[str, Tensor], prefix: str, _metadata: dict) -> None:
    """Give tied names of a state dict a copy: savers of safetensors refuse shared memory.

    transformers' Trainer is one. With keep_vars=True parameters stay what they are.
    """
    for name, original in model.tied_weights.items():
        tied = state.get(prefix + name)
        if tied is not None and not isinstance(tied, nn.Parameter):
            shared = state.get(prefix + original)
            if shared is not None and shared.data_ptr() == tied.data_ptr():
                state[prefix + name] = tied.clone()


def _tie_again(model: BertBase, _keys: object) -> None:
    """Tie after load_state_dict: with assign=True it gives tied names parameters of their own."""
    model.tie_weights()
