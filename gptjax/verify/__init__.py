"""Verify hand-written gradients: ``python -m gptjax.verify`` for a model's, `check` and `compare`
for your own.

::

    jax.config.update("jax_enable_x64", True)
    report = gptjax.verify.check(loss, loss_and_grad, params, batch)
    print(report)
    assert report
"""

from gptjax.verify.comparison import compare
from gptjax.verify.proof import Report, check
from gptjax.verify.rows import Comparison, Row

__all__ = ["Comparison", "Report", "Row", "check", "compare"]
