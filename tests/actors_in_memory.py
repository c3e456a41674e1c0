"""Replicas of an instance in memory that are actors, as on Ray, and refs of their own kind.

    actors = MemoryActors()
    instance = actors.instance = MemoryInstance({"echo": ...}, actors)

A handler runs on the thread that calls `serve`; one that returns HELD answers later, by
`actors.held.pop().set_result(value)`. What is served ends its reservation a turn later.
"""

from __future__ import annotations

import concurrent.futures
import pickle
import threading
from collections.abc import Callable, Generator
from typing import Any

from memory import HELD, MemoryInstance

from headgate.errors import HeadgateError, RequestTimeout
from headgate.handle import make_handle


class MemoryRef:
    """A ref that is not headgate's."""

    def __init__(self) -> None:
        self.future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def __await__(self) -> Generator[Any, None, Any]:
        import asyncio

        return asyncio.wrap_future(self.future).__await__()


class MemoryActors:
    """Calls handlers in this process."""

    instance: MemoryInstance

    def __init__(self) -> None:
        self.served: list[tuple[str, int]] = []
        self.couriers: list[tuple[str, str, bool, dict[str, Any]]] = []
        self.held: list[concurrent.futures.Future[Any]] = []
        self.problem: BaseException | None = None
        self.unknown: list[Callable[[HeadgateError | None], None]] | None = None

    def is_ref(self, value: object) -> bool:
        return isinstance(value, MemoryRef)

    def ready(self, replica_id: str, then: Callable[[HeadgateError | None], None]) -> bool:
        """At once, unless `unknown` is a list: that gets what to call."""
        if self.unknown is None:
            return True
        self.unknown.append(then)
        return False

    def serve(self, replica_id: str, token: int, data: Any, kwargs: dict[str, Any]) -> MemoryRef:
        if self.problem is not None:
            raise self.problem
        assert not any(map(self.is_ref, (data, *kwargs.values())))
        self.served.append((replica_id, token))
        received = self.instance.granted.pop(token)
        received.data, received.kwargs = pickle.loads(pickle.dumps((data, kwargs)))
        ref = MemoryRef()
        try:
            value = self.instance.handlers[received.endpoint](received)
        except Exception as error:  # noqa: BLE001 - the ref carries it
            ref.future.set_exception(error)
        else:
            if value is HELD:
                self.held.append(ref.future)
            else:
                ref.future.set_result(value)
        lane = received.caller.lane  # type: ignore[attr-defined]
        ref.future.add_done_callback(lambda _: lane.run(received.caller.on_reply_end))
        return ref

    def courier(
        self, key: str, endpoint: str, missing_ok: bool, options: dict[str, Any], data: Any, kwargs: dict[str, Any]
    ) -> MemoryRef:
        if self.problem is not None:
            raise self.problem
        self.couriers.append((key, endpoint, missing_ok, options))
        ref = MemoryRef()
        handle: Any = make_handle(self.instance, endpoint, missing_ok).options(**options)  # type: ignore[arg-type]

        def resolved(value: Any) -> Any:
            return value.future.result(5) if self.is_ref(value) else value

        def run() -> None:
            try:
                named = {name: resolved(value) for name, value in kwargs.items()}
                ref.future.set_result(handle.call(resolved(data), **named))
            except Exception as error:  # noqa: BLE001 - the ref carries it
                ref.future.set_exception(error)

        threading.Thread(target=run).start()
        return ref

    def get(self, refs: list[Any], timeout: float | None) -> list[Any]:
        _, late = concurrent.futures.wait([ref.future for ref in refs], timeout)
        if late:
            raise RequestTimeout(f"{len(late)} values were not there within {timeout} s")
        return [ref.future.result() for ref in refs]

    def wait(self, refs: list[Any], num_returns: int, timeout: float | None) -> tuple[list[Any], list[Any]]:
        ready = [ref for ref in refs if ref.future.done()][:num_returns]
        if len(ready) < num_returns:
            concurrent.futures.wait([ref.future for ref in refs], timeout)
            ready = [ref for ref in refs if ref.future.done()][:num_returns]
        return ready, [ref for ref in refs if ref not in ready]
