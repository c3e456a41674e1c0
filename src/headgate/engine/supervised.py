"""What is known of one supervisor's children, however asks and answers travel.

The local engine talks to its supervisor over a socket, the Ray engine to one on each node by way
of an agent (engine/agent.py). Answers may be lost with a connection: `list` is to be called on
each new one, before anything else, and then everything is known again: what has ended meanwhile, and
what became of forks whose answer never came.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from os import WIFSIGNALED, waitstatus_to_exitcode

import msgspec

from headgate.engine import asks
from headgate.engine.interface import Process
from headgate.errors import InstanceError
from headgate.wire import messages

_decode_spec = msgspec.msgpack.Decoder(messages.ReplicaSpec).decode
#: The cause of an end of which only the result was seen.
UNSEEN = "its end was not seen"


class Known:
    """A living child: as the supervisor told of it, and what it runs if it is a replica."""

    def __init__(self, child: asks.Child, node: str) -> None:
        spec = spec_in(child.role, child.note)
        self.child = child
        self.spec = spec
        backend, version = (spec.backend, spec.version) if spec else ("", 0)
        self.process = Process(child.id, child.role, backend, version, child.pid, child.started, node)


def spec_in(role: str, note: bytes) -> messages.ReplicaSpec | None:
    """What a child runs; None for a proxy."""
    return _decode_spec(note) if role == "replica" else None


class Supervised:
    """The children of one supervisor but for its controller or agent.

    send       a datagram for the supervisor; those that are lost go with a connection
    on_known   called with each child that was not known before, listed or forked
    on_exit    (id, cause) of each that was known and is gone
    """

    def __init__(
        self,
        send: Callable[[bytes], None],
        on_known: Callable[[Known], None] = lambda known: None,
        on_exit: Callable[[str, str], None] = lambda id, cause: None,
        node: str = "local",
    ) -> None:
        #: Oldest first.
        self.known: dict[str, Known] = {}
        self._send = send
        self._on_known = on_known
        self._on_exit = on_exit
        self._node = node
        # At random: an answer to another incarnation of the controller is none to this one.
        self._count = int.from_bytes(os.urandom(6), "little")
        self._forks: dict[int, tuple[asks.Fork, asyncio.Future[str]]] = {}
        self._list_n = 0
        self._listings: deque[asyncio.Future[tuple[Known, ...]]] = deque()
        self._listed: dict[str, asks.Child] = {}
        self._found: dict[str, Known] = {}

    # --- asking -------------------------------------------------------------------------------

    async def list(self) -> tuple[Known, ...]:
        """Ask for all children: those that nobody knew of and no `fork` returns. Raises InstanceError.

        Asked again before the answer, as on a new connection, all return then; the latest gets those found.
        """
        self._count += 1
        self._list_n = self._count
        answer: asyncio.Future[tuple[Known, ...]] = asyncio.get_running_loop().create_future()
        self._listings.append(answer)
        self._send(asks.encode(asks.List(self._list_n)))
        return await answer

    async def fork(self, role: str, name: str, note: bytes = b"") -> str:
        """Fork a child: its id. Raises InstanceError."""
        self._count += 1
        fork = asks.Fork(self._count, role, name, note)
        data = asks.encode(fork)
        if len(data) > asks.MAX_ASK_BYTES:
            raise InstanceError(f"cannot start {name}: its env is longer than {asks.MAX_ASK_BYTES} bytes")
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._forks[fork.n] = fork, answer
        self._send(data)
        return await answer

    def kill(self, id: str) -> None:
        """SIGKILL to the child's process group."""
        self._send(asks.encode(asks.Kill(id)))

    def close_listener(self) -> None:
        """Close the supervisor's copy of the HTTP listener."""
        self._send(asks.encode(asks.CloseListener()))

    def asked(self) -> Iterator[asks.Fork]:
        """The forks without an answer."""
        return (fork for fork, _ in self._forks.values())

    # --- hearing ------------------------------------------------------------------------------

    def hear(self, data: bytes) -> None:
        """A datagram from the supervisor, in the order in which it sent them."""
        answer = asks.decode_answer(data)
        match answer:
            case asks.Forked():
                self._forked(answer)
            case asks.Child():
                self._listed[answer.id] = answer
                if answer.id not in self.known:
                    self._found[answer.id] = self._know(answer)
            case asks.Listed():
                self._all_listed(answer.n)
            case asks.Exited():
                self._listed.pop(answer.id, None)
                self._exited(answer.id, cause_of(answer.status))

    def _forked(self, forked: asks.Forked) -> None:
        if forked.n not in self._forks:  # asked by somebody else; if it runs, the next list says so
            return
        fork, answer = self._forks.pop(forked.n)
        if forked.error:
            _fail(answer, f"cannot start {fork.name}: {forked.error}")
            return
        self._know(asks.Child(forked.id, fork.role, fork.name, forked.pid, forked.started, fork.note))
        if not answer.done():
            answer.set_result(forked.id)

    def _know(self, child: asks.Child) -> Known:
        known = self.known[child.id] = Known(child, self._node)
        self._on_known(known)
        return known

    def _exited(self, id: str, cause: str) -> None:
        self._found.pop(id, None)
        if self.known.pop(id, None) is not None:
            self._on_exit(id, cause)

    def _all_listed(self, n: int) -> None:
        listed, self._listed = self._listed, {}
        if n != self._list_n:  # of an earlier connection
            return
        for id in [id for id in self.known if id not in listed]:
            self._exited(id, UNSEEN)
        for lost in [number for number in self._forks if number < n]:
            self._settle(*self._forks.pop(lost))
        while self._listings:
            answer = self._listings.pop()
            if not answer.done():
                answer.set_result(tuple(self._found.values()))
                self._found.clear()

    def _settle(self, fork: asks.Fork, answer: asyncio.Future[str]) -> None:
        """The answer to a fork was lost: the first child found that may be it, is."""
        about = (fork.role, fork.name, fork.note)
        for id, known in self._found.items():
            if (known.child.role, known.child.name, known.child.note) == about:
                del self._found[id]
                if not answer.done():
                    answer.set_result(id)
                return
        _fail(answer, f"cannot start {fork.name}: the supervisor was not reached")

    # --- the end ------------------------------------------------------------------------------

    def lost(self, cause: str = "its supervisor ended") -> None:
        """The supervisor is gone, and with it all that it had forked."""
        self._listed.clear()
        for id in tuple(self.known):
            self._exited(id, cause)
        forks, self._forks = self._forks, {}
        for fork, answer in forks.values():
            _fail(answer, f"cannot start {fork.name}: the supervisor ended")
        while self._listings:
            _fail(self._listings.pop(), "the supervisor ended")

    def leave(self) -> None:
        """Nothing is to be heard any more: whoever waits is cancelled."""
        for _, answer in self._forks.values():
            answer.cancel()
        for listing in self._listings:
            listing.cancel()


def _fail(answer: asyncio.Future[str] | asyncio.Future[tuple[Known, ...]], why: str) -> None:
    if not answer.done():
        answer.set_exception(InstanceError(why))


def cause_of(status: int) -> str:
    """What waitpid() said, for people.

    >>> cause_of(9), cause_of(256)
    ('killed by SIGKILL', 'exited with status 1')
    """
    code = waitstatus_to_exitcode(status)
    if not WIFSIGNALED(status):
        return f"exited with status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"killed by signal {-code}"
