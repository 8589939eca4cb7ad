"""A pure-functional GPT-2 in JAX whose backward pass is derived by hand: see `gptjax.models.gpt2`."""
