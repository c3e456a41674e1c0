"""Files as a shelf; that nothing is lost on it is test_store.py's."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from headgate.controller.shelf import FileShelf


@pytest.fixture
def shelf(tmp_path: Path) -> FileShelf:
    return FileShelf(str(tmp_path))


def test_what_is_written_is_read_under_its_name(shelf: FileShelf, tmp_path: Path) -> None:
    shelf.write("a", b"one")
    shelf.write("folder/b", b"two", sync=False)
    shelf.write("a", b"three")

    assert (shelf.read("a"), shelf.read("folder/b"), shelf.read("c")) == (b"three", b"two", None)
    assert (shelf.has("a"), shelf.has("folder/b"), shelf.has("c")) == (True, True, False)
    assert Path(shelf.path("folder/b")) == tmp_path / "folder" / "b"


def test_only_this_user_may_read_what_is_there(shelf: FileShelf, tmp_path: Path) -> None:
    shelf.write("folder/b", b"two")

    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "folder" / "b").stat().st_mode) == 0o600


def test_names_go_one_folder_deep(shelf: FileShelf) -> None:
    shelf.write("a", b"")
    shelf.write("folder/b", b"")

    assert sorted(shelf.names()) == ["a", "folder", "folder/b"]


def test_what_was_removed_is_gone_and_may_be_removed_again(shelf: FileShelf) -> None:
    shelf.write("a", b"one")
    shelf.remove("a")
    shelf.remove("a")

    assert shelf.names() == []


def test_what_was_renamed_has_its_new_name_only(shelf: FileShelf) -> None:
    shelf.write("a", b"one")
    shelf.rename("a", "b")

    assert shelf.names() == ["b"]
    assert shelf.read("b") == b"one"


def test_a_renewed_value_leaves_the_one_before(shelf: FileShelf) -> None:
    for value in (b"one", b"two", b"three"):
        shelf.renew("a", "a.1", value)

    assert (shelf.read("a"), shelf.read("a.1")) == (b"three", b"two")
    assert sorted(shelf.names()) == ["a", "a.1"]


def test_what_cannot_be_read_is_lost(shelf: FileShelf, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()

    with pytest.raises(ValueError, match="Is a directory"):
        shelf.read("a")


def test_a_write_that_fails_changes_nothing(shelf: FileShelf, tmp_path: Path) -> None:
    def full(fd: int, data: bytes) -> int:
        os.write(fd, data[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shelf.renew("a", "a.1", b"one")
    shelf.renew("a", "a.1", b"two")
    broken = FileShelf(str(tmp_path), write=full)
    for write in (broken.write, lambda name, data: broken.renew(name, "a.1", data)):
        with pytest.raises(OSError, match="No space left"):
            write("a", b"three")

    assert sorted(shelf.names()) == ["a", "a.1"]
    assert (shelf.read("a"), shelf.read("a.1")) == (b"two", b"one")
