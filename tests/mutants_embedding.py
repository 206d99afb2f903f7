"""Faults in the kernels of the embeddings, of their tables' gradients and of the loss."""

from functools import partial

from mutant import Mutant

EMBEDDING = "tests/test_embedding_kernel.py"
CROSS_ENTROPY = "tests/test_cross_entropy_kernel.py"
MEMORY = "tests/test_kernel_memory.py"
OVERFLOW = "tests/test_kernel_overflow.py"
PLAIN = "test_formula and ids and float32 and 17"

embedding = partial(Mutant, file="kernels/embedding.py", tests=EMBEDDING)
embedding_rows = partial(Mutant, file="kernels/common.py", tests=EMBEDDING)
tables = partial(Mutant, file="kernels/embedding_tables.py", tests=EMBEDDING)
embedding_op = partial(Mutant, file="bert_fast/ops/embedding.py", tests=EMBEDDING)
cross_entropy = partial(Mutant, file="kernels/cross_entropy.py", tests=CROSS_ENTROPY)
cross_entropy_op = partial(Mutant, file="bert_fast/ops/cross_entropy.py", tests=CROSS_ENTROPY)

EMBEDDING_MUTANTS = [
    embedding(
        "embedding: position and type tables swapped",
        "token_type_ids, word, position, type_, w, b, y, z, mean, rstd)",
        "token_type_ids, word, type_, position, w, b, y, z, mean, rstd)",
        PLAIN,
    ),
    embedding(
        "embedding: the position's id in the type table",
        "type_ptr + type_ids[:, None] * D",
        "type_ptr + (position_ids % C)[:, None] * D",
        PLAIN,
    ),
    embedding(
        "embedding: the id past the table is inside",
        "inside = (ids >= 0) & (ids < size)",
        "inside = (ids >= 0) & (ids <= size)",
        "test_ids_out_of_range",
    ),
    embedding(
        "embedding: an id below 0 is inside",
        "inside = (ids >= 0) & (ids < size)",
        "inside = (ids >= -1) & (ids < size)",
        "test_ids_out_of_range",
    ),
    embedding(
        "embedding: an id outside gives a row of nothing",
        'z = tl.where(known[:, None], z, float("nan"))',
        "z = tl.where(known[:, None], z, 0.0)",
        "test_ids_out_of_range",
    ),
    embedding_rows(
        "embedding: variance over the tile's columns",
        "rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + eps)",
        "rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / BLOCK_D + eps)",
        "test_data and float32",
    ),
    embedding_rows(
        "embedding: variance as a difference of squares",
        "rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + eps)",
        "rstd = tl.rsqrt(tl.sum(tl.where(in_row, z * z, 0.0), axis=1) / D - mean * mean + eps)",
        "test_far_from_zero and float32",
    ),
    embedding_rows(
        "embedding: columns past the end hold minus the mean",
        "centred = tl.where(in_row, z - mean[:, None], 0.0)",
        "centred = z - mean[:, None]",
        "test_data and float32",
    ),
    embedding_rows(
        "embedding: eps outside the root",
        "/ D + eps)",
        "/ D) + eps",
        "test_eps and float32",
    ),
    embedding(
        "embedding: dropout before the shift",
        "y *= common.row_dropout(rows, key, threshold, factor, ROWS, BLOCK_D)",
        "y = (y - b) * common.row_dropout(rows, key, threshold, factor, ROWS, BLOCK_D) + b",
        "test_dropout and float32 and ids",
        within="_embed_fwd_kernel",
    ),
    embedding(
        "embedding backward: what is kept is not scaled",
        "dy *= common.row_dropout(rows, key, threshold, factor,",
        "dy *= common.row_dropout(rows, key, threshold, 1.0,",
        "test_dropout and float32 and ids",
    ),
    embedding(
        "embedding backward: a mask of the first tile for all",
        "dy *= common.row_dropout(rows, key, threshold",
        "dy *= common.row_dropout(rows % ROWS, key, threshold",
        "test_dropout and float32 and ids",
    ),
    embedding(
        "embedding backward: position's gradient by type",
        "dposition = table_gradient(dz, position_ids, position, -1)",
        "dposition = table_gradient(dz, token_type_ids, position, -1)",
        PLAIN,
    ),
    embedding(
        "embedding backward: the pad row gets a gradient",
        "dword = table_gradient(dz, input_ids, word, pad_id)",
        "dword = table_gradient(dz, input_ids, word, -1)",
        "test_padding_row",
    ),
    embedding(
        "embedding backward: the type's pad row gets none",
        "dtype = table_gradient(dz, token_type_ids, type_, -1)",
        "dtype = table_gradient(dz, token_type_ids, type_, pad_id)",
        "test_padding_row",
    ),
    embedding(
        "embedding backward: rounded before the sums",
        "dz = torch.empty(T, D, dtype=torch.float32, device=z.device)",
        "dz = torch.empty(T, D, dtype=z.dtype, device=z.device)",
        "test_what_is_summed_was_not_rounded",
    ),
    embedding(
        "embedding backward: a foul row counts",
        "known = mask & known[:, None]",
        "known = mask",
        "test_ids_out_of_range",
    ),
    embedding(
        "embedding backward: the gradient of a foul row is not written",
        "tl.store(dz_ptr + offs, dz, mask=mask)",
        "tl.store(dz_ptr + offs, dz, mask=known)",
        "test_ids_out_of_range",
    ),
    embedding_op(
        "embedding: no pad row is row 0",
        "pad_id = -1 if pad_id is None else pad_id",
        "pad_id = 0 if pad_id is None else pad_id",
        PLAIN,
    ),
]

