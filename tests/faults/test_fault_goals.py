"""The goals record is damaged: what was complete counts, what was not is kept aside, and nobody notices but the log.

The record is on disk twice, the newest and the one before, and once more in memory that the supervisor holds.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import errno
import functools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from http_load import Load, in_thread
from promises import Promise
from running import grown_controller, instance_pids, key_of, one_instance, pid_of
from under_load import described, replica_pids, serve, under_load, worker

import headgate
from headgate.controller import failpoints
from headgate.controller.shelf import FileShelf, Memory
from headgate.controller.store import BEFORE, NEWEST, Store, StoreError, pack, unpack
from headgate.core.state import BackendGoal, Endpoint, EndpointGoal, Facts, Goals, Settings, Traffic
from headgate.errors import InstanceError

pytestmark = pytest.mark.local("on Ray the record is in the cluster's key-value store")

BLOCK = 512


def goals(backends: int) -> Goals:
    return Goals(
        tuple(EndpointGoal(Endpoint(f"e{n}", f"/e{n}", ("GET",), Traffic(((f"b{n}", 1.0),)))) for n in range(backends)),
        tuple(BackendGoal(f"b{n}", 1, f"{n:064x}", Settings(), Facts(), call=f"c{n}") for n in range(backends)),
    )


# --- every offset, in memory ---


def cut(record: bytes, at: int) -> bytes:
    return record[:at]


def flipped(record: bytes, at: int) -> bytes:
    return record[:at] + bytes([record[at] ^ 1 << at // BLOCK % 8]) + record[at + 1 :]


@pytest.mark.promise("goals record truncated or bit-flipped anywhere: the last complete generation, never empty")
def test_a_record_damaged_at_any_offset(tmp_path: Path, promise: Promise) -> None:
    size = len(pack(goals(20)))
    step = promise.size(full=8 * size // BLOCK, small=size // BLOCK)
    tried = 0
    for damage in (cut, flipped):
        for at in range(0, size, max(1, size // step)):
            for names in ((NEWEST,), (BEFORE,), (NEWEST, BEFORE)):
                for has_memory in (False, True):
                    tried += 1
                    with damaged_store(tmp_path, damage, at, names, has_memory) as (store, was):
                        _check_load(store, names, has_memory, was, tmp_path)
    promise.none_of(tried, "damaged records led to empty or wrong goals")


class damaged_store:
    """A store with two generations, some damaged, and what was in the damaged ones."""

    def __init__(
        self, directory: Path, damage: Callable[[bytes, int], bytes], at: int, names: tuple[str, ...], has_memory: bool
    ) -> None:
        self._directory = directory
        self._damage, self._at, self._names = damage, at, names
        self._fd = os.memfd_create("goals") if has_memory else -1

    def __enter__(self) -> tuple[Store, dict[str, bytes]]:
        memory = Memory(self._fd) if self._fd >= 0 else None
        Store(FileShelf(str(self._directory)), memory)._save(goals(19), sync=False)
        Store(FileShelf(str(self._directory)), memory)._save(goals(20), sync=False)
        was = {}
        for name in self._names:
            path = self._directory / name
            record = path.read_bytes()
            path.unlink()
            path.write_bytes(self._damage(record, min(self._at, len(record) - 1)))
            was[name] = path.read_bytes()
        return Store(FileShelf(str(self._directory)), memory), was

    def __exit__(self, *error: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        for path in self._directory.iterdir():
            path.unlink()


def _check_load(store: Store, names: tuple[str, ...], has_memory: bool, was: dict[str, bytes], folder: Path) -> None:
    if len(names) == 2 and not has_memory:
        with pytest.raises(StoreError, match=r"is lost \(damaged: goals\.json\.1\.corrupt-\d+, goals\.json\.corrupt-"):
            store.load()
        assert not store.is_new()
    else:
        assert store.load() == goals(20 if has_memory or NEWEST not in names else 19)
    if NEWEST in names:
        (aside,) = folder.glob("goals.json.corrupt-*")
        assert aside.read_bytes() == was[NEWEST]
    if has_memory:
        assert unpack((folder / NEWEST).read_bytes()) == goals(20)


class Unreadable(FileShelf):
    """A disk on which a file cannot be read."""

    names_lost: tuple[str, ...] = ()

    def read(self, name: str) -> bytes | None:
        if name in self.names_lost:
            raise ValueError(os.strerror(errno.EIO))
        return super().read(name)


@pytest.mark.parametrize("has_memory", [True, False])
def test_a_disk_that_cannot_be_read(has_memory: bool, tmp_path: Path) -> None:
    fd = os.memfd_create("goals")
    memory = Memory(fd) if has_memory else None
    shelf = Unreadable(str(tmp_path))
    store = Store(shelf, memory)
    store.save(goals(1))
    store.save(goals(2))
    shelf.names_lost = (NEWEST,)
    assert store.load() == goals(2 if has_memory else 1)
    shelf.names_lost = (NEWEST, BEFORE)
    if has_memory:
        assert store.load() == goals(2)
    else:
        with pytest.raises(StoreError, match="is lost"):
            store.load()
    os.close(fd)


def test_eio_is_a_record_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.open

    def broken(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).endswith(NEWEST):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *args, **kwargs)

    store = Store(FileShelf(str(tmp_path)))
    store.save(goals(1))
    store.save(goals(2))
    monkeypatch.setattr(builtins, "open", broken)
    assert store.load() == goals(1)


def test_a_memory_that_is_damaged_or_gone_is_none(tmp_path: Path) -> None:
    fd = os.memfd_create("goals")
    store = Store(FileShelf(str(tmp_path)), Memory(fd))
    store.save(goals(1))
    store.save(goals(2))
    os.truncate(fd, 100)
    (tmp_path / NEWEST).write_bytes(b"")
    assert store.load() == goals(1)
    os.close(fd)
    store.save(goals(3))
    assert store.load() == goals(3)


@pytest.mark.parametrize("names", [(BEFORE,), (NEWEST, BEFORE)])
def test_what_is_in_the_way_of_the_next_save_is_set_aside(names: tuple[str, ...], tmp_path: Path) -> None:
    fd = os.memfd_create("goals")
    store = Store(FileShelf(str(tmp_path)), Memory(fd))
    store.save(goals(1))
    store.save(goals(2))
    for name in names:
        _folder(tmp_path / name)
    assert store.load() == goals(2)
    store.save(goals(3))
    assert store.load() == goals(3)
    assert len(list(tmp_path.glob("*.corrupt-*"))) == len(names)
    os.close(fd)


def test_files_that_are_gone_make_no_new_instance(tmp_path: Path) -> None:
    fd = os.memfd_create("goals")
    store = Store(FileShelf(str(tmp_path)), Memory(fd))
    assert store.is_new()
    store.save(goals(2))
    for name in os.listdir(tmp_path):
        os.unlink(tmp_path / name)
    assert not store.is_new()
    assert store.load() == goals(2)
    os.close(fd)


# --- a crash between any two system calls ---


class Disk:
    """What a machine that loses its power may find: files whose data was not synced are empty, cut or whole.

    Names change in the order in which they were changed, as on every journaling file system.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        #: Each a system call: what it did, and to what.
        self.calls: list[tuple[str, ...]] = []
        self.data: dict[str, bytes] = {}

    def record(self, patch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
        """Note all that `act` does to files."""
        paths: dict[int, str] = {}
        real = {name: getattr(os, name) for name in ("open", "fsync", "replace", "link", "unlink")}

        def opened(path: str, flags: int, *args: Any) -> int:
            fd: int = real["open"](path, flags, *args)
            paths[fd] = path
            if flags & os.O_CREAT:
                self.calls.append(("create", path))
            return fd

        def synced(fd: int) -> None:
            real["fsync"](fd)
            path = paths[fd]
            self.calls.append(("sync names" if os.path.isdir(path) else "sync", path))
            if not os.path.isdir(path):
                self.data[path] = Path(path).read_bytes()

        def named(name: str) -> Callable[..., None]:
            def change(*args: str) -> None:
                real[name](*args)
                self.calls.append((name, *args))

            return change

        patch.setattr(os, "open", opened)
        patch.setattr(os, "fsync", synced)
        for name in ("replace", "link", "unlink"):
            patch.setattr(os, name, named(name))
        act()
        patch.undo()

    def after(self, before: dict[str, bytes], ended: int) -> Iterator[dict[str, bytes]]:
        """The possible contents of the folder when the power goes after so many calls."""
        done = self.calls[:ended]
        names = [index for index, call in enumerate(done) if call[0] not in ("sync", "sync names")]
        safe = max((index for index, call in enumerate(done) if call[0] == "sync names"), default=-1)
        for kept in range(sum(index < safe for index in names), len(names) + 1):
            for share in (0.0, 0.5, 1.0):
                yield self._contents(before, [done[index] for index in names[:kept]], done, share)

    def _contents(
        self, before: dict[str, bytes], changes: list[tuple[str, ...]], done: list[tuple[str, ...]], share: float
    ) -> dict[str, bytes]:
        found = dict(before)
        for what, *paths in changes:
            match what, paths:
                case "create", [path]:
                    data = self.data[path]
                    found[path] = data if ("sync", path) in done else data[: int(len(data) * share)]
                case "replace", [old, new]:
                    if found.get(new) is not found[old]:  # not two names of one file
                        found[new] = found.pop(old)
                case "link", [old, new]:
                    found[new] = found[old]
                case "unlink", [path]:
                    found.pop(path, None)
        return found


@pytest.mark.promise("power lost between any two system calls of a change: the goals before it, or the new ones")
def test_power_lost_between_any_two_system_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, promise: Promise
) -> None:
    tried = 0
    for generations in range(1, 1 + promise.size(full=4, small=2)):
        folder = tmp_path / str(generations)
        folder.mkdir()
        store = Store(FileShelf(str(folder)))
        for number in range(1, generations + 1):
            store.save(goals(number))
        before = {str(path): path.read_bytes() for path in folder.iterdir()}
        disk = Disk(folder)
        disk.record(monkeypatch, lambda: store.save(goals(9)))  # noqa: B023
        for ended in range(len(disk.calls) + 1):
            for contents in disk.after(before, ended):
                tried += 1
                shutil.rmtree(folder)
                folder.mkdir()
                for path, data in contents.items():
                    Path(path).write_bytes(data)
                found = Store(FileShelf(str(folder))).load()
                assert found == goals(9) or (found == goals(generations) and ended < len(disk.calls)), (
                    disk.calls[:ended],
                    sorted(contents),
                )
                if generations > 1:
                    assert unpack((folder / BEFORE).read_bytes()) in (goals(generations - 1), goals(generations))
    promise.none_of(tried, "states of the disk lost both generations")


