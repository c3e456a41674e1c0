"""Where the store puts its records and blobs: names and bytes, in a directory or elsewhere.

A shelf replaces a value as a whole or not at all. What is put there, and under which names, is store.py.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

from headgate.controller.failpoints import reach

#: The end of the name of a file that is not complete yet.
NEW = ".new"


class Shelf(ABC):
    """Bytes by name. Every method raises OSError when the shelf is full or out of reach.

    where    for people: what follows "in"
    scheme   what `path` begins with, for those that read blobs without the store
    """

    where: str
    scheme: str

    @abstractmethod
    def names(self) -> list[str]:
        """The names of all that is here."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """What is here under that name; None if nothing is. ValueError if it is there, but lost."""

    @abstractmethod
    def write(self, name: str, data: bytes, sync: bool = True) -> None:
        """Keep `data`, instead of what was there; with `sync` it survives whatever ends the machine."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Forget it; nothing happens if it is not here."""

    def has(self, name: str) -> bool:
        """Whether something is here under that name."""
        return name in self.names()

    def renew(self, name: str, before: str, data: bytes, sync: bool = True) -> None:
        """Keep `data`, and what was there as `before`."""
        old = self.read(name)
        if old is not None:
            self.write(before, old, sync)
        self.write(name, data, sync)

    def rename(self, name: str, new: str) -> None:
        """Keep it under another name."""
        data = self.read(name)
        if data is not None:
            self.write(new, data, sync=False)
            self.remove(name)

    def path(self, name: str) -> str:
        """What others find it by."""
        return f"{self.scheme}:{name}"


class FileShelf(Shelf):
    """Files in one directory and its folders. A value is written to another file, synced, renamed.

    write   os.write, or a stand-in for a disk that is full
    """

    scheme = "file"

    def __init__(self, directory: str, *, write: Callable[[int, bytes], int] = os.write) -> None:
        self.where = directory
        self._write = write

    def names(self) -> list[str]:
        """The names of all files; those in a folder as "folder/name"."""
        found = []
        for name in os.listdir(self.where):
            found.append(name)
            with contextlib.suppress(OSError):  # it is no folder
                found += [f"{name}/{each}" for each in os.listdir(self.path(name))]
        return found

    def read(self, name: str) -> bytes | None:
        try:
            with open(self.path(name), "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:  # a disk that cannot be read has lost what was there
            raise ValueError(str(error)) from error

    def write(self, name: str, data: bytes, sync: bool = True) -> None:
        path = self.path(name)
        if "/" in name:
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        with self._forgetting(path + NEW):
            self._write_file(path + NEW, data, sync)
            reach("blob.synced")
            os.replace(path + NEW, path)
            reach("blob.written")

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(name))

    def has(self, name: str) -> bool:
        return os.path.exists(self.path(name))

    def renew(self, name: str, before: str, data: bytes, sync: bool = True) -> None:
        """As Shelf.renew; and if it raises, `before` too is as it was."""
        newest, older = self.path(name), self.path(before)
        with self._forgetting(newest + NEW, older + NEW):
            self._write_file(newest + NEW, data, sync)
            reach("goals.synced")
            if os.path.exists(newest):
                _link(newest, older + NEW)
                reach("goals.linked")
                os.replace(older + NEW, older)
                self.remove(before + NEW)  # it stays where both are names of one file
            reach("goals.kept")
            os.replace(newest + NEW, newest)
            try:
                reach("goals.renamed")
                if sync:
                    _sync_directory(self.where)
            except OSError:  # what was refused must not be found there later
                _take_back(newest, older)
                raise

    def rename(self, name: str, new: str) -> None:
        os.replace(self.path(name), self.path(new))

    def path(self, name: str) -> str:
        """The file."""
        return os.path.join(self.where, name)

    @contextlib.contextmanager
    def _forgetting(self, *paths: str) -> Iterator[None]:
        """Leave nothing half done behind."""
        try:
            yield
        except OSError:
            for path in paths:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            raise

    def _write_file(self, path: str, data: bytes, sync: bool) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._write(fd, rest) :]  # type: ignore[arg-type]
            reach("file.written")
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)


def _link(path: str, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name)
    os.link(path, name)


def _take_back(newest: str, older: str) -> None:
    if os.path.exists(older):
        _link(older, newest + NEW)
        os.replace(newest + NEW, newest)
    else:
        os.unlink(newest)


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Memory:
    """Bytes in a file that is in memory and has no name; it lives as long as any process holds it open.

    What cannot be read or written is not there: this is a second line only.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self) -> bytes:
        """What was written last; empty for nothing."""
        with contextlib.suppress(OSError):
            return os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        return b""

    def write(self, data: bytes) -> None:
        """Keep `data` instead."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
            rest, at = memoryview(data), 0
            while rest:
                size = os.pwrite(self._fd, rest, at)
                rest, at = rest[size:], at + size