TABLE_MUTANTS = [
    tables(
        "tables: the first run was begun before",
        "crossed = (first > 0) & (before == begun)",
        "crossed = before == begun",
        "test_runs",
    ),
    tables(
        "tables: no run enters a chunk",
        "crossed = (first > 0) & (before == begun)",
        "crossed = first < 0",
        "test_runs",
    ),
    tables(
        "tables: the last run has no end",
        "ends = (at + 1 >= T) | (following != row)",
        "ends = following != row",
        "test_runs and equal",
    ),
    tables(
        "tables: a run goes on into the next",
        "tl.where(begins[:, None], 0.0, total[None, :])",
        "total[None, :]",
        "test_runs",
    ),
    tables(
        "tables: a run that leaves a chunk is lost",
        "tl.where(ends, entered, at == first + CHUNK - 1)",
        "tl.where(ends, entered, at == first + CHUNK)",
        "test_runs",
    ),
    tables(
        "tables: entering and leaving runs swapped",
        "tl.where(entered, 0, 1)",
        "tl.where(entered, 1, 0)",
        "test_runs",
    ),
    tables(
        "tables: the last chunk of a run is dropped",
        "for start in range(chunk + 1, outside, ROWS):",
        "for start in range(chunk + 1, outside - 1, ROWS):",
        "test_runs",
    ),
    tables(
        "tables: a run's first chunk counted twice",
        "for start in range(chunk + 1, outside, ROWS):",
        "for start in range(chunk, outside, ROWS):",
        "test_runs",
    ),
    tables(
        "tables: every chunk of a run begins it",
        "begins = (first == 0) | (before != row)",
        "begins = first >= 0",
        "test_runs",
    ),
    tables(
        "tables: the last border is not joined",
        "((chunks - 1) * blocks,)",
        "(max(chunks - 2, 0) * blocks,)",
        "test_runs",
    ),
    tables(
        "tables: the pad row is written",
        "return (row >= 0) & (row < num_rows) & (row != pad_id)",
        "return (row >= 0) & (row < num_rows)",
        "test_padding_row",
    ),
    tables(
        "tables: an id past the table is written",
        "return (row >= 0) & (row < num_rows) & (row != pad_id)",
        "return (row >= 0) & (row <= num_rows) & (row != pad_id)",
        "nobody_checked and after and test_guard_pages",
        tests=MEMORY,
    ),
    tables(
        "tables: an id below 0 is written",
        "return (row >= 0) & (row < num_rows) & (row != pad_id)",
        "return (row >= -9) & (row < num_rows) & (row != pad_id)",
        "nobody_checked and before and test_guard_pages",
        tests=MEMORY,
    ),
    tables(
        "tables: the search for a run's end stops early",
        "while inside + 1 < outside:",
        "while inside + 2 < outside:",
        "test_runs",
    ),
    tables(
        "tables: a chunk that is not full has no program",
        "chunks = triton.cdiv(T, chunk)",
        "chunks = max(1, T // chunk)",
        "test_runs",
    ),
    tables(
        "tables: any order of equal ids",
        "torch.sort(ids.clamp(-1, table.shape[0])",
        "torch.sort(ids.flip(0).clamp(-1, table.shape[0])",
        "test_runs",
    ),
    tables(
        "tables: a token's row in 32 bits",
        "tokens = tl.load(order_ptr + at, mask=live, other=0)",
        "tokens = tl.load(order_ptr + at, mask=live, other=0).to(tl.int32)",
        "test_embed_backward",
        tests=OVERFLOW,
    ),
]

