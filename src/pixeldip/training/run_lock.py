"""One process group at a time in a run folder."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ..errors import UserError
from ..files import writing
from ..run_folder import LOCK

try:
    import fcntl
except ImportError:  # Windows, where nothing stops a second run
    fcntl = None

_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


@contextlib.contextmanager
def only_run(run: Path) -> Iterator[None]:
    """Holds a run folder for as long as this process lives in here; made for it, and left empty, it is removed again.

    The lock is the kernel's (flock), so a killed process leaves none behind. Other machines see it where the network
    file system passes it on (NFS does; Lustre if mounted with flock); where there are no locks, nothing is held.

    Raises:
        UserError: naming the process that holds it, or if the folder cannot be written.
    """
    made = not run.exists()
    with writing(f"out {run}"):
        file = _locked(run)
    try:
        with contextlib.suppress(OSError):  # of a disk that is full: the run's own message tells more
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield
    finally:
        with contextlib.suppress(OSError):  # where another process has just begun
            if made and [path.name for path in run.iterdir()] == [LOCK]:
                (run / LOCK).unlink()
                run.rmdir()
        with contextlib.suppress(OSError):  # of a disk that is full
            file.close()


def _locked(run: Path) -> TextIO:
    while True:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / LOCK).open("a+", encoding="utf-8")
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.seek(0)
                raise UserError(
                    f"{run}: a run is going on in this folder ({file.read() or 'by an unknown process'}); wait for its "
                    "end or stop it, or choose another folder with --out"
                ) from error
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # its last holder has removed it in the meantime
