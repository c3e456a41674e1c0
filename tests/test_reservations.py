"""`remote` where replicas are actors: reservations, refs of the engine's own, couriers. No Ray here."""

from __future__ import annotations

import asyncio
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import virtual_time
from actors_in_memory import MemoryActors, MemoryRef
from handlers_in_memory import HANDLERS, async_handle, echo, posted, sync_handle, turns
from memory import MemoryHome, MemoryInstance, MemoryLink, Received

from headgate import ObjectRef, get, homes, wait
from headgate.calls import Options, Target
from headgate.core import framing
from headgate.errors import (
    ArgumentError,
    BackendOverloaded,
    ConfigError,
    ControllerUnavailable,
    EndpointNotFound,
    InstanceError,
    ProtocolError,
    ReplicaDied,
    RequestTimeout,
    SerializationError,
)
from headgate.lanes import lane_of
from headgate.reservations import LOOK_S, Reservation, refs_here, use


class Odd:
    """Encodes nowhere, with an error of its own."""

    def __reduce__(self) -> Any:
        raise RuntimeError("not me")


def world() -> tuple[MemoryInstance, MemoryActors]:
    actors = MemoryActors()
    instance = actors.instance = MemoryInstance(dict(HANDLERS), actors)
    return instance, actors


@pytest.fixture(autouse=True)
def actors() -> Iterator[MemoryActors]:
    made = MemoryActors()
    use(made)
    yield made
    use(None)


@pytest.fixture
def instance(actors: MemoryActors) -> Iterator[MemoryInstance]:
    made = actors.instance = MemoryInstance(dict(HANDLERS), actors)
    made.start()
    yield made
    made.leave()


def in_memory(main: Callable[[MemoryInstance, MemoryActors], Any]) -> Any:
    """Run `main(instance, actors)` on virtual time."""
    return virtual_time.run(main(*world()))


def pending(instance: MemoryInstance) -> set[Any]:
    """The calls that the lane of the headgate thread still counts."""
    return set(instance.on_thread(lambda: set(lane_of(instance, instance.thread.loop).pending)))  # type: ignore[arg-type]


# --- the grant ---


def test_remote_returns_the_ref_of_the_engine(instance: MemoryInstance, actors: MemoryActors) -> None:
    ref = sync_handle(instance, "echo").remote((1, 2))
    assert isinstance(ref, MemoryRef)
    assert get(ref) == (1, 2)
    assert [replica for replica, _ in actors.served] == ["it#0001"]
    assert actors.served[0][1] > 1 << 40  # the token that was granted
    assert not pending(instance)


def test_an_async_remote_returns_the_ref_of_the_engine() -> None:
    async def main(instance: MemoryInstance, actors: MemoryActors) -> None:
        ref = await async_handle(instance, "echo").remote([3])
        assert isinstance(ref, MemoryRef)
        assert await ref == [3]
        await turns()
        assert not lane_of(instance, asyncio.get_running_loop()).pending  # type: ignore[arg-type]

    in_memory(main)


def test_call_goes_the_way_of_bytes_all_the_same(instance: MemoryInstance, actors: MemoryActors) -> None:
    assert sync_handle(instance, "describe").call(1, a=2)["kwargs"] == {"a": 2}
    assert asyncio.run(async_call(instance, "echo", 5)) == 5
    assert not actors.served


async def async_call(instance: MemoryInstance, endpoint: str, *arguments: Any, **named: Any) -> Any:
    return await async_handle(instance, endpoint).call(*arguments, **named)


def test_a_reservation_says_what_a_call_says_but_the_arguments(instance: MemoryInstance) -> None:
    handle = sync_handle(instance, "describe").options(
        method_name="other", shard_key="ada", http_method="POST", http_headers={"X-A": "1"}
    )
    assert get(handle.remote([1], a=1, b={"c"})) == {
        "method_name": "other", "http_method": "POST", "headers": {"X-A": "1"},
        "shard_key": "ada", "data": [1], "kwargs": {"a": 1, "b": {"c"}},
    }  # fmt: skip


