"""The loop: when it calls its hooks, when it fetches numbers, and when it ends."""

import pytest

from gptjax.parallel.processes import Stop
from gptjax.train import metrics, trainer
from gptjax.train.trainer import DivergedError
from tests.train.fakes import Steps, make_trainer

NAN, INFINITE = float("nan"), float("inf")


def test_metrics_are_fetched_after_the_next_step_is_dispatched(monkeypatch):
    """So the device has work while the host waits; the last step's come at the end."""
    steps = Steps(losses={1: 5.0, 2: 4.0, 3: 3.0})
    loop = make_trainer(monkeypatch, steps, steps=3)
    loop.listen(lambda record: steps.log.append((record["step"], record["loss"])))
    loop.fit()
    assert steps.log == [
        "step 1 of batch 1",
        "step 2 of batch 2",
        (1, 5.0),
        "step 3 of batch 3",
        (2, 4.0),
        (3, 3.0),
    ]


def test_a_record_says_all_that_is_known_of_its_step(monkeypatch):
    records = []
    loop = make_trainer(monkeypatch, Steps(losses={2: NAN}), steps=2)
    loop.listen(records.append)
    loop.fit()
    assert set(records[0]) == {"step", "loss", "grad_norm", "lr", "ms", "tokens_per_s"}
    assert (records[0]["grad_norm"], records[0]["lr"]) == (2.0, pytest.approx(0.1))
    assert records[1]["skipped"]


def test_hooks_are_called_when_due_around_the_step_that_they_belong_to(monkeypatch):
    """Whatever is due has the numbers of the step before out of the way."""
    steps = Steps()
    log = steps.log
    loop = make_trainer(monkeypatch, steps, steps=5)
    loop.listen(
        lambda record: log.append(
            {k: record[k] for k in ("step", "checked", "measured") if k in record}
        )
    )
    loop.before_step(
        lambda batch: log.append(f"before {loop.done + 1}, {batch}") or {"checked": batch}, every=2
    )
    loop.measure(
        lambda: log.append(f"measure {loop.done}") or {"measured": int(loop.state.params["w"])},
        every=3,
    )
    loop.after_step(lambda: log.append(f"after {loop.done}"), every=4)
    loop.fit()
    assert log == [
        "step 1 of batch 1",
        {"step": 1},
        "before 2, batch 2",
        "step 2 of batch 2",
        {"step": 2, "checked": "batch 2"},
        "step 3 of batch 3",
        "measure 3",
        {"step": 3, "measured": 3},
        "before 4, batch 4",
        "step 4 of batch 4",
        {"step": 4, "checked": "batch 4"},
        "after 4",
        "step 5 of batch 5",
        "measure 5",
        {"step": 5, "measured": 5},
        "after 5",
    ]


def calls(loop, log):
    """Count hooks of every kind."""
    for every in (0, 2):
        for at_end in (True, False):
            name = f"every {every}{', at the end' if at_end else ''}"
            loop.measure(
                lambda name=name: log.append((f"measure {name}", loop.done)) or {}, every, at_end
            )
            loop.after_step(
                lambda name=name: log.append((f"after {name}", loop.done)), every, at_end
            )
    loop.after_step(
        lambda: log.append(("when stopped", loop.done)), 0, at_end=False, when_stopped=True
    )


def test_an_interval_of_0_is_never_but_for_the_end(monkeypatch):
    loop, log = make_trainer(monkeypatch, Steps(), steps=3), []
    calls(loop, log)
    loop.fit()
    for kind in ("measure", "after"):
        found = [call for call in log if call[0].startswith(kind)]
        assert sorted(found) == [
            (f"{kind} every 0, at the end", 3),
            (f"{kind} every 2", 2),
            (f"{kind} every 2, at the end", 2),
            (f"{kind} every 2, at the end", 3),
        ]
    assert not [call for call in log if call[0] == "when stopped"]


