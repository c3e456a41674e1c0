"""Bring an instance to life from the driver, and take it down with it.

The order of things is the start-up time. The supervisor is executed first of all (starting.py), and
while it imports what it needs, the driver imports its own half, checks, binds the socket and writes
the run directory; a port in use is an error before any of the other processes ran.

Whoever started an instance that is not detached owns its end: `Ending.now` runs once, at shutdown, at
the end of a `with` block, when the client is collected, or when the interpreter exits. A driver
that is killed is noticed by the supervisor; a supervisor that is killed takes all others along, and
what it left is removed here.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Protocol

from headgate.engine import boot, directory, listener
from headgate.errors import HeadgateError, InstanceError
from headgate.params import pack
from headgate.signals import Held, catch_sigterm, release_sigterm
from headgate.wire.address import listen
from headgate.wire.own_thread import is_own

if TYPE_CHECKING:
    from headgate.config import HTTPOptions
    from headgate.engine.ignition import Spark
    from headgate.instance import Instance

#: The longest that a start may take; then something is wrong with this machine.
START_S = 60.0
#: The longest that a shutdown may take: beyond the 20 s that requests in flight are given.
SHUTDOWN_S = 30.0
#: How long processes may take to end once they were told or killed.
_DYING_S = 2.0
#: How often what a killed instance left is looked for.
_SWEEPS = 10


class Launch(Protocol):
    """What was started, as far as ending it goes; launch_ray.py has the other one."""

    def kill(self, number: int = ...) -> None: ...
    def reap(self) -> object: ...
    def collect(self, timeout_s: float = ...) -> bool: ...


class Launched:
    """A supervisor that this process executed: where it lives, what it listens on, and its end."""

    def __init__(self, path: str, token: bytes, pid: int, address: str | None) -> None:
        self.path = path
        self.token = token
        self.address = address
        self._pidfd = os.pidfd_open(pid)
        self._lock = threading.RLock()  # a signal handler may come here while its thread is in here

    def kill(self, number: int = signal.SIGTERM) -> None:
        """End all processes of the instance: SIGTERM lets the supervisor clean up."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            if self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, number)

    def reap(self) -> None:
        """The instance is over: collect what is left of it."""
        self.collect()

    def collect(self, timeout_s: float = _DYING_S) -> bool:
        """Wait for the supervisor's end, reap it and remove what it left; False if it lives on."""
        with self._lock:
            if self._pidfd < 0:
                return True
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            if not poll.poll(timeout_s * 1000):
                return False
            with contextlib.suppress(ChildProcessError):  # somebody else's wait() took it
                os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
            os.close(self._pidfd)
            self._pidfd = -1
        for _ in range(_SWEEPS):
            if not os.path.isdir(self.path):
                break
            directory.sweep(os.path.dirname(self.path))  # it was killed; so was a child that it had just forked,
            time.sleep(0.005)  # which may hold the lock for a moment
        return True


def launch(spark: Spark, options: HTTPOptions, namespace: str, detached: bool) -> Launched:
    """Bind, write the run directory, tell the supervisor. Raises HeadgateError, no file is left then."""
    middlewares = pack("http_options: middlewares", options.middlewares) if options.middlewares else b""
    root = directory.base()
    directory.sweep(root)
    if detached and directory.find(root, namespace):
        raise InstanceError(
            f"a detached instance of namespace {namespace!r} runs already; use headgate.connect({namespace!r}), "
            "or give this one another namespace"
        )
    with contextlib.ExitStack() as copies:  # of what the supervisor inherits
        http = _listen(options)
        if http is not None:
            copies.enter_context(http)
        name = directory.name_of(namespace) if detached else spark.instance
        path, lock = directory.create(root, name)
        copies.callback(os.close, lock)
        with contextlib.ExitStack() as undo:
            undo.callback(directory.remove, path)
            directory.write_instance(path, spark.instance)
            token = directory.write_token(path)
            control = copies.enter_context(listen(os.path.join(path, directory.CONTROL)))
            address = _write_address(path, http, options)
            http_fields = portable(options)
            tls_fd = boot.tls_memory(http_fields)
            if tls_fd >= 0:
                copies.callback(os.close, tls_fd)
            record = boot.Boot(
                instance=spark.instance,
                namespace=namespace,
                directory=path,
                token=token,
                detached=detached,
                driver_pid=os.getpid(),
                lock_fd=lock,
                control_fd=control.fileno(),
                http_fd=-1 if http is None else http.fileno(),
                tls_fd=tls_fd,
                http=http_fields,
                middlewares=middlewares,
            )
            boot.tell(spark, record)
            undo.pop_all()
            return Launched(path, token, spark.pid, address)


