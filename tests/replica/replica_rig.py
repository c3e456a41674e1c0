"""A worker behind links whose other ends keep every frame; plain code runs on the loop. For virtual time."""

from __future__ import annotations

import asyncio
import mmap
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

import msgspec
import virtual_time

from headgate.core import framing
from headgate.core.state import Settings
from headgate.replica import callable as code
from headgate.replica.links import CallerLink
from headgate.replica.plain import PlainThread
from headgate.replica.worker import Worker
from headgate.wire import payload
from headgate.wire.link import Link, open_link
from headgate.wire.segments import Segment

pack = framing.HEADER.pack
HEAD = b"GET /x?a=1 HTTP/1.1\r\nhost: h\r\n\r\n"


class PlainOnLoop(PlainThread):
    """The plain thread's interface, run between the turns of the loop: no thread, same order."""

    reads_links = False

    def __init__(self) -> None:
        super().__init__()
        self.queued: list[Callable[[], None]] = []
        self.put = self._put  # type: ignore[method-assign]

    def _put(self, work: Any) -> None:
        self.queued.append(work)
        asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        self.queued.pop(0)()


class RouterEnd(Link):
    """The router's end: keeps every frame."""

    def __init__(self) -> None:
        super().__init__()
        self.got: list[tuple[int, int, int, int, bytes, bytes]] = []
        self.page = mmap.mmap(-1, 65536)

    def on_frames(self, frames: list[framing.Frame]) -> None:
        for kind, flags, meta_len, slot, arg, source, start, end in frames:
            meta, body = bytes(source[start : start + meta_len]), bytes(source[start + meta_len : end])
            self.got.append((kind, flags, slot, arg, meta, body))

    def http(self, slot: int, body: bytes = b"", *, method: str | None = None, ms: int = 0) -> None:
        meta = msgspec.msgpack.encode([f"id{slot}", "e", None, [], "127.0.0.1", 1, ["h", 80, "http"], method])
        flags = framing.HEAD if method else 0
        arg = len(HEAD) << 32 | ms
        payload = meta + HEAD + body
        self.send(pack(len(payload), framing.CALL, flags, len(meta), slot, arg) + payload)

    def value(self, slot: int, data: Any, **kwargs: Any) -> None:
        meta = msgspec.msgpack.encode([f"id{slot}", "e", None, None, None, bool(kwargs)])
        body = b"".join(payload.encode((data, kwargs) if kwargs else data))
        self.send(pack(len(meta) + len(body), framing.CALL, framing.VALUE, len(meta), slot, 0) + meta + body)

    def segment(self, slot: int, segment: Segment) -> None:
        """A call whose body is a segment of this process."""
        meta = msgspec.msgpack.encode([f"id{slot}", "e", None, None, None, False])
        body, flags = segment.place, framing.VALUE | framing.SEGMENT
        self.send(pack(len(meta) + len(body), framing.CALL, flags, len(meta), slot, 0) + meta + body)

    def flagged(self, kind: int, flags: int, slot: int = 0, arg: int = 0) -> None:
        """A frame without a body."""
        self.send(pack(0, kind, flags, 0, slot, arg))

    def reserve(self, slot: int, *, method: str | None = None, ms: int = 0, want: int = 0) -> None:
        """A call for a slot only."""
        meta = msgspec.msgpack.encode([f"id{slot}", "e", method, None, None, False])
        flags = framing.VALUE | framing.RESERVE | (framing.HEAD if method else 0)
        self.send(pack(len(meta), framing.CALL, flags, len(meta), slot, want << 48 | ms) + meta)

    async def token(self, slot: int) -> int:
        """The token that came for a reservation."""
        for _ in range(5000):
            for kind, flags, at, _, _, body in self.got:
                if (kind, at) == (framing.REPLY, slot) and flags & framing.MORE:
                    return int.from_bytes(body, "little")
            await asyncio.sleep(0.001)
        raise AssertionError(f"no token for slot {slot}: {self.got}")

    def frame(self, kind: int, slot: int = 0, arg: int = 0, body: bytes = b"") -> None:
        self.send(pack(len(body), kind, 0, 0, slot, arg) + body)

    def ends(self) -> dict[int, tuple[int, int, bytes]]:
        """slot -> its final answer, as (type, status, body)."""
        final = {framing.REPLY, framing.ERROR, framing.END, framing.BUSY, framing.DRAINING}
        return {
            slot: (kind, arg & 0xFFFF, body)
            for kind, flags, slot, arg, _, body in self.got
            if kind in final and not (kind == framing.REPLY and flags & framing.MORE)
        }

    async def end(self, slot: int) -> tuple[int, int, bytes]:
        for _ in range(5000):
            if slot in self.ends():
                return self.ends()[slot]
            await asyncio.sleep(0.001)
        raise AssertionError(f"no answer in slot {slot}: {self.got}")

    def stream(self, slot: int) -> bytes:
        return b"".join(body for kind, _, at, _, _, body in self.got if kind == framing.DATA and at == slot)


class Rig:
    def __init__(self, target: Any, *init_args: Any, **settings: Any) -> None:
        loaded = code.LoadedCallable(target, init_args, "target")
        loaded.construct()
        self.drained = False
        self.plain = PlainOnLoop()
        self.worker = Worker(loaded, Settings(**settings), self.plain, on_drained=self._on_drained)
        self.links: list[Link] = []

    def _on_drained(self) -> None:
        self.drained = True

    async def link(self, name: str = "router", pid: int = 0) -> RouterEnd:
        """A link of a router; `pid` is its process if it shares memory with the replica."""
        ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            sock.setblocking(False)
        router = RouterEnd()
        caller = CallerLink(self.worker, name, router.page, None, pid)
        await open_link(caller, theirs)
        await open_link(router, ours)
        self.links += [router, caller]
        return router

    def claim(self, token: int, data: Any = None, **kwargs: Any) -> Future[Any]:
        """As whoever brings the arguments."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        self.worker.reservations.claim(token, data, kwargs, future)
        return future

    def close(self) -> None:
        for link in self.links:
            link.abort()


def served(target: Any, *init_args: Any, **settings: Any) -> Callable[[Any], Callable[[], None]]:
    """Run an async test with a worker for `target`."""

    def decorate(test: Callable[[Rig], Awaitable[None]]) -> Callable[[], None]:
        def run() -> None:
            async def main() -> None:
                rig = Rig(target, *init_args, **settings)
                try:
                    await test(rig)
                finally:
                    rig.close()
                    await asyncio.sleep(0.001)

            virtual_time.run(main())

        run.__name__ = getattr(test, "__name__", "test")
        return run

    return decorate
