"""Many processes that train one model: how they start, agree, and end.

Each process runs the same command on devices of its own, and JAX makes one mesh of them all. What
is on the host has to be the same everywhere, or they would wait for each other forever: what one
decides, `agreed` tells the others. They agree through the key-value store that JAX's coordination
service, in process 0, keeps; Orbax has a name for it.
"""

import contextlib
import json
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
from orbax.checkpoint import multihost

from gptjax.config import DistributedConfig
from gptjax.errors import ConfigError, GptjaxError
from gptjax.parallel import clusters

PREPARING_HOURS = 12  # that process 0 may take to download and tokenize a corpus
FIRST_FAILED = "process 0 failed: "
T = TypeVar("T")


def start(cfg: DistributedConfig) -> None:
    """Join the other processes, if there are any; before JAX's backend starts.

    Raises:
        ConfigError: they cannot be reached, or there are some that JAX does not see.

    """
    if jax.distributed.is_initialized() or not (
        cfg.process or (cfg.detect and not clusters.is_alone(os.environ))
    ):
        return
    told: dict[str, Any] = {}
    if cfg.process:
        told = {
            "coordinator_address": cfg.coordinator,
            "num_processes": cfg.count_of,
            "process_id": cfg.index_of,
        }
        told["cluster_detection_method"] = "deactivate"
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    try:
        with clusters.without_advice():
            jax.distributed.initialize(
                **told,
                # `gptjax.parallel.heartbeat` comes first, and says it better
                heartbeat_timeout_seconds=2 * cfg.timeout,
                initialization_timeout=max(cfg.timeout, 60),
                # JAX's own: process 0 may be closing its loggers
                shutdown_timeout_seconds=max(cfg.timeout, 300),
            )
    except Exception as error:
        if not cfg.process and "must be called before" in str(error):
            return  # whoever started JAX decided to be alone
        if not cfg.process and "should be defined" in str(error):
            clusters.require_none(os.environ)
            return
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"the processes cannot join ({reason[:200]}): give each distributed.coordinator "
            "HOST:PORT and "
            "distributed.process N/M, or distributed.detect false to train alone"
        ) from error


def are_many() -> bool:
    """Whether there are other processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that prints and writes; the only one is."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def agreed(name: str, decide: Callable[[], str]) -> str:
    """What process 0 decides; the others wait for it.

    Args:
        name: of the decision, each time another.
        decide: called in process 0 alone.

    Raises:
        ConfigError: in the others, if it fails in process 0, whose error says why.

    """
    if not are_many():
        return decide()
    key = f"gptjax/{name}"
    if not is_first():
        found = store().blocking_key_value_get(key, PREPARING_HOURS * 3_600_000)
        if found.startswith("failed"):
            raise ConfigError(f"{FIRST_FAILED}{found.removeprefix('failed ')}")
        return found.removeprefix("decided ")
    try:
        decision = decide()
    except BaseException as error:
        store().key_value_set(key, f"failed {error}")
        raise
    store().key_value_set(key, f"decided {decision}")
    return decision


def require_same(options: Any) -> None:
    """Check that this process was given what process 0 was.

    Raises:
        ConfigError: it was not.

    """
    if agreed("options", lambda: repr(options)) != repr(options):
        raise ConfigError(
            "this process was given other options than process 0: give all of them the same"
        )


def first_then_others(name: str, f: Callable[[], Any]) -> Any:
    """``f()`` in every process, once it is done in process 0, so that what it keeps on disk is made
    once.
    """
    results: list[Any] = []

    def run() -> str:
        results.append(f())
        return ""

    agreed(name, run)
    return results[0] if results else f()


def together(name: str, f: Callable[[], T]) -> T:
    """``f()`` in every process; where it fails in one it fails in all, once all are done with it.
    ``f`` waits for no other.

    Args:
        name: of what is done, each time another.
        f: what is done.

    Raises:
        GptjaxError: in all processes, if it was raised in any; whatever else ``f`` raises if that
            is the only process.
        RuntimeError: in all processes, if anything else was raised in any.

    """
    if not are_many():
        return f()
    count, said, result = jax.process_count(), "", None
    try:
        result = f()
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        said = json.dumps([isinstance(error, GptjaxError), reason])
    store().key_value_set(f"gptjax/{name}/{jax.process_index()}", said)
    told = [
        store().blocking_key_value_get(f"gptjax/{name}/{i}", PREPARING_HOURS * 3_600_000)
        for i in range(count)
    ]
    failed = [(*json.loads(words), i) for i, words in enumerate(told) if words]
    if not failed:
        return cast(T, result)
    mendable, reason, process = next((entry for entry in failed if entry[0]), failed[0])
    where = "" if told == told[:1] * count else f"in process {process} of {count}: "
    raise (GptjaxError if mendable else RuntimeError)(f"{where}{reason}")


class Stop:
    """When to stop: at once where there is one process, else at a step that all agree on.

    A process that got a signal says before it starts step n that n + 1 is the last. No other knows
    step n's loss before that one has joined in it, so whoever asks once it has that loss is told in
    time.
    """

    def __init__(self, done: int = 0, steps: int = 2**31) -> None:
        """``done`` steps were done before, of ``steps`` in all."""
        self.received: list[str] = []
        """The names of the signals that have arrived here."""
        self.name = ""
        """The signal that stopped the run."""
        self._said = False
        self._many = are_many()
        self._steps = steps
        self._last = done + 1 + self._many
        self._deciding = threading.Lock()

    def receive(self, name: str) -> int:
        """Take a signal. Returns the step after which training will stop, unless another process
        was asked before.
        """
        with self._deciding:
            self.received.append(name)
            return min(self._last, self._steps)

    def say(self, step: int) -> None:
        """Before ``step`` is started: tell the others of a signal."""
        if not self._many:
            return
        with self._deciding:
            asked = bool(self.received)
            self._last = step + (1 if asked else 2)
        if asked and not self._said:
            self._said = True
            with contextlib.suppress(Exception):  # another process was first
                store().key_value_set("gptjax/stop", f"{step + 1} {self.received[0]}")

    def now(self, step: int) -> bool:
        """With the results of the step before ``step`` known: whether this one is the last."""
        if not self._many:
            with self._deciding:
                self._last = step + 1
                self.name = self.received[0] if self.received else ""
            return bool(self.name)
        try:
            last, name = store().key_value_try_get("gptjax/stop").split()
        except Exception as error:
            if "NOT_FOUND" not in str(error):
                raise
            return False
        if step < int(last):
            return False
        self.name = name
        return True


def store() -> Any:
    """Where processes leave words for each other: the coordination service's keys and values."""
    return multihost.get_jax_distributed_client()
