"""The controller on a Ray cluster: where it listens, what it stores in, and its end.

It runs in an actor that Ray makes anew wherever it can (headgate/actors.py). Where it listens stands in
the cluster's key-value store; on the same node it is the same address again, so that most find it without
looking. What is stored under the instance's Ray namespace goes with the instance, or, where
nobody was left to remove it, with the next start of any.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable

from headgate import logs
from headgate.controller.serving import serve
from headgate.controller.shelf import Shelf
from headgate.controller.store import Store
from headgate.engine import cluster
from headgate.engine.ray_engine import RayEngine
from headgate.engine.ray_records import STORE, Meeting, Origin, Records, pack
from headgate.errors import InstanceError
from headgate.wire import address
from headgate.wire.control import Hub

log = logs.get("controller")

#: The record that says that a shutdown was begun.
_OVER = "over"
_TRIES = 5
_SWEEP_S = 60.0


class KeyValueShelf(Shelf):
    """A shelf in the cluster's key-value store, which replaces a value as a whole or not at all."""

    scheme = "ray"

    def __init__(self, records: Records) -> None:
        self._records = records
        self.where = f"the key-value store of the Ray cluster, under {records.scope!r}"

    def names(self) -> list[str]:
        return [name.removeprefix(STORE) for name in self._records.names() if name.startswith(STORE)]

    def read(self, name: str) -> bytes | None:
        return self._records.get(STORE + name)

    def write(self, name: str, data: bytes, sync: bool = True) -> None:
        self._records.put(STORE + name, data)

    def has(self, name: str) -> bool:
        return self._records.has(STORE + name)

    def remove(self, name: str) -> None:
        self._records.remove(STORE + name)


async def control(origin: Origin, listening: Callable[[], None]) -> None:
    """Be the controller of that instance; returns when it is over and nothing of it is left but this process.

    listening   called once others may connect
    """
    records = Records(origin.scope)
    before = await cluster.apart(_take_over, records, origin)
    if before is not None and await cluster.apart(records.has, _OVER):
        await _clear(records)  # this one's predecessor died in the middle of its end
        return
    listeners = _listen(origin, before)
    unix, tcp = (address.address_of(each) for each in listeners)
    meeting = Meeting(unix, tcp, cluster.node_id(), before.incarnation + 1 if before else 1)
    await cluster.apart(records.put, "meeting", pack(meeting))
    hub = Hub(listeners, origin.token, lambda peer, message: None, lambda peer: None)
    engine = RayEngine(origin, hub, meeting)
    location = origin.http.get("location") if origin.http.get("host") is not None else None
    listening()
    sweeping = asyncio.get_running_loop().create_task(_sweep_apart(origin.scope))
    await serve(
        engine, Store(KeyValueShelf(records)), hub, incarnation=meeting.incarnation, location=location
    )
    sweeping.cancel()
    with contextlib.suppress(OSError, TimeoutError):
        await cluster.apart(records.put, _OVER, b"")
        await engine.close()
    await _clear(records)


async def _clear(records: Records) -> None:
    """Forget all of the instance; if the cluster's head does not answer, the next start of any does it."""
    for _ in range(_TRIES):
        with contextlib.suppress(OSError, TimeoutError):
            await cluster.apart(records.clear)
            return
        await asyncio.sleep(1.0)


async def _sweep_apart(mine: str) -> None:
    with contextlib.suppress(OSError, TimeoutError):
        await cluster.apart(_sweep, mine, timeout_s=_SWEEP_S)


def _take_over(records: Records, origin: Origin) -> Meeting | None:
    """What an earlier controller of this very instance wrote, which died; None for the first one."""
    stored = records.origin()
    if stored is not None and stored.instance == origin.instance:
        return records.meeting()
    if stored is not None:  # a detached instance of the same name, whose controller was killed for good
        records.clear()
    records.put("origin", pack(origin))
    return None


def _listen(origin: Origin, before: Meeting | None) -> list[socket.socket]:
    host = cluster.join_host(cluster.node_address())
    unix = address.listen(f"@headgate-{origin.instance}-controller")
    if before is not None and before.node == cluster.node_id():
        with contextlib.suppress(InstanceError):  # somebody else has the port now
            return [unix, address.listen(before.tcp)]
    return [unix, address.listen(f"tcp://{host}:0")]


def _sweep(mine: str) -> None:
    """Forget instances that ended when nobody was left to do so."""
    for scope in Records.scopes():
        if scope != mine and cluster.find(scope, cluster.CONTROLLER) is None:  # not even one that Ray makes anew
            Records(scope).clear()
