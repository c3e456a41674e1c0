"""The store keeps what it said it keeps, whatever happens to the files."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from headgate.controller.shelf import FileShelf, Memory, Shelf
from headgate.controller.store import BEFORE, BLOBS, NEWEST, Store, StoreError, pack, unpack
from headgate.core.state import BackendGoal, Endpoint, EndpointGoal, Facts, Goals, Settings, Traffic


def goals(backends: int = 1, text: str = "iris") -> Goals:
    """Goals with every kind of value in them."""
    return Goals(
        endpoints=(EndpointGoal(Endpoint("e", "/é/{x:int}", ("GET",), Traffic((("iris0", 0.5), ("b", 0.5)))), "c-1"),),
        backends=tuple(
            BackendGoal(
                f"{text}{number}",
                number + 1,
                "ab" * 32,
                Settings(request_timeout_s=1.5),
                Facts(is_async=True),
                given={"num_replicas": 2, "request_timeout_s": 2.0, "idempotent": True, "max_batch_size": None},
                user_config="cd" * 32,
                config_version=3,
                env=(("NAME", 'va"lue'),),
                resources={"num_gpus": 0.5, "resources": {"tpu": 1}},
                call="call-7",
            )
            for number in range(backends)
        ),
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with two generations: first(), then second()."""
    store = Store(FileShelf(str(tmp_path)))
    store.save(first())
    store.save(second())
    return store


def first() -> Goals:
    return goals(1)


def second() -> Goals:
    return goals(2)


# --- goals ---


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    Store(FileShelf(str(tmp_path))).save(goals(3))

    assert Store(FileShelf(str(tmp_path))).load() == goals(3)


def test_a_new_instance_begins_with_empty_goals(tmp_path: Path) -> None:
    Store(FileShelf(str(tmp_path))).begin()

    assert Store(FileShelf(str(tmp_path))).load() == Goals()


def test_numbers_keep_their_types() -> None:
    given = unpack(pack(goals())).backends[0].given
    assert [type(value) for value in given.values()] == [int, float, bool, type(None)]


def test_two_generations_are_kept(store: Store, tmp_path: Path) -> None:
    store.save(goals(3))

    assert unpack((tmp_path / NEWEST).read_bytes()) == goals(3)
    assert unpack((tmp_path / BEFORE).read_bytes()) == second()
    assert sorted(os.listdir(tmp_path)) == [NEWEST, BEFORE]


def test_only_this_user_may_read_what_is_stored(store: Store, tmp_path: Path) -> None:
    name = store.put(b"code")
    for path in (tmp_path / NEWEST, tmp_path / BEFORE, Path(store.path(name))):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_small_record_is_refused_wherever_it_is_cut() -> None:
    record = pack(Goals())
    for length in range(len(record)):
        with pytest.raises(ValueError):
            unpack(record[:length])


