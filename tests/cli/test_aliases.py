import pytest

from gptjax.cli.aliases import ADVICE, ALIASES, advice, nearest, same_meaning
from gptjax.cli.options import options_of, parse
from gptjax.config import COMMANDS, Config
from gptjax.errors import ConfigError

TRAIN = [option.name for option in options_of(Config)]
EVERYWHERE = {
    option.name for config_class in COMMANDS.values() for option in options_of(config_class)
}
OTHERS = {  # a name in nanoGPT, llm.c, llama2.c or Hugging Face's libraries -> ours
    "block_size": "data.seq_len",
    "n_layer": "model.num_layers",
    "n_head": "model.num_heads",
    "n_embd": "model.channels",
    "d_model": "model.channels",
    "dim": "model.channels",
    "hidden_size": "model.channels",
    "intermediate_size": "model.hidden",
    "batch_size": "data.batch_size",
    "batch-size": "data.batch_size",
    "per_device_train_batch_size": "data.batch_size",
    "max_iters": "train.steps",
    "max_steps": "train.steps",
    "num_iterations": "train.steps",
    "lr": "optim.learning_rate",
    "learning_rate": "optim.learning_rate",
    "warmup_iters": "optim.warmup_steps",
    "weight_decay": "optim.weight_decay",
    "beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "grad_clip": "optim.grad_clip",
    "max_grad_norm": "optim.grad_clip",
    "gradient_accumulation_steps": "optim.accumulate",
    "eval_interval": "train.eval_every",
    "out_dir": "runs",
    "output_dir": "runs",
    "dropout": "model.dropout",
    "vocab_size": "model.vocab_size",
    "seq_len": "data.seq_len",
    "steps": "train.steps",
    "optim.lr": "optim.learning_rate",
    "train.batch_size": "data.batch_size",
}


def suggestion(*args: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse(Config, "python -m gptjax.train", "", list(args))
    return str(error.value)


@pytest.mark.parametrize(("theirs", "ours"), OTHERS.items())
@pytest.mark.parametrize("where", ["command line", "file"])
def test_the_names_of_other_programs_lead_to_ours(theirs, ours, where, tmp_path):
    args = [f"--{theirs}=1"]
    if where == "file":
        section, _, key = theirs.rpartition(".")
        (tmp_path / "x.yaml").write_text(f"{section}: {{{key}: 1}}\n" if section else f"{key}: 1\n")
        args = ["--config", str(tmp_path / "x.yaml")]
    assert suggestion(*args).endswith(f"unknown option {theirs}: did you mean {ours}?")


@pytest.mark.parametrize("name", ["device", "compile", "init_from"])
def test_what_is_not_chosen_is_said_to_be_so(name):
    assert suggestion(f"--{name}=x") == f"unknown option {name}: {ADVICE[name]}"


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("model.chanels", "model.channels"),
        ("lerning_rate", "optim.learning_rate"),
        ("modle.preset", "model.preset"),
        ("chekpoint_every", "train.checkpoint_every"),
        ("zzz", None),
    ],
)
def test_a_misspelling_is_matched_in_full_or_by_its_last_component(typed, ours):
    assert same_meaning(typed, TRAIN) in (None, ours)
    assert nearest(typed, TRAIN) == ours


def test_the_table_leads_to_options_and_hides_none():
    assert set(ALIASES) <= EVERYWHERE
    for ours, others in ALIASES.items():
        assert not {name for name in others.split() if name in TRAIN}, ours
    assert not set(ADVICE) & {name.rpartition(".")[2] for name in EVERYWHERE}
    assert advice("model.compile") == ADVICE["compile"]
    assert advice("channels") is None


def test_a_command_is_led_to_the_option_that_it_has():
    assert same_meaning("out_dir", TRAIN) == "runs"
    assert same_meaning("out_dir", ["checkpoint", "prompt"]) == "checkpoint"