def test_the_frame_of_a_reservation_has_no_body() -> None:
    async def main(instance: MemoryInstance, actors: MemoryActors) -> None:
        instance.room = 0
        sending = asyncio.ensure_future(async_handle(instance, "echo").options(method_name="m").remote([1], k=2))
        await turns()
        caller = instance.router().waiting[0][1]
        assert (caller.flags, caller.body) == (framing.VALUE | framing.HEAD | framing.RESERVE, b"")
        assert Received(caller, None).has_kwargs
        instance.router().admit()
        await sending

    in_memory(main)


def test_to_be_sent_is_not_to_be_granted() -> None:
    async def main(instance: MemoryInstance, actors: MemoryActors) -> None:
        instance.room = 0
        sending = asyncio.ensure_future(async_handle(instance, "echo").remote(1))
        await turns()
        instance.router().waiting[0][1].on_assigned()  # but that replica is full
        await turns(10)
        assert not sending.done()
        instance.router().admit()
        assert await (await sending) == 1

    in_memory(main)


def test_the_slot_is_held_until_the_answer(instance: MemoryInstance, actors: MemoryActors) -> None:
    ref = sync_handle(instance, "hold").remote()
    (call,) = pending(instance)
    assert (call.assigned, call.done) == (True, False)
    assert call.data is None  # the arguments are Ray's now
    actors.held.pop().set_result("late")
    assert get(ref) == "late"
    assert not pending(instance)


