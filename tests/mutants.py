"""Every fault that `mutate.py` plants."""

import mutants_attention
import mutants_attention_bwd
import mutants_common
import mutants_embedding
import mutants_invariant
import mutants_ops
import mutants_rounding
import mutants_rows

PARTS = (
    mutants_attention,
    mutants_attention_bwd,
    mutants_rows,
    mutants_common,
    mutants_embedding,
    mutants_ops,
    mutants_rounding,
    mutants_invariant,
)
MUTANTS = tuple(mutant for part in PARTS for mutant in part.MUTANTS)
