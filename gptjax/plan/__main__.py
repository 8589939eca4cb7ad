"""Plan a run before paying for it: ``python -m gptjax.plan --config configs/1558m.yaml --topology
v5e:16x16``.

The topology names devices that need not be present: TPU slices by the shape of their torus
(``v5e:4x4``, ``v6e:4x4``, ``v4:2x2x4``, ``v5p:2x2x4``), GPUs by their number (``h100:8``,
``h200:8``, ``a100:8``; ``cuda:8`` is ``h100:8``), or simulated CPUs (``cpu:8``). The configuration
is that of training. If it has no mesh, the plan chooses one: fsdp over as many devices as leave 16
channels to each, data over the rest. The batch is rounded up to whole rows on every device.

The step is compiled ahead of time, for TPUs by libtpu (``pip install 'gptjax[tpu]'``), for NVIDIA's
GPUs by JAX's CUDA plugin (``pip install 'gptjax[cuda-aot]'``, 0.5 GB, without NVIDIA's libraries),
for CPUs by XLA, which gives the program's memory and collectives. Without the CUDA plugin, or with
``--predict``, they are predicted from shapes, and a real program needs more. Times are lower bounds
at the rates of the makers' data sheets, which few programs reach; ``in turn`` adds up products,
memory and update, from the kernels of the program if it is compiled, since a GPU runs one after the
other. The last line is the command that trains as planned, on as many tokens as ``--tokens`` says.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

from gptjax import cli
from gptjax.cli.options import parse
from gptjax.config import MeshConfig, ModelConfig, PlanConfig
from gptjax.datasets import vocabulary_without_corpus
from gptjax.datasets.batches import BatchShape
from gptjax.errors import ConfigError, naming
from gptjax.parallel.mesh import mesh_shape
from gptjax.plan.predict import Work
from gptjax.plan.report import comparison, describe
from gptjax.plan.search import Plan, make_plan
from gptjax.plan.topology import Topology, open_devices, parse_topology, start
from gptjax.plan.training import train_command
from gptjax.train.optimizer import make_optimizer
from gptjax.xla.backend import start_jax

PROG = "python -m gptjax.plan"
CHANNELS = 16  # fewest channels of a weight on one device, in a mesh that the plan chooses


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status."""
    with cli.reported_errors(PROG):
        cfg, file = parse(PlanConfig, PROG, __doc__ or "", argv)
        if cfg.json and not Path(cfg.json).absolute().parent.is_dir():
            raise ConfigError(
                f"{cfg.json} cannot be written: there is no folder "
                f"{Path(cfg.json).absolute().parent}"
            )
        topology = parse_topology(cfg.topology)
        start(topology)
        start_jax(cfg.model.dtype)
        record = plan(cfg, file, topology)
        if cfg.json:
            with naming(cfg.json):
                Path(cfg.json).write_text(json.dumps(record, indent=1) + "\n")
            print(f"wrote {cfg.json}")
        machines = (
            f"on each of {topology.hosts} machines" if topology.hosts > 1 else "on one machine"
        )
        train = (
            f"in one process {machines}:\n  {record['train']}"
            if record["train"]
            else "not possible: it does not fit"
        )
        print(f"{'train':<12} {train}")
    return 0