#: The steps at which a change can still be refused; after them it is stored.
GOALS_POINTS = ["goals.before_write", "goals.synced", "goals.linked", "goals.kept", "goals.renamed"]


def test_every_step_of_a_change_of_the_goals_is_before_or_after_it_is_stored() -> None:
    steps = {point for point in failpoints.POINTS if point.startswith("goals.")}
    assert steps == {*GOALS_POINTS, "goals.stored", "goals.taken"}


@pytest.mark.parametrize("point", [*GOALS_POINTS, "file.written"])
def test_a_change_that_is_refused_is_not_there_later_either(point: str, tmp_path: Path) -> None:
    store = Store(FileShelf(str(tmp_path)))
    try:
        store.save(goals(1))
        store.save(goals(2))
        for number in (3, 4):
            failpoints.arm(f"{point}=raise")
            with pytest.raises(StoreError, match="cannot store the goals"):
                store.save(goals(9))
            assert store.load() == goals(number - 1)
            failpoints.arm("")
            store.save(goals(number))
            assert store.load() == goals(number)
    finally:
        failpoints.arm("")
    assert sorted(os.listdir(tmp_path)) == [NEWEST, BEFORE]


# --- a running instance ---


@pytest.fixture
def armed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is written there happens at the failpoint that it names, once."""
    monkeypatch.setenv(failpoints.VARIABLE, f"@{tmp_path / 'armed'}")
    return tmp_path / "armed"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """What the instance of the test says on stderr."""
    return tmp_path / "stderr"


@pytest.fixture
def client(armed: Path, log: Path) -> Iterator[headgate.Client]:
    """An instance of the test's own."""
    with contextlib.ExitStack() as stack:
        before = os.dup(2)
        with log.open("ab") as file:
            os.dup2(file.fileno(), 2)
        try:
            client = stack.enter_context(one_instance(http_options={"port": 0}))
        finally:
            os.dup2(before, 2)
            os.close(before)
        yield client


