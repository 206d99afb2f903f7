"""What the models return: a dict whose entries are attributes and tuple items as well.

Field names and their order are those of transformers, so `out.logits`, `out["logits"]`, `out[0]`
and `loss, logits = out.to_tuple()` mean the same here as there.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.utils._pytree import register_pytree_node


class ModelOutput(dict):
    """A dict in the order of its fields; a field that is None is left out of the dict.

    Args:
        values: a mapping or pairs, so that tools that rebuild outputs (accelerate, DataParallel)
            can.
        **fields: values by name.

    Raises:
        TypeError: a name is not a field of the class.
    """

    fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any):
        """Take the annotated names as the fields."""
        super().__init_subclass__(**kwargs)
        cls.fields = tuple(cls.__annotations__)
        # DDP's static graph, FSDP and torch.export look for tensors through this
        register_pytree_node(
            cls,
            lambda out: (list(out.values()), tuple(out)),
            lambda values, names: cls(zip(names, values, strict=True)),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def __init__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), **fields: Any):
        given = dict(values, **fields)
        for name in given:
            if name not in self.fields:
                want = ", ".join(self.fields)
                raise TypeError(f"{type(self).__name__}: want the fields {want}, got {name!r}")
        super().__init__((n, given[n]) for n in self.fields if given.get(n) is not None)

    def __getattr__(self, name: str) -> Any:
        """Return the field `name`, None when it is absent."""
        if name in self.fields:
            return self.get(name)
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Set the field `name`; None removes it."""
        if name not in self.fields:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}")
        values = {**self, name: value}
        self.clear()
        self.update((n, values[n]) for n in self.fields if values.get(n) is not None)

    def __getitem__(self, key: str | int | slice) -> Any:
        """Return a field by name, or by its index among the fields that are present."""
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are present, in order."""
        return tuple(self.values())


class BertModelOutput(ModelOutput):
    """Of BertModel: (B, L, D) last hidden state, (B, D) pooled [CLS], per-layer extras.

    The two fields of decoders are transformers': never a cache, and no cross attention, which is
    an empty tuple beside attentions.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None
    hidden_states: tuple[Tensor, ...] | None
    past_key_values: None
    attentions: tuple[Tensor, ...] | None
    cross_attentions: tuple[()] | None


class PreTrainingOutput(ModelOutput):
    """Of BertForPreTraining: (B, L, V) MLM logits and (B, 2) NSP logits."""

    loss: Tensor | None
    prediction_logits: Tensor | None
    seq_relationship_logits: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class LogitsOutput(ModelOutput):
    """Of the heads with one set of logits; their shape is the head's."""

    loss: Tensor | None
    logits: Tensor | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class QuestionAnsweringOutput(ModelOutput):
    """Of BertForQuestionAnswering: (B, L) logits of a span's first and last token."""

    loss: Tensor | None
    start_logits: Tensor
    end_logits: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None
