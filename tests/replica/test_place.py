"""A replica anywhere: on threads of a process that is not its own, reached from its node and from others."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from replica_rig import RouterEnd

from headgate.core import framing
from headgate.core.state import Settings
from headgate.engine.boot import Boot, ChildBoot
from headgate.errors import InstanceError, RequestError
from headgate.replica.callable import pack
from headgate.replica.place import Place, addresses
from headgate.replica.process import Replica
from headgate.wire import control, messages, payload
from headgate.wire.address import listen
from headgate.wire.handshake import dial
from headgate.wire.home import DirectoryHome
from headgate.wire.link import open_link
from headgate.wire.slots import SlotPage

TOKEN = b"t" * 32


def test_a_child_of_the_supervisor_listens_in_the_run_directory(tmp_path: Path) -> None:
    directory = str(tmp_path)
    boot = Boot("i", "n", directory, TOKEN, False, 1, -1, -1, http={"expose_tracebacks": True})
    place = Place.of(ChildBoot(boot, "iris#0007", "replica", "iris"))
    assert (place.id, place.backend, place.expose) == ("iris#0007", "iris", True)
    assert list(place.listen) == [f"{directory}/r0007.sock"]
    assert (place.home.key, place.home.token, place.home.node) == (directory, TOKEN, "local")
    (tmp_path / "blob").write_bytes(b"code")
    assert place.read_blob(str(tmp_path / "blob")) == b"code"
    with pytest.raises(FileNotFoundError):
        place.read_blob(str(tmp_path / "gone"))
    (listener,) = place.bind()
    with listener:
        assert addresses([listener]) == (place.listen[0], "")
        assert os.stat(place.listen[0]).st_mode & 0o777 == 0o600


def test_a_place_may_have_an_address_for_other_nodes(tmp_path: Path) -> None:
    name = f"@headgate-test-{os.getpid()}"
    place = Place(DirectoryHome(str(tmp_path), TOKEN), "x#1", "x", [name, "tcp://127.0.0.1:0"])
    listeners = place.bind()
    try:
        local, remote = addresses(listeners)
        assert local == name
        assert remote.startswith("tcp://127.0.0.1:")
        assert not remote.endswith(":0")
        with pytest.raises(InstanceError):
            place.bind()
    finally:
        for listener in listeners:
            listener.close()


def test_nothing_can_be_claimed_before_the_replica_serves(tmp_path: Path) -> None:
    replica = Replica(Place(DirectoryHome(str(tmp_path), TOKEN), "x#1", "x", []))
    with pytest.raises(RequestError, match="not ready"):
        replica.claim(1, "data").result(timeout=0)
    replica.give_up(1)
    replica.answered(1)


# --- a replica on a thread: it makes its process that replica for good, so each has a process of its own ---


class FakeController:
    """Assigns one backend to the first replica that comes, and keeps its reports."""

    def __init__(self, directory: Path, spec: messages.ReplicaSpec) -> None:
        self.spec = spec
        self.reports: list[messages.Report] = []
        self.peer: control.Peer | None = None
        listener = listen(str(directory / "control.sock"))
        self.hub = control.Hub(listener, TOKEN, self._on_message, lambda peer: None)
        self.hub.open()

    def _on_message(self, peer: control.Peer, message: messages.ToController) -> None:
        if isinstance(message, messages.Hello):
            self.peer = peer
            peer.tell(messages.Assign(self.spec))
        elif isinstance(message, messages.Report):
            self.reports.append(message)

    async def report(self, phase: str) -> messages.Report:
        for _ in range(1000):
            if self.reports and self.reports[-1].phase == phase:
                return self.reports[-1]
            await asyncio.sleep(0.01)
        raise AssertionError(self.reports)


async def link_to(address: str) -> RouterEnd:
    link = RouterEnd()
    page = SlotPage()
    sock, pid = await dial(address, TOKEN, "router", [page.fd] if page.fd is not None else [])
    assert pid == (0 if address.startswith("tcp") else os.getpid())
    await open_link(link, sock)
    return link


def twice(request: Any) -> Any:
    return request.data, request.data, threading.current_thread().name


class Async:
    def __init__(self, fails: bool = False) -> None:
        if fails:
            raise ValueError("on purpose")

    async def __call__(self, request: Any) -> Any:
        return request.data, request.data, threading.current_thread().name


async def on_a_thread(directory: Path, target: Any, *init_args: Any) -> None:
    code, _ = pack(target, init_args)
    blobs = {"ray:code": code}
    over = threading.Event()
    controller = FakeController(directory, messages.ReplicaSpec("x", 1, "ray:code", Settings()))
    place = Place(
        DirectoryHome(str(directory), TOKEN), "x#1", "x", [f"@headgate-test-{os.getpid()}", "tcp://127.0.0.1:0"],
        read_blob=blobs.__getitem__, over=over.set,
    )  # fmt: skip
    replica = Replica(place)
    threading.Thread(target=replica.run, name="replica", daemon=True).start()
    if init_args:
        report = await controller.report("failed")
        assert "on purpose" in report.error
    else:
        await serve(controller, replica)
    controller.hub.close()
    (directory / "control.sock").unlink()
    await asyncio.to_thread(over.wait, 10.0)
    assert over.is_set()


async def serve(controller: FakeController, replica: Replica) -> None:
    report = await controller.report("ready")
    assert report.node == "local"
    for slot, address in enumerate((report.address, report.remote)):
        link = await link_to(address)
        link.value(9, "wire")
        assert payload.decode((await link.end(9))[2]) == ("wire", "wire", "replica")
        link.reserve(slot)
        token = await link.token(slot)
        data = object()
        claimed = await asyncio.wrap_future(replica.claim(token, data))
        assert claimed == (data, data, "replica")
        assert (await link.end(slot))[0] == framing.END
        replica.answered(token)
        link.close()
    assert controller.peer is not None
    controller.peer.tell(messages.Drain(5.0))
    await controller.report("drained")


@pytest.mark.parametrize("how", ["plain", "async", "fails"])
def test_a_replica_runs_on_a_thread(how: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, __file__, how, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr


if __name__ == "__main__":
    kinds: dict[str, tuple[Any, ...]] = {"plain": (twice,), "async": (Async,), "fails": (Async, True)}
    asyncio.run(asyncio.wait_for(on_a_thread(Path(sys.argv[2]), *kinds[sys.argv[1]]), 30.0))