def _replaced(path: Path, data: bytes) -> None:
    """Never through the name's file: the older generation may be the same one."""
    path.unlink()
    path.write_bytes(data)


def _newer(record: bytes) -> bytes:
    return json.dumps({"version": 99, **json.loads(record)}).encode()


def _unreadable(path: Path) -> None:
    path.chmod(0)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": lambda path: _replaced(path, path.read_bytes()[:BLOCK]),
    "bit-flipped": lambda path: _replaced(path, flipped(path.read_bytes(), BLOCK)),
    "empty": lambda path: _replaced(path, b""),
    "of a newer version": lambda path: _replaced(path, _newer(path.read_bytes())),
    "a directory": _folder,
    "mode 000": _unreadable,
    "removed": lambda path: path.unlink(),
}


@pytest.mark.promise("goals record damaged while it serves: nothing changes, a loud error, the damaged one kept aside")
def test_a_damaged_record_changes_nothing_that_serves(
    client: headgate.Client, tmp_path: Path, log: Path, promise: Promise
) -> None:
    serve(client, worker(tmp_path / "log"), num_replicas=2, max_concurrent_queries=100)
    client.create_endpoint("last", backend="it", route="/last")  # the newest generation alone knows of it
    key, before = key_of(client), sorted(replica_pids(client))
    both = [(NEWEST,), (NEWEST, BEFORE)]
    cases = [(damage, names) for damage in DAMAGES for names in both]
    chosen = promise.random.sample(cases, promise.size(len(cases), 4))

    async def damage_all(running: Load) -> None:
        for damage, names in chosen:
            for name in names:
                DAMAGES[damage](Path(key, name))
            if promise.full:  # so many ends in a row would be a crash loop, with pauses
                await in_thread(grown_controller, key)
            os.kill(pid_of(key, "headgate-ctl"), signal.SIGKILL)
            assert set(await in_thread(client.list_endpoints)) == {"it", "last"}, (damage, names)
            assert sorted(await in_thread(replica_pids, client)) == before
            await in_thread(client.set_traffic, "last", {"it": 1.0})  # and it can be changed
            assert len(unpack(Path(key, NEWEST).read_bytes()).endpoints) == 2

    running = under_load(client, damage_all)
    assert described(running.failed) == []
    promise.none_of(running.sent, "requests failed")
    assert sorted(replica_pids(client)) == before
    said = log.read_text()
    lost = [case for case in chosen if not (case[0] == "mode 000" and os.geteuid() == 0)]
    assert said.count("was lost; nothing else: all of it is known still") == len(lost)
    if any(case[0] not in ("removed", "mode 000") for case in chosen):
        assert list(Path(key).glob("goals.json.corrupt-*"))
        assert "is damaged" in said
    promise.says(f"{len(lost)} times a loud error")


