"""One line proves it: an accelerated model beside its own original, on the caller's own batch."""

import copy
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from bert_fast import accuracy
from bert_fast.hf import families, sentences
from bert_fast.hf.accelerate import accelerate
from bert_fast.hf.marks import MARK, Mark

# Where the original is off by over half of a tensor's norm, or its values are below a share of the
# slack that the largest tensor has, there is nothing but rounding, as in the gradient of a key's
# bias: ours may be as many times more, and that share.
_NOISE, _NOISE_FACTOR, _NOISE_SLACK = 0.5, 4.0, 1e-2
# In fewer numbers than these the original's error is a matter of luck: it counts as no less than
# that of the other tensors in the middle.
_FEW = 100


class VerificationError(RuntimeError):
    """An accelerated model is not what its original is.

    Attributes:
        report: all that was compared.
    """

    def __init__(self, message: str, report: "VerifyReport"):
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Difference:
    """An output, the loss or a gradient, beside the truth.

    Attributes:
        name: of the output, or "grad NAME" of a parameter.
        ours: the largest error of the accelerated model.
        original: that of the original in the same dtype.
        share: the error, in the larger of two measures, as a share of what is allowed.
    """

    name: str
    ours: float
    original: float
    share: float


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found; printing it gives a table, the worst first.

    Attributes:
        dtype: of the model.
        truth: dtype of the original that is the truth.
        differences: of all tensors, the worst first.
        notes: what else the reader should know.
    """

    dtype: str
    truth: str
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every error is within what is allowed."""
        return all(d.share <= 1 for d in self.differences)

    def __str__(self) -> str:
        count, worst = len(self.differences), self.differences[:8]
        verdict = "the same answers" if self.passed else "NOT the same answers"
        lines = [f"{verdict}: {count} tensors in {self.dtype}, the truth in {self.truth}"]
        width = max(len(d.name) for d in worst)
        lines.append(f"  {'':<{width}}  {'ours':>8}  {'original':>8}  of the allowed")
        for d in worst:
            line = f"{d.name:<{width}}  {d.ours:8.1e}  {d.original:8.1e}  {100 * d.share:4.0f} %"
            lines.append(f"  {line}")
        if count > len(worst):
            lines.append(f"  and {count - len(worst)} more, each nearer")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def verify(model: nn.Module, batch: Mapping[str, Any], grads: bool = True) -> VerifyReport:
    """Compare a model of transformers, accelerated, with its own original code.

    The truth is the original in fp64, for a 16-bit model in fp32. An answer passes if its error is
    at most twice that of the original in the model's own dtype, and what rounding may add. Dropout
    is off; rows of padding are left out. The model is as it was afterwards, gradients included.

    Args:
        model: accelerated or not (then it is while this runs); also a SentenceTransformer. A copy
            of it has to fit into memory, in the dtype of the truth.
        batch: the arguments of its forward by name; of a SentenceTransformer its features. With
            labels the loss is compared, without them a random projection of the outputs.
        grads: whether the gradients of all parameters that have any are compared, too.

    Raises:
        VerificationError: an error is above what is allowed; the worst are named.
        ValueError: there is nothing to accelerate in the model.
    """
    added = [] if _marked(model) else _mark(model)
    marked = _marked(model)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    wide = torch.float32 if dtype.itemsize == 2 else torch.float64
    device = next(model.parameters()).device
    batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        before = {module: {*mark.reasons} for module, mark in marked.items()}
        ours = _answers(model, batch, dtype, grads)
        reasons = {
            f"{type(module).__name__} ran its original code, since {reason}"
            for module, mark in marked.items()
            for reason in mark.reasons - before[module]
        }
        with _plain(marked):
            original = _answers(model, batch, dtype, grads)
            exact = copy.deepcopy(model).to(wide)
        with torch.autocast(device.type, enabled=False):
            truth = _answers(exact, batch, wide, grads)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module in added:
            module.__dict__.pop(MARK, None)
    more = [n for n in ours if n.startswith("attentions.") and n not in truth]
    if more:
        reasons.add("the original gives no attentions, as its implementation of them is not eager")
    ours = {name: t for name, t in ours.items() if name not in more}
    found = _compare(ours, original, truth, accuracy.short(dtype))
    names = accuracy.short(dtype), accuracy.short(wide)
    report = VerifyReport(*names, tuple(found), tuple(sorted(reasons)))
    if not report.passed:
        bad = [d for d in found if not d.share <= 1]
        named = ", ".join(f"{d.name} ({d.ours:.1e}, original {d.original:.1e})" for d in bad[:5])
        others = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise VerificationError(f"not the original's answers: {named}{others}", report)
    return report


