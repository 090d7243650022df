"""Files that are complete or absent, and folders that one process at a time writes to.

A file is written under a temporary name, ``.NAME.on-HOST.PID.part``, and takes its own name when it is complete. What a
killed process leaves is swept when its folder is next written to. A folder is locked by the file ``.lock``: the
operating system lets go of the lock when the process ends, however it ends, so that none is ever stale.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from wherefrom.errors import ArtefactError, AttributionWarning, InputError, expected

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows has none: folders are not locked there
    fcntl = None

HOST = re.sub(r"\W", "-", platform.node())  # as it stands in the name of a temporary file
TEMPORARY_NAME = re.compile(r"\..+?(?:\.on-(?P<host>[\w-]+))?\.(?P<pid>\d{1,18})\.part", re.DOTALL)
LOCK = ".lock"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def write_atomically(path: str | Path, sweep: bool = True) -> Iterator[Path]:
    """Give a temporary file to write to, which becomes ``path`` if nothing fails; folders are made if need be.

    Args:
        path: the file.
        sweep: remove what killed processes left in its folder first.

    Raises:
        ArtefactError: if it cannot be written: the disk is full, the folder is read-only, the path is a folder.
        InputError: if it is no path, or what is written holds text that is no Unicode.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.on-{HOST}.{os.getpid()}.part"
    check_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if sweep:
            sweep_parts(path.parent)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        is_full = error.errno in NO_SPACE
        advice = "Free some space, or give another folder." if is_full else "Give another path."
        raise ArtefactError(f"{path} could not be written: {_reason(error)}. {advice}") from error
    except UnicodeEncodeError as error:  # half of a character of UTF-16, as a broken JSON may have
        raise expected(f"the text in {path}", "Unicode", repr(error.object[error.start : error.end])) from error


whole = write_atomically  # the name before, for callers that use it still


def check_path(path: str | Path) -> None:
    """Refuse what the system takes for no path.

    Raises:
        InputError: if it holds a null or half of a character.
    """
    try:
        is_valid = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        is_valid = False
    if not is_valid:
        raise expected("a path", "without nulls and halves of characters", repr(str(path)))


def sweep_parts(folder: Path) -> None:
    """Remove the temporary files of processes of this machine that are no more; those of live ones stay."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            part = TEMPORARY_NAME.fullmatch(entry.name)
            # A folder may be shared by several machines: of another's processes nobody here knows whether they live.
            is_of_this_machine = part is not None and part["host"] in (None, HOST)
            if part and is_of_this_machine and not _is_alive(int(part["pid"])):
                with suppress(OSError):  # another process swept it, or may not be swept
                    os.unlink(entry.path)


class Lock:
    """The right to write to a folder, which one process at a time has.

    It is the operating system's lock on an open file, and not the file itself, so nothing stays locked after a kill.

    Args:
        folder: made if need be; `release` removes what was made if it is still empty.
        advice: what to do if another process has it.

    Raises:
        InputError: if another process writes there, by its number. OSError: if the folder cannot be made.
    """

    def __init__(self, folder: str | Path, advice: str = "Wait for it, or give another folder."):
        self.folder = Path(folder)
        self.path = self.folder / LOCK
        self._made_folders = [f for f in (self.folder, *self.folder.parents) if not f.exists()]
        self._file: int | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        if fcntl is not None:
            self._file = self._acquire(fcntl, advice)
        sweep_parts(self.folder)

    def _acquire(self, system: ModuleType, advice: str) -> int | None:
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                system.flock(file, system.LOCK_EX | system.LOCK_NB)
            except OSError as error:
                # Who holds the lock has written its name into the file.
                holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
                os.close(file)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise InputError(f"{holder} is writing to {self.folder}. {advice}") from error
                message = f"{self.folder} cannot be locked ({_reason(error)}): let no other process write there."
                warnings.warn(message, AttributionWarning, stacklevel=4)
                return None
            # The holder before may have removed the file after it was opened here: then it locks nothing.
            with suppress(FileNotFoundError):
                if os.fstat(file).st_ino == os.stat(self.path).st_ino:
                    break
            os.close(file)
        try:
            os.ftruncate(file, 0)
            os.pwrite(file, f"Process {os.getpid()} on {platform.node()}".encode(), 0)
        except OSError:  # a full disk: the lock holds all the same
            pass
        return file

    def release(self) -> None:
        """Let other processes write."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                self.path.unlink()
            os.close(file)
        made_folders, self._made_folders = self._made_folders, []
        for folder in made_folders:  # the innermost first
            with suppress(OSError):
                folder.rmdir()


def _is_alive(pid: int) -> bool:
    if fcntl is None:  # Windows, where the signal 0 ends a process
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is there, and another user's
        return True
    return True


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
