"""What the controller asks of the supervisor, and what it hears: one msgpack map in each datagram.

They talk over a SOCK_SEQPACKET socket pair of their own, a fresh one for each incarnation of the
controller. Children are named by their id ("iris#0007"), whose number the supervisor never gives
twice. `note` is whatever the asker wants to find again in `Child` after the controller's end; the
supervisor does not look into it.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

#: Longer datagrams than this are refused by the kernel's default socket buffer.
MAX_ASK_BYTES = 131_072


class Fork(Struct, frozen=True, tag_field="op", tag="fork"):
    """Fork a child; answered by the Forked with the same `n`."""

    n: int
    role: str
    name: str
    note: bytes = b""


class Kill(Struct, frozen=True, tag_field="op", tag="kill"):
    """SIGKILL to the child's process group; its Exited follows. Nothing happens if it is gone."""

    id: str


class List(Struct, frozen=True, tag_field="op", tag="list"):
    """Tell each living child; answered by one Child for each, then Listed."""


class CloseListener(Struct, frozen=True, tag_field="op", tag="close_listener"):
    """Close the supervisor's copy of the HTTP listener: with the proxies' own, the port is free."""


class Forked(Struct, frozen=True, tag_field="op", tag="forked"):
    """The child runs, or `error` says why it could not be forked."""

    n: int
    id: str = ""
    pid: int = 0
    started: float = 0.0
    error: str = ""


class Child(Struct, frozen=True, tag_field="op", tag="child"):
    """A living child. `started` is on the clock of time.monotonic(), which all processes share."""

    id: str
    role: str
    name: str
    pid: int
    started: float
    note: bytes = b""


class Listed(Struct, frozen=True, tag_field="op", tag="children"):
    """The end of the answer to List."""

    count: int


class Exited(Struct, frozen=True, tag_field="op", tag="exited"):
    """A child has ended and was reaped; `status` is what waitpid() said."""

    id: str
    pid: int
    status: int


Ask = Fork | Kill | List | CloseListener
Answer = Forked | Child | Listed | Exited

encode = msgspec.msgpack.Encoder().encode
decode_ask = msgspec.msgpack.Decoder(Ask).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
