"""Runs a program written by a model, in a process of its own with limits."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# The limits are set in the new process, which the program's own then replaces: a function that runs between fork and exec
# could hang where the parent has threads, as torch has.
LAUNCHER = """
import os, resource, sys
seconds, megabytes, program = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
resource.setrlimit(resource.RLIMIT_AS, (megabytes * 2**20, megabytes * 2**20))
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
os.execv(sys.executable, [sys.executable, "-I", "-X", "utf8", "-c", *sys.argv[4:], program])
"""
# Runs the program as a script, and then writes the secret that it was given into a pipe: a program that ends earlier, with
# whatever exit code, does not know the secret.
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
        exit_code: of its process, or the negative number of the signal that ended it.
        timed_out: it was ended because `wall_seconds` had passed.
    """

    passed: bool
    exit_code: int
    timed_out: bool


def run_program(
    source: str, *, cpu_seconds: int = 5, wall_seconds: float = 10.0, memory_megabytes: int = 1024
) -> Outcome:
    """Runs Python source with `python -I`, in a temporary directory that holds nothing else and is removed afterwards,
    without this process's environment variables, without input, its output thrown away. On POSIX systems only.

    Seconds, memory and the size of files (1 MiB each) are limited; processes that it started are ended with it, unless they
    left its group. The network, reading of files and the number of processes are NOT limited: this is no protection against
    malicious programs. For that, run the whole evaluation in a container without network.

    Args:
        cpu_seconds: CPU time of each of its processes.
        wall_seconds: time until it is ended.
        memory_megabytes: address space of each of its processes, MiB.

    Raises:
        ValueError: a limit that is not above 0.
    """
    limits = {"cpu_seconds": cpu_seconds, "wall_seconds": wall_seconds, "memory_megabytes": memory_megabytes}
    for name, value in limits.items():
        if value <= 0:
            raise ValueError(f"{name}={value}; it takes more than 0")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program.py"
        # characters that UTF-8 does not have make a file that Python refuses, so that the program fails and not this one
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
                with contextlib.suppress(BrokenPipeError):  # it ended before it began, for want of memory
                    process.communicate(word, timeout=wall_seconds)
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                _end_group(process.pid)
            exit_code = process.wait()
            os.set_blocking(said, False)
            answer = b""
            with contextlib.suppress(BlockingIOError):  # nothing was said
                answer = os.read(said, 64)
        finally:
            os.close(said)
            os.close(pipe)
    return Outcome(answer == word and exit_code == 0 and not timed_out, exit_code, timed_out)


def _end_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:  # nobody is left
        pass
