"""Who does not answer: every process is asked once a second whether its headgate thread lives.

A proxy that leaves two in a row unanswered is replaced; a replica is killed when it has been silent
for its backend's health_check_timeout_s, or when its process, if it is one of this node, has been
stopped (state T) for 3 s. A node's agent only passes on what the controller asks; its silence is logged.
Being slow is not being dead: the thread that answers is not the one that runs user code. When
this process itself was held up, nobody is to blame and counting begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from headgate import logs
from headgate.controller.publisher import PROXY, REPLICA, PeerLike
from headgate.wire import messages

PERIOD_S = 1.0
PROXY_PATIENCE = 2  # pings
STOPPED_S = 3.0
AGENT = "agent"
AGENT_PATIENCE = 10  # pings

log = logs.get("health")


class Process(PeerLike, Protocol):
    """A peer whose process may be on this node: then its pid means something here."""

    is_local: bool


class Heartbeats:
    """Pings and who answered them.

    timeout_s   how long the replica of that id may be silent
    is_stopped  whether the process of that pid is in state T
    """

    def __init__(
        self, timeout_s: Callable[[str], float], is_stopped: Callable[[int], bool] | None = None
    ) -> None:
        self._timeout_s = timeout_s
        self._is_stopped = is_stopped or is_stopped_in_proc
        self._unanswered: dict[Process, int] = {}
        self._stopped: dict[Process, int] = {}
        self._last_round = float("inf")

    def heard(self, peer: Process) -> None:
        """`peer` said something."""
        self._unanswered[peer] = 0

    def gone(self, peer: Process) -> None:
        """The connection of `peer` has ended."""
        self._unanswered.pop(peer, None)
        self._stopped.pop(peer, None)

    def round(self, peers: Iterable[Process], now: float) -> list[tuple[str, str]]:
        """Ping all of `peers`: the ids of those to be killed, each with the reason."""
        if now - self._last_round > 2.0 * PERIOD_S:
            self._unanswered.clear()
            self._stopped.clear()
        self._last_round = now
        dead = []
        for peer in list(peers):
            missed = self._unanswered.get(peer, 0)
            if reason := self._verdict(peer, missed):
                dead.append((peer.id, reason))
            self._unanswered[peer] = missed + 1
            peer.tell(messages.Ping())
        return dead

    def _verdict(self, peer: Process, missed: int) -> str:
        if peer.role == PROXY and missed >= PROXY_PATIENCE:
            return f"did not answer for {missed * PERIOD_S:g} s"
        if peer.role == AGENT and missed == AGENT_PATIENCE:
            log.warning("%s has not answered for %g s", peer.id, missed * PERIOD_S)
        if peer.role != REPLICA or not missed:
            self._stopped.pop(peer, None)
            return ""
        is_stopped = peer.is_local and self._is_stopped(peer.pid)
        stopped = self._stopped.get(peer, 0) + 1 if is_stopped else 0
        self._stopped[peer] = stopped
        if stopped * PERIOD_S >= STOPPED_S:
            return f"its process was stopped for {stopped * PERIOD_S:g} s"
        if missed * PERIOD_S >= self._timeout_s(peer.id):
            return f"did not answer for {missed * PERIOD_S:g} s"
        return ""


def is_stopped_in_proc(pid: int) -> bool:
    """Whether a process is stopped by a signal, as /proc says."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"T"
    except (OSError, IndexError):  # gone
        return False
