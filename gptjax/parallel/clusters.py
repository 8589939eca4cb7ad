"""Clusters that JAX does not see although this process was started as one of many: they would train
as many models.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping

from gptjax.errors import ConfigError

# What starts processes, with the variables in which it tells each how many there are and which one
# it is. Slurm's batch script, which is one process whatever the job has, is told of no step.
LAUNCHERS = {
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "an MPI like MPICH": ("PMI_SIZE", "PMI_RANK"),
    "Slurm": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
}


def is_alone(env: Mapping[str, str]) -> bool:
    """Whether this is the one process of a Slurm step, a shell in an allocation say; JAX would wait
    for the whole job's.

    Args:
        env: the environment's variables.

    """
    of_mpi = "OMPI_COMM_WORLD_SIZE" in env or env.get("PMI_SIZE", "1") not in ("0", "1")
    return env.get("SLURM_STEP_NUM_TASKS") == "1" and not of_mpi


def require_none(env: Mapping[str, str]) -> None:
    """Check, where JAX has found no cluster, that this process is alone indeed.

    Raises:
        ConfigError: it is one of many.

    """
    unseen = "but JAX does not see the others"
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        install = "for want of the package kubernetes: pip install 'gptjax[kubernetes]'"
        raise ConfigError(
            f"this is a pod of an indexed job of Kubernetes, {unseen} {install}, or train in each "
            "pod alone with "
            "--distributed.detect false"
        )
    for launcher, (count, index) in LAUNCHERS.items():
        if env.get(count, "1") not in ("0", "1"):
            raise ConfigError(
                f"{launcher} has started {env[count]} processes, {unseen}: give each "
                "--distributed.coordinator HOST:PORT and "
                f"--distributed.process ${index}/{env[count]}, which a shell in each fills in, or "
                "train in each alone "
                "with --distributed.detect false"
            )


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
    """Leave out what JAX says in every pod of Kubernetes that lacks a package; `require_none` says
    it where it matters.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Kubernetes environment detected")
        yield
