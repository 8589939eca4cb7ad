"""PyTorch contenders: the GPT-2 of `transformers` with scaled-dot-product attention and fused
AdamW, eager and compiled.
"""

import copy
import importlib
import os
import time
from collections.abc import Iterator
from typing import Any

from gptjax.bench.steps import NEW_TOKENS, random_batch, random_prompt
from gptjax.bench.timing import Contender
from gptjax.config import Config
from gptjax.errors import ConfigError

PRECISIONS = ("float32", "bfloat16")


def load(cfg: Config) -> tuple[Any, Any, Any]:
    """(the ``torch`` module, a fresh model in training mode, its device); the vocabulary is padded
    to the same size as ours.

    Raises:
        ConfigError: a package is missing, or the model is not GPT-2.

    """
    if cfg.model.family != "gpt2":
        raise ConfigError(
            "peer torch is the GPT-2 of transformers: it cannot be compared with "
            f"model.family {cfg.model.family}"
        )
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(f"peer torch needs {error.name}: pip install 'gptjax[parity]'") from error
    model = cfg.model
    theirs = transformers.GPT2Config(
        n_layer=model.num_layers,
        n_head=model.num_heads,
        n_embd=model.channels,
        vocab_size=model.padded_vocab_size,
        n_positions=model.max_seq_len,
        embd_pdrop=model.dropout,
        attn_pdrop=model.dropout,
        resid_pdrop=model.dropout,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(cfg.seed)
    # TF32 on a GPU, PyTorch's fastest setting; no change on a CPU
    torch.set_float32_matmul_precision("high")
    return torch, transformers.GPT2LMHeadModel(theirs).to(device), device


def step_contenders(
    cfg: Config,
    ways: tuple[str, ...] = ("eager", "compile"),
    precisions: tuple[str, ...] = PRECISIONS,
) -> Iterator[Contender]:
    """Training steps of one model: eager and with ``torch.compile``, in float32 and under bfloat16
    autocast, or only some of these.
    """
    torch, model, device = load(cfg)
    model.train()
    optim = cfg.optim
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    adamw = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": optim.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ],
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
    batch = random_batch(cfg)
    inputs, targets = (torch.from_numpy(ids).long().to(device) for ids in batch[:2])

    def loss_of(ids: Any, labels: Any) -> Any:
        logits = model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    for how in ways:
        forward = torch.compile(loss_of) if how == "compile" else loss_of
        for precision in precisions:

            def step(forward: Any = forward, precision: str = precision) -> None:
                for ids, labels in zip(inputs, targets, strict=True):
                    with torch.autocast(
                        device.type, torch.bfloat16, enabled=precision == "bfloat16"
                    ):
                        loss = forward(ids, labels) / len(inputs)
                    loss.backward()
                if optim.grad_clip:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
                adamw.step()
                adamw.zero_grad(set_to_none=True)
                _wait(torch, device)

            name = f"torch {how}, {precision}"
            yield Contender(name, step, _compile_facts(step))


def decode_contenders(cfg: Config) -> Iterator[Contender]:
    """Greedy ``generate`` of `NEW_TOKENS` tokens with a key-value cache."""
    torch, model, device = load(cfg)
    model.eval()
    prompt = torch.from_numpy(random_prompt(cfg)).long().to(device)
    for precision in PRECISIONS:
        cast = copy.deepcopy(model).to(getattr(torch, precision))

        def run(cast: Any = cast) -> None:
            with torch.no_grad():
                made = cast.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=NEW_TOKENS,
                    min_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    pad_token_id=0,
                )
            _wait(torch, device)
            if made.shape[1] != prompt.shape[1] + NEW_TOKENS:
                raise RuntimeError(
                    f"transformers made {made.shape[1] - prompt.shape[1]} tokens, not {NEW_TOKENS}"
                )

        yield Contender(f"transformers, {precision}", run, _compile_facts(run))


def _compile_facts(run: Any) -> dict[str, float]:
    """Time the first run, in which ``torch.compile`` compiles."""
    began = time.perf_counter()
    run()
    return {"compile_s": time.perf_counter() - began}


def _wait(torch: Any, device: Any) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
