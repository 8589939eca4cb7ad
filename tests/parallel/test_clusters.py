"""What is made of the environment in which a launcher starts processes, with JAX's own detection
reading it.
"""

import jax
import pytest

from gptjax.config import DistributedConfig
from gptjax.errors import ConfigError
from gptjax.parallel import processes
from gptjax.parallel.clusters import is_alone

POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_NODELIST": "n[1-8]",
}
TASK = BATCH_SCRIPT | {"SLURM_STEP_NODELIST": "n[1-8]", "SLURM_STEP_NUM_TASKS": "8"}
# 4 had OMPI_MCA_orte_hnp_uri, too, which JAX looks for
MPI_5 = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}


@pytest.fixture
def launched(monkeypatch):
    """Start as a process with these variables does, in which JAX's backend has not started; joined
    to whom, if to anyone.
    """
    joined = []

    class State:
        client = None

        def initialize(
            self, coordinator_address, num_processes, process_id, local_device_ids, *args, **kwargs
        ):
            address, count, index, _ = (
                jax._src.clusters.ClusterEnv.auto_detect_unset_distributed_params(
                    coordinator_address, num_processes, process_id, local_device_ids, None, 1
                )
            )
            if address is None:
                raise ValueError("coordinator_address should be defined.")
            joined.append((address.split(":")[0], count, index))

    def start(env, **options):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        processes.start(DistributedConfig(**options))
        return joined

    monkeypatch.setattr(jax._src.distributed, "global_state", State())
    monkeypatch.setattr(jax._src.xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setitem(__import__("sys").modules, "kubernetes", None)  # not installed
    return start


@pytest.mark.parametrize(
    "env", [{}, POD, BATCH_SCRIPT, MPI_5 | {"OMPI_COMM_WORLD_SIZE": "1"}, {"PMI_SIZE": "1"}]
)
def test_a_single_process_is_alone_under_every_launcher(launched, env):
    assert launched(env) == []


def test_a_shell_in_a_slurm_allocation_is_alone(launched):
    shell = TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "n1"}
    assert launched(shell) == []
    assert not is_alone(shell | MPI_5)
    assert not is_alone(shell | {"PMI_SIZE": "4"})


def test_a_cluster_that_jax_detects_is_joined(launched):
    assert launched(TASK) == [("n1", 8, 0)]


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            POD | {"JOB_COMPLETION_INDEX": "0"},
            r"indexed Kubernetes job, .* without the package kubernetes: pip install 'gptjax\[kubernetes\]'",
        ),
        (
            MPI_5,
            r"Open MPI has started 4 processes, .* --distributed.process \$OMPI_COMM_WORLD_RANK/4",
        ),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, r"MPICH has started 2 processes"),
        (
            {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"},
            r"Slurm has started 8 processes, .* \$SLURM_PROCID/8",
        ),
    ],
)
def test_processes_that_jax_does_not_detect_are_an_error(launched, env, message):
    with pytest.raises(ConfigError, match=message):
        launched(env)
    assert launched(env, detect=False) == []  # as asked