CROSS_ENTROPY_MUTANTS = [
    cross_entropy(
        "cross entropy: the sum is not rescaled with the maximum",
        "tl.where(s > largest, total * e + 1.0, total + e)",
        "tl.where(s > largest, total + 1.0, total + e)",
        "test_formula and bias and float32 and 2500",
    ),
    cross_entropy(
        "cross entropy: the threads' sums are not rescaled",
        "row_total = tl.sum(total * tl.exp(largest - row_largest), axis=0)",
        "row_total = tl.sum(total, axis=0)",
        "test_formula and bias and float32 and 33",
    ),
    cross_entropy(
        "cross entropy: the label's -1 missing",
        "d = tl.exp(s - largest) * (1.0 / total) - tl.where(cols[None, :] == label, 1.0, 0.0)",
        "d = tl.exp(s - largest) * (1.0 / total)",
        "test_formula and bias and float32 and 33",
    ),
    cross_entropy(
        "cross entropy: a row without label gets a gradient",
        "read = mask & (label != IGNORE)",
        "read = mask",
        "test_no_label and float32",
    ),
    cross_entropy(
        "cross entropy: a row without label has a loss",
        "tl.where(label == IGNORE, 0.0, loss)",
        "loss",
        "test_no_label and float32",
    ),
    cross_entropy(
        "cross entropy: words past the vocabulary count",
        'torch.full((S,), float("-inf"), **narrow)',
        "torch.full((S,), 0.0, **narrow)",
        "test_formula and bias and float32 and 33",
    ),
    cross_entropy(
        "cross entropy: the word past the vocabulary is a label",
        "labelled = (label >= 0) & (label < V)",
        "labelled = (label >= 0) & (label <= V)",
        "test_label_out_of_range",
    ),
    cross_entropy(
        "cross entropy: a label far outside is read",
        "labelled = (label >= 0) & (label < V)",
        "labelled = label >= 0",
        "nobody_checked and after and test_guard_pages",
        tests=MEMORY,
    ),
    cross_entropy(
        "cross entropy: the last block reads the next row",
        "mask=cols < S, other=float",
        "mask=cols < S + BLOCK_V, other=float",
        "test_formula and bias and float32 and 2500",
    ),
    cross_entropy(
        "cross entropy: labels of the first chunk for all",
        "rows = labels[part], largest[part], total[part]",
        "rows = labels[: last - first], largest[part], total[part]",
        "test_chunks and float32",
    ),
    cross_entropy(
        "cross entropy: losses of a chunk over those of another",
        "loss[part], V, S)",
        "loss[: last - first], V, S)",
        "test_chunks and float32",
    ),
    cross_entropy(
        "cross entropy: dw of the last chunk alone",
        "dw += s.T @ x[part]",
        "dw = s.T @ x[part]",
        "test_chunks and float32",
    ),
    cross_entropy(
        "cross entropy: every row with the statistics of the first",
        "largest = tl.load(largest_ptr + rows, mask=here",
        "largest = tl.load(largest_ptr + rows * 0, mask=here",
        "test_formula and bias and float32 and 33",
    ),
    cross_entropy(
        "cross entropy: bias gradient of whole programs only",
        "end = tl.minimum(begin + rows_per_program, N)",
        "end = tl.minimum(begin + rows_per_program - 1, N)",
        "test_chunks and float32",
    ),
    cross_entropy(
        "cross entropy: rows of logits V apart",
        "out = logits_ptr + rows[:, None] * S + cols[None, :]",
        "out = logits_ptr + rows[:, None] * V + cols[None, :]",
        "test_formula and bias and float32 and 33",
    ),
    cross_entropy_op(
        "cross entropy: the loss's gradient is not applied",
        "torch.mul(g, d_loss.expand_as(g), out=torch.empty_like(g))",
        "g",
        "test_formula and bias and float32 and 33",
    ),
]

MUTANTS = [*EMBEDDING_MUTANTS, *TABLE_MUTANTS, *CROSS_ENTROPY_MUTANTS]
