"""The calls from which the kernels' variants are recorded: every op, as a model can ask for it."""

import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import op_cases
import torch
from op_cases import Case
from torch import Tensor

from bert_fast.ops import registry

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = FP32, FP16, BF16
SIZES = (64, *(K for K in range(16, 129, 8) if K != 64))  # of a head
WIDTHS = (768, 1024, 100, 8192)
LENGTHS = (1, 16, 33, 64, 100, 128, 200, 256, 300, 512, 700)

# Nobody asks these cases what is right.
op_cases.row_factors = op_cases.attention_factors = lambda *_, **__: None

ACTIVATIONS = "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"


def unaligned(t: Tensor | None) -> Tensor | None:
    """A contiguous copy that starts one element after what is aligned to 16 bytes."""
    if t is None:
        return None
    whole = t.new_empty(t.numel() + 1)
    return whole[1:].view(t.shape).copy_(t)


def both(case: Case, align: bool = True, wanted: tuple[str, ...] | None = None) -> None:
    """Call the op without gradients, then with them and backward."""
    if not align:
        case = case.with_inputs(**{name: unaligned(t) for name, t in case.inputs.items()})
    with torch.no_grad():
        case.call()
    wanted = case.leaves if wanted is None else wanted
    leaves = {name: case.inputs[name].detach().requires_grad_() for name in wanted}
    out = case.call(**leaves)
    dy = torch.zeros_like(out)
    with case.mode():
        out.backward(dy if align else unaligned(dy))


def cast(case: Case, **dtypes: torch.dtype) -> Case:
    """The case with these inputs in these dtypes."""
    return case.with_inputs(**{name: case.inputs[name].to(d) for name, d in dtypes.items()})


def _layer_norm(dtype: torch.dtype, align: bool, **kwargs: Any) -> None:
    both(op_cases.layer_norm_case(**kwargs).to(dtype), align)


def _mixed_layer_norm(low: torch.dtype, p: float) -> None:
    """What autocast and fp32 weights beside 16-bit rows make of it."""
    make = partial(op_cases.layer_norm_case, D=768, p=p)
    for dtypes in (
        {"x": low},
        {"x": low, "residual": low},
        {"residual": low},
        {"w": low, "b": low, "x": low},
    ):
        both(cast(make(), **dtypes))
    both(cast(make(residual=False), x=low))
    for residual in (True, False):
        case = make(residual=residual, p=p).to(low)
        given = case.inputs | case.options | case.dropout | {"p": p, "out_dtype": FP32}
        y, z, mean, rstd = by_name("add_layer_norm", given)
        given |= {"dy": y, "z": z if z.numel() else case.inputs["x"], "mean": mean, "rstd": rstd}
        by_name("add_layer_norm_bwd", given | {"x_dtype": low})


def by_name(op: str, given: dict[str, Any]) -> Any:
    """Call torch.ops.bert_fast's op with those of `given` that it takes; None for other tensors."""
    op = getattr(torch.ops.bert_fast, op).default
    values = {a.name: given.get(a.name) for a in op._schema.arguments}
    return op(**values | {"site": given.get("site", 0)})


def _embed(dtype: torch.dtype, align: bool, **kwargs: Any) -> None:
    """Of more rows than the backward gives to one program."""
    both(op_cases.embed_case(T=300, **kwargs).to(dtype), align)


def _mixed_embed(low: torch.dtype, p: float) -> None:
    make = partial(op_cases.embed_case, D=768, p=p)
    tables = "word", "position", "type_"
    both(cast(make(), **dict.fromkeys(tables, low)))
    both(cast(make(), word=low))
    both(cast(make(with_ids=False), word=low))


def _gelu(dtype: torch.dtype, align: bool, **kwargs: Any) -> None:
    both(op_cases.gelu_case(**kwargs).to(dtype), align)


def _mixed_gelu(low: torch.dtype) -> None:
    both(cast(op_cases.gelu_case(D=768), x=low))
    both(cast(op_cases.gelu_case(D=768), b=low))


def _linear(dtype: torch.dtype, align: bool, **kwargs: Any) -> None:
    both(op_cases.linear_case(**kwargs).to(dtype), align)


def _attention(dtype: torch.dtype, align: bool, **kwargs: Any) -> None:
    """One batch with every length, and one whose longest is short."""
    for lengths in (LENGTHS, (16, 0, 1)):
        both(op_cases.attention_case(lengths, **kwargs).to(dtype), align)


def _cross_entropy(dtype: torch.dtype, align: bool, **kwargs: Any) -> None:
    case = op_cases.cross_entropy_case(**kwargs).to(dtype)
    both(case, align)
    both(case, align, wanted=("x",))


def _partials(dtype: torch.dtype, align: bool, N: int) -> None:
    """As each number of sums, whichever the launchers make today."""
    from bert_fast.kernels import common

    for S in (1, 2, 3):
        outs = [torch.empty(N, dtype=dtype) for _ in range(S)]
        common.sum_partials(torch.empty(common.NUM_PARTIALS, S, N), outs)


