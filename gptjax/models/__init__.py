"""Models as pure functions of a pytree: the families, and the network that runs any of them."""

from typing import Any

from gptjax.models import gpt2, llama

FAMILIES: dict[str, Any] = {"gpt2": gpt2, "llama": llama}
