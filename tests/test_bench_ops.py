"""The benchmark's rows for ops: all there, right answers pass, wrong ones do not, true counts."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gate
import op_rows
import ops as rows
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from bench_cases import planted
from torch.utils.flop_counter import FlopCounterMode

from bert_fast import reference
from bert_fast.ops import implementations

ROOT = Path(__file__).resolve().parents[1]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", (FP32, BF16, FP16), ids=lambda d: str(d)[6:])
EVERY = pytest.mark.parametrize("name", rows.names())
NAMES = """
    attention s128, attention s256, attention s512, attention mixed, attention s128 dropout,
    attention s512 dropout, attention_bwd s128, attention_bwd s512, attention_bwd s512 dropout,
    work_list, layer_norm, add_layer_norm, add_layer_norm dropout, add_layer_norm_bwd,
    add_layer_norm_bwd dropout, embed, embed_bwd, linear, linear invariant, linear_bwd, column_sums,
    linear_gelu, bias_gelu, bias_gelu_bwd, linear_cross_entropy, unpad
"""


def candidate(name, which="bert_fast", device="cpu", dtype=FP32, size="odd"):
    case, candidates = rows.case(name, device, dtype, size)
    return case, next(c for c in candidates if c.name == which).prepare()


def inputs_of(name, dtype=FP32, size="small"):
    return rows.case(name, "cpu", dtype, size)[0].inputs[0]


# --- what is there -------------------------------------------------------------------------------


def test_the_names_are_those_of_the_ledger():
    assert rows.names() == " ".join(NAMES.split()).split(", ")


def test_every_op_has_a_row_named_after_it():
    # a step is no function of tensors to tensors; unpad_work is the two others in one
    others = {"adamw_", "grad_norm", "lamb_", "unpad_work"}
    assert {row.op for row in rows.ROWS.values()} == set(implementations()) - others
    for name, row in rows.ROWS.items():
        assert row.op == {"layer_norm": "add_layer_norm"}.get(name, name.split()[0])
        assert ("dropout" in name) == (row.p > 0)


def test_a_size_or_dtype_that_is_not_there_is_refused():
    for dtype, size in ((FP32, "huge"), (torch.int64, "odd")):
        with pytest.raises(ValueError, match="size, dtype: want"):
            rows.case("linear", "cpu", dtype, size)


def test_odd_sizes_hold_an_empty_sequence_and_one_of_a_token():
    lengths = rows.case("attention mixed", "cpu", FP32, "odd")[0].inputs[0]["lengths"]
    filled = rows.case("unpad", "cpu", FP32, "odd")[0].inputs[0]["mask"].sum(1)
    assert {0, 1} <= set(lengths) and {0, 1} <= set(filled.tolist())
    tokens = inputs_of("embed_bwd", size="odd")["tokens"]
    assert (tokens == rows._PAD).any() and tokens.unique().numel() < tokens.numel()


# --- right answers -------------------------------------------------------------------------------


@EVERY
@DTYPES
@pytest.mark.parametrize("size", ("odd", "small"))
def test_right_answers_pass(name, dtype, size, device):
    case, candidates = rows.case(name, device, dtype, size)
    json.dumps(case.facts, allow_nan=False)
    assert case.flush and case.work.bytes > 0
    checked = gate.Gate(case)
    for one in candidates:
        try:
            checked.check(one.prepare(), one.factor)
        except gate.AbsentError:
            assert one.name == "varlen_attn"


def test_the_row_says_what_serves_the_op():
    for name in ("unpad", "attention_bwd s128"):
        served = implementations()[rows.ROWS[name].op]["cpu"].name
        assert candidate(name)[1].notes == {"implementation": served}


@pytest.mark.parametrize(
    ("name", "dtype", "why"),
    [
        ("attention s128", BF16, "needs CUDA and 16 bits"),
        ("attention_bwd s512", FP32, "needs CUDA and 16 bits"),
        ("attention s128 dropout", BF16, "no dropout"),
    ],
)
def test_varlen_attn_says_what_it_lacks(name, dtype, why):
    with pytest.raises(gate.AbsentError, match=why):
        candidate(name, "varlen_attn", dtype=dtype)


@pytest.mark.parametrize(
    ("name", "which"),
    [
        (name, which)
        for name, row in rows.ROWS.items()
        for which in ("torch", "sdpa")
        if row.p and which in row.peers
    ],
)
def test_a_peer_is_timed_with_dropout_and_checked_without(name, which):
    case, prepared = candidate(name, which)
    if "bwd" in name:  # each call would have the mask of the graph that was kept
        runs = [candidate(name, which)[1].run(case.inputs[0])[0] for _ in range(2)]
    else:
        runs = [prepared.run(case.inputs[0])[0] for _ in range(2)]
    assert not torch.equal(*runs)
    assert "without dropout" in prepared.notes["checked"]
    assert gate.check(case, prepared)["own"]["l2"] < 1e-5


# --- wrong answers -------------------------------------------------------------------------------


def _whole_batch(qkv, cu_seqlens, max_len, *dropout):
    every = torch.tensor([0, qkv.shape[0]], dtype=torch.int32)
    return reference.attention(qkv, every, qkv.shape[0], *dropout)


def _lse_in_base_2(*args):
    o, lse = reference.attention(*args)
    return o, lse / torch.log(torch.tensor(2.0))


def _biased_rstd(*args):
    y, z, mean, rstd = reference.add_layer_norm(*args)
    return y, z, mean, rstd * 1.01


def _other_mask(*args):
    *before, site, out_dtype = args
    return reference.add_layer_norm(*before, site + 1, out_dtype)


def _pad_row_kept(*args):
    return reference.embed_bwd(*args[:11], -1, *args[12:])


def _one_row_off(mask):
    rows_, cu_seqlens, max_len = reference.unpad(mask)
    return torch.cat((rows_[:-1], rows_[-1:] + 1)), cu_seqlens, max_len


WRONG = {
    "attention s128": ("attention", _whole_batch, "(o|lse)"),
    "attention mixed": ("attention", _lse_in_base_2, "lse"),
    "attention_bwd s128": ("attention_bwd", lambda *a: -reference.attention_bwd(*a), "dqkv"),
    "add_layer_norm": ("add_layer_norm", _biased_rstd, "rstd"),
    "add_layer_norm dropout": ("add_layer_norm", _other_mask, "(z|mean|rstd)"),
    "add_layer_norm_bwd": (
        "add_layer_norm",
        _biased_rstd,
        "d[zwx]",
    ),  # of the forward it is made from
    "embed_bwd": ("embed_bwd", _pad_row_kept, "dword"),
    "bias_gelu": ("bias_gelu", lambda x, b, name: reference.bias_gelu(x, b, "relu"), "y"),
    "linear": ("linear", lambda x, w, b: reference.linear(x, w, None), "y"),
    "unpad": ("unpad", _one_row_off, "rows"),
}


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_op_is_refused(name, dtype):
    op, wrong, output = WRONG[name]
    case, prepared = candidate(name, dtype=dtype)
    with planted(op, wrong), pytest.raises(gate.RefusedError, match=f"^{output}: want"):
        gate.check(case, prepared)
    gate.check(*candidate(name, dtype=dtype))  # and the plant is gone


def test_a_wrong_peer_with_dropout_is_refused():
    def wrong(v, p):
        z = F.dropout(v["x"], p) + 1.01 * v["residual"]
        return F.layer_norm(z, v["w"].shape, v["w"], v["b"], rows.EPS)

    row = rows.ROWS["add_layer_norm dropout"]
    row = replace(row, peers={**row.peers, "wrong": op_rows.Peer(wrong)})
    case, candidates = op_rows.build("wrong", row, "cpu", FP32, "odd")
    with pytest.raises(gate.RefusedError, match=r"^y: want"):
        gate.check(case, candidates[2].prepare())


# --- bytes and FLOPs -----------------------------------------------------------------------------


class Moved:
    """The reference, which counts the bytes of the tensors its last call took and gave."""

    def __getattr__(self, op):
        def call(*args):
            out = getattr(reference, op)(*args)
            given = out if isinstance(out, tuple) else (out,)
            tensors = [t for t in (*args, *given) if isinstance(t, torch.Tensor)]
            self.bytes = sum(t.nbytes for t in tensors)
            return out

        return call


@pytest.mark.parametrize("name", [n for n in rows.names() if not n.startswith("embed")])
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("fp32", "bf16"))
def test_bytes_are_those_of_what_the_op_takes_and_gives(name, dtype):
    case, _ = rows.case(name, "cpu", dtype, "small")
    row, moved = rows.ROWS[name], Moved()
    row.answers(moved, case.inputs[0], row.p)
    host = 8 if row.p else 0  # of the seed
    host += 8 if name == "unpad" else 0  # of max_len
    if row.op.startswith("attention"):
        host += case.inputs[0]["work"].nbytes  # nothing beside the rows
    assert case.work.bytes == moved.bytes - host


def test_bytes_of_the_embeddings_are_those_of_the_rows_looked_up():
    T, D, V, P = 16384, 768, 30522, 512
    forward, backward = (
        rows.ROWS[n].work(2, 0.0, T=T, D=D, V=V, P=P) for n in ("embed", "embed_bwd")
    )
    ids, statistics, rows_TD = 3 * 8 * T, 2 * 4 * T, 2 * T * D
    assert forward.bytes == ids + 3 * rows_TD + 2 * (512 + 2 + 2) * D + statistics
    assert backward.bytes == ids + 2 * rows_TD + 2 * D + statistics + 2 * (30522 + 512 + 2 + 2) * D


@pytest.mark.parametrize("name", [n for n in rows.names() if n[:6] in ("attent", "linear")])
def test_flops_are_those_of_the_matrix_products(name):
    case, _ = rows.case(name, "cpu", FP32, "small")
    row = rows.ROWS[name]
    saved = row.save(reference, case.inputs[0], row.p)
    with FlopCounterMode(display=False) as counter:
        row.call(reference, case.inputs[0], row.p, saved)
    assert case.work.flops == counter.get_total_flops() > 0


def test_full_sizes_are_those_of_the_targets():
    def full(name):
        row = rows.ROWS[name]
        return row.work(2, row.p, **row.sizes["full"])

    assert full("attention s512").flops == 4 * 512**2 * 64 * 16 * 32
    assert full("attention_bwd s512").flops == 10 * 512**2 * 64 * 16 * 32
    assert full("linear").flops == 77_309_411_328
    assert full("add_layer_norm").bytes == 4 * 2**26 + 2 * 2 * 1024 + 8 * 32768
    assert full("unpad").tokens * 2 == full("unpad").slots == 65536
    for name in ("attention s128", "attention s256", "attention s512"):
        assert full(name).tokens == 16384
    mixed = full("attention mixed")
    assert mixed.sequences == 64 and abs(mixed.tokens - 16384) < 1024


# --- pytest-benchmark ----------------------------------------------------------------------------


def test_what_is_wrong_is_not_timed_by_pytest_benchmark():
    import test_speed  # not above: without pytest-benchmark it would skip this whole file

    def pedantic(*_, **__):
        raise AssertionError("it was timed")

    benchmark = SimpleNamespace(extra_info={}, pedantic=pedantic)
    case, candidates = rows.case("bias_gelu", "cpu", FP32, "odd")
    with planted("bias_gelu", WRONG["bias_gelu"][1]), pytest.raises(gate.RefusedError):
        test_speed.measure(benchmark, case, candidates)


def test_the_entries_of_pytest_benchmark_run(tmp_path):
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "speed.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-p", "no:xdist"]
    command += ["-p", "no:cacheprovider", "-k", "unpad or encoder", f"--benchmark-json={out}"]
    # under xdist pytest-benchmark does not measure, and the variables would say so to it too
    alone = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    entries = json.loads(out.read_text("utf-8"))["benchmarks"]
    assert len(entries) == 2
    assert all(e["extra_info"]["error"]["own"]["l2"] < 1e-5 for e in entries)


@pytest.mark.parametrize("name", ["bias_gelu", "linear_gelu", "bias_gelu_bwd"])
def test_a_wrong_reference_is_no_truth(name, monkeypatch):
    """What PyTorch's own expression gives must agree with it, or the whole row fails."""
    for function in ("activation", "activation_bwd"):
        right = getattr(reference, function)
        monkeypatch.setattr(reference, function, lambda *a, right=right: right(*a) * 1.01)
    for dtype in (FP32, BF16):
        case, _ = rows.case(name, "cpu", dtype, "small")
        with pytest.raises(ValueError, match="want a truth that PyTorch agrees with"):
            gate.Gate(case)
