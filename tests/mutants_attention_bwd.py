"""Faults in attention's backward, and in the work list."""

from functools import partial

from mutant import Mutant

in_attention = "tests/test_attention_kernel.py"
in_edges = "tests/test_kernel_edges.py"
AROUND_32 = "test_formula and short and 33 and float32"
STREAMED = "test_formula and rules and 129 and float32"
WITH_DROPOUT = "test_formula and 65 and float32"

backward = partial(Mutant, file="kernels/attention_bwd.py", tests=in_attention)
work_list = partial(Mutant, file="kernels/work_list.py", tests="tests/test_work_list.py")

BACKWARD_MUTANTS = [
    backward(
        "attention backward: its own work list misses the last row",
        "work = work_list(cu_seqlens, qkv.shape[0], tile)",
        "work = work_list(cu_seqlens, qkv.shape[0] - 1, tile)",
        "test_formula and rules and 33 and float32",
    ),
    backward(
        "attention backward: the mask is not applied to dP",
        "dp = tl.where(kept, dp * keep_scale, 0.0)",
        "dp = dp * keep_scale",
        WITH_DROPOUT + " and rules",
    ),
    backward(
        "attention backward: dP is not scaled",
        "dp = tl.where(kept, dp * keep_scale, 0.0)",
        "dp = tl.where(kept, dp, 0.0)",
        WITH_DROPOUT + " and rules",
    ),
    backward(
        "attention backward: the probabilities of dV are not scaled",
        "tl.where(kept, p * keep_scale, 0.0)",
        "tl.where(kept, p, 0.0)",
        WITH_DROPOUT + " and rules",
    ),
    backward(
        "attention backward: dQ and dK are not scaled",
        "ds = p * (dp - delta[:, None]) * scale",
        "ds = p * (dp - delta[:, None])",
        STREAMED,
    ),
    backward(
        "attention backward: natural log-sum-exp in base 2",
        "(lse * LOG2_E)[:, None]",
        "lse[:, None]",
        STREAMED,
    ),
    backward(
        "attention backward: delta lost",
        "ds = p * (dp - delta[:, None]) * scale",
        "ds = p * dp * scale",
        STREAMED,
    ),
    backward(
        "attention backward: delta without the output, short form",
        "delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)",
        "delta = tl.sum(do.to(tl.float32) * do.to(tl.float32), axis=1)",
        AROUND_32,
        within="_all_gradients",
    ),
    backward(
        "attention backward: delta without the output, long form",
        "o = load_rows(o_ptr + at,",
        "o = load_rows(do_ptr + at,",
        STREAMED,
        within="_attention_delta_kernel",
    ),
    backward(
        "attention backward: dK and dV swapped",
        "store_rows(dk_ptr, dk, keys, 3 * H * K, n, K, BLOCK_K)\n"
        "        store_rows(dk_ptr + H * K, dv,",
        "store_rows(dk_ptr + H * K, dk, keys, 3 * H * K, n, K, BLOCK_K)\n"
        "        store_rows(dk_ptr, dv,",
        STREAMED,
    ),
    backward(
        "attention backward: keys past the end in dQ",
        "MASKED=True",
        "MASKED=False",
        "test_large_scores and below and float32",
        tests=in_edges,
        within="_attention_long_bwd_q_kernel",
    ),
    backward(
        "attention backward: dQ with the first tile's mask",
        "q, do, k, v, lse, delta, row, first, keys,",
        "q, do, k, v, lse, delta, row, 0, keys,",
        WITH_DROPOUT + " and rules",
        within="_attention_long_bwd_q_kernel",
    ),
    backward(
        "attention backward: a tail of one query is lost",
        "for row in range(0, n, BLOCK_M):",
        "for row in range(0, n - 1, BLOCK_M):",
        STREAMED,
        within="_attention_long_bwd_kv_kernel",
    ),
    backward(
        "attention backward: statistics of the batch's first rows",
        "stat = head.to(tl.int64) * T + begin",
        "stat = head.to(tl.int64) * T",
        "test_formula and rules and 33 and float32",
        within="_attention_long_bwd_q_kernel",
    ),
    backward(
        "attention backward: dQ of the last keys alone",
        "dq = tl.dot(ds, k, dq, input_precision=PRECISION)",
        "dq = tl.dot(ds, k, input_precision=PRECISION)",
        "test_formula and short and 127 and float32",
        within="_all_gradients",
    ),
    backward(
        "attention backward: values of no sequence get no gradient written",
        "for part in tl.static_range(3):",
        "for part in tl.static_range(2):",
        "test_empty_sequences and float32",
        tests=in_edges,
    ),
    backward(
        "attention backward: key without the site",
        "key = tl.load(seed_ptr) + site",
        "key = tl.load(seed_ptr)",
        WITH_DROPOUT + " and rules",
        within="_attention_long_bwd_kv_kernel",
    ),
]

