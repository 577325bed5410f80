"""A lock that gives a run sole use of its output folder."""

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
    """Creates the folder if needed and locks it for this process, until the block or the process ends. Forked children don't
    keep the lock (POSIX).

    Raises:
        ValueError: another process holds the lock; the message names it.
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
                f"output_dir={str(folder)!r}: another run is writing there{holder and f' (process {holder})'}; wait until "
                "it ends, stop it, or set another output_dir"
            ) from error
        except OSError as error:  # a file system without locks
            logger.warning(f"{path}: can't be locked ({error}): make sure that no other run uses this output_dir")
            break
        try:
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        except FileNotFoundError:
            pass
        file.close()  # the holder has just ended and removed the file
    file.truncate(0)
    file.write(f"{os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        if is_new and not any(folder.iterdir()):  # the run wrote nothing
            folder.rmdir()
