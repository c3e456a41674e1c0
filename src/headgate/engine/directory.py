"""The run directory of an instance: its sockets, its token, and the lock that says it lives.

    <base>/1f3a90c2      an instance that ends with its client; the name is the instance's id
    <base>/d-default     the detached instance of namespace "default"

Rule: the lock (flock on the file `lock`) is the truth. Who holds it lives; the lock belongs to an
open file description that the supervisor inherits, so it ends with the supervisor however that
ends. A directory whose lock is free is a leftover, and only its new holder may remove it.

`<base>` is $XDG_RUNTIME_DIR/headgate, else headgate-<uid> in the temporary directory: 0700 and ours.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import time

from headgate.errors import InstanceError
from headgate.wire.address import MAX_UNIX_PATH_BYTES

LOCK = "lock"
TOKEN = "token"
ADDRESS = "address"
INSTANCE = "instance"
CONTROL = "control.sock"

#: Room for the name of any socket in a run directory, with its slash.
_SOCKET_NAME_BYTES = 24
#: Room for the name of a run directory, with its slash: "d-" and 32 characters.
_DIRECTORY_NAME_BYTES = 35
_OURS = re.compile(r"[0-9a-f]{8}|d-[A-Za-z0-9._-]{1,32}")
_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,31}")
#: How long a lock must stay taken to count: those who only look at one hold it for microseconds.
_PATIENCE_S = 0.1


def base() -> str:
    """The directory of all of this user's run directories on this machine; made if missing.

    Raises InstanceError if no place is short enough for unix sockets, or if somebody else made it.
    """
    uid = os.geteuid()
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    places = [f"{runtime}/headgate"] if runtime.startswith("/") and os.access(runtime, os.W_OK) else []
    temporary = (os.environ.get("TMPDIR", ""), "/tmp")
    places += [f"{tmp}/headgate-{uid}" for tmp in temporary if tmp.startswith("/")]
    room = MAX_UNIX_PATH_BYTES - _SOCKET_NAME_BYTES - _DIRECTORY_NAME_BYTES
    for place in places:
        if len(os.fsencode(place)) <= room:
            return _private(place)
    raise InstanceError(f"no place for the run directory: {places} are longer than {room} bytes")


def _private(path: str) -> str:
    try:
        os.makedirs(path, 0o700, exist_ok=True)
        found = os.lstat(path)
    except OSError as error:
        raise InstanceError(
            f"cannot make the run directory {path}: {error.strerror}; set XDG_RUNTIME_DIR or TMPDIR to a "
            "directory that you may write to"
        ) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise InstanceError(
            f"{path} is not a private directory of this user (owner {found.st_uid}, mode "
            f"{stat.filemode(found.st_mode)}); remove it or set XDG_RUNTIME_DIR"
        )
    return path


def name_of(namespace: str) -> str:
    """The name of the run directory of a detached instance.

    >>> name_of("default")
    'd-default'
    """
    if _PLAIN.fullmatch(namespace):
        return f"d-{namespace}"
    import hashlib

    return "d-" + hashlib.sha256(namespace.encode(errors="surrogatepass")).hexdigest()[:32]


def create(root: str, name: str) -> tuple[str, int]:
    """Make `<root>/<name>`, or take over a leftover of that name: its path, and its lock as an open fd.

    Raises InstanceError if its holder lives, or if it is not this user's alone. Whoever inherits the fd keeps
    the lock.
    """
    path = os.path.join(root, name)
    give_up = time.monotonic() + _PATIENCE_S
    while (lock := _lock(path, make=True)) is None:
        if time.monotonic() > give_up:
            raise InstanceError(f"an instance already runs in {path}; use headgate.connect() to reach it")
        time.sleep(0.002)
    try:
        _private(path)
    except InstanceError:
        os.close(lock)
        raise
    _end_strays(path)
    _empty(path, keep=LOCK)
    return path, lock


def is_alive(path: str) -> bool:
    """Whether the instance of that run directory lives: whether somebody holds its lock."""
    give_up = time.monotonic() + _PATIENCE_S
    while os.path.exists(os.path.join(path, LOCK)):
        lock = _lock(path, make=False)
        if lock is not None:
            os.close(lock)
            return False
        if time.monotonic() > give_up:
            return True
        time.sleep(0.002)
    return False


def find(root: str, namespace: str) -> str | None:
    """The run directory of the detached instance of `namespace`, if it lives."""
    path = os.path.join(root, name_of(namespace))
    return path if is_alive(path) else None


def sweep(root: str) -> list[str]:
    """Remove the run directories whose instances have ended: their paths."""
    removed = []
    for name in os.listdir(root):
        path = os.path.join(root, name)
        if not _OURS.fullmatch(name) or (lock := _lock(path, make=True)) is None:
            continue
        _end_strays(path)
        remove(path)
        os.close(lock)
        removed.append(path)
    return removed


def _end_strays(path: str) -> None:
    """End what is left of the processes of an instance that was killed, with its lock held."""
    try:
        with open(os.path.join(path, INSTANCE), encoding="ascii") as file:
            instance = file.read()
    except FileNotFoundError:  # a new directory
        return
    if instance:
        from headgate.engine import strays

        strays.kill_all_of(instance)


def write_instance(path: str, instance: str) -> None:
    """Note the id that all processes of the instance carry, for whoever sweeps what is left of it."""
    fd = os.open(os.path.join(path, INSTANCE), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(fd, "w", encoding="ascii") as file:
        file.write(instance)


def replica_socket(path: str, id: str) -> str:
    """Where the replica of that id listens.

    >>> replica_socket("/run/headgate/1f3a90c2", "iris#0007")
    '/run/headgate/1f3a90c2/r0007.sock'
    """
    return os.path.join(path, f"r{id.rpartition('#')[2]}.sock")


def remove(path: str) -> None:
    """Delete a run directory, with the lock held; the lock's name goes last. What is gone already is fine."""
    _empty(path, keep=LOCK)
    for delete, victim in ((os.unlink, os.path.join(path, LOCK)), (os.rmdir, path)):
        try:
            delete(victim)
        except OSError:  # gone, or somebody put a file there: then it stays
            return


