"""Leave only the mutants of the backward in a session of cosmic-ray: ``keep_backward.py FILE
SESSION``.
"""

import ast
import sqlite3
import sys
from pathlib import Path

FUNCTIONS = {
    "block_bwd", "embed_bwd", "norm_bwd", "recompute",  # models/gpt2.py, models/llama.py
    # Models/transformer.py
    "blocks_bwd", "over_layers", "loss_and_grad", "classifier_and_grad", "to_params", "loss_manual",
    # Models/layers.py
    "linear_bwd", "layernorm_bwd", "rmsnorm_bwd", "gelu_bwd", "gelu_again", "swiglu_bwd",
    "swiglu_again",
}  # fmt: skip

source, session = sys.argv[1:]
kept = set()
for node in ast.parse(Path(source).read_text()).body:
    # The binding follows its function
    name = getattr(node, "name", "loss_manual" if isinstance(node, ast.Expr) else "")
    if name in FUNCTIONS:
        kept |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
with sqlite3.connect(session) as database:
    for job, line in database.execute(
        "select job_id, start_pos_row from mutation_specs"
    ).fetchall():
        if line not in kept:
            for table in ("mutation_specs", "work_results", "work_items"):
                database.execute(f"delete from {table} where job_id = ?", (job,))
