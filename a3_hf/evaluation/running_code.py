"""Runs a program that a model has written, in a process of its own with limits."""

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

FINISHED = 93  # exit code of a program that ran past its last line; 0 it could choose in the middle

# The limits are set in the new process, which the program's own then replaces: a function that runs between fork and exec
# could hang where the parent has threads, as torch has.
LAUNCHER = """
import os, resource, sys
seconds, megabytes, program = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
resource.setrlimit(resource.RLIMIT_AS, (megabytes * 2**20, megabytes * 2**20))
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
os.execv(sys.executable, [sys.executable, "-I", "-X", "utf8", program])
"""


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: it ran past its last line.
        exit_code: of its process: `FINISHED`, the program's own, or the negative number of the signal that ended it.
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

    Limited are the seconds, the memory, and files, to 1 MiB each; processes that it started are ended with it, unless they
    left its group. The network, reading of files and the number of processes are NOT limited: Python has no means to. It
    keeps accidents small; against programs that mean harm, run the whole evaluation in a container without network.

    Args:
        cpu_seconds: of work of each of its processes.
        wall_seconds: on the clock.
        memory_megabytes: of address space, of each of its processes (MiB).

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
        program.write_bytes(f"{source}\nraise SystemExit({FINISHED})\n".encode("utf-8", errors="surrogatepass"))
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", LAUNCHER, str(cpu_seconds), str(memory_megabytes), str(program)],
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        timed_out = False
        try:
            process.wait(wall_seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _end_group(process.pid)
        exit_code = process.wait()
    return Outcome(exit_code == FINISHED and not timed_out, exit_code, timed_out)


def _end_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:  # nobody is left
        pass