def _calls(dtype: torch.dtype, align: bool, every: bool) -> Iterator[tuple[str, bool, Callable]]:
    """Yield (name, whether it is one of the default ones, call)."""
    for D in WIDTHS if align and every else (768,):
        default = D == 768
        for p in (0.0, 0.1):
            for parts in ("bias residual", "residual", "") if default else ("bias residual",):
                name = f"layer_norm D={D} p={p} {parts or 'alone'}"
                given = {"p": p, "residual": "residual" in parts, "bias": "bias" in parts}
                call = partial(_layer_norm, dtype, align, D=D, **given)
                yield name, default and ("bias" in parts or not (parts or p)), call
            for with_ids in (True, False) if default else (True,):
                name = f"embed D={D} p={p} with_ids={with_ids}"
                call = partial(_embed, dtype, align, D=D, p=p, with_ids=with_ids)
                yield name, default and with_ids, call
        if default:
            call = partial(_embed, dtype, align, D=D, ids_dtype=torch.int32, pad_id=0)
            yield f"embed D={D} int32", False, call
        F = {768: 3072, 1024: 4096}.get(D, D)
        for activation in ACTIVATIONS if D == 768 and align else ("gelu",):
            default = D == 768 and activation == "gelu"
            for bias in (True, False) if D == 768 else (True,):
                name = f"gelu D={F} {activation} bias={bias}"
                call = partial(_gelu, dtype, align, D=F, activation=activation, bias=bias)
                yield name, default and bias, call
            name = f"linear_gelu F={F} {activation}"
            call = partial(_linear, dtype, align, D=64, F_=F, activation=activation)
            yield name, default, call
    sizes = ((768, 768), (1024, 3072), (100, 100), (16, 8192)) if every else ()
    for D, F in ((768, 2304), *sizes):
        for bias in (True, False):
            name = f"linear D={D} F={F} bias={bias}"
            call = partial(_linear, dtype, align, D=D, F_=F, bias=bias)
            yield name, F == 2304 and bias, call
    # in the mode, whose tensors are aligned by a copy; model sizes are not compiled in, but whether
    # they are 1 or multiples of 16
    sizes = ((768, 2304), *(((768, 1), (768, 2), (100, 100)) if every else ())) if align else ()
    for D, F in sizes:
        for bias in (True, False) if F == 2304 else (True,):
            name = f"linear invariant D={D} F={F} bias={bias}"
            call = partial(_linear, dtype, align, D=D, F_=F, bias=bias, invariant=True)
            yield name, F == 2304 and bias, call
    sizes = SIZES if align else (64, 80)
    for K in sizes if every else (64,):
        for p in (0.0, 0.1) if align else (0.1,):
            call = partial(_attention, dtype, align, H=2, K=K, p=p)
            yield f"attention K={K} p={p}", K == 64, call
    sizes = ((768, 30522),) if align else ()
    for D, V in (*sizes, *(((1024, 1018), (100, 1001), (8192, 64)) if every else ())):
        for bias in (True, False):
            name = f"cross_entropy D={D} V={V} bias={bias}"
            call = partial(_cross_entropy, dtype, align, D=D, V=V, bias=bias)
            yield name, D == 768 and bias, call
    if align:
        yield "sum_partials", False, partial(_partials, dtype, align, N=768)


def _mixed(low: torch.dtype) -> Iterator[tuple[str, bool, Callable]]:
    for p in (0.0, 0.1):
        yield f"layer_norm mixed p={p}", False, partial(_mixed_layer_norm, low, p)
        yield f"embed mixed p={p}", False, partial(_mixed_embed, low, p)
    yield "gelu mixed", False, partial(_mixed_gelu, low)


def is_default(dtype: torch.dtype, name: str) -> bool:
    """Everything in bf16, and of fp16 and fp32 what `make test` has time for."""
    op, _, rest = name.partition(" ")
    if dtype == BF16:
        return True
    if dtype == FP16:
        return op not in ("linear", "linear_gelu", "gelu") and "p=0.0" not in rest
    return op not in ("linear", "gelu") and not {"p=0.1", "alone"} & {*rest.split()}


def has_kernel(name: str) -> bool:
    """Whether kernels serve the op that a call's name begins with."""
    op = name.split()[0]
    op = {"layer_norm": "add_layer_norm", "gelu": "bias_gelu"}.get(op, op)
    op = {"cross_entropy": "linear_cross_entropy"}.get(op, op)
    return op == "sum_partials" or op in registry.kernels


def record(recorder: Any, every: bool) -> list[str]:
    """Make the calls for the recorder's GPU; return what raised: 'sm_90 call: error'."""
    failed = []
    for dtype in DTYPES:
        for align in (True, False) if every else (True,):
            calls = [*_calls(dtype, align, every)]
            calls += [*_mixed(dtype)] if every and align and dtype != FP32 else []
            for name, default, call in calls:
                default = default and is_default(dtype, name)
                if not (default or every) or not has_kernel(name):
                    continue
                recorder.default = default and align
                recorder.label = f"{name} {str(dtype)[6:]}{'' if align else ' unaligned'}"
                try:
                    call()
                except Exception as error:
                    at = traceback.extract_tb(sys.exc_info()[2])[-1]
                    where = f"{at.filename.rpartition('/')[2]}:{at.lineno}"
                    said = f"{type(error).__name__}: {error}"[:300]
                    failed.append(f"sm_{recorder.driver.arch} {recorder.label}: {where}: {said}")
    return failed
