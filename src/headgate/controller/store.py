"""The stored goals: one JSON record with its own checksum, the last two kept, and users' code as blobs.

    goals.json      the newest generation: {"sha256": ..., "goals": ...}
    goals.json.1    the one before
    (memory)        the newest once more, where it ends with the instance and not with a disk (shelf.Memory)
    blobs/<sha256>  code and user_config, by content; opened by replicas only

They are on a shelf (shelf.py): files in the run directory, or elsewhere. A record is complete or it
does not count. A damaged one is set aside as `*.corrupt-<time>`; the copy in memory takes its place and
is stored again, so that nothing is lost; without that copy the other generation is used.
Where records were and none is left that counts, `load` raises: an empty answer would end everything
that serves.

What the goals say is core/goals.py; when they are saved, controller/controller.py.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
import time
from collections.abc import Iterable

import msgspec
from msgspec import Struct

from headgate import logs
from headgate.controller.failpoints import reach
from headgate.controller.shelf import NEW, Memory, Shelf
from headgate.core.state import Goals
from headgate.errors import InstanceError

log = logs.get("store")

NEWEST = "goals.json"
BEFORE = "goals.json.1"
BLOBS = "blobs"
_HALF_WRITTEN = (NEWEST + NEW, BEFORE + NEW)

_CORRUPT = re.compile(r"goals\.json(\.1)?\.corrupt-.*")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StoreError(InstanceError):
    """The goals could not be stored, and nothing was changed; or there are none left to load."""


class _Record(Struct, forbid_unknown_fields=True):
    sha256: str
    goals: msgspec.Raw


_decode_record = msgspec.json.Decoder(_Record).decode
_decode_goals = msgspec.json.Decoder(Goals).decode


class Store:
    """The goals and blobs on one shelf.

    memory   for the newest record once more
    """

    def __init__(self, shelf: Shelf, memory: Memory | None = None) -> None:
        self.shelf = shelf
        self._memory = memory

    # --- goals ---

    def is_new(self) -> bool:
        """Whether nothing was ever stored here. Raises StoreError."""
        if self._memory is not None and self._memory.read():
            return False
        return not any(name in (NEWEST, BEFORE) or _CORRUPT.fullmatch(name) for name in self._names())

    def begin(self) -> None:
        """Store empty goals, once, when the instance is new; from then on `load` must find a record."""
        self._save(Goals(), sync=False)

    def save(self, goals: Goals) -> None:
        """Make `goals` the newest generation; it survives whatever ends this process or machine.

        Raises StoreError, and then the goals are as they were.
        """
        self._save(goals, sync=True)

    def load(self) -> Goals:
        """The newest generation that is complete; damaged ones are set aside.

        Raises StoreError if there is none, or if the shelf does not answer: then nothing is set aside.
        """
        found, before = self._complete(NEWEST), self._complete(BEFORE)  # a damaged one may be in the way of a save
        if found is not None:
            self._remember(pack(found))
            return found
        found = self._remembered()
        if found is not None:
            log.error("the goals record in %s was lost; nothing else: all of it is known still", self.shelf.where)
            try:
                self.save(found)
            except StoreError as error:
                log.error("%s", error)
            return found
        if before is not None:
            log.error("the newest goals record in %s was lost: the one before counts", self.shelf.where)
            return before
        raise StoreError(
            f"the goals record in {self.shelf.where} is lost{self._remains()}; what runs goes on serving as "
            "it is, but nothing can be changed any more: call shutdown() and start again"
        )

    def _complete(self, name: str) -> Goals | None:
        """The goals of that record; None if there is none, or a damaged one, which is set aside."""
        try:
            record = self.shelf.read(name)
            return None if record is None else unpack(record)
        except OSError as error:
            raise self._away("the goals", error) from None
        except ValueError as error:
            self._set_aside(name, error)
            return None

    def _remembered(self) -> Goals | None:
        with contextlib.suppress(ValueError):  # its writer was killed on the way; then the shelf's is newer
            if self._memory is not None and (record := self._memory.read()):
                return unpack(record)
        return None

    def _remember(self, record: bytes) -> None:
        if self._memory is not None:
            self._memory.write(record)

    def _save(self, goals: Goals, *, sync: bool) -> None:
        record = pack(goals)
        try:
            reach("goals.before_write")
            self.shelf.renew(NEWEST, BEFORE, record, sync)
        except OSError as error:
            raise self._refused("the goals", error) from None
        reach("goals.stored")
        self._remember(record)

    def _set_aside(self, name: str, error: Exception) -> None:
        aside = f"{name}.corrupt-{time.time_ns()}"
        path = self.shelf.path(name)
        log.error("the goals record %s is damaged (%s); set aside as %s", path, error, self.shelf.path(aside))
        with contextlib.suppress(OSError):  # an unreadable disk: it stays where it is
            self.shelf.rename(name, aside)

    def _remains(self) -> str:
        with contextlib.suppress(StoreError):
            found = sorted(name for name in self._names() if _CORRUPT.fullmatch(name))
            return f" (damaged: {', '.join(found)})" if found else ""
        return ""

    def _names(self) -> list[str]:
        try:
            return self.shelf.names()
        except OSError as error:
            raise self._away("the goals", error) from None

    # --- blobs ---

    def put(self, data: bytes) -> str:
        """Keep `data`: the name under which `get` and `path` find it. Raises StoreError."""
        name = hashlib.sha256(data).hexdigest()
        try:
            if not self.shelf.has(_blob(name)):
                self.shelf.write(_blob(name), data)
        except OSError as error:
            raise self._refused("code or user_config", error) from None
        return name

    def get(self, name: str) -> bytes:
        """The content of a blob. Raises StoreError."""
        try:
            found = self.shelf.read(_blob(name))
        except (OSError, ValueError) as error:
            raise self._away("code or user_config", error) from None
        if found is None:
            raise StoreError(f"code or user_config is lost: there is no {_blob(name)} in {self.shelf.where}")
        return found

    def path(self, name: str) -> str:
        """What a replica finds a blob by: a file, or "<scheme>:<name>" where the shelf has no files."""
        return self.shelf.path(_blob(name))

    def collect(self, used: Iterable[str]) -> None:
        """Remove the blobs that are not `used`, and what an earlier controller left half written."""
        keep = {_blob(name) for name in used}
        with contextlib.suppress(OSError):  # it will be tried again
            for name in self.shelf.names():
                if name not in keep and (name.startswith(_blob("")) or name in _HALF_WRITTEN):
                    self.shelf.remove(name)

    # --- errors ---

    def _refused(self, what: str, error: OSError) -> StoreError:
        remedy = "make room there" if error.errno in _FULL else "mend that"
        return StoreError(
            f"cannot store {what} in {self.shelf.where}: {_reason(error)}; nothing was changed and everything "
            f"serves on; {remedy}, then repeat the call"
        )

    def _away(self, what: str, error: Exception) -> StoreError:
        return StoreError(
            f"cannot read {what} in {self.shelf.where}: {_reason(error)}; nothing was changed and what runs serves on"
        )


def _blob(name: str) -> str:
    return f"{BLOBS}/{name}"


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


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
