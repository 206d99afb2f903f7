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

from bert_fast import reference, reference_optimizer
from bert_fast.ops import implementations

ROOT = Path(__file__).resolve().parents[1]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", (FP32, BF16, FP16), ids=lambda d: str(d)[6:])
NAMES = """
    attention s128, attention s256, attention s512, attention glue, attention squad,
    attention wikipedia, attention lognormal, attention mixed, attention s128 dropout,
    attention s512 dropout, attention_bwd s128, attention_bwd s512, attention_bwd s512 dropout,
    attention s128 fwd+bwd, attention s512 fwd+bwd, attention s512 dropout fwd+bwd,
    attention glue fwd+bwd, attention squad fwd+bwd, attention wikipedia fwd+bwd,
    attention lognormal fwd+bwd, attention mixed fwd+bwd, layer_norm, layer_norm fwd+bwd,
    add_layer_norm, add_layer_norm dropout, add_layer_norm_bwd, add_layer_norm_bwd dropout,
    add_layer_norm fwd+bwd, add_layer_norm dropout fwd+bwd, embed, embed_bwd, embed fwd+bwd,
    linear, linear invariant, linear_bwd, linear fwd+bwd, column_sums, linear_gelu, bias_gelu,
    bias_gelu_bwd, bias_gelu fwd+bwd, linear_cross_entropy, linear_cross_entropy forward,
    unpad, work_list, unpad_work, adamw_, lamb_, grad_norm
"""
STEPS = [name for name, row in rows.ROWS.items() if row.in_place]
OPTIMIZER = [*STEPS, "grad_norm"]
BOTH = [name for name in rows.names() if name.endswith("fwd+bwd")]


def candidate(name, which="bert_fast", device="cpu", dtype=FP32, size="odd"):
    case, candidates = rows.case(name, device, dtype, size)
    return case, next(c for c in candidates if c.name == which).prepare()


def inputs_of(name, dtype=FP32, size="small"):
    return rows.case(name, "cpu", dtype, size)[0].inputs[0]


# --- what is there -------------------------------------------------------------------------------


def test_the_names_are_those_of_the_ledger():
    assert rows.names() == " ".join(NAMES.split()).split(", ")


def test_every_op_has_a_row_named_after_it():
    assert {row.op for row in rows.ROWS.values()} == set(implementations())
    for name, row in rows.ROWS.items():
        op = {"layer_norm": "add_layer_norm"}.get(name.split()[0], name.split()[0])
        assert row.op == (f"{op}_bwd" if name in BOTH else op)
        assert ("dropout" in name) == (row.p > 0)


def test_rows_with_other_lengths_are_the_same_at_odd_sizes():
    odd = rows.odd_names()
    assert {row.op for name, row in rows.ROWS.items() if name in odd} == set(implementations())
    assert len(odd) == len(rows.names()) - 7 - 6 - 2  # forward; together; dropout and backward


def test_every_pair_has_a_row_for_both_together():
    names = rows.names()
    backward = [n for n, row in rows.ROWS.items() if row.direction == "backward"]
    backward.remove("column_sums")  # of a bias, whose forward is no op
    pairs = {n: n.replace("_bwd", "") for n in backward}
    assert all(n != forward for n, forward in pairs.items())
    assert all(f"{forward} fwd+bwd" in names for forward in pairs.values())
    lengths = {row.lengths for name, row in rows.ROWS.items() if name.startswith("attention")}
    assert lengths == {"full", "glue", "squad", "wikipedia", "normal", "lognormal"}
    for name in names:
        if rows.ROWS[name].op == "attention" and "s256" not in name and name != S128_DROPOUT:
            assert f"{name} fwd+bwd" in names


S128_DROPOUT = "attention s128 dropout"  # shown for what dropout adds to a forward


@pytest.mark.parametrize("name", rows.names())
def test_sizes_are_those_of_both_models(name):
    row = rows.ROWS[name]
    assert {"base", "large", "base cpu", "large cpu", "small", "odd"} <= set(row.sizes)
    for size, widths in (("base", (768, 12, 3072)), ("large", (1024, 16, 4096))):
        for where in (size, f"{size} cpu"):
            for key, want in zip("DHF", widths, strict=True):
                part = row.op in OPTIMIZER and (where, key) == (f"{size} cpu", "F")
                assert row.sizes[where].get(key, want) == (0 if part else want)
            assert row.sizes[where].get("K", 64) == 64 and row.sizes[where].get("V", 30522) == 30522
        on_gpu, on_cpu = (row.work(4, row.p, **row.sizes[w]).tokens for w in (size, f"{size} cpu"))
        assert on_gpu >= 15 * on_cpu and on_cpu <= 1024
        assert row.direction == "step" or "cross_entropy" in name or row.p or on_cpu > 600