WORK_LIST_MUTANTS = [
    work_list(
        "work list: a sequence ends where it begins",
        "cu_seqlens_ptr + sequences + 1, mask",
        "cu_seqlens_ptr + sequences, mask",
        "test_kernel_entries",
    ),
    work_list(
        "work list: the border before the slack is not read",
        "mask=sequences <= B, other=0",
        "mask=sequences < B, other=0",
        "test_kernel_entries",
    ),
    work_list(
        "work list: whole tiles only",
        "    tiles = (length + tile - 1) // tile",
        "    tiles = length // tile",
        "test_kernel_entries",
    ),
    work_list(
        "work list: a sequence is before itself",
        "others[None, :] < mine[:, None]",
        "others[None, :] <= mine[:, None]",
        "test_kernel_entries",
    ),
    work_list(
        "work list: the slack is not the last",
        "is_before = longer | (as_long & earlier) | (mine == B)[:, None]",
        "is_before = longer | (as_long & earlier)",
        "test_kernel_entries",
    ),
    work_list(
        "work list: a sequence beyond the rows",
        "tl.minimum(tl.maximum(last, first), T) - first",
        "tl.maximum(last, first) - first",
        "test_borders_are_held",
    ),
    work_list(
        "work list: a sequence of fewer rows than none",
        "tl.minimum(tl.maximum(last, first), T) - first",
        "tl.minimum(last, T) - first",
        "test_borders_are_held",
    ),
    work_list(
        "work list: the shortest first",
        "their_length[None, :] > length[:, None]",
        "their_length[None, :] < length[:, None]",
        "test_kernel_entries",
    ),
    work_list(
        "work list: a tile is long",
        "tl.where(their_tiles > 1,",
        "tl.where(their_tiles >= 1,",
        "test_kernel_entries",
    ),
    work_list(
        "work list: the slack in tiles",
        "tl.minimum(tiles, 1)",
        "tiles",
        "test_kernel_entries and 300",
    ),
    work_list(
        "work list: tiles a row apart",
        "tl.store(ptrs + 3, i * tile, mask=mask)",
        "tl.store(ptrs + 3, i, mask=mask)",
        "test_kernel_entries",
    ),
    work_list(
        "work list: borders outside the rows",
        "first = tl.minimum(tl.maximum(first, 0), T)",
        "first = tl.minimum(first, T)",
        "test_borders_are_held",
    ),
    work_list(
        "work list: more entries than there is room for",
        "tl.minimum(total + tiles, capacity)",
        "total + tiles",
        "test_borders_are_held",
    ),
    work_list(
        "work list: the first 128 sequences alone",
        "for start in range(0, B, BLOCK_B):",
        "for start in range(0, tl.minimum(B, BLOCK_B), BLOCK_B):",
        "test_kernel_entries",
    ),
    work_list(
        "work list, eager: the slack in tiles",
        "tiles[B:].clamp_(max=1)",
        "tiles[B:].clamp_(min=0)",
        "test_entries and 300",
        file="bert_fast/reference.py",
    ),
    work_list(
        "work list, eager: as long in any order",
        "argsort(descending=True, stable=True)",
        "flip(0).argsort(descending=True, stable=True)",
        "test_entries",
        file="bert_fast/reference.py",
    ),
    work_list(
        "work list: tiles of 64 rows",
        "TILE = 128",
        "TILE = 64",
        "test_entries",
        file="bert_fast/ops/work_list.py",
    ),
]

MUTANTS = [*BACKWARD_MUTANTS, *WORK_LIST_MUTANTS]