def test_a_small_record_is_refused_whichever_bit_is_flipped() -> None:
    record = pack(goals())
    for at in range(len(record) * 8):
        damaged = bytearray(record)
        damaged[at // 8] ^= 1 << at % 8
        with pytest.raises(ValueError):
            unpack(bytes(damaged))


def test_a_record_with_something_behind_it_is_refused() -> None:
    with pytest.raises(ValueError):
        unpack(pack(goals()) + b"\n")


def test_a_large_record_cut_anywhere_gives_the_generation_before(tmp_path: Path) -> None:
    record = pack(goals(100))
    for length in range(0, len(record), 512):
        _fall_back(tmp_path / str(length), record[:length])


def test_a_large_record_with_a_flipped_bit_gives_the_generation_before(tmp_path: Path) -> None:
    record = pack(goals(100))
    for at in range(0, len(record), 512):
        damaged = bytearray(record)
        damaged[at] ^= 0x10
        _fall_back(tmp_path / str(at), bytes(damaged))


def _fall_back(directory: Path, damaged: bytes) -> None:
    directory.mkdir()
    (directory / NEWEST).write_bytes(damaged)
    (directory / BEFORE).write_bytes(pack(first()))

    assert Store(FileShelf(str(directory))).load() == first()
    (aside,) = directory.glob("goals.json.corrupt-*")
    assert aside.read_bytes() == damaged


def test_an_unreadable_record_gives_the_generation_before(store: Store, tmp_path: Path) -> None:
    (tmp_path / NEWEST).unlink()
    (tmp_path / NEWEST).mkdir()

    assert store.load() == first()


def test_saving_goes_on_after_a_fall_back(store: Store, tmp_path: Path) -> None:
    (tmp_path / NEWEST).write_bytes(b"{}")
    store.load()
    store.save(goals(3))

    assert Store(FileShelf(str(tmp_path))).load() == goals(3)
    assert unpack((tmp_path / BEFORE).read_bytes()) == first()


def test_two_damaged_records_are_an_error_and_stay_one(store: Store, tmp_path: Path) -> None:
    for name in (NEWEST, BEFORE):
        (tmp_path / name).write_bytes(b"\0" * 100)
    for _ in range(3):  # the controller is restarted again and again
        with pytest.raises(StoreError, match=r"lost \(damaged: goals.json.1.corrupt-\d+, .*shutdown"):
            store.load()


def test_missing_records_are_an_error(store: Store, tmp_path: Path) -> None:
    for name in (NEWEST, BEFORE):
        (tmp_path / name).unlink()
    with pytest.raises(StoreError, match="lost; what runs goes on"):
        store.load()


def test_a_process_that_ends_between_any_two_steps_of_a_save_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(10):
        directory = tmp_path / str(step)
        directory.mkdir()
        store = Store(FileShelf(str(directory)))
        store.save(first())
        store.save(second())
        with monkeypatch.context() as patch:
            _end_after(step, patch)
            try:
                store.save(goals(3))
            except KeyboardInterrupt:
                assert Store(FileShelf(str(directory))).load() in (second(), goals(3))
            else:
                assert Store(FileShelf(str(directory))).load() == goals(3)


def _end_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """The process ends instead of the next call of the system after so many."""
    left = [steps]

    def ending(call):  # type: ignore[no-untyped-def]
        def perform(*args, **kwargs):  # type: ignore[no-untyped-def]
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return call(*args, **kwargs)

        return perform

    for name in ("open", "fsync", "link", "replace"):
        patch.setattr(os, name, ending(getattr(os, name)))


# --- full disks ---


def full_after(size: int):  # type: ignore[no-untyped-def]
    """os.write for a disk with room for `size` more bytes."""
    left = [size]

    def write(fd: int, data: bytes) -> int:
        room = min(left[0], len(data))
        if room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= room
        return os.write(fd, data[:room])

    return write


@pytest.mark.parametrize("size", [0, 1, 100, 1000])
def test_a_full_disk_is_a_typed_error_and_changes_nothing(store: Store, tmp_path: Path, size: int) -> None:
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    full = Store(FileShelf(str(tmp_path), write=full_after(size)))

    with pytest.raises(StoreError, match="No space left on device; nothing was changed"):
        full.save(goals(100))
    with pytest.raises(StoreError, match="cannot store code or user_config"):
        full.put(b"x" * 2000)

    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert files == before
    assert not os.listdir(tmp_path / BLOBS)
    assert full.load() == second()


def test_it_recovers_by_itself(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        Store(FileShelf(str(tmp_path), write=full_after(10))).save(goals(3))
    store.save(goals(3))

    assert store.load() == goals(3)


def test_short_writes_are_completed(tmp_path: Path) -> None:
    store = Store(FileShelf(str(tmp_path), write=lambda fd, data: os.write(fd, data[:7])))
    store.save(goals(2))

    assert store.load() == goals(2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full_changes_nothing_and_recovers(small_disk: Path) -> None:
    store = Store(FileShelf(str(small_disk)))
    store.save(first())
    filler = _fill(small_disk)

    with pytest.raises(StoreError, match="No space left"):
        store.save(goals(20))
    with pytest.raises(StoreError, match="No space left"):
        store.put(b"code")
    assert store.load() == first()

    filler.unlink()
    store.save(goals(20))
    assert store.load() == goals(20)


def _fill(disk: Path) -> Path:
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    return filler


# --- blobs ---


def test_a_blob_is_found_by_its_name(store: Store) -> None:
    name = store.put(b"code")

    assert Path(store.path(name)).read_bytes() == store.get(name) == b"code"
    assert store.put(b"code") == name


def test_blobs_that_nobody_uses_are_removed(store: Store, tmp_path: Path) -> None:
    used, unused = store.put(b"used"), store.put(b"unused")
    (tmp_path / BLOBS / "half.new").write_bytes(b"ha")
    store.collect([used])

    assert os.listdir(tmp_path / BLOBS) == [used]
    assert not os.path.exists(store.path(unused))


def test_collecting_without_any_blob_is_fine(tmp_path: Path) -> None:
    Store(FileShelf(str(tmp_path))).collect([])


def test_a_blob_that_is_not_there_or_cannot_be_read_is_an_error(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"is lost: there is no blobs/abc in {tmp_path}"):
        store.get("abc")
    (tmp_path / BLOBS / "abc").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"cannot read code or user_config .*: .*Is a directory"):
        store.get("abc")


# --- other shelves ---


def test_what_is_saved_is_in_memory_too_to_the_last_byte(tmp_path: Path) -> None:
    fd = os.memfd_create("goals")
    try:
        store = Store(FileShelf(str(tmp_path)), Memory(fd))
        for one in (second(), first()):
            store.save(one)
            assert Memory(fd).read() == (tmp_path / NEWEST).read_bytes() == pack(one)
    finally:
        os.close(fd)


class MemoryShelf(Shelf):
    """A shelf without files, that may be out of reach after so many calls."""

    where, scheme = "memory", "mem"

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.calls_left = -1

    def names(self) -> list[str]:
        self._call()
        return list(self.kept)

    def read(self, name: str) -> bytes | None:
        self._call()
        return self.kept.get(name)

    def write(self, name: str, data: bytes, sync: bool = True) -> None:
        self._call()
        self.kept[name] = data

    def remove(self, name: str) -> None:
        self._call()
        self.kept.pop(name, None)

    def _call(self) -> None:
        if self.calls_left == 0:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        self.calls_left -= 1


@pytest.fixture
def shelf() -> MemoryShelf:
    """A shelf with two generations: first(), then second()."""
    shelf = MemoryShelf()
    Store(shelf).save(first())
    Store(shelf).save(second())
    return shelf


def test_any_shelf_keeps_two_generations(shelf: MemoryShelf) -> None:
    assert Store(shelf).load() == second()
    assert {name: unpack(data) for name, data in shelf.kept.items()} == {NEWEST: second(), BEFORE: first()}


def test_any_shelf_is_new_until_something_was_stored(shelf: MemoryShelf) -> None:
    new = Store(MemoryShelf())
    assert new.is_new()
    assert not Store(shelf).is_new()
    new.begin()

    assert not new.is_new()
    assert new.load() == Goals()


def test_on_any_shelf_a_damaged_record_is_set_aside(shelf: MemoryShelf) -> None:
    damaged = shelf.kept[NEWEST] = pack(second())[:-1]

    assert Store(shelf).load() == first()
    [aside] = set(shelf.kept) - {BEFORE}
    assert re.fullmatch(r"goals\.json\.corrupt-\d+", aside)
    assert shelf.kept[aside] == damaged


def test_on_any_shelf_two_damaged_records_are_an_error_and_it_is_not_new(shelf: MemoryShelf) -> None:
    shelf.kept[NEWEST] = shelf.kept[BEFORE] = b"{}"
    for _ in range(2):
        with pytest.raises(StoreError, match=r"in memory is lost \(damaged: goals.json.1.corrupt-\d+, "):
            Store(shelf).load()

    assert not Store(shelf).is_new()


def test_any_shelf_keeps_blobs(shelf: MemoryShelf) -> None:
    store = Store(shelf)
    used, unused = store.put(b"used"), store.put(b"unused")
    assert store.put(b"used") == used
    store.collect([used])

    assert store.get(used) == b"used"
    assert store.path(used) == f"mem:{BLOBS}/{used}"
    assert sorted(shelf.kept) == [f"{BLOBS}/{used}", NEWEST, BEFORE]
    with pytest.raises(StoreError, match=f"is lost: there is no {BLOBS}/{unused} in memory"):
        store.get(unused)


def test_a_shelf_out_of_reach_is_a_typed_error(shelf: MemoryShelf) -> None:
    store = Store(shelf)
    name = store.put(b"code")
    shelf.calls_left = 0
    why = "in memory: Connection timed out; nothing was changed"

    for call in (lambda: store.save(goals(3)), lambda: store.put(b"new")):
        with pytest.raises(StoreError, match=f"cannot store .* {why} and everything serves on; mend that, then repeat"):
            call()
    for call in (store.load, store.is_new, lambda: store.get(name)):
        with pytest.raises(StoreError, match=f"cannot read .* {why}"):
            call()
    store.collect([])
    shelf.calls_left = -1
    assert store.load() == second()
    assert store.get(name) == b"code"


def test_whenever_a_shelf_gets_out_of_reach_the_goals_are_the_old_or_the_new_ones(shelf: MemoryShelf) -> None:
    for calls in range(10):
        shelf.calls_left = calls
        try:
            Store(shelf).save(goals(3 + calls))
        except StoreError:
            shelf.calls_left = -1
            assert Store(shelf).load() == second()
        else:
            break

    shelf.calls_left = -1
    assert Store(shelf).load() == goals(3 + calls)
    assert calls > 1


def test_nothing_is_set_aside_while_a_shelf_is_out_of_reach(shelf: MemoryShelf) -> None:
    shelf.kept[NEWEST] = b"{}"
    before = dict(shelf.kept)
    shelf.calls_left = 0
    with pytest.raises(StoreError, match="cannot read the goals in memory"):
        Store(shelf).load()
    assert shelf.kept == before

    shelf.calls_left = 1  # it reads the damaged record, and no more
    with pytest.raises(StoreError, match="cannot read the goals in memory"):
        Store(shelf).load()
    assert shelf.kept == before


def test_a_shelf_that_cannot_list_what_was_damaged_still_says_that_all_is_lost(shelf: MemoryShelf) -> None:
    shelf.kept.clear()
    shelf.calls_left = 2

    with pytest.raises(StoreError, match="the goals record in memory is lost; "):
        Store(shelf).load()
