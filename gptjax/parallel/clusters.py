"""Clusters that JAX does not detect, in which each process would train a model of its own."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping

from gptjax.errors import ConfigError

# Launchers, each with its environment variables for the number of processes and the index of this
# one. Slurm's batch script, always a single process, has no step variables.
LAUNCHERS = {
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "an MPI like MPICH": ("PMI_SIZE", "PMI_RANK"),
    "Slurm": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
}


def is_alone(env: Mapping[str, str]) -> bool:
    """Whether this is the only process of a Slurm step, such as a shell in an allocation; JAX would
    wait for the processes of the whole job.

    Args:
        env: the environment variables.

    """
    of_mpi = "OMPI_COMM_WORLD_SIZE" in env or env.get("PMI_SIZE", "1") not in ("0", "1")
    return env.get("SLURM_STEP_NUM_TASKS") == "1" and not of_mpi


def require_none(env: Mapping[str, str]) -> None:
    """Check that this is the only process; call if JAX has detected no cluster.

    Raises:
        ConfigError: a launcher has started several.

    """
    unseen = "but JAX does not detect the others"
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        install = "without the package kubernetes: pip install 'gptjax[kubernetes]'"
        raise ConfigError(
            f"this is a pod of an indexed Kubernetes job, {unseen} {install}, or let each pod "
            "train alone with --distributed.detect false"
        )
    for launcher, (count, index) in LAUNCHERS.items():
        if env.get(count, "1") not in ("0", "1"):
            raise ConfigError(
                f"{launcher} has started {env[count]} processes, {unseen}: give each "
                "--distributed.coordinator HOST:PORT and "
                f"--distributed.process ${index}/{env[count]}, expanded by a shell in each, or "
                "let each train alone with --distributed.detect false"
            )


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
    """Suppress JAX's warning about a package missing in a Kubernetes pod; `require_none` reports it
    if it matters.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Kubernetes environment detected")
        yield
