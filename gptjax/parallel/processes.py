"""Training in several processes: how they start, agree and stop.

Each process runs the same command on its own devices, which JAX joins into one mesh. All processes
must take the same decisions on the host, or they would wait for each other forever; `broadcast`
gives them those of process 0. They communicate through the key-value store of JAX's coordination
service, which runs in process 0 and which Orbax exposes.
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

PREPARING_HOURS = 12  # time for process 0 to download and tokenize a corpus
FIRST_FAILED = "process 0 failed: "
T = TypeVar("T")


def start(cfg: DistributedConfig) -> None:
    """Join the other processes, if there are any. Call before JAX's backend starts.

    Raises:
        ConfigError: they cannot be reached, or JAX does not detect them.

    """
    if jax.distributed.is_initialized() or not (
        cfg.process or (cfg.detect and not clusters.is_alone(os.environ))
    ):
        return
    options: dict[str, Any] = {}
    if cfg.process:
        options = {
            "coordinator_address": cfg.coordinator,
            "num_processes": cfg.count_of,
            "process_id": cfg.index_of,
        }
        options["cluster_detection_method"] = "deactivate"
    jax.config.update("jax_enable_preemption_service", False)  # it would handle SIGTERM
    try:
        with clusters.without_advice():
            jax.distributed.initialize(
                **options,
                # Later than `gptjax.parallel.heartbeat`, which has the better message
                heartbeat_timeout_seconds=2 * cfg.timeout,
                initialization_timeout=max(cfg.timeout, 60),
                # At least JAX's default: process 0 may still be closing its loggers
                shutdown_timeout_seconds=max(cfg.timeout, 300),
            )
    except Exception as error:
        if not cfg.process and "must be called before" in str(error):
            return  # JAX has already started in this process, without others
        if not cfg.process and "should be defined" in str(error):
            clusters.require_none(os.environ)
            return
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"the processes cannot join ({reason[:200]}): give each distributed.coordinator "
            "HOST:PORT and distributed.process N/M, or distributed.detect false to train alone"
        ) from error


def is_distributed() -> bool:
    """Whether there are several processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is process 0, which prints and writes files; True if there is only one."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def broadcast(name: str, decide: Callable[[], str]) -> str:
    """Broadcast the result of ``decide()`` in process 0 to all; the others wait for it.

    Args:
        name: a name for the decision, used only once.
        decide: called in process 0 only.

    Raises:
        ConfigError: in the other processes, if ``decide`` fails in process 0, with its reason.

    """
    if not is_distributed():
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
    """Check that this process has the same options as process 0.

    Raises:
        ConfigError: they differ.

    """
    if broadcast("options", lambda: repr(options)) != repr(options):
        raise ConfigError(
            "the options of this process differ from process 0's: give all processes the same ones"
        )


def first_then_others(name: str, f: Callable[[], Any]) -> Any:
    """Call ``f()`` in process 0 first, then in the others, which reuse the files it has written."""
    results: list[Any] = []

    def run() -> str:
        results.append(f())
        return ""

    broadcast(name, run)
    return results[0] if results else f()


def run_in_all(name: str, f: Callable[[], T]) -> T:
    """Call ``f()`` in every process and wait for all; if it fails in one, it fails in all.

    Args:
        name: a name for the call, used only once.
        f: must not wait for other processes.

    Raises:
        GptjaxError: in all processes, if any raised it.
        RuntimeError: in all processes, if any raised another exception; with a single process, that
            exception itself.

    """
    if not is_distributed():
        return f()
    count, failure, result = jax.process_count(), "", None
    try:
        result = f()
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        failure = json.dumps([isinstance(error, GptjaxError), reason])
    store().key_value_set(f"gptjax/{name}/{jax.process_index()}", failure)
    failures = [
        store().blocking_key_value_get(f"gptjax/{name}/{i}", PREPARING_HOURS * 3_600_000)
        for i in range(count)
    ]
    failed = [(*json.loads(text), i) for i, text in enumerate(failures) if text]
    if not failed:
        return cast(T, result)
    mendable, reason, process = next((entry for entry in failed if entry[0]), failed[0])
    where = "" if failures == failures[:1] * count else f"in process {process} of {count}: "
    raise (GptjaxError if mendable else RuntimeError)(f"{where}{reason}")


class Stop:
    """The step to stop after: the current one in a single process, else one that all agree on.

    A process that received a signal announces before step n that n + 1 is the last step. Step n
    needs all processes, so none has its loss before that announcement, and each checks for one when
    it has the loss.
    """

    def __init__(self, done: int = 0, steps: int = 2**31) -> None:
        """Start after ``done`` of ``steps`` steps."""
        self.received: list[str] = []
        """Names of the signals that this process received."""
        self.name = ""
        """The signal that stopped the run."""
        self._announced = False
        self._many = is_distributed()
        self._steps = steps
        self._last = done + 1 + self._many
        self._deciding = threading.Lock()

    def receive(self, name: str) -> int:
        """Receive a signal. Returns the step after which training will stop, unless another process
        received one earlier.
        """
        with self._deciding:
            self.received.append(name)
            return min(self._last, self._steps)

    def announce(self, step: int) -> None:
        """Announce a received signal to the others; call before ``step`` starts."""
        if not self._many:
            return
        with self._deciding:
            asked = bool(self.received)
            self._last = step + (1 if asked else 2)
        if asked and not self._announced:
            self._announced = True
            with contextlib.suppress(Exception):  # another process was first
                store().key_value_set("gptjax/stop", f"{step + 1} {self.received[0]}")

    def is_last(self, step: int) -> bool:
        """Whether ``step`` is the last one; call once the results of the step before it are
        known.
        """
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
    """The key-value store of JAX's coordination service."""
    return multihost.get_jax_distributed_client()
