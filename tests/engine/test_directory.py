"""Run directories: who holds the lock lives, and everything else is a leftover."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from headgate.engine import directory
from headgate.errors import InstanceError


@pytest.fixture
def root(run_dir: Path, tmp_path: Path) -> str:
    path = tmp_path / "base"
    path.mkdir(0o700)
    return str(path)


def test_the_base_is_private_and_below_xdg_runtime_dir(run_dir: Path) -> None:
    assert directory.base() == f"{run_dir}/headgate"
    assert os.stat(directory.base()).st_mode & 0o777 == 0o700


def test_without_xdg_runtime_dir_the_base_is_in_the_temporary_directory(
    monkeypatch: pytest.MonkeyPatch, short_dir: Path
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setenv("TMPDIR", str(short_dir))
    assert directory.base() == f"{short_dir}/headgate-{os.geteuid()}"


def test_a_place_too_long_for_unix_sockets_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, short_dir: Path
) -> None:
    (short_dir / ("x" * 60)).mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_dir / ("x" * 60)))
    monkeypatch.setenv("TMPDIR", str(short_dir))
    assert directory.base() == f"{short_dir}/headgate-{os.geteuid()}"


def test_a_base_that_others_may_enter_is_refused(monkeypatch: pytest.MonkeyPatch, short_dir: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_dir))
    base = short_dir / "headgate"
    base.mkdir()
    base.chmod(0o755)
    with pytest.raises(InstanceError, match=f"{base} is not a private directory"):
        directory.base()
    base.rmdir()
    base.symlink_to("/tmp")
    with pytest.raises(InstanceError, match="not a private directory"):
        directory.base()
    base.unlink()
    base.touch()
    with pytest.raises(InstanceError, match="cannot make the run directory"):
        directory.base()


@pytest.mark.parametrize("namespace", ["default", "a.b-C_9", "", "ü", "../x", "x" * 200, "a/b", "\udcff"])
def test_a_namespace_becomes_a_short_name_of_its_own(namespace: str) -> None:
    name = directory.name_of(namespace)
    assert "/" not in name
    assert len(name) <= 34
    assert directory._OURS.fullmatch(name)
    assert directory.name_of(namespace + "2") != name


def test_a_second_instance_in_the_same_directory_is_refused(root: str) -> None:
    path, lock = directory.create(root, "d-default")
    assert os.stat(path).st_mode & 0o777 == 0o700
    with pytest.raises(InstanceError, match="already runs"):
        directory.create(root, "d-default")
    os.close(lock)
    _, lock = directory.create(root, "d-default")
    os.close(lock)


def test_what_a_dead_instance_left_is_gone_when_the_next_takes_over(root: str) -> None:
    path, lock = directory.create(root, "d-default")
    directory.write_token(path)
    os.makedirs(f"{path}/blobs/deep")
    Path(f"{path}/blobs/deep/x").touch()
    os.symlink("/", f"{path}/link")
    os.close(lock)

    path, lock = directory.create(root, "d-default")
    assert os.listdir(path) == [directory.LOCK]
    os.close(lock)


def test_the_lock_lives_as_long_as_a_process_that_inherited_it(root: str) -> None:
    path, lock = directory.create(root, "d-default")
    holder = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    os.close(lock)
    assert directory.is_alive(path)
    assert directory.find(root, "default") == path
    assert directory.sweep(root) == []

    holder.communicate()
    assert not directory.is_alive(path)
    assert directory.find(root, "default") is None
    assert directory.sweep(root) == [path]
    assert os.listdir(root) == []


def test_a_namespace_that_was_never_started_is_not_found(root: str) -> None:
    assert directory.find(root, "default") is None


def test_the_sweep_touches_nothing_of_others(root: str) -> None:
    Path(root, "notes.txt").touch()
    Path(root, "0123abcd").touch()  # a file where a directory of ours could be
    os.mkdir(f"{root}/somebody")
    living, lock = directory.create(root, "1f3a90c2")
    os.mkdir(f"{root}/89abcdef")  # of ours, and whoever made it died before the lock

    assert directory.sweep(root) == [f"{root}/89abcdef"]
    assert sorted(os.listdir(root)) == ["0123abcd", "1f3a90c2", "notes.txt", "somebody"]
    directory.remove(living)
    os.close(lock)
    assert not os.path.exists(living)


def test_a_run_directory_that_others_may_enter_is_refused(root: str) -> None:
    path, lock = directory.create(root, "d-default")
    os.close(lock)
    os.chmod(path, 0o711)
    with pytest.raises(InstanceError, match="not a private directory of this user"):
        directory.create(root, "d-default")
    os.chmod(path, 0o700)
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
        with pytest.raises(InstanceError, match="owner 65534"):
            directory.create(root, "d-default")
        os.chown(path, 0, 0)
    os.rename(path, f"{root}/elsewhere")
    os.symlink("elsewhere", path)
    with pytest.raises(InstanceError, match="not a private directory of this user"):
        directory.create(root, "d-default")
    os.unlink(path)
    os.rename(f"{root}/elsewhere", path)
    _, lock = directory.create(root, "d-default")
    os.close(lock)


def test_removing_twice_is_fine(root: str) -> None:
    path, lock = directory.create(root, "1f3a90c2")
    directory.remove(path)
    directory.remove(path)
    os.close(lock)


def test_starts_and_sweeps_at_the_same_time_never_take_a_living_directory(root: str) -> None:
    faults: list[str] = []

    def start_often(name: str) -> None:
        for _ in range(30):
            path, lock = directory.create(root, name)
            directory.write_token(path)
            if len(directory.read_token(path)) != 32:
                faults.append(path)
            directory.remove(path)
            os.close(lock)

    def sweep_often() -> None:
        while not over.is_set():
            directory.sweep(root)

    over = threading.Event()
    sweeper = threading.Thread(target=sweep_often)
    starters = [threading.Thread(target=start_often, args=(f"0000000{n}",)) for n in range(3)]
    for thread in (sweeper, *starters):
        thread.start()
    for thread in starters:
        thread.join()
    over.set()
    sweeper.join()
    assert faults == []
    assert directory.sweep(root) == []


def test_the_token_is_secret_and_read_back(root: str) -> None:
    path, lock = directory.create(root, "1f3a90c2")
    token = directory.write_token(path)
    assert len(token) == 32
    assert os.stat(f"{path}/{directory.TOKEN}").st_mode & 0o777 == 0o600
    assert directory.read_token(path) == token
    directory.remove(path)
    os.close(lock)
    with pytest.raises(InstanceError, match="is gone"):
        directory.read_token(path)
