"""The goals on disk: one JSON record with its own checksum, the last two kept, and users' code as blobs.

    <dir>/goals.json      the newest generation: {"sha256": ..., "goals": ...}
    <dir>/goals.json.1    the one before
    <dir>/blobs/<sha256>  code and user_config, by content; opened by replicas only

A record is complete or it does not count: written to another file, synced, renamed. A damaged one
is set aside as `*.corrupt-<time>` and the other generation is used. Where records were and none is
left that counts, `load` raises: an empty answer would end everything that serves.

What the goals say is core/goals.py; when they are saved, controller/controller.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable

import msgspec
from msgspec import Struct

from headgate import logs
from headgate.core.state import Goals
from headgate.errors import InstanceError

log = logs.get("store")

NEWEST = "goals.json"
BEFORE = "goals.json.1"
BLOBS = "blobs"

_CORRUPT = re.compile(r"goals\.json(\.1)?\.corrupt-.*")
_NEW = ".new"


class StoreError(InstanceError):
    """The goals could not be stored, and nothing was changed; or there are none left to load."""


class _Record(Struct, forbid_unknown_fields=True):
    sha256: str
    goals: msgspec.Raw


_decode_record = msgspec.json.Decoder(_Record).decode
_decode_goals = msgspec.json.Decoder(Goals).decode


class Store:
    """The goals and blobs in one directory.

    write   os.write, or a stand-in for a disk that is full
    """

    def __init__(self, directory: str, *, write: Callable[[int, bytes], int] = os.write) -> None:
        self._directory = directory
        self._blobs = os.path.join(directory, BLOBS)
        self._write = write

    # --- goals ---

    def is_new(self) -> bool:
        """Whether nothing was ever stored here."""
        return not any(name in (NEWEST, BEFORE) or _CORRUPT.fullmatch(name) for name in os.listdir(self._directory))

    def begin(self) -> None:
        """Store empty goals, once, when the instance is new; from then on `load` must find a record."""
        self._save(Goals(), sync=False)

    def save(self, goals: Goals) -> None:
        """Make `goals` the newest generation; it survives whatever ends this process or machine.

        Raises StoreError, and then the generations are as they were.
        """
        self._save(goals, sync=True)

    def load(self) -> Goals:
        """The newest generation that is complete; damaged ones are set aside.

        Raises StoreError if there is none.
        """
        for name in (NEWEST, BEFORE):
            path = os.path.join(self._directory, name)
            try:
                with open(path, "rb") as file:
                    return unpack(file.read())
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                self._set_aside(path, error)
        raise StoreError(
            f"the goals record in {self._directory} is lost{self._remains()}; what runs goes on serving as "
            "it is, but nothing can be changed any more: call shutdown() and start again"
        )

    def _save(self, goals: Goals, *, sync: bool) -> None:
        newest = os.path.join(self._directory, NEWEST)
        before = os.path.join(self._directory, BEFORE)
        try:
            self._write_file(newest + _NEW, pack(goals), sync)
            if os.path.exists(newest):
                _link(newest, before + _NEW)
                os.replace(before + _NEW, before)
            os.replace(newest + _NEW, newest)
            if sync:
                _sync_directory(self._directory)
        except OSError as error:
            self._forget(newest + _NEW, before + _NEW)
            raise self._full("the goals", error) from None

    def _set_aside(self, path: str, error: Exception) -> None:
        aside = f"{path}.corrupt-{time.time_ns()}"
        log.error("the goals record %s is damaged (%s); set aside as %s", path, error, aside)
        with contextlib.suppress(OSError):  # an unreadable disk: it stays where it is
            os.replace(path, aside)

    def _remains(self) -> str:
        with contextlib.suppress(OSError):
            found = sorted(name for name in os.listdir(self._directory) if _CORRUPT.fullmatch(name))
            return f" (damaged: {', '.join(found)})" if found else ""
        return ""

    # --- blobs ---

    def put(self, data: bytes) -> str:
        """Keep `data`: the name under which `path` finds it. Raises StoreError."""
        name = hashlib.sha256(data).hexdigest()
        path = self.path(name)
        if os.path.exists(path):
            return name
        try:
            os.makedirs(self._blobs, 0o700, exist_ok=True)
            self._write_file(path + _NEW, data, sync=True)
            os.replace(path + _NEW, path)
        except OSError as error:
            self._forget(path + _NEW)
            raise self._full("code or user_config", error) from None
        return name

    def path(self, name: str) -> str:
        """The file of a blob."""
        return os.path.join(self._blobs, name)

    def collect(self, used: Iterable[str]) -> None:
        """Remove the blobs that are not `used`."""
        keep = set(used)
        with contextlib.suppress(OSError):  # it will be tried again
            for name in os.listdir(self._blobs):
                if name not in keep:
                    os.unlink(self.path(name))

    # --- files ---

    def _write_file(self, path: str, data: bytes, sync: bool) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._write(fd, rest) :]  # type: ignore[arg-type]
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)

    def _forget(self, *paths: str) -> None:
        for path in paths:
            with contextlib.suppress(OSError):
                os.unlink(path)

    def _full(self, what: str, error: OSError) -> StoreError:
        return StoreError(
            f"cannot store {what} in {self._directory}: {error.strerror or error}; nothing was changed and "
            "everything serves on; make room there, then repeat the call"
        )


def pack(goals: Goals) -> bytes:
    """`goals` as a record."""
    return _compose(msgspec.json.encode(goals))


def unpack(record: bytes) -> Goals:
    """The goals of a record; raises ValueError if one bit of it is not as `pack` wrote it."""
    goals = bytes(_decode_record(record).goals)
    if _compose(goals) != record:
        raise ValueError("its checksum is wrong")
    return _decode_goals(goals)


def _compose(goals: bytes) -> bytes:
    return b'{"sha256":"%b","goals":%b}' % (hashlib.sha256(goals).hexdigest().encode(), goals)


def _link(path: str, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name)
    os.link(path, name)


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