def write_token(path: str) -> bytes:
    """A new secret of 32 bytes for the instance, kept in its run directory (0600) for `connect`."""
    token = os.urandom(32)
    fd = os.open(os.path.join(path, TOKEN), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(fd, "wb") as file:
        file.write(token)
    return token


def read_token(path: str) -> bytes:
    """The secret of the instance of that run directory; InstanceError if it is gone."""
    try:
        with open(os.path.join(path, TOKEN), "rb") as file:
            return file.read()
    except OSError as error:
        raise InstanceError(f"the instance in {path} is gone ({error.strerror}); start a new one") from None


def write_address(path: str, address: str) -> None:
    """Keep the URL of the instance's HTTP server in its run directory, for `connect`."""
    fd = os.open(os.path.join(path, ADDRESS), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        file.write(address)


def read_address(path: str) -> str | None:
    """What `write_address` wrote; None for an instance without an HTTP server."""
    try:
        with open(os.path.join(path, ADDRESS), encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None


def _lock(path: str, *, make: bool) -> int | None:
    """An fd that holds the lock of `path`; None if another has it or it went away under our hands."""
    name = os.path.join(path, LOCK)
    try:
        if make:
            os.makedirs(path, 0o700, exist_ok=True)
        fd = os.open(name, os.O_RDWR | (os.O_CREAT if make else 0), 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), os.stat(name)):
            return fd
    except OSError:  # held by another, or removed by its last holder between our open and our lock
        pass
    os.close(fd)
    return None


def _empty(path: str, keep: str) -> None:
    for folder, folders, files in os.walk(path, topdown=False):
        for name in (*files, *folders):
            victim = os.path.join(folder, name)
            if folder == path and name == keep:
                continue
            is_folder = name in folders and not os.path.islink(victim)
            with contextlib.suppress(OSError):  # gone meanwhile, or not ours to delete
                (os.rmdir if is_folder else os.unlink)(victim)