def test_a_cpu_has_its_own_sizes_and_the_facts_say_what_is_done():
    case, _ = rows.case("attention glue fwd+bwd", "cpu", FP32, "base")
    sizes = rows.ROWS["attention glue"].sizes["base cpu"]
    assert case.name == "attention glue fwd+bwd, base" and case.facts["sizes"] == sizes
    said = {key: case.facts[key] for key in ("op", "direction", "model", "lengths", "p")}
    assert said == {
        "op": "attention_bwd",
        "direction": "both",
        "model": "base",
        "lengths": "glue",
        "p": 0.0,
    }
    assert rows.case("linear", "cpu", FP32, "small")[0].name == "linear"
    assert rows.case("linear", "cpu", BF16, "odd")[0].name == "linear, odd, bf16"
    case, _ = rows.case("linear", "cpu", FP32, "large")
    assert case.name == "linear, large" and case.facts["sizes"] == {"T": 1024, "D": 1024, "F": 4096}
    assert case.facts["direction"] == "forward" and "lengths" not in case.facts


def test_the_ledger_reads_cases_that_are_there():
    found = rows.ledger_names()
    assert len(found) == len(set(found)) >= 15
    for name, size in found:
        assert size in ("base", "large") and size in rows.ROWS[name].sizes
    assert {("attention s256", "large"), ("layer_norm", "large"), ("linear", "base")} <= {*found}
    assert {("adamw_", "large"), ("lamb_", "large")} <= {*found}


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


@pytest.mark.parametrize(
    ("name", "size"),
    [*((n, "odd") for n in rows.odd_names()), *((n, "small") for n in rows.names())],
)
@DTYPES
def test_right_answers_pass(name, dtype, size, device):
    case, candidates = rows.case(name, device, dtype, size)
    json.dumps(case.facts, allow_nan=False)
    assert case.flush and case.work.bytes > 0
    checked = gate.Gate(case)
    for one in candidates:
        try:
            checked.check(one.prepare(), one.factor)
        except gate.AbsentError:
            assert one.name in ("varlen_attn", "torch compile", "liger")


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
    ("which", "why"), [("torch compile", "are for CUDA"), ("liger", "not installed|needs CUDA")]
)
@pytest.mark.parametrize("name", ["layer_norm", "layer_norm fwd+bwd", "linear_cross_entropy"])
def test_peers_for_a_gpu_say_so(name, which, why):
    with pytest.raises(gate.AbsentError, match=why):
        candidate(name, which)


@pytest.mark.parametrize("name", ["layer_norm", "add_layer_norm dropout fwd+bwd"])
def test_liger_is_called_as_it_is_written(name, monkeypatch):
    """By PyTorch's own functions under its names: its arguments are given in its order."""

    def loss(x, w, target, bias=None, ce_weight=None, ignore_index=-100, reduction="mean"):
        return F.cross_entropy(
            F.linear(x, w, bias), target, None, None, ignore_index, None, reduction
        )

    functional = SimpleNamespace(
        liger_layer_norm=lambda X, W, B, eps: F.layer_norm(X, W.shape, W, B, eps),
        liger_fused_linear_cross_entropy=loss,
    )
    for module in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    for one in (name, "linear_cross_entropy", "linear_cross_entropy forward"):
        row = rows.ROWS[one]
        peer = replace(row.peers["liger"], lacks=lambda case, p: "")
        row = replace(row, peers={"torch": row.peers["torch"], "liger": peer})
        case, candidates = op_rows.build(one, row, "cpu", FP32, "odd")
        gate.check(case, candidates[2].prepare())


@pytest.mark.parametrize("name", BOTH)
def test_both_keeps_nothing(name):
    """Each call runs the forward and the backward: of ours, and of the peer."""
    row, runs = rows.ROWS[name], []

    def counted(f, what):
        return lambda *a: runs.append(what) or f(*a)

    peer = row.peers["torch"]
    peer = replace(peer, expression=counted(peer.expression, "peer"))
    row = replace(row, save=counted(row.save, "forward"), call=counted(row.call, "backward"))
    row = replace(row, peers={"torch": peer})
    case, (ours, torch_) = op_rows.build(name, row, "cpu", FP32, "odd")
    ours, torch_ = ours.prepare(), torch_.prepare()
    for _ in range(2):
        ours.run(case.inputs[0])
        torch_.run(case.inputs[0])
    assert runs == ["forward", "backward", "peer"] * 2


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("name", STEPS)
def test_a_step_goes_on_when_timed_and_begins_anew_when_checked(name, dtype):
    case, candidates = rows.case(name, "cpu", dtype, "odd")
    checked = gate.Gate(case)
    for one in candidates:
        prepared = one.prepare()
        assert prepared.changes_state
        first, second = ([t.clone() for t in prepared.run(case.inputs[0])] for _ in range(2))
        assert not any(map(torch.equal, first, second))
        checked.check(prepared, one.factor)
    assert not checked._restore(0)


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


def _decay_everywhere(*args):
    step = reference_optimizer.Step(*args)
    reference_optimizer.adamw_(*step._replace(weight_decays=[0.1, 0.1]))


def _no_trust_ratio(*args):
    reference_optimizer.adamw_(*args[:-1])


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
    "adamw_": ("adamw_", _decay_everywhere, "(param|master)"),
    "lamb_": ("lamb_", _no_trust_ratio, "(param|master)"),
    "grad_norm": ("grad_norm", lambda g, s: reference_optimizer.grad_norm(g[1:], s), "norm"),
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
        gate.check(case, candidates[-1].prepare())


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
