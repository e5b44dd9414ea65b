"""Run functions in fresh processes that need not import torch again: they are forked from one that has imported it.

`run` starts one server for each process of pytest, at its first call, and asks it for processes from then on. The
server computes nothing itself, so it has no threads that its forks would lack. What a process changes for itself, such
as a default dtype or a function that it replaces, ends with it. A process that crashes or hangs fails its own call
alone.

    python tests/forked.py      the server: it reads calls from its standard input until that is closed
"""

import atexit
import functools
import gc
import importlib
import os
import pickle
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# the path of a module and the name of a function in it
Name = tuple[str, str]

# the seconds that the other processes of a call have to end once one has failed
GRACE = 20.0

# what torch imports when a program first needs it: without this each process would import it again
LATER = (
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor.parallel",
)


def name_of(function: Callable[..., Any]) -> Name:
    return function.__code__.co_filename, function.__name__


def find(name: Name) -> Callable[..., Any]:
    """Return the function of this name, and of a test that a decorator has made the function that was decorated."""
    found = getattr(importlib.import_module(Path(name[0]).stem), name[1])
    return getattr(found, "__wrapped__", found)


# Asking --------------------------------------------------------------------------------------------------------------


def run(function: Callable[..., None], count: int, *arguments: Any, seconds: float = 300.0) -> None:
    """Call ``function(number, folder, *arguments)`` in `count` processes, and fail with what the failing ones print.

    Args:
        function: a function at the top of a module.
        count: the number of processes. `number` counts them from 0.
        arguments: whatever can be pickled.
        seconds: the time after which processes that still run are killed; they have failed then.

    `folder` is an empty folder that the processes of this call share. It is removed at the end.
    """
    failed = server().ask((name_of(function), count, arguments, seconds))
    assert not failed, "\n".join(failed)


def server() -> "Server":
    if not SERVERS or SERVERS[0].process.poll() is not None:
        SERVERS[:] = [Server()]
    return SERVERS[0]


class Server:
    """The process that forks, as a process of pytest sees it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        atexit.register(self.close)

    def ask(self, call: tuple[Any, ...]) -> list[str]:
        answered = False
        try:
            pickle.dump(call, self.process.stdin)
            self.process.stdin.flush()
            failed = pickle.load(self.process.stdout)
            answered = True
        except (EOFError, BrokenPipeError):
            return [f"the server of processes has ended with {self.process.wait()}"]
        finally:
            if not answered:  # an answer that comes later would be taken for that of the next call
                self.process.kill()
        return failed

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


SERVERS: list[Server] = []


# Serving -------------------------------------------------------------------------------------------------------------


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed here is no answer
    for module in LATER:
        importlib.import_module(module)
    while True:
        try:
            call = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(answer(*call), answers)
        answers.flush()


def answer(name: Name, count: int, arguments: tuple[Any, ...], seconds: float) -> list[str]:
    """Return what each process that failed has printed."""
    try:
        function = find(name)
    except Exception:
        return [traceback.format_exc()]
    gc.freeze()  # a collection in a process would write to every object, and so copy it
    with tempfile.TemporaryDirectory() as place:
        outputs, folder = Path(place), Path(place) / "shared"
        folder.mkdir()
        # closed when all have passed: a process that ended before the others would close their connections to it
        wait, go = os.pipe()
        processes = [
            Process(number, functools.partial(function, number, folder, *arguments), wait, go, outputs)
            for number in range(count)
        ]
        os.close(wait)
        watch(processes, seconds)
        os.close(go)
        return [failure for failure in map(Process.failure, processes) if failure]


class Process:
    """A fork that makes one call, writes a byte when that has returned, and waits for the others."""

    def __init__(self, number: int, call: Callable[[], None], wait: int, go: int, outputs: Path) -> None:
        self.number, self.passed, self.output = number, False, outputs / str(number)
        self.report, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(go)
            code = 1
            try:
                self.enter(self.output)
                call()
                os.write(writer, b".")
                os.read(wait, 1)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)  # ending gloo's threads one by one has aborted a process that had passed
        os.close(writer)

    @staticmethod
    def enter(output: Path) -> None:
        import torch

        nothing, file = os.open(os.devnull, os.O_RDONLY), os.open(output, os.O_WRONLY | os.O_CREAT)
        for source, target in ((nothing, 0), (file, 1), (file, 2)):
            os.dup2(source, target)
        torch.set_num_threads(1)
        torch.manual_seed(0)

    def failure(self) -> str:
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.report)
        said = self.output.read_text(errors="replace") if self.output.exists() else ""
        return "" if self.passed and not status else f"process {self.number} ended with {status}:\n{said}"


def watch(processes: list[Process], seconds: float) -> None:
    """Wait until every process has passed or ended, and kill those that take too long."""
    selector = selectors.DefaultSelector()
    for process in processes:
        selector.register(process.report, selectors.EVENT_READ, process)
    end = time.monotonic() + seconds
    while selector.get_map():
        for key, _ in selector.select(max(0.0, end - time.monotonic())):
            key.data.passed = bool(os.read(key.data.report, 1))
            selector.unregister(key.fileobj)
            if not key.data.passed:
                end = min(end, time.monotonic() + GRACE)
        if time.monotonic() >= end:
            for key in list(selector.get_map().values()):
                os.kill(key.data.pid, signal.SIGKILL)
                selector.unregister(key.fileobj)


if __name__ == "__main__":
    main()
