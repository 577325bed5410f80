"""Runs a program written by a model, in a separate process with limits."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# The limits are set in a new process, which then executes the program: a function that runs between fork and exec could hang
# if the parent has threads, as torch has.
LAUNCHER = """
import os, resource, sys
seconds, megabytes, program = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
resource.setrlimit(resource.RLIMIT_AS, (megabytes * 2**20, megabytes * 2**20))
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
os.execv(sys.executable, [sys.executable, "-I", "-X", "utf8", "-c", *sys.argv[4:], program])
"""
# Runs the program as a script, then writes a secret into a pipe: a program that ends earlier, with any exit code, does not
# know the secret.
RUNNER = """
import os, sys, types
def run(pipe, program):
    word = os.read(0, 64)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.set_inheritable(pipe, False)
    with open(program, "rb") as file:
        source = file.read()
    sys.argv = [program]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__ = program
    exec(compile(source, program, "exec", dont_inherit=True), main.__dict__)
    os.write(pipe, word)
run(int(sys.argv[1]), sys.argv[2])
"""


@dataclass(frozen=True)
class Outcome:
    """The end of a program.

    Attributes:
        passed: it ran past its last line, and its process ended with the exit code 0.
        exit_code: exit code of its process, or minus the signal that ended it.
        timed_out: it was killed after `wall_seconds`.
    """

    passed: bool
    exit_code: int
    timed_out: bool


def run_program(
    source: str, *, cpu_seconds: int = 5, wall_seconds: float = 10.0, memory_megabytes: int = 1024
) -> Outcome:
    """Runs Python source with `python -I`, in a temporary directory that holds nothing else and is removed afterwards,
    without this process's environment variables and without input; its output is discarded. POSIX systems only.

    Time, memory and the size of files (1 MiB each) are limited; processes that it started end with it, unless they left its
    group. Network, reading of files and the number of processes are NOT limited: this does not protect against malicious
    programs. For that, run the whole evaluation in a container without network.

    Args:
        cpu_seconds: CPU time of each of its processes.
        wall_seconds: time after which it is killed.
        memory_megabytes: address space of each of its processes, MiB.

    Raises:
        ValueError: a limit that is not above 0.
    """
    limits = {"cpu_seconds": cpu_seconds, "wall_seconds": wall_seconds, "memory_megabytes": memory_megabytes}
    for name, value in limits.items():
        if value <= 0:
            raise ValueError(f"{name}={value}: expected a number above 0")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program.py"
        # characters outside UTF-8 make a file that Python refuses, so the program fails, not this process
        program.write_bytes(source.encode("utf-8", errors="surrogatepass"))
        word = secrets.token_bytes(32)
        said, pipe = os.pipe()
        limits = [str(cpu_seconds), str(memory_megabytes), str(program)]
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", LAUNCHER, *limits, RUNNER, str(pipe)],
                cwd=folder,
                env={"HOME": folder, "TMPDIR": folder},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=(pipe,),
            )
            timed_out = False
            try:
                with contextlib.suppress(BrokenPipeError):  # it ended before it read, out of memory
                    process.communicate(word, timeout=wall_seconds)
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                _end_group(process.pid)
            exit_code = process.wait()
            os.set_blocking(said, False)
            answer = b""
            with contextlib.suppress(BlockingIOError):  # nothing was written
                answer = os.read(said, 64)
        finally:
            os.close(said)
            os.close(pipe)
    return Outcome(answer == word and exit_code == 0 and not timed_out, exit_code, timed_out)


def _end_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:  # no process is left
        pass
