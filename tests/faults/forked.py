"""Commands in a process of which a standard stream is closed, or the folder removed: ``python -m
tests.faults.forked``.

Each runs in a fork of this process, which has imported them all, so that they do not take seconds
each to start.
"""

import importlib
import json
import os
import signal
import sys
import tempfile
import traceback

COMMANDS = (
    "train",
    "evaluate",
    "convert",
    "plot",
    "generate",
    "verify",
    "plan",
    "bench",
    "datasets",
    "tokenizers",
)
STREAMS = ("stdin", "stdout", "stderr")
LIMIT_S = 60


def main_of(command):
    try:
        return importlib.import_module(f"gptjax.{command}.__main__").main
    except ModuleNotFoundError:
        return importlib.import_module(f"gptjax.{command}").main


def run(main, arguments, fault):
    """Exit status, stdout and stderr of a command; ``fault`` is a stream that is closed, ``full``
    or ``removed``.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = f"{folder}/out", f"{folder}/err"
        child = os.fork()
        if not child:
            status = 99
            try:
                signal.alarm(LIMIT_S)
                os.dup2(
                    os.open("/dev/full" if fault == "full" else out, os.O_CREAT | os.O_WRONLY), 1
                )
                os.dup2(os.open(err, os.O_CREAT | os.O_WRONLY), 2)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
                if fault in STREAMS:
                    os.close(STREAMS.index(fault))
                    setattr(sys, fault, None)
                if fault == "removed":
                    os.mkdir(f"{folder}/gone")
                    os.chdir(f"{folder}/gone")
                    os.rmdir(f"{folder}/gone")
                try:
                    status = main(arguments)
                except SystemExit as stop:
                    status = stop.code or 0
                for stream in filter(None, (sys.stdout, sys.stderr)):
                    stream.flush()  # as Python does at its end
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [open(path).read() if os.path.exists(path) else "" for path in (out, err)]  # noqa: SIM115
        return [status, *texts]


if __name__ == "__main__":
    mains = {command: main_of(command) for command in COMMANDS}
    cases = json.load(sys.stdin)
    print(
        json.dumps([run(mains[command], arguments, fault) for command, arguments, fault in cases])
    )