def test_a_signal_stops_after_the_next_step_and_calls_its_hooks(monkeypatch):
    """Though others are due at that step."""
    steps, log, stop = Steps(), [], Stop(steps=9)
    loop = make_trainer(monkeypatch, steps, steps=9)
    calls(loop, log)
    loop.before_step(
        lambda batch: {} if loop.done + 1 < 4 else stop.receive("SIGTERM") and {}, every=1
    )
    records = []
    loop.listen(lambda record: records.append(record["step"]))
    loop.fit(stop)
    assert (loop.done, stop.name, steps.log[-1]) == (4, "SIGTERM", "step 4 of batch 4")
    assert [call for call in log if call[1] > 2] == [("when stopped", 4)]
    assert records == [1, 2, 3, 4]


def test_it_ends_at_the_step_that_all_processes_agreed_on(monkeypatch):
    """Each asks after every step, and has told the others before it of what it knows."""

    class Agreed(Stop):
        asked: list = []  # noqa: RUF012

        def announce(self, step):
            self.asked.append(f"announce {step}")

        def is_last(self, step):
            self.asked.append(f"is_last {step}")
            self.name = "SIGINT" if step == 3 else ""
            return step == 3

    loop, saved, stop = make_trainer(monkeypatch, Steps(), steps=9), [], Agreed()
    loop.after_step(lambda: saved.append(loop.done), every=0, when_stopped=True)
    loop.fit(stop)
    assert (loop.done, saved) == (3, [3])
    assert stop.asked == [
        "announce 1",
        "is_last 1",
        "announce 2",
        "is_last 2",
        "announce 3",
        "is_last 3",
    ]


def test_it_goes_on_from_the_steps_that_are_done(monkeypatch):
    steps = Steps()
    loop = make_trainer(monkeypatch, steps, done=7, steps=9)
    assert loop.saved == 7
    loop.fit()
    assert steps.log == ["step 8 of batch 8", "step 9 of batch 9"]


@pytest.mark.parametrize("bad", [NAN, INFINITE])
def test_divergence_ends_the_run_and_says_what_is_left(monkeypatch, bad):
    """Once so many steps in a row, each of them recorded, were not finite: others in between start
    the count anew.
    """
    records = []
    loop = make_trainer(
        monkeypatch, Steps({2: bad, 3: bad, 5: bad, 6: bad, 7: bad}), steps=20, max_nonfinite=3
    )
    loop.listen(lambda record: records.append(record["step"]))
    with pytest.raises(DivergedError) as error:
        loop.fit()
    assert str(error.value) == (
        "stopped after step 7: 3 losses or gradients in a row were not finite; there is no "
        "checkpoint yet; lower optim.learning_rate or raise optim.warmup_steps"
    )
    assert records == [1, 2, 3, 4, 5, 6, 7]


def test_divergence_names_the_last_good_checkpoint(monkeypatch):
    loop = make_trainer(monkeypatch, Steps({6: NAN}), done=2, steps=20, max_nonfinite=1)

    def save():
        loop.saved = loop.done

    loop.after_step(save, every=2)
    with pytest.raises(
        DivergedError,
        match=r"after step 6: 1 losses.*; the last good checkpoint is after step 4; lower",
    ):
        loop.fit()


def test_what_hooks_take_is_not_the_steps_time(monkeypatch):
    clock = [0.0]

    def perf_counter():
        clock[0] += 0.001
        return clock[0]

    monkeypatch.setattr(metrics.time, "perf_counter", perf_counter)

    class Timed(Steps):
        def __call__(self, *args):
            clock[0] += 1.0
            return super().__call__(*args)

    def hook(*args):
        clock[0] += 100.0
        return {}

    records = []
    loop = make_trainer(monkeypatch, Timed(), steps=6)
    loop.listen(records.append)
    loop.before_step(hook, every=2)
    loop.after_step(hook, every=3)
    loop.fit()
    assert len(records) == 6
    # A step takes 1 s, and none waits for more than the next one's
    assert max(record["ms"] for record in records) < 2500


def test_parameters_with_a_nonfinite_loss_are_not_saved(monkeypatch):
    loop = make_trainer(monkeypatch, Steps())
    for value, finite in ((1.0, True), (NAN, False), (INFINITE, False)):
        monkeypatch.setattr(trainer, "evaluate", lambda loss, params, batches, value=value: value)
        assert loop.is_finite() == finite
