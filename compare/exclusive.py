"""One comparison at a time on a machine: a lock, and a look for workers that an earlier one left behind.

Two runs side by side would each measure the other. Workers die with their parent where the system offers that (see
`worker.py`); those of a parent that was stopped or killed in an odd moment are found by their command line and ended here.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from compare.errors import CompareError
from compare.places import cache_root

WORKER = "compare.worker"


@contextlib.contextmanager
def alone(say: Callable[[str], None], lock: Path | None = None) -> Iterator[None]:
    """Holds the lock for the length of a run, after ending orphaned workers. Raises `CompareError` beside another run."""
    import fcntl

    lock = lock or cache_root() / "run.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip() or "unknown"
            raise CompareError(
                f"another comparison is running (process {who}); each would measure the other, so wait until it is over"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        for pid in orphans():
            say(f"ending process {pid}, a worker that an earlier run left behind")
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # a worker leads its own group
        yield


def orphans(proc: Path = Path("/proc")) -> list[int]:
    """Workers of this user that lead their group and whose parent is gone (they were handed to process 1)."""
    found = []
    for folder in proc.glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            after_name = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            parent, group = int(after_name[1]), int(after_name[2])
            ours = folder.stat().st_uid == os.getuid()
            if ours and parent == 1 and group == int(folder.name) and words[1:3] == [b"-m", WORKER.encode()]:
                found.append(int(folder.name))
    return found
