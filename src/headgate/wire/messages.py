"""What is said on a control connection, between the controller and everybody else.

Each message is one msgpack array in one CONTROL frame (wire/control.py). A process dials the
controller, says `Hello`, and the connection then carries calls and their answers, snapshots
and their acknowledgements, and the commands and reports of replicas.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from headgate.core import framing
from headgate.core.state import Facts, Settings


class ReplicaSpec(Struct, frozen=True, array_like=True):
    """What a replica is to run. Blobs travel as paths of files; only the replica unpickles them."""

    backend: str
    version: int
    code_path: str
    settings: Settings
    user_config_path: str | None = None
    config_version: int = 0
    env: tuple[tuple[str, str], ...] = ()
    resources: dict[str, Any] = {}


# --- from a process to the controller ---------------------------------------------------------


class Report(Struct, frozen=True, tag="report", array_like=True):
    """A replica's own word on its state; sent at each change and again on every reconnect.

    `phase` is one of core.lifecycle's: starting, ready, draining, drained, failed. `error` is the
    text for the user when it failed to start or to reconfigure to `config_version`; `error_kind`
    names its class of headgate.errors when it failed to start. `address` and `remote` are those of
    core.state.ReplicaAddress. `worn` is why it wants to be replaced (core/recycling.py).
    """

    backend: str
    version: int
    phase: str
    address: str = ""
    facts: Facts = Facts()
    config_version: int = 0
    error: str = ""
    in_flight: int = 0
    error_kind: str = ""
    remote: str = ""
    node: str = "local"
    worn: str = ""


class Hello(Struct, frozen=True, tag="hello", array_like=True):
    """The first message. `follows` asks for snapshots; `snapshot_version` is the newest it has.

    routers   of a replica: the processes that have links to it, by their wire names (handshake.py)
    """

    role: str  # "client", "proxy", "replica" or "agent"
    id: str
    pid: int
    follows: bool = False
    snapshot_version: int = 0
    report: Report | None = None
    node: str = "local"
    routers: tuple[str, ...] = ()


class Linked(Struct, frozen=True, tag="linked", array_like=True):
    """The first link of a process to this replica has opened, or the last has ended; `name` is its wire name."""

    name: str
    is_linked: bool


class Follow(Struct, frozen=True, tag="follow", array_like=True):
    """From now on this process wants snapshots (a replica that got a handle)."""


class Ack(Struct, frozen=True, tag="ack", array_like=True):
    """Snapshot `version` is in force in this process."""

    version: int


class Request(Struct, frozen=True, tag="request", array_like=True):
    """A call of the controller. `call` is unique for ever, so that a repeat is recognised."""

    id: int
    call: str
    method: str
    params: msgspec.Raw


class Health(Struct, frozen=True, tag="health", array_like=True):
    """A replica's check_health() result: `error` is empty when healthy; `hangs` if there is no result."""

    error: str = ""
    hangs: bool = False


class Pong(Struct, frozen=True, tag="pong", array_like=True):
    """The answer to `Ping`."""


class Fenced(Struct, frozen=True, tag="fenced", array_like=True):
    """The Fence of that number is in force in this replica."""

    number: int


class Answer(Struct, frozen=True, tag="answer", array_like=True):
    """A node's agent hands on what its supervisor said (engine/asks.py)."""

    data: bytes


# --- from the controller to a process ---------------------------------------------------------


class Ask(Struct, frozen=True, tag="ask", array_like=True):
    """For the supervisor behind a node's agent (engine/asks.py)."""

    data: bytes



class Assign(Struct, frozen=True, tag="assign", array_like=True):
    """What a new replica is to run."""

    spec: ReplicaSpec


class Configure(Struct, frozen=True, tag="configure", array_like=True):
    """New limits at once; a `config_version` other than the replica's own makes it reconfigure."""

    settings: Settings
    config_version: int
    user_config_path: str | None = None


class Drain(Struct, frozen=True, tag="drain", array_like=True):
    """Finish what you have, take nothing new, report "drained" when empty."""

    timeout_s: float


class Fence(Struct, frozen=True, tag="fence", array_like=True):
    """Refuse calls from these processes until a later Fence no longer names them; answered with `Fenced`.

    peers   process id (Hello.id) -> the snapshot version that it has to follow first
    """

    peers: dict[str, int]
    number: int = 0


class Publish(Struct, frozen=True, tag="publish", array_like=True):
    """A new snapshot, msgpack of core.state.Snapshot; answered with `Ack`."""

    version: int
    snapshot: msgspec.Raw


class PublishChange(Struct, frozen=True, tag="change", array_like=True):
    """A new snapshot for who was sent the one before on this connection: msgpack of core.deltas.Delta.

    Answered with `Ack`; who has another one than the one before ends the connection, and gets all of it anew.
    """

    version: int
    delta: msgspec.Raw


class Response(Struct, frozen=True, tag="response", array_like=True):
    """The answer to the Request of that id: a value, or an error of headgate.errors by name."""

    id: int
    value: msgspec.Raw = msgspec.Raw(b"\xc0")
    error: tuple[str, str] | None = None


class Ping(Struct, frozen=True, tag="ping", array_like=True):
    """Asks whether the headgate thread of the process is alive."""


class Goodbye(Struct, frozen=True, tag="goodbye", array_like=True):
    """The instance shuts down; a proxy closes its listener and drains, then leaves."""

    timeout_s: float = 20.0


ToController = Hello | Linked | Follow | Ack | Request | Report | Health | Pong | Fenced | Answer
FromController = Ask | Assign | Configure | Drain | Fence | Publish | PublishChange | Response | Ping | Goodbye

encode = msgspec.msgpack.Encoder().encode
decode_to_controller = msgspec.msgpack.Decoder(ToController).decode
decode_from_controller = msgspec.msgpack.Decoder(FromController).decode


def framed(message: ToController | FromController) -> bytes:
    """A message as it goes over a connection."""
    body = encode(message)
    return framing.pack(framing.CONTROL, 0, 0, 0, 0, len(body)) + body
