"""One line makes a model of transformers fast, and one undoes it."""

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from bert_fast.hf import families, forward, sentences
from bert_fast.hf.marks import MARK, Mark, Replacement, remove_marks, replaceable

_lock = threading.Lock()
_blocks: list[bool] = []  # of patch_transformers that are entered: whether each is strict


def accelerate(model: nn.Module, *, strict: bool = False) -> nn.Module:
    """Make the BERTs in a model of transformers run on packed rows, in place.

    BERT, RoBERTa, XLM-RoBERTa, DistilBERT and ELECTRA, with any head, also inside a larger module:
    wrapped by PEFT, or a SentenceTransformer, whose `encode` then takes equal texts once and short
    ones 128 at a time. Classes, configuration and parameters stay what and where they are. What
    cannot be accelerated (decoders, cross attention, masks by query and key, ...) runs its original
    code and says so once.

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
    found = _known(model)
    encoders = [(module, owner) for module, owner in found if families.family(owner) is not None]
    reasons = {
        module: families.why_not(module, owner, families.family(owner))
        for module, owner in encoders
    }
    if strict:  # before anything is changed
        for module, reason in reasons.items():
            if reason:
                raise NotImplementedError(f"{type(module).__name__}: {reason}")
    if not encoders:
        reason = f"{type(model).__name__} holds no BERT of transformers: nothing is accelerated"
        if strict:
            raise NotImplementedError(reason)
        warnings.warn(f"bert_fast: {reason}", stacklevel=2)
    _mark(found, strict)
    for module, reason in reasons.items():
        if reason:
            module.__dict__[MARK].refuse(module, reason)
    _compile_again()
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`: the model is exactly what it was, with the weights it has now.

    Args:
        model: as it was given to `accelerate`.

    Returns:
        The same model.
    """
    remove_marks(model)
    _compile_again()
    return model


def _compile_again() -> None:
    """Drop what is compiled: it looks for no mark any more."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@contextmanager
def patch_transformers(*, strict: bool = False) -> Iterator[None]:
    """Inside the block models of transformers are accelerated as they are made.

    Whoever makes them: `AutoModel.from_pretrained`, a pipeline, SentenceTransformer. They stay
    accelerated after the block.

    Args:
        strict: as for `accelerate`, at every call.
    """
    from transformers import PreTrainedModel

    with _lock:
        if not _blocks:
            original = PreTrainedModel.post_init

            @wraps(original)
            def post_init(self: Any) -> None:
                original(self)
                if _blocks:
                    _mark(_known(self), _blocks[-1])

            PreTrainedModel.post_init = post_init
        _blocks.append(strict)
    try:
        yield
    finally:
        with _lock:
            _blocks.remove(strict)
            if not _blocks:
                PreTrainedModel.post_init = PreTrainedModel.post_init.__wrapped__


def _known(model: nn.Module) -> list[tuple[nn.Module, type]]:
    """Return what can be replaced in a model, each with its class in the other library."""
    owners = (
        (module, families.known(type(module)) or sentences.known(type(module)))
        for module in model.modules()
    )
    return [(module, owner) for module, owner in owners if owner is not None]


def _mark(found: list[tuple[nn.Module, type]], strict: bool) -> None:
    """Mark what was found in a model."""
    scored = any(families.is_head(owner) for _, owner in found)
    for module, owner in found:
        prepare(owner)
        module.__dict__[MARK] = Mark(owner, strict, scored)


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
    given = to.by_name(args, kwargs)
    try:
        forward.check(self, mark.owner, given)
        how = {"legacy": "return_dict" in to.names, "scored": mark.scored}
        return forward.run(self, mark.owner, given, **how)
    except NotImplementedError as error:
        reason = str(error)
    mark.refuse(self, reason)
    return to.original(self, *args, **kwargs)


def _head(
    self: nn.Module, mark: Mark, to: Replacement, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """What an accelerated masked-LM head runs."""
    try:
        return forward.score(self, mark.owner, args[0] if args else kwargs[to.names[0]])
    except NotImplementedError as error:
        reason = str(error)
    mark.refuse(self, reason)
    return to.original(self, *args, **kwargs)