def memory_of(key: str) -> Path:
    """The supervisor's copy of the goals."""
    for pid in instance_pids(key):
        for fd in Path("/proc", str(pid), "fd").iterdir():
            try:
                if "headgate-goals" in os.readlink(fd):
                    return fd
            except OSError:
                continue
    raise LookupError(key)


@pytest.mark.promise("every copy of the goals lost: what runs serves on, each change is refused with what to do")
def test_when_every_copy_is_lost_what_runs_serves_on(tmp_path: Path, promise: Promise) -> None:
    with one_instance(http_options={"port": 0}) as client:
        serve(client, worker(tmp_path / "log"), num_replicas=2, max_concurrent_queries=100)
        key, before = key_of(client), sorted(one.pid for one in client.status().replicas)
        refused = 0

        async def lose(running: Load) -> None:
            nonlocal refused
            for name in (NEWEST, BEFORE):
                Path(key, name).write_bytes(b"\0" * 1000)
            memory_of(key).write_bytes(b"")
            for _ in range(promise.size(10, 2)):  # and however often the controller is made anew
                if promise.full:
                    await in_thread(grown_controller, key)
                os.kill(pid_of(key, "headgate-ctl"), signal.SIGKILL)
                for change in (lambda: client.delete_endpoint("it"), lambda: client.create_backend("new", print)):
                    with pytest.raises(InstanceError, match=r"goals record .* is lost .*what runs goes on serving"):
                        await in_thread(change)
                    refused += 1
                await asyncio.sleep(0.3)
                status = await in_thread(client.status)
                assert sorted(one.pid for one in status.replicas) == before
                assert "is lost" in status.waiting[0]

        running = under_load(client, lose)
        assert described(running.failed) == []
        promise.none_of(running.sent, "requests failed")
        promise.says(f"{refused} changes refused")


@pytest.mark.promise("goals cannot be written (EIO): a typed error, nothing changed, the same call works later")
def test_a_write_that_fails_is_a_typed_error_and_changes_nothing(
    client: headgate.Client, armed: Path, tmp_path: Path, promise: Promise
) -> None:
    serve(client, worker(tmp_path / "log"), num_replicas=2, max_concurrent_queries=100)
    points = ["file.written", *GOALS_POINTS]
    chosen = promise.random.sample(points, promise.size(len(points), 2))
    create = functools.partial(client.create_endpoint, "new", backend="it", route="/new")

    async def fail_all(running: Load) -> None:
        for point in chosen:
            record = Path(key_of(client), NEWEST).read_bytes()
            armed.write_text(f"{point}=raise")
            with pytest.raises(InstanceError, match=r"cannot store the goals .* then repeat the call"):
                await in_thread(create)
            assert Path(key_of(client), NEWEST).read_bytes() == record
            assert "new" not in await in_thread(client.list_endpoints)
            await in_thread(create)
            await in_thread(client.delete_endpoint, "new")

    running = under_load(client, fail_all)
    assert described(running.failed) == []
    promise.none_of(running.sent, "requests failed")