@pytest.mark.parametrize("end", ["error", "failure", "reply"])
def test_after_the_grant_it_ends_in_silence(
    instance: MemoryInstance, actors: MemoryActors, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    ref = sync_handle(instance, "hold").remote()
    (call,) = pending(instance)
    if end == "error":
        instance.on_thread(call.on_error, 504, 0, 0, b"text", 0, 4)
    elif end == "failure":
        instance.on_thread(call.on_failure, ReplicaDied("it died"))
    else:
        instance.on_thread(call.on_reply, 200, 0, 0, b"", 0, 0)
    assert not pending(instance)
    actors.held.pop().set_result("by Ray")
    assert get(ref, timeout=5) == "by Ray"
    assert not caplog.records


def test_the_error_of_a_handler_comes_by_the_ref(instance: MemoryInstance) -> None:
    with pytest.raises(ValueError, match="no milk"):
        get(sync_handle(instance, "fail").remote("milk"))


def test_many_threads_reserve_with_one_handle(instance: MemoryInstance) -> None:
    handle = sync_handle(instance, "echo")
    wrong: list[Any] = []

    def work(thread: int) -> None:
        for number in range(50):
            if get(handle.remote((thread, number))) != (thread, number):
                wrong.append((thread, number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not wrong
    assert not pending(instance)


# --- the actor of a replica ---


def test_a_loop_goes_on_while_an_actor_is_looked_for() -> None:
    async def main(instance: MemoryInstance, actors: MemoryActors) -> None:
        actors.unknown = []
        sending = asyncio.ensure_future(async_handle(instance, "echo").remote(1))
        await turns(10)
        (found,) = actors.unknown
        assert not sending.done()
        found(None)
        assert await (await sending) == 1

    in_memory(main)


def test_a_thread_waits_for_an_actor_that_is_looked_for(instance: MemoryInstance, actors: MemoryActors) -> None:
    class FoundAtOnce(list[Any]):
        def append(self, then: Any) -> None:
            threading.Thread(target=then, args=(None,)).start()

    actors.unknown = FoundAtOnce()
    assert get(sync_handle(instance, "echo").remote(1)) == 1


def test_an_actor_that_is_gone_gives_the_slot_back() -> None:
    async def main(instance: MemoryInstance, actors: MemoryActors) -> None:
        actors.unknown = []
        sending = asyncio.ensure_future(async_handle(instance, "echo").remote(1))
        await turns(10)
        actors.unknown.pop()(ReplicaDied("it is gone"))
        with pytest.raises(ReplicaDied, match="it is gone"):
            await sending
        assert len(instance.router().cancelled) == 1
        assert not actors.served

    in_memory(main)


def test_an_actor_that_nobody_finds_is_an_error_in_time_and_no_concern_later() -> None:
    async def main(instance: MemoryInstance, actors: MemoryActors) -> None:
        actors.unknown = []
        with pytest.raises(ControllerUnavailable, match="within 5 s"):
            await async_handle(instance, "echo").remote(1)
        assert asyncio.get_running_loop().time() == pytest.approx(LOOK_S, abs=0.1)
        assert len(instance.router().cancelled) == 1
        actors.unknown.pop()(None)
        await turns()
        assert not actors.served

    in_memory(main)


# --- no grant ---


def test_a_refusal_is_raised_from_remote(instance: MemoryInstance, actors: MemoryActors) -> None:
    instance.refusal = BackendOverloaded("it is full")
    with pytest.raises(BackendOverloaded, match="it is full"):
        sync_handle(instance, "echo").remote(1)
    with pytest.raises(BackendOverloaded, match="it is full"):
        asyncio.run(async_remote(instance))
    assert not actors.served


async def async_remote(instance: MemoryInstance) -> Any:
    return await async_handle(instance, "echo").remote(1)


def test_an_endpoint_that_is_not_there_is_raised_from_remote(instance: MemoryInstance) -> None:
    handle = sync_handle(instance, "echo")
    instance.remove("echo")
    with pytest.raises(EndpointNotFound):
        handle.remote(1)


def test_a_missing_endpoint_is_waited_for_if_that_is_ok() -> None:
    async def main(instance: MemoryInstance, actors: MemoryActors) -> None:
        asyncio.get_running_loop().call_later(4, instance.add, "late", echo)
        assert await (await async_handle(instance, "late", missing_ok=True).remote(7)) == 7
        with pytest.raises(EndpointNotFound, match="within 5 s"):
            await async_handle(instance, "never", missing_ok=True).remote()

    in_memory(main)


def test_a_deadline_before_the_grant_is_raised_from_remote() -> None:
    async def main(instance: MemoryInstance, actors: MemoryActors) -> None:
        instance.room = 0
        with pytest.raises(RequestTimeout):
            await async_handle(instance, "echo").options(timeout_s=2).remote(1)
        assert asyncio.get_running_loop().time() == pytest.approx(2, abs=0.1)

    in_memory(main)


def test_a_deadline_after_the_grant_is_rays_to_tell() -> None:
    async def main(instance: MemoryInstance, actors: MemoryActors) -> None:
        ref = await async_handle(instance, "hold").options(timeout_s=2).remote(1)
        lane = lane_of(instance, asyncio.get_running_loop())  # type: ignore[arg-type]
        (call,) = lane.pending
        assert call.deadline == pytest.approx(2, abs=0.1)  # what the frame tells the replica
        await asyncio.sleep(3)
        assert not lane.pending
        assert not ref.future.done()

    in_memory(main)


def test_after_the_end_remote_says_so(instance: MemoryInstance) -> None:
    handle = sync_handle(instance, "echo")
    instance.leave()
    with pytest.raises(InstanceError, match="already been shut down"):
        handle.remote(1)


@pytest.mark.parametrize("how", ["on_reply", "on_reply_end"])
def test_an_answer_without_a_grant_is_a_broken_protocol(how: str) -> None:
    async def main(instance: MemoryInstance, actors: MemoryActors) -> None:
        instance.room = 0
        sending = asyncio.ensure_future(async_handle(instance, "echo").remote(1))
        await turns()
        caller = instance.router().waiting[0][1]
        getattr(caller, how)(*((200, 0, 0, b"", 0, 0) if how == "on_reply" else ()))
        with pytest.raises(ProtocolError, match="without a grant"):
            await sending

    in_memory(main)


# --- giving up ---


def test_a_cancelled_task_gives_its_reservation_back() -> None:
    async def main(instance: MemoryInstance, actors: MemoryActors) -> None:
        instance.room = 0
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(async_handle(instance, "echo").remote(), 1)
        assert len(instance.router().cancelled) == 1
        assert not instance.router().waiting

    in_memory(main)


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [(threading.Lock(), SerializationError, r"thread\.lock"), (Odd(), SerializationError, "Odd.*not me")],
)
def test_an_argument_that_cannot_travel_gives_the_slot_back_and_is_named(
    instance: MemoryInstance, value: Any, kind: type[Exception], text: str
) -> None:
    handle = sync_handle(instance, "echo")
    for send in (lambda: handle.remote(value), lambda: handle.remote(1, x=value)):
        with pytest.raises(kind, match=text):
            send()
        assert not pending(instance)
    assert len(next(iter(instance.routers.values())).cancelled) == 2


@pytest.mark.parametrize(
    ("problem", "kind"),
    [
        (TypeError("Ray cannot"), SerializationError), (pickle.PicklingError("no"), SerializationError),
        (OSError("no cluster"), OSError), (KeyboardInterrupt("Ctrl-C"), KeyboardInterrupt),
    ],
)  # fmt: skip
def test_whatever_serve_raises_gives_the_slot_back(
    instance: MemoryInstance, actors: MemoryActors, problem: BaseException, kind: type[BaseException]
) -> None:
    actors.problem = problem
    with pytest.raises(kind, match=str(problem)):
        sync_handle(instance, "echo").remote(1)
    instance.on_thread(lambda: None)
    assert not pending(instance)
    assert len(next(iter(instance.routers.values())).cancelled) == 1


def test_a_reservation_of_a_loop_that_ends_is_not_cancelled_at_the_replica() -> None:
    instance, _ = world()

    async def main() -> MemoryRef:
        ref = await async_handle(instance, "hold").remote()
        assert isinstance(ref, MemoryRef)
        return ref

    ref = asyncio.run(main())
    assert not next(iter(instance.routers.values())).cancelled
    assert not ref.future.done()


# --- shadows ---


def test_a_shadow_gets_the_arguments_as_bytes() -> None:
    async def main(instance: MemoryInstance, actors: MemoryActors) -> None:
        instance.add("both", echo, shadow="echo")
        ref = await async_handle(instance, "both").remote([1], k=2)
        assert await ref == [1]
        (shadow,) = instance.shadows
        assert (shadow.data, shadow.kwargs, shadow.flags) == ([1], {"k": 2}, framing.VALUE)

    in_memory(main)


def test_a_shadow_is_encoded_on_the_thread_of_the_caller(instance: MemoryInstance) -> None:
    threads: list[str] = []

    class Watched:
        def __reduce__(self) -> Any:
            threads.append(threading.current_thread().name)
            return str, ("value",)

    instance.add("both", echo, shadow="echo")
    assert get(sync_handle(instance, "both").remote(Watched())) == "value"
    assert instance.shadows[0].data == "value"
    assert set(threads) == {threading.current_thread().name}


def test_a_shadow_of_an_endpoint_that_comes_late_is_encoded_then() -> None:
    async def main(instance: MemoryInstance, actors: MemoryActors) -> None:
        asyncio.get_running_loop().call_later(1, instance.add, "late", echo, "echo")
        assert await (await async_handle(instance, "late", missing_ok=True).remote(9)) == 9
        assert [shadow.data for shadow in instance.shadows] == [9]

    in_memory(main)


def test_what_cannot_be_copied_has_no_shadow_and_does_not_hurt(caplog: pytest.LogCaptureFixture) -> None:
    class OnlyRay:  # a type for which Ray alone knows a way
        def __reduce__(self) -> Any:
            raise SerializationError("only Ray")

    async def main() -> None:
        instance, _ = world()
        instance.add("both", echo, shadow="echo")
        lane = lane_of(instance, asyncio.get_running_loop())  # type: ignore[arg-type]
        call = Reservation(lane, Target("both", False, Options()))
        call.fill(OnlyRay(), {})
        lane.submit(call)
        await turns()
        assert call.assigned
        assert not instance.shadows

    with caplog.at_level(logging.WARNING, "headgate.handle"):
        virtual_time.run(main())
    assert any("'both' has no shadow: only Ray" in message for message in caplog.messages)


# --- refs as arguments ---


@pytest.mark.parametrize("as_keyword", [False, True])
def test_an_argument_that_is_a_ref_goes_by_courier_at_once(
    instance: MemoryInstance, actors: MemoryActors, as_keyword: bool
) -> None:
    waiting = sync_handle(instance, "hold").remote()
    handle = sync_handle(instance, "describe", missing_ok=True).options(shard_key="s", timeout_s=5)
    ref = handle.remote(x=waiting) if as_keyword else handle.remote(waiting, y=1)
    assert not ref.future.done()
    actors.held.pop().set_result("late")
    found = get(ref, timeout=5)
    assert "late" in (found["data"], found["kwargs"].get("x"))
    options = {
        "method_name": None, "shard_key": "s", "http_method": None, "http_headers": None, "timeout_s": 5.0
    }  # fmt: skip
    assert actors.couriers == [(instance.key, "describe", True, options)]


def test_an_async_handle_sends_refs_by_courier_too(instance: MemoryInstance, actors: MemoryActors) -> None:
    ref = sync_handle(instance, "echo").remote(1)

    async def main() -> Any:
        return await (await async_handle(instance, "echo").remote(ref))

    assert asyncio.run(main()) == 1
    assert len(actors.couriers) == 1


def test_what_the_courier_cannot_take_is_named(instance: MemoryInstance, actors: MemoryActors) -> None:
    ref = sync_handle(instance, "echo").remote(1)
    actors.problem = TypeError("Ray cannot")
    with pytest.raises(SerializationError, match=r"thread\.lock"):
        sync_handle(instance, "echo").remote(threading.Lock(), x=ref)
    actors.problem = OSError("no cluster")
    with pytest.raises(OSError, match="no cluster"):
        sync_handle(instance, "echo").remote(1, x=ref)


def test_call_takes_refs_of_the_engine(instance: MemoryInstance, actors: MemoryActors) -> None:
    one, two = (sync_handle(instance, "echo").remote(number) for number in (1, 2))
    found = sync_handle(instance, "describe").call(one, b=two, c=3)
    assert (found["data"], found["kwargs"]) == (1, {"b": 2, "c": 3})
    assert asyncio.run(async_call(instance, "describe", 0, x=one))["kwargs"] == {"x": 1}
    assert asyncio.run(async_call(instance, "echo", two)) == 2
    assert not actors.couriers


def test_the_error_of_a_ref_is_that_of_the_call_it_was_passed_to(instance: MemoryInstance) -> None:
    broken = sync_handle(instance, "fail").remote("salt")
    with pytest.raises(ValueError, match="no salt"):
        sync_handle(instance, "echo").call(broken)
    with pytest.raises(ValueError, match="no salt"):
        asyncio.run(async_call(instance, "echo", broken))
    with pytest.raises(ValueError, match="no salt"):
        get(sync_handle(instance, "echo").remote(broken))


def test_a_deadline_counts_while_the_arguments_of_a_call_are_waited_for(instance: MemoryInstance) -> None:
    waiting = sync_handle(instance, "hold").remote()
    with pytest.raises(RequestTimeout, match="waited for its arguments"):
        sync_handle(instance, "echo").options(timeout_s=0.01).call(waiting)

    async def main() -> Any:
        return await async_handle(instance, "echo").options(timeout_s=0.01).call(waiting)

    with pytest.raises(RequestTimeout, match="waited for its arguments"):
        asyncio.run(main())


def test_a_timeout_that_a_ref_ends_with_is_its_own(instance: MemoryInstance) -> None:
    def late(request: Received) -> Any:
        raise RequestTimeout("mine")

    instance.add("late", late)
    for timeout_s in (None, 60):
        with pytest.raises(RequestTimeout, match="mine"):
            sync_handle(instance, "echo").options(timeout_s=timeout_s).call(sync_handle(instance, "late").remote())

        async def main(timeout_s: float | None = timeout_s) -> Any:
            ref = sync_handle(instance, "late").remote()
            return await async_handle(instance, "echo").options(timeout_s=timeout_s).call(ref)

        with pytest.raises(RequestTimeout, match="mine"):
            asyncio.run(main())


@pytest.fixture
def local() -> Iterator[MemoryInstance]:
    """An instance whose replicas are plain processes."""
    made = MemoryInstance({"echo": echo})
    made.start()
    yield made
    made.leave()


def test_a_ref_of_a_local_instance_is_resolved_first(
    instance: MemoryInstance, local: MemoryInstance, actors: MemoryActors
) -> None:
    own = sync_handle(local, "echo").remote(4)
    assert isinstance(own, ObjectRef)
    assert get(sync_handle(instance, "echo").remote(own)) == 4
    theirs = sync_handle(instance, "echo").remote(5)
    found = get(sync_handle(instance, "describe").remote(own, x=theirs), timeout=5)
    assert (found["data"], found["kwargs"]) == (4, {"x": 5})
    assert sync_handle(instance, "describe").call(theirs, x=own)["kwargs"] == {"x": 4}

    async def main() -> Any:
        return await (await async_handle(instance, "echo").remote(own))

    assert asyncio.run(main()) == 4


def test_a_request_passed_as_data_arrives_with_its_body(instance: MemoryInstance) -> None:
    instance.add("path", lambda request: (request.data.method, request.data.url.path, request.data.data))

    async def main() -> Any:
        request = posted()
        ref = await async_handle(instance, "path").remote(request)
        return await ref, get(sync_handle(instance, "path").remote(request))

    assert asyncio.run(main()) == (("POST", "/a", b"body"),) * 2


# --- get and wait ---


def test_get_takes_refs_of_both_kinds(instance: MemoryInstance, local: MemoryInstance) -> None:
    theirs = [sync_handle(instance, "echo").remote(number) for number in range(3)]
    own = [sync_handle(local, "echo").remote(number) for number in range(10, 12)]
    assert get(theirs) == [0, 1, 2]
    assert get(theirs[1]) == 1
    assert get((theirs[0], own[0], theirs[2], own[1]), timeout=5) == [0, 10, 2, 11]
    assert get([own[0], theirs[0]]) == [10, 0]


def test_a_timeout_ends_the_waiting_not_the_request(instance: MemoryInstance, actors: MemoryActors) -> None:
    ref = sync_handle(instance, "hold").remote()
    for timeout in (0, 0.001, -1):
        with pytest.raises(RequestTimeout):
            get([ref], timeout=timeout)
    actors.held.pop().set_result(1)
    assert get(ref, timeout=5) == 1


def test_wait_takes_refs_of_one_kind(instance: MemoryInstance, local: MemoryInstance, actors: MemoryActors) -> None:
    slow = sync_handle(instance, "hold").remote()
    quick = [sync_handle(instance, "echo").remote(number) for number in range(2)]
    assert wait([slow, *quick]) == ([quick[0]], [slow, quick[1]])
    assert wait([slow, *quick], num_returns=3, timeout=0.01) == (quick, [slow])
    assert wait([slow], timeout=-1) == ([], [slow])
    with pytest.raises(ArgumentError, match=r"headgate\.ObjectRef and actors_in_memory\.MemoryRef"):
        wait([slow, sync_handle(local, "echo").remote(1)])
    with pytest.raises(ConfigError, match="num_returns"):
        wait([slow], num_returns=2)
    with pytest.raises(ConfigError, match="once"):
        wait([slow, slow])
    with pytest.raises(ArgumentError, match="got int"):
        wait([slow, 1])
    actors.held.pop().set_result(1)


def test_without_an_engine_of_refs_there_are_headgates_own_only() -> None:
    ref = MemoryRef()
    use(None)
    if refs_here() is None:  # else Ray was imported, and MemoryRef is none of its refs
        with pytest.raises(ArgumentError, match="got MemoryRef"):
            get(ref)
    with pytest.raises(ArgumentError, match="got MemoryRef"):
        wait([ref])


# --- pickling ---


def test_a_handle_carries_the_key_of_its_home(actors: MemoryActors) -> None:
    instance = actors.instance = MemoryInstance(dict(HANDLERS), actors, key="ray:headgate-1")
    handle = sync_handle(instance, "describe").options(shard_key="s")
    asked: list[str] = []

    def find(key: str) -> Any:
        asked.append(key)
        raise InstanceError(f"no instance behind {key}")

    before = homes.register("ray", find)
    try:
        copy = pickle.loads(pickle.dumps(handle))
        assert repr(copy) == repr(handle)
        assert not asked  # only when it is used
        with pytest.raises(InstanceError, match="behind ray:headgate-1"):
            copy.remote(1)
        assert pickle.dumps(copy) == pickle.dumps(handle)
    finally:
        assert before is not None
        homes.register("ray", before)


def test_a_key_without_a_kind_is_a_run_directory() -> None:
    for key in ("/nowhere/1", "/nowhere:x/1", "strange:x"):
        with pytest.raises(InstanceError, match="is gone"):
            homes.home_of(key)


def test_kinds_of_homes_are_registered() -> None:
    home = MemoryHome("memory:1")
    before = homes.register("memory", lambda key: home)
    assert before is None
    assert homes.home_of("memory:1") is home


def test_a_home_says_what_the_lane_calls(instance: MemoryInstance, local: MemoryInstance, actors: MemoryActors) -> None:
    assert lane_of(instance, instance.thread.loop).actors is actors  # type: ignore[arg-type]
    assert lane_of(local, local.thread.loop).actors is None  # type: ignore[arg-type]
    assert MemoryLink.replica.id == "it#0001"
