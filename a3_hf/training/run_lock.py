"""A folder for one run at a time."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

LOCK_FILE = ".lock"


@contextmanager
def sole_use(folder: str | os.PathLike) -> Iterator[None]:
    """Makes the folder, if need be, and holds it for this process until the block ends, or the process does, however it ends.

    The lock is the process's own (POSIX): children that it forks don't hold it on.

    Raises:
        ValueError: another process holds it; says which.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    while True:
        file = path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise ValueError(
                f"output_dir={str(folder)!r}: another run is writing there{holder and f' (process {holder})'}; wait for its "
                "end, stop it, or give another output_dir"
            ) from error
        except OSError as error:  # a file system without locks
            logger.warning(f"{path}: can't be locked ({error}): see to it that no other run has this output_dir")
            break
        try:
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        except FileNotFoundError:
            pass
        file.close()  # its holder has just ended and removed it
    file.truncate(0)
    file.write(f"{os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        if is_new and not any(folder.iterdir()):  # nothing came of it
            folder.rmdir()