def verify_pretrained(
    name_or_path: str | os.PathLike,
    texts: Sequence[str],
    *,
    dtype: str | None = None,
    device: str | None = None,
    grads: bool = True,
) -> VerifyReport:
    """Verify a model in a directory or on the hub, on texts, as `verify` does.

    Args:
        name_or_path: what transformers' from_pretrained takes.
        texts: a batch of them, cut to what the model takes.
        dtype: "float32", "float16" or "bfloat16"; None: float32.
        device: None: the GPU if there is one, else the CPU.
        grads: as for `verify`.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(name_or_path)
    name = next(iter(config.architectures or ()), "AutoModel")
    model = getattr(transformers, name).from_pretrained(name_or_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name_or_path)
    most = config.max_position_embeddings - (config.pad_token_id or 0) - 1  # RoBERTa's begin there
    most = min(tokenizer.model_max_length, most)
    batch = tokenizer([*texts], padding=True, truncation=True, max_length=most, return_tensors="pt")
    if "MultipleChoice" in name:
        batch = {key: value[:, None] for key, value in batch.items()}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device, getattr(torch, dtype or "float32"))
    return verify(model, batch, grads)


def _marked(model: nn.Module) -> dict[nn.Module, Mark]:
    """Return the modules that are accelerated."""
    return {m: m.__dict__[MARK] for m in model.modules() if MARK in m.__dict__}


def _mark(model: nn.Module) -> list[nn.Module]:
    """Accelerate a model that is not; return what has to be undone."""
    if not any(families.known(type(module)) for module in model.modules()):
        raise ValueError(f"model: want a BERT of transformers in it, got {type(model).__name__}")
    return [*_marked(accelerate(model))]


@contextmanager
def _plain(marked: Mapping[nn.Module, Mark]) -> Iterator[None]:
    """Inside the block the modules run their original code."""
    for module in marked:
        del module.__dict__[MARK]
    try:
        yield
    finally:
        for module, mark in marked.items():
            module.__dict__[MARK] = mark


# --- what a model answers ------------------------------------------------------------------------


def _answers(
    model: nn.Module, batch: Mapping[str, Any], dtype: torch.dtype, grads: bool
) -> dict[str, Tensor]:
    """Return the outputs at real tokens, the loss, and "grad NAME" of each parameter."""
    inputs = {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() and "mask" not in k else v
        for k, v in batch.items()
    }
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.set_grad_enabled(grads):
        is_sentences = sentences.known(type(model)) is not None
        out = model(inputs) if is_sentences else model(**inputs)
        found = {
            name: _real(t, batch.get("attention_mask"))
            for name, t in _tensors(out)
            if t.is_floating_point() and not (is_sentences and name in batch)
        }
        loss = found["loss"] if "loss" in found else _projection(found)
    if grads and named:
        values = torch.autograd.grad(loss, [*named.values()], allow_unused=True)
        for name, value in zip(named, values, strict=True):
            if value is not None:
                found[f"grad {name}"] = value
    return {name: t.detach() for name, t in found.items()}


def _tensors(out: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of an output by name, those of tuples with their place."""
    pairs = out.items() if isinstance(out, Mapping) else enumerate(out)
    for name, value in pairs:
        if isinstance(value, Tensor):
            yield str(name), value
        elif isinstance(value, tuple | list):
            for i, part in enumerate(value):
                if isinstance(part, Tensor):
                    yield f"{name}.{i}", part


def _real(t: Tensor, mask: Tensor | None) -> Tensor:
    """Return an output without what stands at padding."""
    if mask is None or mask.ndim < 2:
        return t
    real = mask.to(t.device, torch.bool)
    real = real.flatten(0, -2)  # choices, too, are rows to the encoder
    B, L = real.shape
    if t.ndim == 4 and (t.shape[0], *t.shape[2:]) == (B, L, L):  # attentions
        return t.transpose(1, 2)[real]
    return t[real] if t.shape[:2] == real.shape else t


def _projection(found: Mapping[str, Tensor]) -> Tensor:
    """Return a number () whose gradient with respect to each output is random and fixed."""
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for t in found.values():
        weights = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        total = total + (t * weights.to(t.device, t.dtype)).sum()
    return total


# --- comparing -----------------------------------------------------------------------------------


def _compare(
    ours: Mapping[str, Tensor],
    original: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    dtype: str,
) -> list[Difference]:
    """Return the differences, the worst first."""
    missing = [n for n, t in truth.items() if n not in ours or ours[n].shape != t.shape]
    found = [Difference(n, inf, 0.0, inf) for n in [*missing, *(ours.keys() - truth.keys())]]
    for is_grad in (False, True):
        names = [n for n, t in truth.items() if n.startswith("grad ") == is_grad and t.numel()]
        bounds = {n: accuracy.bound(original[n], truth[n], dtype) for n in names}
        usual = [b.norm for n, b in bounds.items() if truth[n].numel() >= _FEW and b.norm < inf]
        usual = statistics.median(usual) if usual else 0.0
        slack = max((b.more_top for b in bounds.values()), default=0.0)
        for name in names:
            if name not in missing:
                few = usual if truth[name].numel() < _FEW else 0.0
                found.append(_difference(name, ours, original, truth, bounds[name], few, slack))
    return sorted(found, key=lambda d: -d.share)


def _difference(
    name: str,
    ours: Mapping[str, Tensor],
    original: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    bound: accuracy.Bound,
    usual: float,
    slack: float,
) -> Difference:
    """Return how far a tensor is off.

    Args:
        name: of the tensor.
        ours: by name, as the next two.
        original: in the same dtype.
        truth: in a wider one.
        bound: of the original's errors.
        usual: the original's error is taken to be no less, as a share of the norm.
        slack: what rounding may add to the tensor of the largest values.
    """
    top, norm = accuracy.errors(ours[name], truth[name])
    if not top < inf:  # where the original has no number there need be none
        finite = original[name].isfinite()
        same = torch.equal(ours[name].isfinite(), finite) and not finite.all()
        return Difference(name, top, bound.top, 1.0 if same else inf)
    scale = truth[name].abs().max().item()
    if bound.norm > _NOISE or scale <= _NOISE_SLACK * slack:
        allowed = {"max": _NOISE_FACTOR * bound.top + _NOISE_SLACK * slack, "l2": inf}
    else:
        own = replace(bound, top=max(bound.top, usual * scale), norm=max(bound.norm, usual))
        allowed = own.allowed()
    if not allowed["max"]:  # a truth of zeros that is known exactly allows nothing
        return Difference(name, top, bound.top, 2.0 * (top > 0))
    return Difference(name, top, bound.top, max(top / allowed["max"], norm / allowed["l2"]))
