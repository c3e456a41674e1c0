"""Bring an instance to life from the driver, and take it down with it.

The order of things is the start-up time: the socket is bound first, so that a port in use is an
error before anything ran; then the supervisor is executed, and while it imports what it needs,
the driver imports its own half (the event loop, the router).

Whoever started an instance that is not detached owns its end: `Ending` runs once, at shutdown, at
the end of a `with` block, when the client is collected, or when the interpreter exits. A driver
that is killed is noticed by the supervisor.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

from headgate.engine import boot, directory, listener
from headgate.errors import HeadgateError, InstanceError

if TYPE_CHECKING:
    from types import FrameType

    from headgate.config import HTTPOptions
    from headgate.instance import Instance

#: Beyond the 20 s that requests in flight are given.
_SHUTDOWN_S = 30.0
_TERMINATED = 128 + signal.SIGTERM


class Launched:
    """A supervisor that was executed: where it lives and what it listens on."""

    def __init__(self, path: str, token: bytes, pid: int, address: str | None) -> None:
        self.path = path
        self.token = token
        self.pid = pid
        self.address = address
        self.pidfd = os.pidfd_open(pid)


def launch(options: HTTPOptions, namespace: str, detached: bool) -> Launched:
    """Bind, write the run directory, execute the supervisor. Raises InstanceError, nothing is left then."""
    root = directory.base()
    directory.sweep(root)
    if detached and directory.find(root, namespace):
        raise InstanceError(
            f"a detached instance of namespace {namespace!r} runs already; use headgate.connect({namespace!r}), "
            "or give this one another namespace"
        )
    http = None if not options.serves else listener.bind(options.host or "127.0.0.1", options.port)
    name = directory.name_of(namespace) if detached else os.urandom(4).hex()
    try:
        path, lock = directory.create(root, name)
    except BaseException:
        if http is not None:
            http.close()
        raise
    control = None
    try:
        token = directory.write_token(path)
        control = listener.bind_unix(os.path.join(path, "control.sock"))
        scheme = "https" if options.ssl_certfile else "http"
        address = None if http is None else listener.address_of(http, scheme)
        if address is not None:
            _write(os.path.join(path, "address"), address)
        record = _record(options, path, token, namespace, detached, lock, control.fileno(), http)
        pid = boot.spawn(record)
        return Launched(path, token, pid, address)
    except BaseException:
        directory.remove(path)
        raise
    finally:
        os.close(lock)
        for sock in (control, http):
            if sock is not None:
                sock.close()


def _record(
    options: HTTPOptions, path: str, token: bytes, namespace: str, detached: bool, lock: int, control: int, http: Any
) -> boot.Boot:
    fields = options.to_dict()
    middlewares = fields.pop("middlewares")
    fields["location"] = str(fields["location"]) if fields["location"] is not None else None
    packed = b""
    if middlewares:
        import cloudpickle

        packed = cloudpickle.dumps(middlewares)
    return boot.Boot(
        instance=os.path.basename(path),
        namespace=namespace,
        directory=path,
        token=token,
        detached=detached,
        driver_pid=os.getpid(),
        lock_fd=lock,
        control_fd=control,
        http_fd=-1 if http is None else http.fileno(),
        http=fields,
        middlewares=packed,
        sys_path=[os.path.abspath(entry) for entry in sys.path],
        cwd=os.getcwd(),
    )


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(fd, "w") as file:
        file.write(text)


def reap(launched: Launched, timeout_s: float) -> bool:
    """Wait for the supervisor's end and collect it; False if it lives on."""
    poll = select.poll()
    poll.register(launched.pidfd, select.POLLIN)
    if not poll.poll(timeout_s * 1000):
        return False
    try:
        os.waitpid(launched.pid, 0)
    except ChildProcessError:  # somebody else's wait() took it
        pass
    return True


class Ending:
    """Ends an instance that this process started; `now` may be called any number of times."""

    def __init__(self, launched: Launched, instance: Instance, detached: bool) -> None:
        self._launched = launched
        self._instance = instance
        self._detached = detached
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._done = False

    def now(self, *, force: bool = False) -> None:
        """Drain and end everything; `force` kills. Returns when all processes are gone."""
        if os.getpid() != self._owner:  # a fork of the driver owns nothing
            return
        if threading.current_thread() is self._instance.thread.thread:
            # collected on the headgate thread, which must not wait for itself
            threading.Thread(target=self.now).start()
            return
        with self._lock:
            if self._done:
                return
            self._done = True
        _restore_sigterm()
        try:
            if force:
                self._kill()
            else:
                self._ask()
        finally:
            self._collect()

    def _ask(self) -> None:
        try:
            self._instance.call("shutdown", timeout_s=_SHUTDOWN_S)
        except HeadgateError:  # it is over already
            pass

    def _kill(self) -> None:
        try:
            signal.pidfd_send_signal(self._launched.pidfd, signal.SIGTERM)
        except ProcessLookupError:
            pass

    def _collect(self) -> None:
        launched = self._launched
        if not reap(launched, 2.0):
            self._kill()
            if not reap(launched, 2.0):
                signal.pidfd_send_signal(launched.pidfd, signal.SIGKILL)
                reap(launched, 2.0)
        self._instance.leave()
        os.close(launched.pidfd)
        if os.path.isdir(launched.path):  # the supervisor was killed: its children ended with it
            shutil.rmtree(launched.path, ignore_errors=True)

    def force(self) -> None:
        """End everything now, also in the middle of `now`."""
        self._kill()
        reap(self._launched, 2.0)

    def release(self) -> None:
        """A detached instance outlives its starter: leave it, and collect nothing."""
        self._instance.leave()


_sigterm_users = 0


def end_with_interpreter(client: Any, ending: Ending, detached: bool) -> weakref.finalize[Any, Any]:
    """End the instance when `client` is collected or the interpreter exits, also by SIGTERM."""
    if not detached:
        _catch_sigterm()
    return weakref.finalize(client, ending.release if detached else ending.now)


def _catch_sigterm() -> None:
    """Make SIGTERM an ordinary exit, if nobody else handles it."""
    global _sigterm_users
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _exit)
        _sigterm_users = 1
    elif signal.getsignal(signal.SIGTERM) is _exit:
        _sigterm_users += 1


def _exit(signum: int, frame: FrameType | None) -> None:
    sys.exit(_TERMINATED)


def _restore_sigterm() -> None:
    global _sigterm_users
    if threading.current_thread() is not threading.main_thread() or not _sigterm_users:
        return
    _sigterm_users -= 1
    if not _sigterm_users and signal.getsignal(signal.SIGTERM) is _exit:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
