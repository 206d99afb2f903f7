"""One line makes a model of transformers fast, and one undoes it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn

from bert_fast.hf import families, forward, sentences
from bert_fast.hf.marks import MARK, Mark, Replacement, remove_marks, replaceable


def accelerate(model: nn.Module, *, strict: bool = False) -> nn.Module:
    """Make the BERTs in a model of transformers run on packed rows, in place.

    BERT, RoBERTa, XLM-RoBERTa, DistilBERT and ELECTRA, with any head, also inside a larger module:
    wrapped by PEFT, or a SentenceTransformer, whose `encode` then takes equal texts once. Classes,
    configuration and parameters stay what and where they are. What cannot be accelerated (decoders,
    cross attention, masks by query and key, ...) runs its original code and says so once.

    Outputs at padding are 0, as docs/numerics.md has it; everything else is the original's.

    Args:
        model: the model, or whatever holds it.
        strict: raise instead of running the original code, here and at every call.

    Returns:
        The same model.

    Raises:
        TypeError: the model is no nn.Module.
        NotImplementedError: with strict, something in it cannot be accelerated, or nothing.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: want a torch.nn.Module, got {type(model).__name__}")
    encoders = 0
    for module in _mark(model, strict):
        owner = module.__dict__[MARK].owner
        family = families.family(owner)
        if family is not None:
            encoders += 1
            reason = families.why_not(module, owner, family)
            if reason:
                module.__dict__[MARK].refuse(module, reason)
    if not encoders:
        reason = f"{type(model).__name__} holds no BERT of transformers: nothing is accelerated"
        if strict:
            raise NotImplementedError(reason)
        warnings.warn(f"bert_fast: {reason}", stacklevel=2)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`: the model is exactly what it was, with the weights it has now.

    Args:
        model: as it was given to `accelerate`.

    Returns:
        The same model.
    """
    remove_marks(model)
    return model


@contextmanager
def patch_transformers(*, strict: bool = False) -> Iterator[None]:
    """Inside the block models of transformers are accelerated as they are made.

    Whoever makes them: `AutoModel.from_pretrained`, a pipeline, SentenceTransformer. They stay
    accelerated after the block.

    Args:
        strict: as for `accelerate`, at every call.
    """
    from transformers import PreTrainedModel

    original = PreTrainedModel.post_init

    @wraps(original)
    def post_init(self: Any) -> None:
        original(self)
        _mark(self, strict)

    PreTrainedModel.post_init = post_init
    try:
        yield
    finally:
        PreTrainedModel.post_init = original


def _mark(model: nn.Module, strict: bool) -> list[nn.Module]:
    """Mark what can be replaced in a model, and return it."""
    found = []
    for module in model.modules():
        owner = families.known(type(module)) or sentences.known(type(module))
        if owner is not None:
            prepare(owner)
            module.__dict__[MARK] = Mark(owner, strict)
            found.append(module)
    marks = [module.__dict__[MARK] for module in found]
    scored = any(families.is_head(mark.owner) for mark in marks)
    for mark in marks:
        mark.scored = scored
    return found


def prepare(owner: type) -> None:
    """Let instances of a class that is known be marked."""
    if families.family(owner) is not None:
        replaceable(owner, "forward", _model)
    elif families.is_head(owner):
        replaceable(owner, "forward", _head)
    else:
        replaceable(owner, "encode", sentences.encode)


def _model(
    self: nn.Module, mark: Mark, to: Replacement, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What an accelerated base model runs."""
    given, family = to.named(args, kwargs), families.family(mark.owner)
    try:
        forward.check(self, mark.owner, family, given)
        how = {"legacy": "return_dict" in to.names, "scored": mark.scored}
        return forward.run(self, family, given, **how)
    except NotImplementedError as error:
        reason = str(error)
    mark.refuse(self, reason)
    return to.original(self, *args, **kwargs)


def _head(
    self: nn.Module, mark: Mark, to: Replacement, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """What an accelerated masked-LM head runs."""
    try:
        return forward.score(self, args[0] if args else kwargs[to.names[0]])
    except NotImplementedError as error:
        reason = str(error)
    mark.refuse(self, reason)
    return to.original(self, *args, **kwargs)