def plan(cfg: PlanConfig, file: Path | None, topology: Topology) -> dict[str, Any]:
    """Print the plan; returns all figures and the training command, which is None if it does not
    fit.

    Raises:
        GptjaxError: the topology, the mesh or the model is invalid.

    """
    size, whose = vocabulary_without_corpus(cfg.data.dataset, cfg.data.tokenizer)
    if not cfg.model.vocab_size:
        print(f"{'vocabulary':<12} {size:,} ids, of {whose}")
    asked = cfg.model.with_vocabulary(size)
    model = asked.resolve(topology.platform, cfg.data.seq_len)
    cfg, chosen = fit_to_topology(cfg, model, topology)
    work = Work(
        model,
        BatchShape(cfg.optim.accumulate, cfg.data.batch_size, cfg.data.seq_len),
        cfg.mesh.shape,
    )
    devices = None if cfg.predict else compile_devices(topology)
    optimizer = make_optimizer(cfg.optim, cfg.train.steps, model)
    tokens = cfg.tokens or work.shape.tokens * cfg.train.steps

    def plan_of(work: Work, largest: bool) -> Plan:
        return make_plan(work, topology, optimizer, cfg.train.backward, devices, tokens, largest)

    found = plan_of(work, cfg.largest)
    print(describe(found, topology, chosen, cfg.train.backward), flush=True)
    plans: dict[str, Plan] = {model.attention: found}
    if cfg.compare:
        for other in others(asked, topology, cfg.data.seq_len, model):
            plans[other.attention] = plan_of(work._replace(model=other), False)
        print(comparison(plans))
    command = train_command(cfg, file, topology) if found.total <= found.capacity else None
    records = {name: p.record() for name, p in plans.items()}
    return {"topology": topology.name, "tokens": tokens, "train": command, "plans": records}


def compile_devices(topology: Topology) -> list[Any] | None:
    """The devices to compile for; None, with a printed note, for GPUs if JAX's CUDA plugin is not
    installed.

    Raises:
        ConfigError: the compiler for another platform is not installed.

    """
    try:
        return open_devices(
            topology, "" if topology.platform == "cuda" else ", or --predict for shapes alone"
        )
    except ConfigError as error:
        if topology.platform != "cuda":
            raise
        print(f"{'note':<12} predicted from shapes: {error}")
        return None


def fit_to_topology(
    cfg: PlanConfig, model: ModelConfig, topology: Topology
) -> tuple[PlanConfig, list[str]]:
    """Fit a configuration to a topology: resolve the mesh, round the batch up to whole rows on
    every device, and set the steps for a token budget.

    Returns:
        The configuration, and a line about each change.

    Raises:
        ConfigError: the configured mesh does not fit the devices or the model.

    """
    mesh, n, batch = cfg.mesh, topology.size, cfg.data.batch_size
    chosen = []
    if mesh == MeshConfig() and n > 1:
        fits = [
            f
            for f in range(1, n + 1)
            if n % f == 0 and model.channels % f == 0 and model.channels // f >= CHANNELS
        ]
        mesh = MeshConfig(fsdp=fits[-1] if fits else 1, data=-1)
        chosen.append("chosen because none is configured")
    # A mesh of n devices divides n times the batch evenly; the batch itself is rounded below.
    shape = mesh_shape(mesh, model.axis_sizes, n * batch, n, topology.hosts)
    if math.prod(shape) < n:
        chosen.append(f"so {n - math.prod(shape)} devices stay idle: --mesh.data -1 uses all")
    shares = shape[0] * shape[1]
    rounded = -(-batch // shares) * shares
    if rounded != batch:
        chosen.append(
            f"data.batch_size {rounded} instead of {batch}, so that each device has whole rows"
        )
    steps = cfg.train.steps
    if cfg.tokens:
        steps = math.ceil(cfg.tokens / (cfg.optim.accumulate * rounded * cfg.data.seq_len))
    data, train = (
        dataclasses.replace(cfg.data, batch_size=rounded),
        dataclasses.replace(cfg.train, steps=steps),
    )
    return dataclasses.replace(cfg, mesh=MeshConfig(*shape), data=data, train=train), chosen


def others(
    model: ModelConfig, topology: Topology, seq_len: int, chosen: ModelConfig
) -> list[ModelConfig]:
    """The model with every other attention implementation that the topology supports."""
    found = []
    for attention in ("splash", "cudnn", "blockwise", "materialised"):
        if attention != chosen.attention:
            try:
                found.append(
                    dataclasses.replace(model, attention=attention).resolve(
                        topology.platform, seq_len
                    )
                )
            except ConfigError:
                continue
    return found


if __name__ == "__main__":
    sys.exit(main())