def _listen(options: HTTPOptions) -> socket.socket | None:
    if not options.serves:
        return None
    host = listener.node_address() if options.host == "node" else options.host or ""
    return listener.bind(host, options.port)


def _write_address(path: str, http: socket.socket | None, options: HTTPOptions) -> str | None:
    """What a client's http_address shows, kept in the run directory for `connect`."""
    if http is None:
        return None
    address = listener.address_of(http, "https" if options.ssl_certfile else "http")
    directory.write_address(path, address)
    return address


def portable(options: HTTPOptions) -> dict[str, Any]:
    """The fields of `options` as they go into a boot record: all but the middlewares; paths in full."""
    fields = {name: value for name, value in options.to_dict().items() if name != "middlewares"}
    for name, as_text in (("location", str), ("ssl_certfile", os.path.abspath), ("ssl_keyfile", os.path.abspath)):
        if fields[name] is not None:
            fields[name] = as_text(fields[name])
    return fields


class Ending:
    """Ends an instance that this process started; `now` may be called any number of times.

    instance   this process's membership in it, once it has joined
    """

    def __init__(self, launched: Launch, detached: bool) -> None:
        self.instance: Instance | None = None
        self._launched = launched
        self._detached = detached
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._done = False
        self._catches_sigterm = False

    def join(self, instance: Instance, held: Held) -> str | None:
        """Become a member, and return when the instance is ready: the URL of the proxy for this node.

        held   the signals, which may come while this waits

        Raises InstanceError if it will not be.
        """
        self.instance = instance
        instance.when_gone(self._launched.reap)
        instance.begin()
        try:
            with held.let():
                instance.join(timeout_s=START_S)
                ready = instance.call("wait_ready", timeout_s=START_S)
        except TimeoutError:
            raise InstanceError(f"it was not ready after {START_S:g} s") from None
        address: str | None = ready["http"]
        return address

    def with_client(self, client: object) -> None:
        """From now on the instance ends when `client` is collected or the interpreter exits, by SIGTERM too."""
        if self._detached:
            weakref.finalize(client, self._launched.collect, 0.0)
        else:
            self._catches_sigterm = catch_sigterm()
            weakref.finalize(client, self.now)

    def now(self, *, force: bool = False) -> None:
        """Drain and end everything; `force` kills. Returns when all processes are gone.

        But on a thread of headgate's own, of this instance or of another one: there the client was collected.
        """
        if os.getpid() != self._owner:  # a fork of the driver owns nothing
            return
        if is_own():
            self._end_aside(force)
        else:
            self._end(force)

    def _end_aside(self, force: bool) -> None:
        """Have a thread do it that the interpreter waits for before it exits."""
        try:
            threading.Thread(target=self._end, args=(force,), name="headgate-end", daemon=False).start()
        except RuntimeError:  # there is none to be had
            self._end(force=True)

    def _end(self, force: bool) -> None:
        with self._lock:
            if self._done:
                return
            self._done = True
            if self._catches_sigterm:
                release_sigterm()
            try:
                if not force:
                    self._ask()
            except BaseException:
                self._launched.kill()
                raise
            finally:
                self._collect(force)

    def _ask(self) -> None:
        assert self.instance is not None
        with contextlib.suppress(HeadgateError, TimeoutError):  # it is over already, or does not answer
            self.instance.call("shutdown", timeout_s=SHUTDOWN_S)

    def _collect(self, force: bool) -> None:
        """See to the end of all processes. What kills and leaves is not interrupted, what waits for them is."""
        with Held() as held:
            try:
                if force or not self._is_over(held):
                    self._kill(held)
            except BaseException:  # whoever interrupts that does not want to wait
                self._kill(held)
                raise
            finally:
                if self.instance is not None:
                    self.instance.leave()

    def _kill(self, held: Held) -> None:
        self._launched.kill()
        if not self._is_over(held):
            self._launched.kill(signal.SIGKILL)
            self._is_over(held)

    def _is_over(self, held: Held) -> bool:
        with held.let():
            return self._launched.collect()

    def force(self) -> None:
        """End everything now, also in the middle of `now`."""
        self._launched.kill()
        if not self._launched.collect():
            self._launched.kill(signal.SIGKILL)
            self._launched.collect()
