"""The benchmark's rows for ops: bytes and FLOPs are those that must be moved and computed."""

import op_rows
import ops as rows
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bert_fast import reference, reference_optimizer

FP32, BF16 = torch.float32, torch.bfloat16
STEPS = [name for name, row in rows.ROWS.items() if row.in_place]
BOTH = [name for name in rows.names() if name.endswith("fwd+bwd")]


class Moved:
    """The reference, which adds up the bytes of the tensors its calls took and gave."""

    def __init__(self):
        self.bytes = 0

    def __getattr__(self, op):
        def call(*args):
            out = getattr(op_rows.REFERENCES, op)(*args)
            given = out if isinstance(out, tuple) else (out,)
            flat = [t for a in args for t in (a if isinstance(a, list) else [a])]
            self.bytes += sum(t.nbytes for t in (*flat, *given) if isinstance(t, torch.Tensor))
            return out

        return call


KNOWN_OTHERWISE = [n for n in rows.names() if n.startswith("embed") or n in STEPS]


@pytest.mark.parametrize("name", [n for n in rows.names() if n not in KNOWN_OTHERWISE])
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("fp32", "bf16"))
def test_bytes_are_those_of_what_the_op_takes_and_gives(name, dtype):
    case, _ = rows.case(name, "cpu", dtype, "small")
    row, moved, v = rows.ROWS[name], Moved(), case.inputs[0]
    if row.direction == "both":
        row.answers(moved, v, row.p)
    else:
        row.call(moved, v, row.p, row.save(op_rows.REFERENCES, v, row.p))
    calls = 2 if name in BOTH else 1
    host = 8 * calls if row.p else 0  # of the seed
    host += 8 if row.op.startswith("unpad") else 0  # of max_len
    if row.op.startswith("attention"):
        host += calls * v["work"].nbytes  # nothing beside the rows
    assert case.work.bytes == moved.bytes - host


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("fp32", "bf16"))
def test_bytes_of_a_step_are_those_it_reads_and_writes(name, dtype):
    case, _ = rows.case(name, "cpu", dtype, "small")
    row = rows.ROWS[name]
    _, args = row.save(None, case.inputs[0], 0.0)
    step = reference_optimizer.Step(*args)
    masters = [t for t in step.masters if t.numel()]
    assert len(masters) == (len(step.params) if dtype == BF16 else 0)
    updated = [*(masters or step.params), *step.exp_avgs, *step.exp_avg_sqs, *step.steps]
    read, written = [*step.grads, *updated], [*updated, *(step.params if masters else [])]
    assert case.work.bytes == sum(t.nbytes for t in (*read, *written))
    large = row.work(2, 0.0, **row.sizes["large"])  # 28 bytes for each of 12.6 million
    assert large.bytes == 28 * (12 * 1024**2 + 13 * 1024) + 8 * 12


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
        if row.direction == "both":
            saved = row.save(reference, case.inputs[0], row.p)
        row.call(reference, case.inputs[0], row.p, saved)
    assert case.work.flops == counter.get_total_flops() > 0


def test_sizes_of_a_gpu_are_those_of_the_targets():
    def full(name, size="large"):
        row = rows.ROWS[name]
        return row.work(2, row.p, **row.sizes[size])

    assert full("attention s512").flops == 4 * 512**2 * 64 * 16 * 32
    assert full("attention_bwd s512").flops == 10 * 512**2 * 64 * 16 * 32
    assert full("attention s512 fwd+bwd").flops == 14 * 512**2 * 64 * 16 * 32
    assert full("linear", "base").flops == 77_309_411_328
    assert full("add_layer_norm").bytes == 4 * 2**26 + 2 * 2 * 1024 + 8 * 32768
    assert full("linear_cross_entropy", "base").tokens == 2458
    assert full("unpad").tokens * 2 == full("unpad").slots == 65536
    for name in ("attention s128", "attention s256", "attention s512"):
        assert full(name).tokens == 16384
    mixed = full("attention mixed")
    assert abs(mixed.sequences - 64) < 4 and abs(mixed.tokens - 16384) < 1024
