"""The supervisor: forks, reaps, holds the listening sockets, restarts the controller, and nothing else.

A fresh interpreter with one thread and no event loop, into which headgate is imported and no user
code ever. Its children are forks of it: they start in milliseconds and share its memory.

It ends, and with it all its processes, when its driver ends (unless detached) or the process that it
was told to watch instead, when the controller exits with status 0, on SIGTERM, and when it is killed
itself: then the kernel takes the children along (engine/leash.py).

On a node of a cluster an agent is in the controller's place (engine/agent.py), under its name here.

One thread is a rule: PR_SET_PDEATHSIG fires when the *thread* that forked ends, and a fork with
other threads around inherits their locks. What children do is told by dotted name in roles.py.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

import msgspec

from headgate.engine import asks, child, directory, ignition, leash, strays
from headgate.engine.boot import Boot, ChildBoot
from headgate.engine.roles import ROLES, Preloads, Role

#: The restarts of a controller that keeps dying young: at once, at once, then 0.05 s doubling to 5 s.
_YOUNG_S = 1.0
_AT_ONCE = 2
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 5.0
#: A controller that a signal has stopped is replaced after so long; a debugger's stop is no such signal.
_STOPPED_S = 10.0
#: How long the end waits for killed processes that the kernel cannot end yet (stuck in a device).
_LAST_WAIT_S = 2.0
#: How long it waits for the children's groups before it looks for adopted processes that left them.
_GROUPS_WAIT_S = 0.01


class _Running(NamedTuple):
    id: str
    role: str
    name: str
    pid: int
    started: float
    note: bytes


class Supervisor:
    """One instance's processes. `run` returns when all of them are gone and the run directory is removed."""

    def __init__(self, boot: Boot, roles: Mapping[str, Role] = ROLES) -> None:
        self._boot = boot
        self._roles = roles
        self._pid = os.getpid()
        self._poll = select.poll()
        self._children: dict[int, _Running] = {}
        self._count = 0
        self._incarnation = 0
        self._young_deaths = 0
        self._controller_due: float | None = 0.0
        self._stopped_until: float | None = None  # the controller, or else it is killed
        self._ask: asks.Line | None = None
        self._preloads = Preloads(roles, with_proxy=boot.http_fd >= 0)
        self._over = False
        # read and write ends: signals arriving here; the leash on the children
        self._wake, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._leash, self._leash_writer = os.pipe2(os.O_CLOEXEC)
        self._memory = os.memfd_create("headgate-goals", os.MFD_CLOEXEC)
        self._watched = -1

    def run(self) -> None:
        """Supervise until the instance is over."""
        try:
            self._prepare()
            while not self._over:
                self._turn()
        finally:
            self._end()

    # --- the loop -----------------------------------------------------------------------------

    def _prepare(self) -> None:
        gc.disable()  # until all is imported
        leash.set_title("headgate-super")
        leash.adopt_orphans()
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, _noted)
        self._poll.register(self._wake, select.POLLIN)
        if self._boot.watch_pid:
            self._watch(self._boot.watch_pid)
        elif not self._boot.detached:
            self._watch(self._boot.driver_pid)
            if os.getppid() != self._boot.driver_pid:  # the pid may be another process's by now
                self._over = True

    def _watch(self, pid: int) -> None:
        try:
            self._watched = os.pidfd_open(pid)
        except ProcessLookupError:
            self._over = True
            return
        self._poll.register(self._watched, select.POLLIN)

    def _turn(self) -> None:
        if self._controller_due is not None and time.monotonic() >= self._controller_due:
            self._start_controller()
        if self._stopped_until is not None and time.monotonic() >= self._stopped_until:
            self._kill_stopped()
        events = self._poll.poll(self._timeout_ms())
        for fd, event in events:
            if fd == self._watched:
                self._over = True
            elif fd == self._wake:
                self._take_signals()
            elif self._ask is not None and fd == self._ask.fileno():
                self._serve(event)
        if not events and self._preloads:
            self._preloads.do_one()

    def _timeout_ms(self) -> float | None:
        if self._preloads and self._controller_due is None:
            return 0
        moments = [each for each in (self._controller_due, self._stopped_until) if each is not None]
        if not moments:
            return None
        return max(0.0, min(moments) - time.monotonic()) * 1000 + 1

    def _take_signals(self) -> None:
        numbers = os.read(self._wake, 512)
        if signal.SIGTERM in numbers:
            self._over = True
        self._reap()
        self._look_at_controller()

    # --- children -----------------------------------------------------------------------------

    def _start_controller(self) -> None:
        self._preloads.do_for("controller")
        self._controller_due = None
        self._incarnation += 1
        if self._ask is not None:
            self._drop_ask()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ask = asks.Line(ours)
        self._poll.register(self._ask, select.POLLIN)
        try:
            self._fork("controller#", "controller", "controller", b"", theirs)
        except OSError:  # no room for a process now
            self._controller_ended(status=-1, lived_s=0.0)
        finally:
            theirs.close()
        if self._incarnation == 1:
            self._fork_unasked()

    def _look_at_controller(self) -> None:
        """Note whether a signal has stopped it, or lets it go on."""
        for running in self._children.values():
            if running.role == "controller":
                with contextlib.suppress(ChildProcessError):  # it ended this very moment
                    found = os.waitid(os.P_PID, running.pid, os.WSTOPPED | os.WCONTINUED | os.WNOHANG)
                    if found is not None:
                        is_stopped = found.si_code != os.CLD_CONTINUED
                        self._stopped_until = time.monotonic() + _STOPPED_S if is_stopped else None

    def _kill_stopped(self) -> None:
        """The controller was stopped for too long: its end brings the next one."""
        self._stopped_until = None
        for running in self._children.values():
            if running.role == "controller":
                _kill_group(running.pid)

    def _fork_unasked(self) -> None:
        for name, role in self._roles.items():
            if role.unasked and (name != "proxy" or self._boot.http_fd >= 0):
                self._forked(asks.Fork(0, name, name))

    def _fork(self, id: str, role: str, name: str, note: bytes, ask: socket.socket | None = None) -> _Running:
        self._preloads.do_for(role)
        gc.freeze()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
            if pid == 0:
                self._become(id, role, name, ask)  # never returns
            with contextlib.suppress(OSError):  # the child does the same: whoever is first
                os.setpgid(pid, pid)
            running = _Running(id, role, name, pid, time.monotonic(), note)
            self._children[pid] = running
            return running
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _become(self, id: str, role: str, name: str, ask: socket.socket | None) -> NoReturn:
        mine = [self._wake, self._wake_writer, self._leash_writer, self._watched]
        if self._ask is not None:
            mine.append(self._ask.fileno())
        about = ChildBoot(self._boot, id, role, name, self._incarnation)
        if role == "controller":
            about.memory_fd = self._memory
        else:
            mine.append(self._memory)
        child.run(about, self._roles[role], self._pid, self._leash, mine, ask)

    def _reap(self) -> None:
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            ended = self._children.pop(found.si_pid, None)
            if ended is not None:
                _kill_group(found.si_pid)  # what it forked; not reaped yet, so the number is still its own
            _, status = os.waitpid(found.si_pid, 0)
            if ended is not None and ended.role == "replica":
                with contextlib.suppress(OSError):  # it never listened
                    os.unlink(directory.replica_socket(self._boot.directory, ended.id))
            if ended is not None:
                self._tell_exit(ended, status)
            if ended is None or ended.role == "replica":
                self._kill_strays()

    def _kill_strays(self) -> None:
        """End what replicas that are gone have left in sessions of its own; its parent's end brings it here."""
        for pid in strays.adopted(set(self._children)):
            if self._has_lost_its_replica(pid):
                with contextlib.suppress(OSError):  # another user's; what is not reaped yet is still itself
                    os.kill(pid, signal.SIGKILL)

    def _has_lost_its_replica(self, pid: int) -> bool:
        """Whether an adopted process is what user code of a replica has started, and that replica is gone."""
        living = [running.id for running in self._children.values() if running.role == "replica"]
        replica = strays.variable_of(pid, ignition.REPLICA_VARIABLE)
        if replica is not None:
            return replica not in living
        mark = child.mark_on(pid)
        if mark is None or mark >> 32 != self._pid or mark in {child.mark(self._pid, id) for id in living}:
            return False
        # An instance that a replica has started is its own.
        return strays.variable_of(pid, ignition.INSTANCE_VARIABLE) in (None, self._boot.instance)

    def _tell_exit(self, ended: _Running, status: int) -> None:
        if ended.role == "controller":
            self._controller_ended(status, time.monotonic() - ended.started)
        else:
            self._send(asks.Exited(ended.id, ended.pid, status))

    def _controller_ended(self, status: int, lived_s: float) -> None:
        self._drop_ask()
        self._stopped_until = None
        if status == 0:
            self._over = True
            return
        self._young_deaths = self._young_deaths + 1 if lived_s < _YOUNG_S else 0
        late = self._young_deaths - _AT_ONCE
        pause = min(_FIRST_PAUSE_S * 2.0 ** min(late - 1, 10), _LONGEST_PAUSE_S) if late > 0 else 0.0
        self._controller_due = time.monotonic() + pause

    # --- what the controller asks -------------------------------------------------------------

    def _serve(self, event: int) -> None:
        assert self._ask is not None
        if event & select.POLLOUT:
            self._listen_for(full=not self._ask.flush())
        if not event & (select.POLLIN | select.POLLHUP | select.POLLERR):
            return
        data = self._ask.receive()
        if data:
            self._answer(asks.decode_ask(data))
        elif data is not None:  # its end is closed; that the process is gone comes as a signal
            self._drop_ask()

    def _answer(self, ask: asks.Ask) -> None:
        match ask:
            case asks.Fork():
                self._send(self._forked(ask))
            case asks.Kill():
                for running in self._children.values():
                    if running.id == ask.id and running.role != "controller":
                        _kill_group(running.pid)
            case asks.List():
                listed = [running for running in self._children.values() if running.role != "controller"]
                for running in listed:
                    self._send(asks.Child(*running))
                self._send(asks.Listed(len(listed), ask.n))
            case asks.CloseListener():
                if self._boot.http_fd >= 0:
                    os.close(self._boot.http_fd)
                    self._boot = msgspec.structs.replace(self._boot, http_fd=-1)

    def _forked(self, ask: asks.Fork) -> asks.Forked:
        if ask.role not in self._roles or ask.role == "controller":
            return asks.Forked(ask.n, error=f"there is no role {ask.role!r}")
        self._count += 1
        try:
            running = self._fork(f"{ask.name}#{self._count:04d}", ask.role, ask.name, ask.note)
        except OSError as error:
            return asks.Forked(ask.n, error=f"cannot fork a process: {error.strerror}")
        return asks.Forked(ask.n, running.id, running.pid, running.started)

    def _send(self, answer: asks.Answer) -> None:
        if self._ask is not None:
            self._listen_for(full=not self._ask.send(asks.encode(answer)))

    def _listen_for(self, *, full: bool) -> None:
        """Asks, and room for answers if there is none; never waits, for the controller may be stopped."""
        assert self._ask is not None
        self._poll.modify(self._ask, select.POLLIN | (select.POLLOUT if full else 0))

    def _drop_ask(self) -> None:
        if self._ask is not None:
            self._poll.unregister(self._ask)
            self._ask.close()
            self._ask = None

    # --- the end ------------------------------------------------------------------------------

    def _end(self) -> None:
        begun = time.monotonic()
        for pid in self._children:
            _kill_group(pid)
        while (waited_s := time.monotonic() - begun) < _LAST_WAIT_S:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:  # none left, adopted ones neither
                break
            if pid == 0:
                if waited_s > _GROUPS_WAIT_S:
                    leash.kill_children_of(self._pid)
                time.sleep(0.001)
        directory.remove(self._boot.directory)


def _noted(number: int, frame: object) -> None:
    """A handler that does nothing: with one, the signal's number is written to the wake-up pipe."""


def _kill_group(pid: int) -> None:
    with contextlib.suppress(OSError):  # gone, or none of it may be killed by us
        os.killpg(pid, signal.SIGKILL)


def main(boot: Boot, roles: Mapping[str, Role] = ROLES) -> NoReturn:
    """Supervise an instance in this process, which does nothing else and then ends."""
    status = 1
    try:
        if sys.stdout is not None:  # whole lines: a child that is killed loses none
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        Supervisor(boot, roles).run()
        status = 0
    except (Exception, KeyboardInterrupt):  # noqa: BLE001 - the outermost frame of a process
        sys.excepthook(*sys.exc_info())
    finally:
        child.flush()
        os._exit(status)
