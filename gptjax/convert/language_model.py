"""A model with its tokenizer: text in, text, losses and gradients out."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from gptjax.config import ModelConfig, Sampler
from gptjax.convert.weights import load_params, open_weights, with_named_tokenizer
from gptjax.errors import ConfigError, DataError
from gptjax.generate.engine import Rules
from gptjax.generate.samples import Sample, continued
from gptjax.generate.stream import prompt_ids
from gptjax.models import transformer
from gptjax.models.batch import Batch
from gptjax.models.params import num_params
from gptjax.tokenizers import Tokenizer
from gptjax.xla.backend import platform_name

_loss = jax.jit(transformer.loss)
_loss_and_grad = jax.jit(transformer.loss_and_grad)


@dataclasses.dataclass(frozen=True, repr=False)
class LanguageModel:
    """A loaded model, as `load` returns it."""

    cfg: ModelConfig
    params: Any
    """In float32, a layer at a time: ``params.blocks[0]`` holds the first layer's."""
    tokenizer: Tokenizer

    def __repr__(self) -> str:
        sizes = f"{num_params(self.cfg):,} parameters, {self.cfg.num_layers} layers"
        return f"<{self.cfg.family}, {sizes}, {self.tokenizer.vocab_size} ids>"

    def generate(
        self,
        text: str = "",
        max_new_tokens: int = 64,
        *,
        temperature: float = Sampler.temperature,
        top_k: int = Sampler.top_k,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> str:
        """The text with a continuation of at most ``max_new_tokens``, which ends before ``stop``.

        Raises:
            ConfigError: an option is out of range.
            DataError: the vocabulary lacks a character of the text.

        """
        cfg = self.cfg.resolve(platform_name(), 1)
        rules = Rules(
            cfg, Sampler(temperature, top_k), self.tokenizer.vocab_size, self.tokenizer.ends
        )
        sample = Sample(self.tokenizer, prompt_ids(self.tokenizer, text), stop)
        parts = continued(self.params, [sample], rules, jax.random.key(seed), max_new_tokens)
        return text + "".join(part for (part,) in parts)

    def loss(self, text: str) -> float:
        """The mean cross-entropy of the text's tokens in nats, each given those before it.

        Raises:
            DataError: see `batch`.

        """
        return float(_loss(self.params, self.batch(text), self.cfg))

    def grad(self, text: str) -> Any:
        """The gradient of `loss` by the backward derived by hand, a tree like ``params``: a
        field for each tensor that ``convert --inspect`` lists, those of layer i in ``.blocks[i]``.

        Raises:
            DataError: see `batch`.

        """
        return _loss_and_grad(self.params, self.batch(text), self.cfg)[1]

    def batch(self, text: str) -> Batch:
        """The text's ids and, at each position, the next: (1, T). A begin-of-text comes first where
        the tokenizer has one.

        Raises:
            DataError: it has fewer than two tokens, or more than the model takes.

        """
        begin = self.tokenizer.begin_of_text
        ids = ([] if begin is None else [begin]) + self.tokenizer.encode(text)
        most = self.cfg.max_seq_len + 1
        if not 2 <= len(ids) <= most:
            raise DataError(f"the text has {len(ids)} tokens, and it takes from 2 to {most}")
        row = np.array([ids], np.int32)
        return Batch(row[:, :-1], row[:, 1:])


def load(where: str, tokenizer: str | None = None) -> LanguageModel:
    """Load a model with its tokenizer.

    Args:
        where: a run, a Hugging Face folder, a file or a name; see
            `gptjax.convert.weights.open_weights`.
        tokenizer: for a model without its own, see `gptjax.tokenizers.find`.

    Raises:
        ConfigError: the model has no tokenizer and none is given; the one given differs from the
            model's own, or has more ids than the model.
        GptjaxError: the model or the tokenizer cannot be read.

    """
    source = with_named_tokenizer(open_weights(where), where, tokenizer)
    if not source.tokenizer:
        raise ConfigError(f"{where} has no tokenizer: name one, as in load(..., tokenizer='gpt2')")
    # Without dropout, and at whatever length: a run's were resolved for its own batches
    cfg = dataclasses.replace(
        source.cfg, dropout=0.0, dropout_mlp=0.0, attention="auto", layers="unroll"
    )
    return LanguageModel(cfg, load_params(source, cfg), source.tokenizer)
