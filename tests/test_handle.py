"""Handles and refs on an instance in memory; on virtual time where time matters."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import gc
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import virtual_time
from handlers_in_memory import HANDLERS, Sour, async_handle, echo, posted, sync_handle, turns
from memory import MemoryInstance, Received

from headgate import get, wait
from headgate import instance as instances
from headgate.calls import Options, Target
from headgate.errors import (
    ArgumentError,
    BackendError,
    BackendOverloaded,
    ConfigError,
    ControllerUnavailable,
    EndpointNotFound,
    HeadgateError,
    InstanceError,
    ProtocolError,
    ReplicaDied,
    RequestCancelled,
    RequestTimeout,
    SerializationError,
)
from headgate.handle import AsyncServeHandle, ServeHandle, make_handle
from headgate.lanes import _lanes
from headgate.reach import Reach
from headgate.refs import ObjectRef


@pytest.fixture
def instance() -> Iterator[MemoryInstance]:
    made = MemoryInstance(dict(HANDLERS))
    made.start()
    yield made
    made.leave()


def held_ref(instance: MemoryInstance) -> tuple[ObjectRef, Received]:
    """A ref without an answer, and its request."""
    ref = sync_handle(instance, "hold").remote()
    while not instance.held:
        instance.on_thread(lambda: None)
    return ref, instance.held.pop()


def in_memory(main: Callable[[MemoryInstance], Any]) -> Any:
    """Run `main(instance)` on virtual time."""
    return virtual_time.run(main(MemoryInstance(dict(HANDLERS))))


# --- what comes back ---


@pytest.mark.parametrize(
    "value", [None, 1, 1.5, "text", b"bytes", (1, 2), {1: {2}}, [None], Sour("x").args, b"x" * 100_000, "ä" * 5000]
)
def test_values_keep_their_types(instance: MemoryInstance, value: Any) -> None:
    handle = sync_handle(instance, "echo")
    for answer in (handle.call(value), handle.remote(value).result(), get(handle.remote(value))):
        assert answer == value
        assert type(answer) is type(value)


def test_an_async_handle_answers_on_the_loop_it_is_used_on() -> None:
    async def main(instance: MemoryInstance) -> None:
        handle = async_handle(instance, "echo")
        assert await handle.call(1) == 1
        ref = await handle.remote(2)
        assert await ref == 2
        assert await ref == 2
        assert list(instance.routers) == [asyncio.get_running_loop()]

    in_memory(main)


def test_one_async_handle_serves_several_loops() -> None:
    instance = MemoryInstance(dict(HANDLERS))
    handle = async_handle(instance, "echo")

    async def main() -> Any:
        return await handle.call(3)

    assert [virtual_time.run(main()) for _ in range(3)] == [3, 3, 3]


def test_keyword_arguments_and_options_arrive(instance: MemoryInstance) -> None:
    handle = sync_handle(instance, "describe").options(
        method_name="other", shard_key="ada", http_method="POST", http_headers={"X-A": "1"}
    )
    assert handle.call([1], a=1, b={"c"}) == {
        "method_name": "other", "http_method": "POST", "headers": {"X-A": "1"},
        "shard_key": "ada", "data": [1], "kwargs": {"a": 1, "b": {"c"}},
    }  # fmt: skip


def test_every_request_has_an_id_of_its_own(instance: MemoryInstance) -> None:
    handle = sync_handle(instance, "echo")
    get([handle.remote(number) for number in range(20)])
    assert len({each.request_id for each in instance.received}) == 20


def test_get_keeps_the_order_of_the_refs(instance: MemoryInstance) -> None:
    handle = sync_handle(instance, "echo")
    assert get([handle.remote(number) for number in range(50)]) == list(range(50))


@pytest.mark.parametrize("size", [999, 1000, 1001, 5000, 1_000_000])
def test_a_large_result_comes_in_parts(instance: MemoryInstance, size: int) -> None:
    value = bytes(range(256)) * (size // 256 + 1)
    assert sync_handle(instance, "echo").call(value[:size]) == value[:size]


@pytest.mark.parametrize("announced", [1, 3])
def test_a_result_of_another_size_than_announced_is_an_error(instance: MemoryInstance, announced: int) -> None:
    ref, request = held_ref(instance)
    call = request.caller
    instance.on_thread(call.on_reply_start, 200, 16, 0, announced.to_bytes(8, "little"), 0, 8)
    instance.on_thread(call.on_data, b"ab", 0, 2)
    instance.on_thread(call.on_reply_end)
    with pytest.raises(ProtocolError, match="2 bytes"):
        ref.result(5)


# --- errors ---


def test_the_users_error_keeps_its_class_message_and_traceback(instance: MemoryInstance) -> None:
    ref = sync_handle(instance, "fail").remote("milk")
    for _ in range(2):
        with pytest.raises(Sour, match="no milk") as caught:
            ref.result()
        assert isinstance(caught.value, BackendError)
        assert caught.value.remote_traceback == "Traceback of the replica"
        assert str(caught.value) == "no milk"
        assert "Traceback of the replica" in caught.value.__notes__[0]


def test_an_error_of_headgates_own_is_itself(instance: MemoryInstance) -> None:
    def die(request: Received) -> Any:
        raise ReplicaDied("a replica died")

    instance.add("dying", die)
    with pytest.raises(ReplicaDied, match="a replica died"):
        sync_handle(instance, "dying").call()


@pytest.mark.parametrize(
    ("status", "kind"), [(503, BackendOverloaded), (504, RequestTimeout), (502, ReplicaDied), (500, HeadgateError)]
)
def test_an_error_of_text_has_the_class_of_its_status(
    instance: MemoryInstance, status: int, kind: type[Exception]
) -> None:
    ref, request = held_ref(instance)
    instance.on_thread(request.caller.on_error, status, 4, 2, b"?hhtext", 1, 7)
    with pytest.raises(kind, match=r"^text$"):
        ref.result(5)


def test_an_error_that_nobody_asks_for_is_dropped_in_silence(
    instance: MemoryInstance, caplog: pytest.LogCaptureFixture
) -> None:
    handle = sync_handle(instance, "fail")
    refs = [handle.remote() for _ in range(3)]
    wait(refs, 3)
    del refs
    gc.collect()
    assert not caplog.records


def test_an_error_leaves_no_cycle_behind(instance: MemoryInstance) -> None:
    handle = sync_handle(instance, "fail")
    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            with pytest.raises(Sour):
                handle.remote().result()
        assert not [each for each in gc.get_objects() if isinstance(each, ObjectRef)]
    finally:
        gc.enable()


def test_an_argument_that_cannot_travel_is_named(instance: MemoryInstance) -> None:
    with pytest.raises(SerializationError, match=r"lock"):
        sync_handle(instance, "echo").remote(threading.Lock())


# --- endpoints ---


def test_an_unknown_endpoint_is_a_key_error_that_names_the_known() -> None:
    instance = MemoryInstance({"iris": echo, "digits": echo})
    with pytest.raises(KeyError, match=r"'rose'.*'iris', 'digits'") as caught:
        make_handle(instance, "rose")  # type: ignore[arg-type]
    assert isinstance(caught.value, EndpointNotFound)
    assert instance.follows


def test_a_deleted_endpoint_is_not_found(instance: MemoryInstance) -> None:
    handle = sync_handle(instance, "echo")
    assert handle.call(1) == 1
    instance.remove("echo")
    with pytest.raises(EndpointNotFound):
        handle.call(1)
    with pytest.raises(EndpointNotFound):
        handle.remote(1)


def test_a_missing_endpoint_is_waited_for_if_that_is_ok() -> None:
    async def main(instance: MemoryInstance) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(4.9, instance.add, "late", echo)
        handle = async_handle(instance, "late", missing_ok=True)
        assert await asyncio.gather(*(handle.call(number) for number in range(3))) == [0, 1, 2]
        assert loop.time() == pytest.approx(4.9, abs=0.001)  # the moment it came
        assert not instance.watchers

    in_memory(main)


def test_a_missing_endpoint_is_waited_for_no_longer_than_five_seconds() -> None:
    async def main(instance: MemoryInstance) -> None:
        handle = async_handle(instance, "never", missing_ok=True)
        with pytest.raises(EndpointNotFound, match="'never' within 5 s; known endpoints: 'echo'"):
            await handle.call()
        assert 5.0 <= asyncio.get_running_loop().time() < 5.1
        assert not instance.watchers

    in_memory(main)


def test_a_deadline_counts_while_an_endpoint_is_waited_for() -> None:
    async def main(instance: MemoryInstance) -> None:
        handle = async_handle(instance, "never", missing_ok=True).options(timeout_s=1)
        with pytest.raises(RequestTimeout, match="'never'"):
            await handle.call()
        assert asyncio.get_running_loop().time() < 1.1

    in_memory(main)


# --- assignment ---


def test_remote_returns_once_a_replica_is_assigned() -> None:
    async def main(instance: MemoryInstance) -> None:
        instance.room = 0
        sending = asyncio.ensure_future(async_handle(instance, "echo").remote(1))
        await turns(10)
        assert not sending.done()
        instance.router().admit()
        ref = await sending
        assert await ref == 1

    in_memory(main)


def test_a_sync_remote_returns_once_a_replica_is_assigned(instance: MemoryInstance) -> None:
    instance.room = 0
    refs: list[ObjectRef] = []
    handle = sync_handle(instance, "hold")
    thread = threading.Thread(target=lambda: refs.append(handle.remote()))
    thread.start()
    while not (instance.routers and next(iter(instance.routers.values())).waiting):
        instance.on_thread(lambda: None)
    assert not refs
    instance.on_thread(next(iter(instance.routers.values())).admit)
    thread.join(5)
    assert len(refs) == 1
    assert "pending" in repr(refs[0])


def test_a_request_that_is_never_assigned_raises_at_remote() -> None:
    async def main(instance: MemoryInstance) -> None:
        instance.room = 0
        with pytest.raises(RequestTimeout):
            await async_handle(instance, "echo").options(timeout_s=2).remote()

    in_memory(main)


# --- refs as arguments ---


def test_a_ref_as_data_is_replaced_by_its_value(instance: MemoryInstance) -> None:
    handle = sync_handle(instance, "echo")
    assert handle.remote(handle.remote(handle.remote((1, 2)))).result() == (1, 2)
    assert handle.call(handle.remote(b"x" * 3000)) == b"x" * 3000


def test_refs_among_keyword_arguments_are_replaced_by_their_values(instance: MemoryInstance) -> None:
    one = sync_handle(instance, "echo").remote(1)
    found = sync_handle(instance, "describe").call(one, two=sync_handle(instance, "echo").remote(2), three=3)
    assert (found["data"], found["kwargs"]) == (1, {"two": 2, "three": 3})


def test_a_value_that_was_taken_is_passed_on_too(instance: MemoryInstance) -> None:
    handle = sync_handle(instance, "echo")
    ref = handle.remote([1])
    assert ref.result() == [1]
    assert handle.call(ref) == [1]


@pytest.mark.parametrize("as_keyword", [False, True])
def test_remote_with_a_ref_returns_before_that_has_its_value(instance: MemoryInstance, as_keyword: bool) -> None:
    waiting, request = held_ref(instance)
    handle = sync_handle(instance, "describe")
    ref = handle.remote(x=waiting) if as_keyword else handle.remote(waiting)
    assert "pending" in repr(ref)
    instance.on_thread(request.answer, "late")
    assert "late" in (ref.result(5)["data"], ref.result(5)["kwargs"].get("x"))


def test_the_error_of_a_ref_is_that_of_the_call_it_was_passed_to(instance: MemoryInstance) -> None:
    broken = sync_handle(instance, "fail").remote("salt")
    with pytest.raises(Sour, match="no salt"):
        sync_handle(instance, "echo").call(broken)
    with pytest.raises(Sour, match="no salt"):
        sync_handle(instance, "echo").remote(1, x=broken).result()


def test_async_handles_take_refs_of_both_kinds(instance: MemoryInstance) -> None:
    from_thread = sync_handle(instance, "echo").remote(1)

    async def main() -> None:
        handle = async_handle(instance, "describe")
        ref = await async_handle(instance, "hold").remote()
        sent = await handle.remote(ref, other=from_thread)
        while not instance.held:
            await asyncio.sleep(0)
        instance.held.pop().answer(2)
        found = await sent
        assert (found["data"], found["kwargs"]) == (2, {"other": 1})
        assert (await handle.call(from_thread))["data"] == 1

    asyncio.run(main())


def test_a_deadline_counts_while_arguments_are_waited_for(instance: MemoryInstance) -> None:
    waiting, request = held_ref(instance)
    ref = sync_handle(instance, "echo").options(timeout_s=0.01).remote(waiting)
    with pytest.raises(RequestTimeout, match="arguments"):
        ref.result(5)
    instance.on_thread(request.answer, 1)


def test_a_ref_does_not_pickle_and_says_what_to_do(instance: MemoryInstance) -> None:
    handle = sync_handle(instance, "echo")
    ref = handle.remote(1)
    with pytest.raises(SerializationError, match=r"headgate\.get"):
        pickle.dumps(ref)
    with pytest.raises(SerializationError, match="as an argument of its own"):
        handle.remote([ref])


# --- waiting ---


def test_a_timeout_ends_the_waiting_not_the_request(instance: MemoryInstance) -> None:
    ref, request = held_ref(instance)
    with pytest.raises(TimeoutError, match=r"0\.001 s") as caught:
        ref.result(timeout=0.001)
    assert isinstance(caught.value, RequestTimeout)
    with pytest.raises(RequestTimeout):
        get([sync_handle(instance, "echo").remote(1), ref], timeout=0)
    instance.on_thread(request.answer, "at last")
    assert get(ref, timeout=5) == "at last"


def test_wait_splits_the_refs_in_their_order(instance: MemoryInstance) -> None:
    slow, request = held_ref(instance)
    quick = [sync_handle(instance, "echo").remote(number) for number in range(3)]
    assert wait([slow, *quick], num_returns=3, timeout=5) == (quick, [slow])
    assert wait([slow, *quick]) == ([quick[0]], [slow, *quick[1:]])
    assert wait([slow], timeout=0) == ([], [slow])
    assert wait([slow, *quick], num_returns=4, timeout=0.001) == (quick, [slow])
    assert slow._call._waiters == []
    instance.on_thread(request.answer, 1)
    assert wait([slow]) == ([slow], [])


def test_an_error_counts_as_an_answer(instance: MemoryInstance) -> None:
    ref = sync_handle(instance, "fail").remote()
    assert wait([ref], timeout=5) == ([ref], [])


@pytest.mark.parametrize("number", [0, 2, True, 1.0])
def test_wait_refuses_a_number_that_cannot_be(instance: MemoryInstance, number: Any) -> None:
    ref = sync_handle(instance, "echo").remote()
    with pytest.raises(ConfigError, match="num_returns"):
        wait([ref], num_returns=number)
    with pytest.raises(ConfigError, match="once"):
        wait([ref, ref])


@pytest.mark.parametrize("wrong", [1, "text", [1], None])
def test_get_and_wait_need_refs(wrong: Any) -> None:
    with pytest.raises(ArgumentError, match="ObjectRefs"):
        get(wrong)
    with pytest.raises(TypeError, match="ObjectRefs"):
        wait(wrong)


def test_blocking_the_loop_that_the_answer_comes_through_raises() -> None:
    async def main(instance: MemoryInstance) -> None:
        ref = await async_handle(instance, "hold").remote()
        await turns()
        for block in (ref.result, lambda: get([ref]), lambda: wait([ref])):
            with pytest.raises(InstanceError, match=r"for ever.*await"):
                block()
        instance.held.pop().answer(1)
        assert get(ref) == 1

    in_memory(main)


def test_a_ref_of_one_loop_is_awaited_on_another(instance: MemoryInstance) -> None:
    ref, request = held_ref(instance)

    async def main() -> Any:
        task = asyncio.ensure_future(ref)
        await turns()
        instance.on_thread(request.answer, "elsewhere")
        return await task

    assert asyncio.run(main()) == "elsewhere"


def test_a_ref_as_a_future(instance: MemoryInstance) -> None:
    ref, request = held_ref(instance)
    future = ref.future()
    on: list[str] = []
    future.add_done_callback(lambda ended: on.append(threading.current_thread().name))
    instance.on_thread(request.answer, 5)
    assert future.result(5) == 5
    assert concurrent.futures.wait([ref.future()], 5).done
    assert on == ["headgate-refs"]  # not the headgate thread
    with pytest.raises(Sour):
        sync_handle(instance, "fail").remote().future().result(5)


# --- giving up ---


def test_a_cancelled_request_raises_and_is_withdrawn(instance: MemoryInstance) -> None:
    ref, request = held_ref(instance)
    assert ref.cancel()
    with pytest.raises(RequestCancelled):
        ref.result(5)
    assert not ref.cancel()
    assert next(iter(instance.routers.values())).cancelled == [request.caller]
    instance.on_thread(request.answer, "too late")
    with pytest.raises(RequestCancelled):
        ref.result(5)


def test_cancelling_the_future_cancels_the_request(instance: MemoryInstance) -> None:
    ref, _ = held_ref(instance)
    assert ref.future().cancel()
    with pytest.raises(RequestCancelled):
        ref.result(5)


def test_a_cancelled_task_cancels_its_request() -> None:
    async def main(instance: MemoryInstance) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(async_handle(instance, "hold").call(), 1)
        instance.room = 0
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(async_handle(instance, "echo").remote(), 1)
        assert len(instance.router().cancelled) == 2
        assert not instance.router().waiting

    in_memory(main)


def test_a_cancelled_call_says_what_its_task_was_told_and_later_calls_have_their_own_answers() -> None:
    async def main(instance: MemoryInstance) -> None:
        hold, echo = async_handle(instance, "hold"), async_handle(instance, "echo")
        assert await echo.call(1) == 1
        task = asyncio.create_task(hold.call())
        while not instance.held:
            await turns(1)
        task.cancel("no time")
        instance.held.pop().answer("late")
        with pytest.raises(asyncio.CancelledError, match="no time"):
            await task
        assert await asyncio.gather(*map(echo.call, range(5))) == [0, 1, 2, 3, 4]

    in_memory(main)


def test_a_task_that_is_cancelled_when_its_answer_is_there_is_cancelled_all_the_same() -> None:
    async def main(instance: MemoryInstance) -> None:
        task = asyncio.create_task(async_handle(instance, "hold").call())
        while not instance.held:
            await turns(1)
        instance.held.pop().answer(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert instance.router().cancelled == []

    in_memory(main)


def test_calls_that_ended_in_every_way_leave_nothing_to_the_next_ones() -> None:
    async def main(instance: MemoryInstance) -> None:
        echo, fail = async_handle(instance, "echo"), async_handle(instance, "fail")
        for number in range(3):
            assert await echo.call(number) == number
            assert await echo.options(timeout_s=1.0).call(number) == number
            assert await echo.call(b"x" * 100_000) == b"x" * 100_000
            with pytest.raises(BackendError):
                await fail.call()
            assert await echo.call(a=number) is None
        await asyncio.sleep(2.0)
        assert await echo.call("end") == "end"
        assert len({received.request_id for received in instance.received}) == 16

    in_memory(main)


def test_a_task_that_ends_the_program_does_not_hold_up_those_answered_with_it() -> None:
    ended = []

    async def call(handle: AsyncServeHandle, number: int) -> None:
        assert await handle.call(number) == number
        ended.append(number)
        if number == 1:
            raise SystemExit

    with asyncio.Runner() as runner:
        instance = MemoryInstance(dict(HANDLERS))
        handle = async_handle(instance, "echo")

        async def main() -> None:
            await asyncio.gather(*(call(handle, number) for number in range(4)), return_exceptions=True)

        with pytest.raises(SystemExit):
            runner.run(main())
        runner.run(asyncio.sleep(0.01))
    assert ended == [0, 1, 2, 3]


def test_a_task_that_awaits_a_call_keeps_its_context() -> None:
    name: contextvars.ContextVar[int] = contextvars.ContextVar("name")

    async def call(handle: AsyncServeHandle, number: int) -> None:
        name.set(number)
        assert await handle.call(number) == number
        assert name.get() == number

    async def main(instance: MemoryInstance) -> None:
        handle = async_handle(instance, "echo")
        await asyncio.gather(*(call(handle, number) for number in range(5)))

    in_memory(main)


def test_to_stop_awaiting_a_ref_does_not_cancel_its_request() -> None:
    async def main(instance: MemoryInstance) -> None:
        ref = await async_handle(instance, "hold").remote()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ref, 1)
        instance.held.pop().answer(1)
        assert await ref == 1

    in_memory(main)


def test_a_call_passes_its_deadline() -> None:
    async def main(instance: MemoryInstance) -> None:
        with pytest.raises(RequestTimeout):
            await async_handle(instance, "hold").options(timeout_s=3).call()
        assert asyncio.get_running_loop().time() == pytest.approx(3, abs=0.1)

    in_memory(main)


# --- the end of the instance ---


def test_after_the_end_every_call_says_so(instance: MemoryInstance) -> None:
    handle = sync_handle(instance, "echo")
    assert handle.call(1) == 1
    instance.leave()
    for use in (handle.call, handle.remote, handle.options(shard_key="a").call):
        with pytest.raises(InstanceError, match="already been shut down"):
            use()


def test_what_is_unanswered_when_the_thread_ends_fails(instance: MemoryInstance) -> None:
    ref, _ = held_ref(instance)
    future = ref.future()
    instance.leave()
    with pytest.raises(InstanceError, match="already been shut down"):
        ref.result(5)
    with pytest.raises(InstanceError):
        future.result(5)


def test_what_is_unanswered_on_a_users_loop_when_the_instance_ends_fails() -> None:
    async def main(instance: MemoryInstance) -> None:
        handle = async_handle(instance, "hold")
        asyncio.get_running_loop().call_later(10, instance.leave)
        with pytest.raises(InstanceError, match="already been shut down"):
            await handle.call()
        assert asyncio.get_running_loop().time() < 10.5

    in_memory(main)


def test_what_is_unanswered_when_a_users_loop_ends_fails() -> None:
    instance = MemoryInstance(dict(HANDLERS))

    async def main() -> ObjectRef:
        return await async_handle(instance, "hold").remote()

    ref = asyncio.run(main())
    with pytest.raises(InstanceError, match="loop"):
        ref.result(5)


def test_a_loop_that_outlives_its_instances_keeps_none_of_them() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(3):
            instance = MemoryInstance(dict(HANDLERS))
            assert await async_handle(instance, "echo").call(1) == 1
            instance.leave()
        await turns()
        assert [key[0] for key in _lanes if key[1] is loop] == [instance]
        assert len(asyncio.all_tasks()) == 2  # this one, and what waits for the end of the loop

    virtual_time.run(main())
    assert not [key for key in _lanes if key[1].is_closed()]


# --- handles ---


def test_options_make_a_new_handle_and_leave_the_old_one(instance: MemoryInstance) -> None:
    plain = sync_handle(instance, "describe")
    one = plain.options(shard_key="a", http_method="PUT")
    two = one.options(shard_key=None, method_name="m")
    seen = [(h.call()["shard_key"], h.call()["http_method"], h.call()["method_name"]) for h in (plain, one, two)]
    assert seen == [(None, None, None), ("a", "PUT", None), (None, "PUT", "m")]
    assert type(two) is ServeHandle
    assert repr(two) == "ServeHandle(endpoint='describe')"
    assert repr(async_handle(instance, "echo")) == "AsyncServeHandle(endpoint='echo')"
    assert two.endpoint_name == "describe"


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"timeout_s": 0}, ValueError), ({"timeout_s": float("inf")}, ValueError), ({"timeout_s": "1"}, TypeError),
        ({"timeout_s": True}, TypeError), ({"http_headers": {"a": 1}}, TypeError), ({"shard_key": 1}, TypeError),
        ({"method_name": b"m"}, TypeError), ({"colour": "red"}, TypeError),
    ],
)  # fmt: skip
def test_options_are_checked(instance: MemoryInstance, options: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind, match=next(iter(options))):
        sync_handle(instance, "echo").options(**options)


def test_a_handle_pickles_and_finds_its_instance_again(
    instance: MemoryInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = sync_handle(instance, "describe").options(shard_key="s", timeout_s=2)
    copy = pickle.loads(pickle.dumps(handle))
    assert repr(copy) == repr(handle)
    with pytest.raises(InstanceError, match="is gone"):
        copy.call()
    monkeypatch.setitem(instances._joined, instance.key, instance)  # type: ignore[arg-type]
    assert copy.call(1)["shard_key"] == "s"
    assert pickle.loads(pickle.dumps(copy)).call(2)["data"] == 2


class Slow(MemoryInstance):
    """An instance whose first snapshot takes until `snapshot_is_here`."""

    def __init__(self) -> None:
        super().__init__(dict(HANDLERS))
        self.snapshot_is_here = threading.Event()

    def follow(self) -> None:
        super().follow()
        if not self.snapshot_is_here.wait(5):
            raise ControllerUnavailable("no snapshot")


def test_an_async_handle_joins_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    instance = Slow()
    target = Target("echo", False, Options())
    handle = AsyncServeHandle(Reach(instance.key), target)
    monkeypatch.setitem(instances._joined, instance.key, instance)  # type: ignore[arg-type]

    async def main() -> None:
        gives_up = asyncio.ensure_future(handle.call(0))
        calls = [asyncio.ensure_future(handle.call(number)) for number in range(3)]
        await turns()
        gives_up.cancel()
        await turns()
        instance.snapshot_is_here.set()
        assert await asyncio.gather(*calls) == [0, 1, 2]
        assert instance.follows == 1
        assert await handle.options(shard_key="a").call(3) == 3

    asyncio.run(main())
    assert instance.follows == 1


def test_an_async_handle_that_could_not_join_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    instance = MemoryInstance(dict(HANDLERS))
    handle = AsyncServeHandle(Reach(instance.key), Target("echo", False, Options()))

    async def main() -> None:
        for _ in range(2):
            with pytest.raises(InstanceError, match="is gone"):
                await handle.call(1)
        monkeypatch.setitem(instances._joined, instance.key, instance)  # type: ignore[arg-type]
        assert await handle.call(1) == 1
        instance.usable = False
        with pytest.raises(InstanceError, match="already been shut down"):
            await handle.call(1)

    asyncio.run(main())


def test_in_a_replica_a_handle_uses_the_replicas_own_membership(
    instance: MemoryInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = pickle.loads(pickle.dumps(sync_handle(instance, "echo")))
    instance.role = "replica"
    monkeypatch.setitem(instances._joined, "first", MemoryInstance())  # type: ignore[arg-type]
    monkeypatch.setitem(instances._joined, "by another name", instance)  # type: ignore[arg-type]
    assert copy.call(1) == 1


def test_a_handle_in_the_wrong_context_warns_once(
    instance: MemoryInstance, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "headgate.handle")

    async def main() -> None:
        sync_handle(instance, "echo")
        async_handle(instance, "echo")

    asyncio.run(main())
    sync_handle(instance, "echo")
    async_handle(instance, "echo")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "sync=False" in caplog.messages[0]
    assert "sync=True" in caplog.messages[1]


# --- threads ---


def test_one_handle_serves_many_threads(instance: MemoryInstance) -> None:
    handle = sync_handle(instance, "echo")
    wrong: list[Any] = []

    def use(thread: int) -> None:
        for number in range(100):
            value = (thread, number)
            answer = handle.call(value) if number % 2 else handle.remote(value).result()
            if answer != value:
                wrong.append((value, answer))

    threads = [threading.Thread(target=use, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not wrong
    assert len(instance.received) == 1600


def test_many_threads_may_wait_for_one_ref(instance: MemoryInstance) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for number in range(50):
            ref, request = held_ref(instance)
            waiting = [pool.submit(ref.result, 5) for _ in range(4)]
            instance.on_thread(request.answer, number)
            assert [each.result(5) for each in waiting] == [number] * 4


# --- Starlette requests ---


def test_a_request_passed_as_data_arrives_with_its_body(instance: MemoryInstance) -> None:
    instance.add("path", lambda request: (request.data.method, request.data.url.path, request.data.data))

    async def main() -> Any:
        return await async_handle(instance, "path").call(posted())

    assert asyncio.run(main()) == ("POST", "/a", b"body")
    with pytest.raises(SerializationError, match="body"):
        sync_handle(instance, "path").call(posted())
