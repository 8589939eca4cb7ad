"""Models as pure functions over a pytree of parameters: the families, and the one network that runs
any of them.
"""

from typing import Any

from gptjax.models import gpt2

FAMILIES: dict[str, Any] = {"gpt2": gpt2}
