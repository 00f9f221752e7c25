"""One process group at a time in a run folder."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from ..run_folder import LOCK

try:
    import fcntl
except ImportError:  # Windows, where nothing stops a second run
    fcntl = None


@contextlib.contextmanager
def only_run(run: Path) -> Iterator[None]:
    """Holds a run folder, which is made if it is not there, for as long as this process lives in here.

    The lock is the kernel's (flock), so a killed process leaves none behind. Other machines see it where the network
    file system passes it on (NFS does; Lustre if mounted with flock); where there are no locks, nothing is held.

    Raises:
        UserError: naming the process that holds it.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"out {run}: cannot be written ({error.strerror})") from error
    with file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    file.seek(0)
                    raise UserError(
                        f"{run}: a run is going on in this folder ({file.read() or 'holder unknown'}); wait for its "
                        "end or stop it, or choose another folder with --out"
                    ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        with contextlib.suppress(OSError):  # a full disk must not keep a run from ending by its own message
            file.flush()
        yield
