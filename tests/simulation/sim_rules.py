"""What must hold in every simulation, whatever fails: each rule is checked at each step that could break it.

at most once    user code begins a request once (twice if its backend is idempotent), and never one that was
                given up while it waited or was answered as not started
nothing lost    every request ends exactly once, with an outcome that something which happened allows, in time
deadlines       a request whose deadline has passed is not sent, and does not begin
retries         of the active requests of a backend in a router at most a fifth, and always three, are tried again at
                one time, each at most twice
FIFO            nobody is sent before one who has waited longer in the same line, or for a further try, and what one
                link brings begins in that order
limits          a replica never runs more than max_concurrent_queries, no batch is too large, no line too long
rollouts        a snapshot never takes away a ready replica while there are fewer than wanted; a version takes over
                whole; a replica drains only when no router may send to it
changes         what is asked after a change has been confirmed is served as it says
ids             no id, version or snapshot number ever means two things
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct
from simulation.sim_loop import ProcessLoop
from simulation.sim_wire import Network

from headgate.core import framing
from headgate.core.state import Snapshot
from headgate.errors import BackendOverloaded, EndpointNotFound, HeadgateError, ReplicaDied, RequestTimeout
from headgate.wire import messages, payload
from headgate.wire.caller import Caller
from headgate.wire.greeting import wire_name

if TYPE_CHECKING:
    from simulation.sim_replica import SimReplica, Task
    from simulation.sim_world import SimRouter

NEVER = float("inf")
#: How late a deadline may be noticed: the router sweeps every 50 ms.
LATE_S = 0.11
#: How long after its caller gave up a request may still begin: until the replica has been told.
CANCELLED_S = 0.15
#: What remains to a request travels in whole milliseconds, and at least as one.
ROUNDED_S = 0.001001
MOST_TRIES = 3
RETRIES_ALWAYS = 3
RETRIES_SHARE_PERCENT = 20


class Change(Struct):
    """A change that somebody asked for.

    ended       when its outcome was known
    confirmed   when it was said to be in force
    """

    of: str
    says: Any
    issued: float
    ended: float = NEVER
    confirmed: float = NEVER


class Copied(Caller):
    """What a shadow is made of: a request under a name of its own."""


class Asked(Caller):
    """A request, and whoever waits for its answer."""

    def __init__(
        self, rules: Rules, id: str, router: SimRouter, endpoint: str, work_s: float, mode: str, big: bool
    ) -> None:
        self.rules = rules
        self.id = id
        self.router = router
        self.name = endpoint
        self.mode = mode
        self.big = big
        self.state = "new"  # waiting, sent, over
        self.outcome = ""
        self.asked_at = self.sent_at = self.ended_at = rules.network.world.time()
        self.sent_to: list[tuple[str, Any]] = []  # replica, link
        self.number = 0  # among all that were sent
        self.serial = 0  # among all that were asked
        self.line: Any = None  # where it waited first
        self.asked_by = self.sent_by = router.router.snapshot.version  # what its router followed then
        self.meta = _meta(id, endpoint)
        self.flags = framing.VALUE
        self.due = NEVER
        self.not_started = False  # as its answer said
        self.copies = 0
        self.body = self._body(id, work_s, mode)

    def _body(self, id: str, work_s: float, mode: str) -> bytes:
        text = f"{id};{work_s};{mode};{'x' * 400 if self.big else ''}"
        return b"".join(bytes(part) for part in payload.encode(text))

    def original(self) -> Caller | None:
        self.copies += 1
        copy = Copied()
        id = f"{self.id}/shadow{self.copies}"
        copy.meta, copy.flags, copy.body = _meta(id, self.name), self.flags, self._body(id, 0.01, "")
        return copy

    def on_assigned(self) -> None:
        self.rules.sent(self)

    def on_refused(self) -> None:
        if self.state == "sent":
            self.state = "waiting"

    def on_reply(self, arg: int, flags: int, meta_len: int, source: Any, start: int, end: int) -> None:
        self.rules.replied(self, payload.decode(bytes(source[start + meta_len : end])))

    def on_error(self, status: int, flags: int, meta_len: int, source: Any, start: int, end: int) -> None:
        self.rules.erred(self, status & 0xFFFF)

    def on_failure(self, error: HeadgateError) -> None:
        self.rules.failed(self, error)


def _meta(id: str, endpoint: str) -> bytes:
    return msgspec.msgpack.encode([id, endpoint, None, None, None, False])


class Rules:
    """The state of the world as its observer knows it, and which rules were broken."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.broken: list[str] = []
        self.requests: dict[str, Asked] = {}
        self.open: dict[SimRouter, dict[Asked, None]] = defaultdict(dict)
        self.executed: Counter[str] = Counter()
        self.idempotent: set[str] = set()
        self.changes: list[Change] = []
        self.dead: dict[str, float] = {}  # and when they died
        self.gently: set[str] = set()  # those that the controller ended in their drain's time
        self.patience: dict[str, float] = {}  # the shortest graceful_shutdown_timeout_s that a backend ever had
        self.finished: dict[str, float] = {}  # when user code had returned
        self.raised: dict[str, bool] = {}  # whether user code raised, for what it was called with last
        self.frozen_until: dict[str, float] = {}  # replicas; for ever, if they still are
        self.cut: set[Any] = set()
        self.excused: set[str] = set()  # replicas that may be ended at once: by force, frozen, broken
        self.forced: Counter[str] = Counter()  # deletes by force of a backend that have not ended
        self.answers: Counter[str] = Counter()
        self.died_of: dict[str, set[int]] = defaultdict(set)  # the versions of replicas that died while ready
        self._sent = 0
        self._begun: dict[tuple[str, Any], int] = {}
        self._snapshots: dict[int, Snapshot] = {}

    def breaks(self, rule: str, what: str) -> None:
        """A rule was broken."""
        self.broken.append(f"{self.network.world.time():.4f} {rule}: {what}")

    def pid_of(self, loop: ProcessLoop) -> int:
        return next((pid for pid, one in self.network.processes.items() if one is loop), 0)

    # --- requests ---

    def submitted(self, one: Asked, limit: int | None) -> None:
        """The router was given a request, and has sent it, lined it up or failed it."""
        if one.state != "new":
            return
        one.state = "waiting"
        one.line = line = one.backend
        if limit is not None and line is not None and one not in line._early:
            length = len(line.waiting)
            if length > limit:
                self.breaks("limits", f"request {one.id} is number {length} in a line of {limit}")

    def sent(self, one: Asked) -> None:
        link: Any = one.link
        line: Any = one.backend
        if one.state == "over":
            self.breaks("at most once", f"request {one.id} is sent though it was over: {one.outcome}")
        one.state = "sent"
        one.sent_by = one.router.router.snapshot.version
        one.sent_to.append((link.replica.id, link))
        self._sent += 1
        one.number = self._sent
        one.line = one.line or line
        one.due = min(one.due, one.deadline)  # a backend that it was routed to later may allow it less time
        one.sent_at = now = self.network.world.time()
        if one.due <= now:
            self.breaks("deadlines", f"request {one.id} is sent {now - one.due:.4f} s after its deadline")
        if one.tries:
            self._within_budget(one, line)
        for other in self.open[one.router]:
            if other.state == "waiting" and other.backend is line and other.due > now and self._is_older(other, one):
                self.breaks("FIFO", f"request {one.id} was sent before {other.id}, which has waited longer")

    def _within_budget(self, one: Asked, line: Any) -> None:
        """It is tried again: others may be as well, but not too many."""
        pending = [caller for link in line.links.values() for caller in link._pending.values()]
        again = sum(caller.tries > 0 for caller in pending)
        active = len(pending) + len(line.waiting) + len(line.retries.waiting)
        if again > max(RETRIES_ALWAYS, active * RETRIES_SHARE_PERCENT // 100):
            self.breaks("retries", f"with request {one.id} {again} of {active} active ones are tried again at one time")
        if one.tries >= MOST_TRIES:
            self.breaks("retries", f"request {one.id} is tried again after {one.tries} tries")

    def _is_older(self, other: Asked, one: Asked) -> bool:
        """Whether `other` is in the line that `one` came from, and was there first. What is tried again has its own."""
        line: Any = one.backend
        if one.tries and other.tries:
            return other.order < one.order and other in line.retries.waiting
        if one.tries or other.tries:
            return False
        if other in line._early:
            return False
        if len(one.sent_to) == 1 and not other.sent_to and one.line is other.line is line:
            return other.serial < one.serial
        waits = other.order in line.waiting._queue or other in line.waiting._returned
        return waits and other.order < one.order

    def ended(self, one: Asked, outcome: str) -> None:
        """The one final answer of a request."""
        if one.state == "over":
            self.breaks("nothing lost", f"request {one.id} ended twice: {one.outcome}, then {outcome}")
            return
        one.state, one.outcome = "over", outcome
        one.ended_at = now = self.network.world.time()
        self.open[one.router].pop(one, None)
        self.answers[outcome] += 1
        if one.due < now - LATE_S and not one.router.was_frozen_since(one.due - LATE_S):
            self.breaks("nothing lost", f"request {one.id} was answered {now - one.due:.3f} s after its deadline")

    def replied(self, one: Asked, value: Any) -> None:
        """The replica has answered."""
        if value != one.id or not self.executed[one.id] or self.raised[one.id]:
            self.breaks("nothing lost", f"request {one.id} got the answer {value!r}")
        self.ended(one, "200")

    def erred(self, one: Asked, status: int) -> None:
        """The replica has answered with an error: the reason must be there, too."""
        early_s = one.due - self.network.world.time()
        if status == 500:
            if not self.raised.get(one.id):
                self.breaks("nothing lost", f"request {one.id} failed, though its code did not raise")
        elif status != 504:  # 499 is for nobody's eyes, and all others are the router's
            self.breaks("nothing lost", f"request {one.id} was answered {status} by its replica")
        elif early_s > ROUNDED_S:
            self.breaks("nothing lost", f"request {one.id} timed out {early_s:.3f} s before its deadline")
        self.ended(one, str(status))

    def failed(self, one: Asked, error: HeadgateError) -> None:
        """The router has no answer: the reason must be there."""
        was = one.state
        now = self.network.world.time()
        line: Any = one.backend
        if isinstance(error, RequestTimeout):
            if one.due > now + 0.002:
                self.breaks("nothing lost", f"request {one.id} timed out {one.due - now:.3f} s before its deadline")
            self.ended(one, "504")
        elif isinstance(error, BackendOverloaded):
            limit = line.view.settings.max_queued_requests
            if limit is None or len(line.waiting) + self._before_links(line) < limit:
                self.breaks("nothing lost", f"request {one.id} was shed by a line of {len(line.waiting)}: {error}")
            self.ended(one, "503")
        elif isinstance(error, ReplicaDied):
            self._died(one, error)
            self.ended(one, "502")
        elif isinstance(error, EndpointNotFound):
            if not any(change.says is None or change.of == one.name for change in self.changes if change.of != "code"):
                self.breaks("nothing lost", f"request {one.id}: {error}")
            self.ended(one, "404")
        else:
            self.breaks("nothing lost", f"request {one.id} ended with {type(error).__name__}: {error}")
            self.ended(one, type(error).__name__)
        if was == "over":
            self.breaks("nothing lost", f"request {one.id} failed after its end")

    def _before_links(self, line: Any) -> int:
        """How many more than its replicas may hold wait for the first links to them."""
        slots = line.view.settings.max_concurrent_queries * max(1, len(line.view.replicas))
        return max(0, len(line._early) - slots)

    def _died(self, one: Asked, error: ReplicaDied) -> None:
        if not one.sent_to:
            self.breaks("nothing lost", f"request {one.id} was lost with a replica it was never sent to")
            return
        replica, link = one.sent_to[-1]
        one.not_started = not error.started
        if one.not_started:
            gone = sum(id in self.dead or each in self.cut for id, each in one.sent_to)
            if gone < 3 or self.executed[one.id]:
                self.breaks("nothing lost", f"request {one.id}, executed {self.executed[one.id]}: {error}")
            return
        if link in self.cut:
            return
        had_answered = self.finished.get(one.id, NEVER) < self.dead.get(replica, 0.0)
        if had_answered and link.replica.node == one.router.node and replica not in self.excused:
            self.breaks("nothing lost", f"request {one.id}: {error}; but its answer had been written")
        if replica in self.gently and replica not in self.excused and link.replica.node == one.router.node:
            self.breaks("nothing lost", f"request {one.id}: {error}; but {replica} was to finish it before its end")
        if replica not in self.dead:
            self.breaks("nothing lost", f"request {one.id}: {error}; but {replica} lives and its link was not cut")
        elif link.replica.node == one.router.node and not self.executed[one.id]:
            self.breaks("nothing lost", f"request {one.id}: {error}; but it had not started")

    def cancelled(self, one: Asked) -> None:
        """Its caller is about to give it up."""
        one.outcome = "cancelled waiting" if one.state == "waiting" else "cancelled"
        one.state = "over"
        one.ended_at = self.network.world.time()
        self.open[one.router].pop(one, None)
        self.answers[one.outcome.split()[0]] += 1

    def vanished(self, router: SimRouter) -> None:
        """A process has ended, and with it whoever waited there."""
        for one in list(self.open[router]):
            one.state, one.outcome = "over", "gone"
            self.answers["gone"] += 1
        self.open[router].clear()

    # --- user code ---

    def began(self, replica: SimReplica, tasks: list[Task]) -> None:
        """User code was called for these."""
        settings = replica.settings
        limit = max(replica.most, settings.max_concurrent_queries)
        running = len(replica.running) + len(tasks)
        if running > limit or replica.worker.admission.held > limit:
            held = replica.worker.admission.held
            self.breaks("limits", f"{replica.id} runs {running} and holds {held}, its limit is {limit}")
        if len(tasks) > replica.most_batch:
            self.breaks("limits", f"{replica.id} got a batch of {len(tasks)}, its limit is {replica.most_batch}")
        raises = any(task.mode == "raise" for task in tasks)
        for task in tasks:
            self.raised[task.id] = raises
            self._began(replica, task)

    def _began(self, replica: SimReplica, task: Task) -> None:
        self.executed[task.id] += 1
        most = 2 if replica.tag in self.idempotent else 1
        if self.executed[task.id] > most:
            self.breaks("at most once", f"request {task.id} began {self.executed[task.id]} times, now in {replica.id}")
        one = self.requests.get(task.id)
        if one is None:
            return
        if one.state == "over" and one.outcome in ("cancelled waiting", "404", "503", "200", "500"):
            self.breaks("at most once", f"request {task.id} began in {replica.id} after it was over: {one.outcome}")
        told = one.ended_at + CANCELLED_S < self.network.world.time()
        if one.state == "over" and one.outcome in ("cancelled", "504") and told and replica.id not in self.excused:
            self.breaks("at most once", f"request {task.id} began in {replica.id} long after it was {one.outcome}")
        if one.not_started:
            self.breaks("at most once", f"request {task.id} began in {replica.id} after it was answered as not started")
        self._in_time(one, replica)
        if not one.sent_to or one.sent_to[-1][0] != replica.id:
            sent = ", ".join(id for id, _ in one.sent_to)
            if one.state != "over":
                self.breaks("at most once", f"request {task.id} began in {replica.id}, but it was sent to {sent}")
            return
        if not one.big:
            at = (replica.id, one.sent_to[-1][1])
            if self._begun.get(at, 0) > one.number:
                self.breaks("FIFO", f"request {task.id} began in {replica.id} after one that was sent later")
            self._begun[at] = one.number
        self._served_as_said(one, replica)

    def _in_time(self, one: Asked, replica: SimReplica) -> None:
        """The replica counts from when it has read the request: it may be late by as long as that takes."""
        late_s = self.network.world.time() - one.due - self.network.slowest_s
        if late_s > ROUNDED_S and self.frozen_until.get(replica.id, 0.0) < one.sent_at:
            self.breaks("deadlines", f"request {one.id} began in {replica.id} {late_s:.4f} s after its deadline")

    # --- changes ---

    def issued(self, of: str, says: Any) -> Change:
        """Somebody asks for a change."""
        change = Change(of, says, self.network.world.time())
        self.changes.append(change)
        return change

    def _overtaken(self, change: Change, at: float) -> Change | None:
        """A change of the same thing that came after `change` was known to be over, and was confirmed before `at`."""
        for later in self.changes:
            if later.of == change.of and later.issued > change.ended and later.confirmed < at:
                return later
        return None

    def _served_as_said(self, one: Asked, replica: SimReplica) -> None:
        of = f"code {replica.tag}"
        mine = [change for change in self.changes if change.of == of and change.says == replica.code]
        for change in mine:
            if later := self._overtaken(change, one.asked_at):
                self.breaks(
                    "changes",
                    f"request {one.id} of {one.asked_at:.4f} ran {replica.code!r} in {replica.id}, though "
                    f"{later.says!r} was in force at {later.confirmed:.4f}",
                )
        if one.asked_by < one.sent_by:  # it waited while its router caught up, and keeps its place in that line
            return
        policies = [change for change in self.changes if change.of == one.name and change.says is not None]
        standing = [change for change in policies if not self._overtaken(change, one.asked_at)]
        if policies and not any(replica.tag in change.says for change in standing):
            self.breaks("changes", f"request {one.id} went to backend {replica.tag!r} against a confirmed set_traffic")

    # --- snapshots ---

    def follows(self, router: SimRouter, old: Snapshot, new: Snapshot, living: Iterable[SimReplica | str]) -> None:
        """A router is about to go from one snapshot to another."""
        known = self._snapshots.setdefault(new.version, new)
        if known != new:
            self.breaks("ids", f"snapshot {new.version} says two things")
        ready = set(living)
        # A router may have missed the one before.
        before = {view.tag: view for view in self._snapshots.get(new.version - 1, old).backends}
        for view in new.backends:
            was = before.get(view.tag)
            if was is None:
                continue
            wanted = view.settings.num_replicas
            if len(view.replicas) < wanted:
                listed = {one.id for one in view.replicas}
                lost = [one.id for one in was.replicas if one.id not in listed and one.id in ready]
                if was.version != view.version and new.version & 0xFFFFFFFF == 1:
                    # The version was stored as the goal, its controller was killed before it could say so, and one
                    # of its replicas died before the next one looked: two accidents at once.
                    lost = [] if view.version in self.died_of[view.tag] else lost
                if lost:
                    self.breaks(
                        "rollouts",
                        f"snapshot {new.version} lists {len(view.replicas)} of {wanted} replicas of {view.tag!r} "
                        f"without {', '.join(lost)}, ready and listed before",
                    )

    def leaves(self, id: str, how: str, routers: Iterable[SimRouter], replica: SimReplica | None) -> None:
        """The controller tells a replica to drain or to end."""
        if id in self.excused:
            return
        for router in routers:
            fenced = replica is not None and wire_name(router.name) in replica.worker.fenced
            if not fenced and any(id == one.id for view in router.router.snapshot.backends for one in view.replicas):
                self.breaks("rollouts", f"{id} {how}, though {router.name} follows a snapshot that lists it")

    # --- replicas ---

    def starts(
        self, id: str, spec: messages.ReplicaSpec, living: dict[str, messages.ReplicaSpec], used: set[str]
    ) -> None:
        """The engine starts a replica."""
        if id in used:
            self.breaks("ids", f"the id {id} is used again")
        for other, theirs in living.items():
            same = (theirs.backend, theirs.version) == (spec.backend, spec.version)
            if same and theirs.code_path != spec.code_path != "":  # "": its blob is gone, it will not come up
                what = f"{id} is version {spec.version} with {spec.code_path!r}"
                self.breaks("ids", f"{what}; {other} is, with {theirs.code_path!r}")

    # --- the end ---

    def at_the_end(self, unmet: Iterable[str]) -> None:
        """All faults are over, and there was time enough."""
        for router, waiting in self.open.items():
            for one in waiting:
                sent = ", ".join(id for id, _ in one.sent_to)
                what = f"request {one.id} of {router.name} is still {one.state}"
                self.breaks("nothing lost", f"{what}; sent to {sent or 'nobody'}")
        for what in unmet:
            self.breaks("rollouts", f"at the end: {what}")
