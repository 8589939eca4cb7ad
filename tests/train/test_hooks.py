"""What a run does between its steps, as its options say."""

from types import SimpleNamespace

import pytest

from gptjax.parallel.processes import Stop
from gptjax.train import hooks
from gptjax.train.hooks import add_hooks
from gptjax.train.trainer import WrongGradientError
from tests.train.fakes import Steps, make_trainer


class Done:
    """A trainer with its hooks, and all that they did, one after another."""

    def __init__(self, monkeypatch, check=lambda batch: {}, finite=lambda step: True, **options):
        self.did = []
        self.loop = make_trainer(
            monkeypatch,
            Steps(),
            **{"eval_every": 0, "sample_tokens": 0, "log_every": 100} | options,
        )
        monkeypatch.setattr(
            hooks, "sample_text", lambda run, params, step: self.note("sample", step) or "once upon"
        )
        monkeypatch.setattr(hooks, "checkpoint_meta", lambda run: {"after": self.loop.done})
        monkeypatch.setattr(self.loop, "is_finite", lambda: finite(self.loop.done))
        monkeypatch.setattr(self.loop, "validation_loss", lambda: 7.0)
        note = self.note
        add_hooks(
            self.loop,
            records=SimpleNamespace(
                write=lambda record: note("record", record["step"], record.get("val_loss"))
            ),
            loggers=SimpleNamespace(
                write=lambda record: note("log", record["step"]),
                text=lambda name, text, step: note(name, text, step),
            ),
            writer=SimpleNamespace(
                save=lambda step, state, cfg, optimizer, meta: note(
                    "save", step, int(state.params["w"]), optimizer, meta
                ),
                check=lambda: note("disk is checked"),
            ),
            display=SimpleNamespace(
                step=lambda record, line: note("line", record["step"]) if line else None,
                print=lambda text: note("print", text),
                label=lambda step: f"step {step}",
            ),
            check=check,
        )

    def note(self, *what):
        """Write down that something was done."""
        self.did.append(what)

    def fit(self, stop=None):
        """Train to the end."""
        self.loop.fit(stop)
        return self

    def of(self, kind):
        """All that was done of one kind."""
        return [what[1:] for what in self.did if what[0] == kind]


def test_every_step_is_recorded_logged_and_the_disk_asked(monkeypatch):
    done = Done(monkeypatch, steps=3).fit()
    assert [n for n, _ in done.of("record")] == [n for (n,) in done.of("log")] == [1, 2, 3]
    assert len(done.of("disk is checked")) == 3


def test_which_steps_are_printed(monkeypatch):
    done = Done(monkeypatch, steps=11, log_every=4, eval_every=5).fit()
    assert [n for (n,) in done.of("line")] == [4, 5, 8, 10, 11]


@pytest.mark.parametrize(("every", "expected"), [(2, [2, 4, 5]), (0, [])])
def test_validation_is_as_often_as_asked_for_and_at_the_end(monkeypatch, every, expected):
    done = Done(monkeypatch, steps=5, eval_every=every).fit()
    assert [n for n, loss in done.of("record") if loss == 7.0] == expected


@pytest.mark.parametrize(("every", "expected"), [(2, [2, 4, 5]), (0, [5])])
def test_checkpoints_hold_the_state_of_their_step(monkeypatch, every, expected):
    done = Done(monkeypatch, steps=5, checkpoint_every=every).fit()
    assert done.of("save") == [(n, n, "optimizer", {"after": n}) for n in expected]
    assert done.loop.saved == 5


def test_a_signal_saves_but_neither_validates_nor_samples(monkeypatch):
    done = Done(monkeypatch, steps=9, eval_every=1, sample_tokens=8)
    stop = Stop(steps=9)
    done.loop.listen(lambda record: stop.receive("SIGTERM") if record["step"] == 2 else None)
    done.fit(stop)
    assert stop.name == "SIGTERM"
    last = done.loop.done
    assert 2 < last < 9
    assert [what[0] for what in done.of("save")] == [last]
    assert dict(done.of("record"))[last] is None
    assert not done.of("sample")


def test_no_checkpoint_is_made_of_parameters_that_are_no_good(monkeypatch):
    done = Done(monkeypatch, steps=6, checkpoint_every=2, finite=lambda step: step < 3).fit()
    assert [what[0] for what in done.of("save")] == [2]
    assert done.loop.saved == 2
    sentence = "no checkpoint: the loss at these parameters is not finite"
    assert done.of("print") == [(f"step {n} | {sentence}",) for n in (4, 6)]


@pytest.mark.parametrize(
    ("tokens", "every", "expected"), [(8, 2, [2, 4, 5]), (8, 0, [5]), (0, 2, [])]
)
def test_samples_are_shown_and_logged(monkeypatch, tokens, every, expected):
    done = Done(monkeypatch, steps=5, sample_tokens=tokens, sample_every=every).fit()
    assert [what for what in done.of("sample") if len(what) == 1] == [(n,) for n in expected]
    assert [what for what in done.of("sample") if len(what) == 2] == [
        ("once upon", n) for n in expected
    ]
    assert done.of("print") == [
        (f"--- sample after step {n} ---\nonce upon\n---",) for n in expected
    ]


def wrong(batch):
    raise WrongGradientError


@pytest.mark.parametrize(("checkpoint_every", "expected"), [(0, [3]), (3, [3]), (2, [2, 3])])
def test_a_wrong_gradient_saves_its_parameters_once_and_ends_the_run(
    monkeypatch, checkpoint_every, expected
):
    done = Done(
        monkeypatch, check=wrong, steps=9, verify_every=4, checkpoint_every=checkpoint_every
    )
    with pytest.raises(WrongGradientError):
        done.fit()
    assert [what[0] for what in done.of("save")] == expected
    assert [n for n, _ in done.of("record")] == [1, 2, 3]


def test_what_a_check_finds_joins_the_record(monkeypatch):
    done = Done(
        monkeypatch, check=lambda batch: {"gradient_error": 1e-7}, steps=5, verify_every=2
    ).fit()
    assert [n for (n,) in done.of("line")] == [2, 4, 5]
