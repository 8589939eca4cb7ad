"""Other names of options: those of nanoGPT, llm.c, llama2.c and Hugging Face's libraries."""

import difflib
from collections.abc import Sequence

SIMILAR = 0.6  # least difflib ratio at which a name counts as a misspelling

SHORT = {"tokenizer": "data.tokenizer"}
"""Short names of options, for commands that have no option of that name."""

# Our option -> its other names. The first entry whose option the command has wins.
ALIASES = {
    "model.num_layers": "n_layer n_layers num_hidden_layers depth",
    "model.num_heads": "n_head n_heads num_attention_heads",
    "model.channels": "n_embd n_embed d_model dim hidden_size embed_dim embedding_size width",
    "model.hidden": "intermediate_size n_inner hidden_dim d_ff ffn_dim mlp_dim",
    "model.vocab_size": "n_vocab",
    "model.max_seq_len": "n_ctx n_positions max_position_embeddings",
    "model.dropout": "attn_pdrop resid_pdrop embd_pdrop attention_dropout hidden_dropout "
    "dropout_rate",
    "model.dropout_mlp": "mlp_dropout activation_dropout",
    "model.dtype": "precision torch_dtype mixed_precision bf16 fp16 fp32",
    "model.attention": "flash flash_attn use_flash_attention attn_implementation",
    "model.recompute": "gradient_checkpointing activation_checkpointing remat",
    "model.preset": "model_type size",
    "data.seq_len": "block_size context_length context_size sequence_length seq_length "
    "max_seq_length",
    "data.batch_size": "micro_batch_size device_batch_size per_device_train_batch_size",
    "data.dataset": "dataset_name data_dir data_path train_file input_bin train_bin train_data",
    "data.tokenizer": "tokenizer_name tokenizer_path vocab_source",
    "data.column": "text_column dataset_text_field",
    "data.order": "shuffle",
    "optim.name": "optimizer",
    "optim.learning_rate": "lr max_lr",
    "optim.schedule": "lr_scheduler lr_scheduler_type scheduler decay_lr",
    "optim.final_fraction": "min_lr learning_rate_decay_frac",
    "optim.warmup_steps": "warmup_iters warmup_iterations warmup num_warmup_steps",
    "optim.beta1": "adam_beta1 b1",
    "optim.beta2": "adam_beta2 b2",
    "optim.eps": "adam_epsilon epsilon adam_eps",
    "optim.grad_clip": "max_grad_norm clip clip_grad grad_norm_clip",
    "optim.accumulate": "gradient_accumulation_steps grad_accum_steps accumulation_steps "
    "total_batch_size",
    "train.steps": "max_iters max_steps num_iterations iterations num_steps lr_decay_iters "
    "num_train_epochs epochs",
    "train.eval_every": "eval_interval val_interval eval_steps val_loss_every",
    "train.eval_tokens": "eval_iters val_max_steps",
    "train.log_every": "log_interval logging_steps",
    "train.sample_every": "sample_interval genevery",
    "train.checkpoint_every": "save_interval save_steps save_every checkpoint_interval "
    "always_save_checkpoint",
    "train.keep_checkpoints": "save_total_limit",
    "log.wandb": "wandb_log wandb_project report_to",
    "mesh.fsdp": "zero_stage",
    "topology": "hardware devices accelerator",
    "mesh.tensor": "tensor_parallel tensor_parallel_size tp",
    "mesh.data": "data_parallel data_parallel_size dp ddp",
    "name": "run_name wandb_run_name experiment",
    "runs": "out_dir output_dir output_log_dir",
    "init": "model_name_or_path pretrained",
    "resume": "resume_from_checkpoint resume_from",
    "seed": "random_seed",
    "seq_len": "block_size context_length context_size sequence_length seq_length max_seq_length",
    "dataset": "dataset_name data_dir data_path",
    "checkpoint": "out_dir init_from model model_path model_name_or_path pretrained ckpt",
    "prompt": "start text input",
    "max_new_tokens": "max_tokens max_length num_tokens n_tokens length",
    "num_samples": "num_return_sequences",
    "temperature": "temp do_sample greedy",
    "int8": "load_in_8bit quantize",
    "batch_size": "eval_batch_size per_device_eval_batch_size",
}

# Options of other programs that gptjax does not need, and what to do instead.
ADVICE = {
    "compile": "every step is compiled, so leave it out",
    "device": "JAX takes the best device there is; the environment variable JAX_PLATFORMS=cpu, "
    "cuda or tpu names one",
    "backend": "processes find each other as the options under distributed say",
    "init_from": "--init hf:gpt2 starts from a model's weights, --resume runs/NAME goes on with "
    "a run",
    "bias": "the model's family decides which biases there are (model.family)",
}


def same_meaning(name: str, options: Sequence[str]) -> str | None:
    """The first of ``options`` with the same last component as ``name``, or with it as an alias."""
    last = _last(name)
    for option in options:
        if _last(option) == last:
            return option
    return next(
        (ours for ours, others in ALIASES.items() if last in others.split() and ours in options),
        None,
    )


def nearest(name: str, options: Sequence[str]) -> str | None:
    """The option spelled most like ``name``, comparing full names and last components; None if
    none is similar.
    """

    def likeness(option: str) -> float:
        pairs = ((name, option), (_last(name), _last(option)))
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    best = max(options, key=likeness, default=None)
    return best if best is not None and likeness(best) >= SIMILAR else None


def advice(name: str) -> str | None:
    """What to do instead of giving this option; None if it is unknown."""
    return ADVICE.get(_last(name))


def _last(name: str) -> str:
    return name.rpartition(".")[2].lower().replace("-", "_")
