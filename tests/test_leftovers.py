"""The guard against leftovers: what it finds, what it leaves alone, and that it fails tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import leftovers
import pytest
from leftovers import Watch
from running import eventually, is_alive

MARKER = f"own-tests-{os.getpid()}"
SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
LISTEN = """
import socket, time
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
time.sleep(60)
"""


@pytest.fixture
def watch(run_dir: Path) -> Iterator[Watch]:
    watch = Watch(MARKER, run_dir)
    yield watch
    watch.clean()
    assert watch.leftovers() == []


def environment(marker: str = MARKER) -> dict[str, str]:
    return {**os.environ, leftovers.VARIABLE: marker}


def spawn_orphan(code: str, env: dict[str, str]) -> int:
    """The pid of a process in a session of its own whose parent has ended."""
    start = f"import subprocess, sys; c = [sys.executable, '-S', '-c', {code!r}]; " + (
        "p = subprocess.Popen(c, start_new_session=True, stdout=subprocess.DEVNULL); print(p.pid)"
    )
    command = [sys.executable, "-c", start]
    return int(subprocess.run(command, env=env, stdout=subprocess.PIPE, timeout=20, check=True).stdout)


def test_nothing_is_left_by_a_test_that_does_nothing(watch: Watch) -> None:
    assert watch.leftovers() == []


def test_a_child_is_found_and_killed(watch: Watch) -> None:
    with subprocess.Popen(SLEEP) as child:
        (line,) = watch.leftovers(grace_s=0)
        assert line.startswith(f"process {child.pid} (python")
        watch.clean()
        assert watch.leftovers(grace_s=0) == []


def test_a_child_that_ends_at_once_is_not_a_leftover(watch: Watch) -> None:
    with subprocess.Popen(SLEEP) as child:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert watch.leftovers() == []


def test_a_child_that_nobody_waits_for_is_found(watch: Watch) -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert watch.leftovers(grace_s=0) == [f"process {pid} (true, state Z)"]
    watch.clean()
    assert watch.leftovers(grace_s=0) == []


def test_a_reparented_process_is_found_by_its_environment(watch: Watch) -> None:
    pid = spawn_orphan("import time; time.sleep(60)", environment())
    assert any(line.startswith(f"process {pid} ") for line in watch.leftovers(grace_s=0))
    watch.clean()
    assert not Path(f"/proc/{pid}/fd/0").exists()


def test_a_stopped_process_is_killed_too(watch: Watch) -> None:
    with subprocess.Popen(SLEEP) as child:
        child.send_signal(signal.SIGSTOP)
        watch.clean()
        child.wait(5)


def test_another_tests_process_is_left_alone(watch: Watch) -> None:
    pid = spawn_orphan("import time; time.sleep(60)", environment("of-somebody-else"))
    try:
        assert watch.leftovers(grace_s=0) == []
        watch.clean()
        assert Path(f"/proc/{pid}").exists()
    finally:
        os.kill(pid, signal.SIGKILL)


def test_children_of_what_was_there_before_are_left_alone(run_dir: Path) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as wider:
        watch = Watch(MARKER, run_dir)
        try:
            assert watch.leftovers(grace_s=0.3) == []
        finally:
            wider.communicate(b"\n")


def test_ports_are_found_with_their_owner(watch: Watch) -> None:
    command = [sys.executable, "-S", "-c", LISTEN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child, socket.socket() as mine:
        assert child.stdout
        port = int(child.stdout.readline())
        mine.bind(("127.0.0.1", 0))
        mine.listen()
        found = watch.leftovers(grace_s=0)
        assert any(line.startswith(f"port {port} of process {child.pid} ") for line in found)
        assert f"port {mine.getsockname()[1]} of the test process" in found
        watch.clean()


def test_sockets_and_run_directories_are_found_and_removed() -> None:
    with tempfile.TemporaryDirectory(prefix="hg-") as folder:
        _check_run_directories(Path(folder))


def _check_run_directories(run_dir: Path) -> None:
    watch = Watch(MARKER, run_dir)
    instance = run_dir / "headgate" / "i1"
    instance.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(instance / "s"))
    assert watch.leftovers(grace_s=0) == [
        f"run directory {run_dir}/headgate",
        f"run directory {instance}",
        f"unix socket {instance}/s",
    ]
    watch.clean()
    assert not instance.exists()


def test_the_empty_parent_of_run_directories_may_stay(tmp_path: Path) -> None:
    watch = Watch(MARKER, tmp_path)
    (tmp_path / "headgate").mkdir()
    assert watch.leftovers(grace_s=0) == []


@pytest.mark.skipif(not os.access(leftovers.SHM, os.W_OK), reason="no /dev/shm to write to")
def test_shared_memory_that_somebody_else_uses_is_left_alone(watch: Watch) -> None:
    path = leftovers.SHM / f"somebody-else-s-{os.getpid()}"
    stranger = spawn_orphan(
        f"import mmap, time; f = open({str(path)!r}, 'w+b'); f.truncate(9); m = mmap.mmap(f.fileno(), 9); "
        "time.sleep(60)",
        environment("somebody-else"),
    )
    try:
        eventually(lambda: leftovers.maps(stranger, path))
        assert watch.leftovers(grace_s=0) == []
        watch.clean()
        assert path.exists()
    finally:
        os.kill(stranger, signal.SIGKILL)
        eventually(lambda: not is_alive(stranger))
    assert watch.leftovers(grace_s=0) == [f"shared memory {path}"]


@pytest.mark.skipif(not os.access(leftovers.SHM, os.W_OK), reason="no /dev/shm to write to")
def test_shared_memory_is_found_and_removed(watch: Watch) -> None:
    path = leftovers.SHM / MARKER
    path.write_bytes(b"x")
    assert f"shared memory {path}" in watch.leftovers(grace_s=0)
    watch.clean()
    assert not path.exists()


def test_a_descriptor_that_stays_open_is_found(watch: Watch) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        assert watch.leftovers(grace_s=0) == [f"open file descriptor {fd} -> /dev/null"]
    finally:
        os.close(fd)


def test_of_what_others_did_only_this_process_s_descriptors_are_left_out(watch: Watch) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        assert watch.leftovers(grace_s=0, mine=False) == []
    finally:
        os.close(fd)


def test_a_socket_that_is_held_without_its_file_is_found(watch: Watch, run_dir: Path) -> None:
    path = run_dir / "gone.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        path.unlink()
        assert watch.leftovers(grace_s=0, mine=False) == [f"bound socket {path}"]


def test_what_goes_away_in_time_is_forgiven(watch: Watch) -> None:
    pid = spawn_orphan("import time; time.sleep(1.0)", environment())
    assert any(str(pid) in line for line in watch.leftovers(grace_s=0))
    began = time.monotonic()
    assert watch.leftovers(grace_s=5) == []
    assert time.monotonic() - began < 4


def test_the_fixture_fails_the_test_and_the_next_one_starts_clean(tmp_path: Path) -> None:
    folder = tmp_path / "e2e"
    folder.mkdir()
    (folder / "test_two.py").write_text(
        textwrap.dedent("""
        import os, subprocess, sys

        def test_one_leaves_a_process():
            env = {**os.environ, "LEFT": "1"}
            keep.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=env))

        def test_two_is_clean(free_port, run_dir):
            assert 0 < free_port < 65536
            assert os.environ["XDG_RUNTIME_DIR"] == str(run_dir)
            assert os.environ["HEADGATE_TEST_ID"].endswith(".2")

        keep = []
        """)
    )
    options = ["-p", "conftest", "-p", "no:randomly", "-c", os.devnull, "--rootdir", str(tmp_path), "-q"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-m", "pytest", *options, str(folder)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=50, cwd=tmp_path)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "the test left behind:" in run.stdout
    assert "2 passed, 1 error" in run.stdout
    assert "ERROR" in run.stdout
    assert "::test_one_leaves_a_process" in run.stdout
