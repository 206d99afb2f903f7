"""Faults in attention: its forward, what its kernels share, its op."""

from functools import partial

from mutant import Mutant

ATTENTION = "kernels/attention.py"
TILES = "kernels/attention_tiles.py"
in_attention = "tests/test_attention_kernel.py"
in_dropout = "tests/test_kernel_dropout.py"
in_edges = "tests/test_kernel_edges.py"
in_batches = "tests/test_kernel_batches.py"

AROUND_32 = "test_formula and short and 33 and float32"
STREAMED = "test_formula and rules and 129 and float32"
WITH_DROPOUT = "test_formula and 65 and float32"

forward = partial(Mutant, file=ATTENTION, tests=in_attention)
tiles = partial(Mutant, file=TILES, tests=in_attention)
attention_op = partial(Mutant, file="bert_fast/ops/attention.py", tests=in_attention)

MUTANTS = [
    forward(
        "attention: one key too many in the short form",
        "s = tl.where((keys < n)[None, :], s,",
        "s = tl.where((keys <= n)[None, :], s,",
        AROUND_32,
        within="_one_pass",
    ),
    forward(
        "attention: one key too many in the last tile of the long form",
        "s = tl.where((keys < n)[None, :], s,",
        "s = tl.where((keys <= n)[None, :], s,",
        STREAMED,
        within="_stream_step",
    ),
    forward(
        "attention: -1e4 for minus infinity",
        's, float("-inf"))',
        "s, -1e4)",
        "test_large_scores and below and float32",
        tests=in_edges,
        within="_stream_step",
    ),
    forward(
        "attention: a tail of one key is lost",
        "if whole < n:",
        "if whole + 1 < n:",
        STREAMED,
    ),
    forward(
        "attention: exponentials of base 2 without log2(e)",
        "plan.K**-0.5 * LOG2_E.value",
        "plan.K**-0.5",
        STREAMED,
    ),
    forward(
        "attention: scale squared",
        "plan.K**-0.5 * LOG2_E.value",
        "plan.K**-1.0 * LOG2_E.value",
        STREAMED,
    ),
    forward(
        "attention: log-sum-exp in base 2, short form",
        "(m + tl.log2(total)) * LN_2",
        "m + tl.log2(total)",
        AROUND_32,
        within="_one_pass",
    ),
    forward(
        "attention: log-sum-exp half in base 2, long form",
        "(m + tl.log2(total)) * LN_2",
        "m * LN_2 + tl.log2(total)",
        STREAMED,
        within="_attention_long_fwd_kernel",
    ),
    forward(
        "attention: rescale of the output lost",
        "acc * rescale[:, None], input_precision",
        "acc, input_precision",
        "test_growing_scores and rules",
    ),
    forward(
        "attention: rescale of the sum lost",
        "total = total * rescale + tl.sum(p, axis=1)",
        "total = total + tl.sum(p, axis=1)",
        "test_growing_scores and rules",
    ),
    forward(
        "attention: the running maximum forgets",
        "larger = tl.maximum(m, tl.max(s, axis=1))",
        "larger = tl.max(s, axis=1)",
        "test_large_scores and both and float32",
        tests=in_edges,
    ),
    forward(
        "attention: dropped probabilities missing in the sum",
        "p = tl.where(kept, p, 0.0)",
        "p = tl.where(kept, p, 0.0)\n            total = tl.sum(p, axis=1)",
        WITH_DROPOUT + " and short",
        within="_one_pass",
    ),
    forward(
        "attention: what is kept is not scaled",
        "acc * (keep_scale / total)[:, None]",
        "acc * (1.0 / total)[:, None]",
        WITH_DROPOUT + " and rules",
    ),
    forward(
        "attention: values with the stride of the output",
        "v = load_rows(q_ptr + 2 * H * K, keys, 3 * H * K,",
        "v = load_rows(q_ptr + 2 * H * K, keys, H * K,",
        AROUND_32,
    ),
    forward(
        "attention: keys in the place of values",
        "v = load_rows(k_ptr + H * K, keys,",
        "v = load_rows(k_ptr, keys,",
        STREAMED,
    ),
    forward(
        "attention: keys in another order than their mask",
        "keys = key_order(BLOCK_N, DROPOUT)",
        "keys = tl.arange(0, BLOCK_N)",
        WITH_DROPOUT + " and short",
        within="_one_pass",
    ),
    forward(
        "attention: the mask's sequence and head swapped",
        "row, first, sequence, head, BLOCK_M",
        "row, first, head, sequence, BLOCK_M",
        "test_attention_counters and fwd",
        tests=in_dropout,
        within="_stream_step",
    ),
    forward(
        "attention: key without the site",
        "key = tl.load(seed_ptr) + site",
        "key = tl.load(seed_ptr)",
        WITH_DROPOUT + " and short",
        within="_attention_short_fwd_kernel",
    ),
    forward(
        "attention: rows of no sequence taken for one",
        "if sequence == B:",
        "if sequence > B:",
        "test_empty_sequences and float32",
        tests=in_edges,
    ),
    forward(
        "attention: the last row of no sequence not written",
        "for row in range(0, n, BLOCK_M):",
        "for row in range(0, n - 1, BLOCK_M):",
        "test_the_work_list_may_come_from_outside and float32",
        within="_zero",
    ),
    forward(
        "attention: heads of the log-sum-exp a sequence apart",
        "lse_ptr += head.to(tl.int64) * T + begin",
        "lse_ptr += head.to(tl.int64) * n + begin",
        "test_every_head_size and short and 16 and float32",
        within="_attention_short_fwd_kernel",
    ),
    forward(
        "attention: 33 rows in the tile of 32",
        "if n <= 32:",
        "if n <= 33:",
        AROUND_32,
    ),
    tiles(
        "attention: the row after a sequence is read",
        "x = tl.load(ptrs, mask=(rows < n)[:, None], other=0.0)",
        "x = tl.load(ptrs, mask=(rows <= n)[:, None], other=0.0)",
        "test_sequences_do_not_meet and float32 and nan",
        tests=in_batches,
    ),
    tiles(
        "attention: the row after a sequence is written",
        "mask = (rows < n)[:, None] & (cols < K)[None, :]",
        "mask = (rows <= n)[:, None] & (cols < K)[None, :]",
        AROUND_32,
    ),
    tiles(
        "attention: a column of the next head is written",
        "mask = (rows < n)[:, None] & (cols < K)[None, :]",
        "mask = (rows < n)[:, None] & (cols <= K)[None, :]",
        "test_every_head_size and rules and 24 and float32",
    ),
    tiles(
        "attention: a column of the next head is read",
        "mask=(rows < n)[:, None] & (cols < K)[None, :], other",
        "mask=(rows < n)[:, None] & (cols <= K)[None, :], other",
        "test_every_head_size and rules and 24 and float32",
    ),
    tiles(
        "attention: keys of a pair swapped in their order",
        "j % 32 // 8 * 2 + j % 2",
        "j % 32 // 8 * 2 + 1 - j % 2",
        WITH_DROPOUT + " and rules",
    ),
    tiles(
        "attention: what equals the threshold is dropped",
        ">= threshold",
        "> threshold",
        "test_the_threshold_is_kept and attention",
        tests=in_dropout,
    ),
    tiles(
        "attention: every tile of keys has the first one's mask",
        "groups = column // 8 + tl.arange(0, C // 8)",
        "groups = tl.arange(0, C // 8)",
        "test_attention_counters and fwd",
        tests=in_dropout,
    ),
    tiles(
        "attention: every tile of queries has the first one's mask",
        "rows = row + tl.arange(0, R)",
        "rows = tl.arange(0, R)",
        "test_attention_counters and fwd",
        tests=in_dropout,
    ),
    tiles(
        "attention: the row before in the work list",
        "4 * (1 + entry).to(tl.int64)",
        "4 * entry.to(tl.int64)",
        AROUND_32,
    ),
    tiles(
        "attention: a sequence begins where its tile does",
        "begin = tl.load(ptr + 1)",
        "begin = tl.load(ptr + 3)",
        AROUND_32,
    ),
    tiles(
        "attention: the entries of long sequences are those of all",
        "1 if STREAM_ALL else 2",
        "2 if STREAM_ALL else 1",
        AROUND_32,
    ),
    tiles(
        "attention: programs for whole tiles only",
        "min(by_length, self.T // tile + streamed)",
        "min(by_length, self.T // tile)",
        "test_no_entry_is_without_a_program",
    ),
    tiles(
        "attention: no program for the rows of no sequence",
        "self.num_short = self.B + 1",
        "self.num_short = self.B",
        AROUND_32,
    ),
    tiles(
        "attention: no program for the rows past whole tiles",
        "streamed * triton.cdiv(max_len, tile)",
        "streamed * (max_len // tile)",
        "test_no_entry_is_without_a_program",
    ),
    tiles(
        "attention: one block too few in a tile",
        "blocks = self.tile // rule[block]",
        "blocks = self.tile // rule[block] - 1",
        STREAMED,
    ),
    tiles(
        "attention: 129 rows are not long",
        "max_len > tile",
        "max_len > tile + 1",
        "test_formula and short and 129 and float32",
    ),
    attention_op(
        "attention: the gradient is taken as it lies",
        "do.contiguous()",
        "do",
        "test_layouts_of_the_gradient and attention",
        tests="tests/test_kernel_layouts.py",
    ),
]
