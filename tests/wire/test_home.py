"""wire/home.py: where the controller is, and when the instance is over."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NamedTuple

import pytest
import virtual_time

from headgate.errors import ProtocolError
from headgate.wire.home import DirectoryHome, FileHome, Home, home_of_child, write_controller

TOKEN = b"t" * 32
FAR = "tcp://10.0.0.7:4711"


def find(home: Home, error: Exception | None = None) -> str | None:
    return virtual_time.run(home.find(error))


class Booted(NamedTuple):
    directory: str
    token: bytes
    node: str


# --- one machine ---


@pytest.mark.parametrize("error", [None, ProtocolError("odd"), TimeoutError(), ConnectionResetError()])
def test_a_run_directory_s_controller_stays_where_it_is(error: Exception | None) -> None:
    assert find(DirectoryHome("/run/d-default", TOKEN), error) == "/run/d-default/control.sock"


@pytest.mark.parametrize("error", [ConnectionRefusedError(), FileNotFoundError()])
def test_where_nobody_listens_the_instance_is_over(error: Exception) -> None:
    assert find(DirectoryHome("/run/d-default", TOKEN), error) is None


# --- several nodes ---


@pytest.mark.parametrize(
    ("unix", "tcp", "node", "found"),
    [
        ("@controller", FAR, "here", "@controller"),
        ("@controller", FAR, "there", FAR),
        ("", FAR, "here", FAR),
        ("@controller", "", "here", "@controller"),
        ("@controller", "", "there", None),
        ("", "", "here", None),
    ],
)
def test_the_file_says_where_the_controller_is(
    tmp_path: Path, unix: str, tcp: str, node: str, found: str | None
) -> None:
    write_controller(str(tmp_path), unix, tcp, node)
    assert find(FileHome(str(tmp_path), TOKEN, "here")) == found
    assert [entry.name for entry in tmp_path.iterdir()] == ["controller"]


def test_without_the_file_or_with_an_empty_one_the_instance_is_over(tmp_path: Path) -> None:
    home = FileHome(str(tmp_path / "controller"), TOKEN, "here")
    assert find(home) is None
    assert find(home, ConnectionRefusedError()) is None
    home = FileHome(str(tmp_path), TOKEN, "here")
    write_controller(str(tmp_path), "@controller", FAR, "here")
    write_controller(str(tmp_path))
    assert (tmp_path / "controller").read_bytes() == b""
    assert find(home) is None


def test_a_file_that_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "controller").mkdir()
    with pytest.raises(OSError, match="directory"):
        find(FileHome(str(tmp_path), TOKEN, "here"))


def test_after_an_error_the_file_is_read_again_once_it_had_time_to_change(tmp_path: Path) -> None:
    write_controller(str(tmp_path), "@old", FAR, "here")
    home = FileHome(str(tmp_path), TOKEN, "here")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert await home.find(None) == "@old"
        assert loop.time() == 0
        loop.call_later(0.04, write_controller, str(tmp_path), "@new", "tcp://10.0.0.8:1", "there")
        assert await home.find(ConnectionRefusedError()) == "tcp://10.0.0.8:1"
        assert loop.time() == pytest.approx(0.05)

    virtual_time.run(main())


# --- children ---


def test_a_child_has_the_home_of_its_node(tmp_path: Path) -> None:
    local = home_of_child(Booted("/run/x", TOKEN, "local"))
    assert (type(local), local.key, local.token, local.node) == (DirectoryHome, "/run/x", TOKEN, "local")
    far = home_of_child(Booted(str(tmp_path), TOKEN, "0abc"))
    assert (type(far), far.key, far.token, far.node) == (FileHome, str(tmp_path), TOKEN, "0abc")
