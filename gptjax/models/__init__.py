"""Models as pure functions of a pytree: the families, and the network that runs any of them."""

from typing import Any

from gptjax.models import gpt2

FAMILIES: dict[str, Any] = {"gpt2": gpt2}
