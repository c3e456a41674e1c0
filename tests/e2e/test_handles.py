"""Handles on a real instance: what a program gets from them, in whatever it runs."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import leftovers
import needs
import pytest
from running import cancel, cancelled, on_ray

import headgate
from headgate import eventloop

NO_SERVER = {"location": "NoServer"}


class Spoiled(ValueError):
    """An error of the user's, with an attribute."""

    def __init__(self, what: str, days: int) -> None:
        super().__init__(what, days)
        self.days = days


@pytest.fixture
def client() -> Iterator[headgate.Client]:
    with headgate.start(http_options=NO_SERVER) as started:
        yield started


def serve(client: headgate.Client, code: Any, *args: Any, name: str = "it", **config: Any) -> Any:
    """A sync handle of a new endpoint."""
    client.create_backend(name, code, *args, config=config)
    client.create_endpoint(name, backend=name)
    return client.get_handle(name)


def awaiting(client: headgate.Client, name: str, use: Callable[[Any], Any]) -> Any:
    """The result of `await use(async handle)` on a loop of its own."""

    async def main() -> Any:
        return await use(client.get_handle(name, sync=False))

    return asyncio.run(main())


def until(reached: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def plain_echo(request: Any) -> Any:
    return request.data


async def async_echo(request: Any) -> Any:
    return request.data


# --- values ---


@pytest.mark.parametrize("code", [plain_echo, async_echo])
def test_values_keep_their_types_over_either_handle(client: headgate.Client, code: Any) -> None:
    handle = serve(client, code)
    values = [None, 1, 2.5, "text", b"bytes", (1, (2,)), {1: {2, 3}}, [None, True], 10**30, float("inf"), Path("/a")]
    assert [handle.call(value) for value in values] == values
    assert headgate.get([handle.remote(value) for value in values]) == values

    async def use(handle: Any) -> None:
        assert [await handle.call(value) for value in values] == values
        assert await asyncio.gather(*[await handle.remote(value) for value in values]) == values

    awaiting(client, "it", use)


def test_numpy_arrays_arrive_whole_and_writable(client: headgate.Client) -> None:
    numpy = needs.module("numpy")

    def double(request: Any) -> Any:
        request.data["a"] *= 2
        return request.data["a"], request.query_params["scale"]

    handle = serve(client, double)
    array, scale = handle.call({"a": numpy.arange(300_000.0)}, scale=numpy.float32(1.5))
    assert array.tolist()[:3] == [0.0, 2.0, 4.0]
    assert array.shape == (300_000,)
    assert type(scale) is numpy.float32
    array[0] = 1.0


def test_values_of_twenty_megabytes_travel_both_ways(client: headgate.Client) -> None:
    handle = serve(client, plain_echo)
    value = os.urandom(1 << 20) * 20
    assert handle.call(value) == value
    refs = [handle.remote({number: value}) for number in range(3)]
    assert headgate.get([handle.remote(ref) for ref in refs]) == [{number: value} for number in range(3)]

    async def use(handle: Any) -> Any:
        return await asyncio.gather(*(handle.call(value) for _ in range(3)))

    assert awaiting(client, "it", use) == [value] * 3


def test_a_generator_arrives_as_a_list(client: headgate.Client) -> None:
    def plain(request: Any) -> Any:
        yield from range(request.data)

    async def later(request: Any) -> Any:
        for number in range(request.data):
            yield {number}

    assert serve(client, plain, name="plain").call(3) == [0, 1, 2]
    assert serve(client, later, name="later").call(2) == [{0}, {1}]


def test_the_handler_gets_a_serve_request(client: headgate.Client) -> None:
    def describe(request: Any) -> Any:
        return (
            type(request.query_params["n"]), request.json(), request.form(), request.body(), request.method,
            request.headers["x-colour"], request.path_params, isinstance(request, headgate.ServeRequest),
        )  # fmt: skip

    async def describe_later(request: Any) -> Any:
        return await request.json(), await request.body(), request.query_params

    plain = serve(client, describe, name="plain").options(http_method="PUT", http_headers={"X-Colour": "red"})
    data = {"a": (1,)}
    assert plain.call(data, n=1.5) == (float, data, data, data, "PUT", "red", {}, True)
    assert serve(client, describe_later, name="later").call(data, n=1) == (data, data, {"n": 1})
    with pytest.raises(TypeError, match=r"needs a dict.*list"):
        plain.call([1], n=1)


def test_a_starlette_request_arrives_as_one(client: headgate.Client) -> None:
    from starlette.requests import Request

    async def read(request: Any) -> Any:
        return type(request).__mro__[1].__name__, request.query_params["q"], await request.json()

    serve(client, read)
    scope = {
        "type": "http", "method": "POST", "path": "/a", "raw_path": b"/a", "query_string": b"q=1",
        "headers": [(b"content-type", b"application/json")], "server": ("h", 80), "scheme": "http",
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b'{"b": 2}', "more_body": False}

    answer = awaiting(client, "it", lambda handle: handle.call(Request(scope, receive)))
    assert answer == ("Request", "1", {"b": 2})


def test_batches_form_from_the_calls_of_a_handle(client: headgate.Client) -> None:
    @headgate.accept_batch
    def squares(requests: Any) -> Any:
        return [(request.data**2, len(requests)) for request in requests]

    handle = serve(client, squares, max_batch_size=4, batch_wait_timeout=5.0)
    answers = headgate.get([handle.remote(number) for number in range(8)], timeout=5)
    assert answers == [(number**2, 4) for number in range(8)]


# --- errors ---


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_the_users_error_arrives_as_itself(client: headgate.Client, kind: str) -> None:
    def spoil(request: Any) -> Any:
        raise Spoiled("milk", days=3)

    async def spoil_later(request: Any) -> Any:
        spoil(request)

    handle = serve(client, spoil if kind == "plain" else spoil_later)
    for ask in (handle.call, lambda: headgate.get(handle.remote()), lambda: headgate.get([handle.remote()])):
        with pytest.raises(Spoiled) as caught:
            ask()
        assert caught.value.days == 3
        assert "milk" in str(caught.value)
        if not on_ray() or ask == handle.call:  # a Ray ref raises as every task of Ray's does
            assert isinstance(caught.value, headgate.BackendError)
            assert "in spoil" in caught.value.remote_traceback

    async def use(handle: Any) -> None:
        with pytest.raises(Spoiled, match="milk"):
            await handle.call()

    awaiting(client, "it", use)


def test_the_error_travels_through_a_composed_backend(client: headgate.Client) -> None:
    def spoil(request: Any) -> Any:
        raise Spoiled("fish", days=1)

    inner = serve(client, spoil, name="inner")
    outer = serve(client, lambda request: inner.call(), name="outer")
    with pytest.raises(Spoiled, match="fish") as caught:
        outer.call()
    assert caught.value.days == 1


@pytest.mark.local("a Ray ref may leave its process")
def test_a_ref_inside_of_something_else_does_not_pickle(client: headgate.Client) -> None:
    handle = serve(client, plain_echo)
    with pytest.raises(headgate.SerializationError, match=r"headgate\.get"):
        handle.call([handle.remote()])


@pytest.mark.local("a Ray ref is bound to its replica: what waits there dies with it")
def test_a_replica_that_is_killed_fails_what_it_ran_and_is_replaced(client: headgate.Client, tmp_path: Path) -> None:
    def sleep(request: Any) -> Any:
        if request.data == "sleep":
            (tmp_path / "started").touch()
            time.sleep(60)
        return os.getpid()

    handle = serve(client, sleep)
    pid = handle.call()
    ref = handle.remote("sleep")
    waiting = handle.remote()
    until((tmp_path / "started").exists)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(headgate.ReplicaDied) as caught:
        ref.result(10)
    assert caught.value.started
    assert waiting.result(10) != pid  # it had not started: another replica ran it
    assert handle.call() != pid


# --- chaining, get, wait ---


def test_refs_are_passed_from_call_to_call(client: headgate.Client, tmp_path: Path) -> None:
    def add(request: Any) -> Any:
        while request.query_params.get("gate") and not (tmp_path / "open").exists():
            time.sleep(0.005)
        return request.data + request.query_params["n"]

    handle = serve(client, add, num_replicas=2)
    first = handle.remote(1, n=1, gate=True)
    second = handle.remote(first, n=10)
    third = handle.remote(100, n=second)  # both came back before `first` has its answer
    assert headgate.wait([first, second, third], timeout=0.05) == ([], [first, second, third])
    (tmp_path / "open").touch()
    assert headgate.get([first, second, third], timeout=10) == [2, 12, 112]

    async def use(handle: Any) -> Any:
        ref = await handle.remote(1, n=first)
        return await (await handle.remote(ref, n=await handle.remote(1, n=1)))

    assert awaiting(client, "it", use) == 5


def test_get_and_wait_take_their_time(client: headgate.Client) -> None:
    def nap(request: Any) -> Any:
        time.sleep(request.data)
        return request.data

    handle = serve(client, nap, num_replicas=2)
    slow, quick = handle.remote(0.5), handle.remote(0.0)
    assert headgate.wait([slow, quick], timeout=5) == ([quick], [slow])
    with pytest.raises(TimeoutError):
        headgate.get([quick, slow], timeout=0.01)
    assert headgate.get([slow, quick], timeout=5) == [0.5, 0.0]
    assert slow.future().result(1) == 0.5


def test_remote_waits_while_every_replica_is_full(client: headgate.Client, tmp_path: Path) -> None:
    def gate(request: Any) -> Any:
        while not (tmp_path / "open").exists():
            time.sleep(0.005)

    handle = serve(client, gate, max_concurrent_queries=1)
    first = handle.remote()
    sent: list[Any] = []
    thread = threading.Thread(target=lambda: sent.append(handle.remote()))
    thread.start()
    thread.join(0.2)
    assert not sent
    (tmp_path / "open").touch()
    thread.join(5)
    assert headgate.get([first, *sent], timeout=5) == [None, None]


def test_the_first_calls_of_a_handle_find_every_replica(client: headgate.Client) -> None:
    def pid(request: Any) -> int:
        time.sleep(0.1)
        return os.getpid()

    serve(client, pid, num_replicas=3, max_queued_requests=0)
    for _ in range(3):  # each with a router of its own, whose links are not there yet
        pids = awaiting(client, "it", lambda handle: asyncio.gather(*(handle.call() for _ in range(3))))
        assert len(set(pids)) == 3


# --- options ---


def test_options_choose_the_method(client: headgate.Client) -> None:
    class Shop:
        def __call__(self, request: Any) -> str:
            return "call"

        def price(self, request: Any) -> Any:
            return request.data * 2

        def _secret(self, request: Any) -> None: ...

    handle = serve(client, Shop)
    assert handle.call() == "call"
    assert handle.options(method_name="price").call(4) == 8
    for name in ("missing", "_secret", "reconfigure"):
        with pytest.raises(headgate.EndpointNotFound, match=name):
            handle.options(method_name=name).call()


def test_a_shard_key_always_meets_the_same_backend(client: headgate.Client) -> None:
    handle = serve(client, lambda request: "a", name="it")
    client.create_backend("b", lambda request: "b")
    client.set_traffic("it", {"it": 0.5, "b": 0.5})
    met = {}
    for key in map(str, range(40)):
        answers = {handle.options(shard_key=key).call() for _ in range(5)}
        answers.add(awaiting(client, "it", lambda each, key=key: each.options(shard_key=key).call()))
        assert len(answers) == 1
        met[key] = answers.pop()
    assert set(met.values()) == {"a", "b"}


def test_a_request_times_out_and_one_that_waits_never_runs(client: headgate.Client, tmp_path: Path) -> None:
    def note(request: Any) -> Any:
        (tmp_path / str(request.data)).touch()
        time.sleep(0.6)

    handle = serve(client, note, max_concurrent_queries=1)
    running = handle.remote("first")
    began = time.monotonic()
    with pytest.raises(headgate.RequestTimeout):
        handle.options(timeout_s=0.1).call("second")
    assert 0.1 <= time.monotonic() - began < 0.5
    with pytest.raises(TimeoutError):
        awaiting(client, "it", lambda each: each.options(timeout_s=0.1).call("third"))
    headgate.get(running, timeout=5)
    handle.call("last")
    assert sorted(os.listdir(tmp_path)) == ["first", "last"]


def test_a_cancelled_request_is_cancelled_in_the_replica(client: headgate.Client, tmp_path: Path) -> None:
    async def sleep(request: Any) -> None:
        (tmp_path / f"{request.data} started").touch()
        try:
            await asyncio.sleep(60)
        finally:
            (tmp_path / f"{request.data} ended").touch()

    handle = serve(client, sleep)
    ref = handle.remote("a")
    until((tmp_path / "a started").exists)
    cancel(ref)
    with pytest.raises(cancelled()):
        headgate.get(ref, timeout=5)
    until((tmp_path / "a ended").exists)

    async def use(handle: Any) -> None:
        task = asyncio.ensure_future(handle.call("b"))
        while not (tmp_path / "b started").exists():
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while not (tmp_path / "b ended").exists():
            await asyncio.sleep(0.005)

    awaiting(client, "it", use)


def test_too_many_waiting_requests_are_shed(client: headgate.Client, tmp_path: Path) -> None:
    def gate(request: Any) -> Any:
        while not (tmp_path / "open").exists():
            time.sleep(0.005)

    serve(client, gate, max_concurrent_queries=1, max_queued_requests=1)

    async def use(handle: Any) -> Any:
        calls = [asyncio.ensure_future(handle.call()) for _ in range(5)]
        await asyncio.wait(calls[2:])
        (tmp_path / "open").touch()
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = awaiting(client, "it", use)
    assert answers[:2] == [None, None]
    assert [type(each) for each in answers[2:]] == [headgate.BackendOverloaded] * 3


# --- endpoints and the instance ---


def test_endpoints_that_are_not_there(client: headgate.Client) -> None:
    with pytest.raises(KeyError, match="rose"):
        client.get_handle("rose")
    early = client.get_handle("rose", missing_ok=True)
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(early.call(1)))
    thread.start()
    handle = serve(client, plain_echo, name="rose")
    thread.join(10)
    assert answers == [1]
    client.delete_endpoint("rose")
    with pytest.raises(headgate.EndpointNotFound, match="rose"):
        handle.call(1)


def test_after_shutdown_a_handle_says_so(client: headgate.Client) -> None:
    handle = serve(client, plain_echo)
    later = client.get_handle("it", sync=False)
    assert handle.call(1) == 1
    client.shutdown()
    with pytest.raises(headgate.InstanceError, match="already been shut down"):
        handle.call(1)
    with pytest.raises(headgate.InstanceError, match="already been shut down"):
        asyncio.run(later.call(1))


@pytest.mark.local("the embedded engine's supervisor is a child of the driver; tests/ray kills other things")
def test_no_call_outlives_its_instance(client: headgate.Client, tmp_path: Path) -> None:
    def sleep(request: Any) -> None:
        (tmp_path / "started").touch()
        time.sleep(60)

    handle = serve(client, sleep, max_concurrent_queries=1)
    running = handle.remote()
    until((tmp_path / "started").exists)
    errors: list[Exception] = []

    def wait_in_line() -> None:
        try:
            handle.call()
        except headgate.HeadgateError as error:
            errors.append(error)

    thread = threading.Thread(target=wait_in_line)
    thread.start()
    thread.join(0.1)
    children = [each for each in leftovers.processes() if each.parent == os.getpid()]
    (supervisor,) = (each.pid for each in children if each.name == "headgate-super")
    os.kill(supervisor, signal.SIGKILL)
    with pytest.raises((headgate.ReplicaDied, headgate.InstanceError)):
        running.result(10)
    thread.join(10)
    assert [type(each) for each in errors] == [headgate.InstanceError]
    with pytest.raises(headgate.InstanceError):
        handle.call()


def test_a_handle_is_used_by_many_threads_and_loops(client: headgate.Client) -> None:
    handle = serve(client, async_echo, num_replicas=2)
    wrong: list[Any] = []

    def use(thread: int) -> None:
        for number in range(100):
            value = (thread, number)
            answer = handle.call(value) if number % 2 else headgate.get(handle.remote(value))
            if answer != value:
                wrong.append((value, answer))

    def use_loop(thread: int) -> None:
        async def use(handle: Any) -> None:
            values = [(thread, number) for number in range(100)]
            if await asyncio.gather(*map(handle.call, values)) != values:
                wrong.append(thread)

        awaiting(client, "it", use)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    threads += [threading.Thread(target=use_loop, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong


# --- event loops ---


@pytest.fixture(scope="module")
def uvloop_pipe() -> None:
    """The pipe that libuv makes with the first loop of a process, and keeps."""
    eventloop.new_event_loop().close()


@pytest.mark.local("Ray opens descriptors in its driver at will")
@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, eventloop.new_event_loop])
def test_a_loop_that_is_just_closed_leaves_nothing_open(
    uvloop_pipe: None, client: headgate.Client, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    serve(client, plain_echo, num_replicas=2)
    handle = client.get_handle("it", sync=False)
    loops: list[weakref.ref[Any]] = []

    def use() -> int:
        loop = new_loop()
        assert loop.run_until_complete(handle.call(len(loops))) == len(loops)
        with warnings.catch_warnings():
            if new_loop is eventloop.new_event_loop:  # uvloop warns itself, and hangs if that is an error
                warnings.simplefilter("ignore", ResourceWarning)
            loop.close()
        loops.append(weakref.ref(loop))
        return len(os.listdir("/proc/self/fd"))

    counts = [use() for _ in range(20)]
    assert max(counts[1:]) - counts[1] < 8, counts  # those of the newest loop are found by the next
    gc.collect()  # warns of what was left open
    assert sum(loop() is not None for loop in loops) < 3
    before = len(os.listdir("/proc/self/fd"))
    use()
    client.shutdown()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) < before


#: What a call-back finds, and a program that it starts, whose answer comes on the headgate thread.
CALL_BACK = """
import signal, subprocess, threading, time
import headgate

def nap(request):
    time.sleep(0.2)

def look(ended):
    shown = subprocess.run(["grep", "SigBlk", "/proc/self/status"], stdout=subprocess.PIPE, text=True)
    print("ANSWER", threading.current_thread().name, signal.pthread_sigmask(signal.SIG_BLOCK, ()), flush=True)
    print("ANSWER", int(shown.stdout.split()[1], 16) == 1 << signal.SIGUSR2 - 1, flush=True)
    over.set()

over = threading.Event()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
with headgate.start(http_options={"location": "NoServer"}) as client:
    client.create_backend("nap", nap)
    client.create_endpoint("nap", backend="nap")
    client.get_handle("nap").remote().future().add_done_callback(look)
    assert over.wait(10)
"""


@pytest.mark.local("a Ray ref's call-backs are Ray's")
def test_a_call_back_and_what_it_starts_take_the_signals_that_the_program_takes() -> None:
    run = subprocess.run([sys.executable, "-c", CALL_BACK], capture_output=True, text=True, timeout=30)
    assert lines(run.stdout) == ["ANSWER headgate-refs {<Signals.SIGUSR2: 12>}", "ANSWER True"], run.stderr


# --- composition ---


def test_a_pickled_handle_calls_from_inside_a_backend(client: headgate.Client) -> None:
    class Plain:
        def __init__(self, handle: Any) -> None:
            self.handle = handle

        def __call__(self, request: Any) -> Any:
            refs = [self.handle.remote(number) for number in range(request.data)]
            return headgate.get(refs)

    class Later:
        def __init__(self, handle: Any) -> None:
            self.handle = handle

        async def __call__(self, request: Any) -> Any:
            return await asyncio.gather(*(self.handle.call(number) for number in range(request.data)))

    inner = serve(client, plain_echo, name="inner")
    assert serve(client, Plain, inner, name="plain").call(5) == [0, 1, 2, 3, 4]
    later = client.get_handle("inner", sync=False)
    assert serve(client, Later, later, name="later").call(5) == [0, 1, 2, 3, 4]


def test_a_backend_connects_and_gets_handles_itself(client: headgate.Client) -> None:
    class Outer:
        def __init__(self) -> None:
            self.handle = headgate.connect().get_handle("inner")

        def __call__(self, request: Any) -> Any:
            return self.handle.call(request.data) + 1

    class OuterLater:
        def __init__(self) -> None:
            self.handle = headgate.connect().get_handle("inner", sync=False)

        async def __call__(self, request: Any) -> Any:
            return await self.handle.call(request.data) + 1

    serve(client, async_echo, name="inner")
    assert serve(client, Outer, name="outer").call(1) == 2
    assert serve(client, OuterLater, name="later").call(1) == 2


def test_a_pickled_handle_calls_from_another_process(client: headgate.Client) -> None:
    handle = serve(client, plain_echo).options(timeout_s=5)
    code = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read()).call({'a': 1}))"
    run = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(handle), capture_output=True, timeout=20)
    assert run.stdout.decode().strip() == "{'a': 1}", run.stderr.decode()
    assert handle.call(1) == 1


@pytest.mark.local("Ray does not survive a fork of its driver")
def test_a_handle_survives_a_fork(client: headgate.Client) -> None:
    handle = serve(client, plain_echo)
    assert handle.call(1) == 1
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = 0 if handle.call(2) == 2 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert handle.call(3) == 3


# --- wherever a program runs ---

PROGRAM = """
import asyncio
import headgate

class Fruit:
    def __init__(self, name):
        self.name = name

class Rotten(Exception):
    pass

def ripen(request):
    if request.data.name == "pear":
        raise Rotten("pear")
    return Fruit("ripe " + request.data.name)

client = headgate.start(http_options={"location": "NoServer"})
client.create_backend("ripen", ripen)
client.create_endpoint("ripen", backend="ripen")
handle = client.get_handle("ripen")
answer = handle.call(Fruit("apple"))
print("ANSWER", type(answer) is Fruit, answer.name)
try:
    headgate.get(handle.remote(Fruit("pear")))
except Rotten as error:
    print("ERROR", error.args)

"""
EXPECTED = ["ANSWER True ripe apple", "ERROR ('pear',)"]


def lines(output: str) -> list[str]:
    """What the program itself printed."""
    plain = output.replace(">>> ", "").replace("... ", "").splitlines()
    return [line for line in plain if line.startswith(("ANSWER", "ERROR"))]


@pytest.mark.parametrize("how", ["file", "stdin", "-i", "-c"])
def test_classes_of_main_travel(how: str, tmp_path: Path) -> None:
    text = PROGRAM
    command = [sys.executable]
    if how == "file":
        (tmp_path / "program.py").write_text(PROGRAM)
        command, text = [sys.executable, str(tmp_path / "program.py")], ""
    elif how == "-c":
        command, text = [sys.executable, "-c", PROGRAM], ""
    elif how == "-i":
        command = [sys.executable, "-i", "-q"]
        text = PROGRAM.replace("\nclass", "\n\nclass").replace("\ndef", "\n\ndef").replace("\nclient", "\n\nclient", 1)
    run = subprocess.run(command, input=text, capture_output=True, text=True, timeout=30)
    assert lines(run.stdout) == EXPECTED, run.stdout + run.stderr
    assert run.returncode == 0


#: Runs each cell of a JSON list in a Jupyter kernel and prints what they print.
NOTEBOOK = """
import json, sys
from jupyter_client.manager import start_new_kernel

def show(message):
    content = message["content"]
    print(content.get("text") or "\\n".join(content.get("traceback", ())), end="")

kernel, channel = start_new_kernel(kernel_name="python3")
try:
    for cell in json.load(sys.stdin):
        channel.execute_interactive(cell, timeout=20, output_hook=show)
finally:
    channel.stop_channels()
    kernel.shutdown_kernel()
"""
CELL = """
later = client.get_handle("ripen", sync=False)
fruits = await asyncio.gather(*(later.call(Fruit("plum")) for _ in range(3)))
print("ANSWER", [fruit.name for fruit in fruits])
ref = await later.remote(Fruit("fig"))
"""
REFUSED = """
try:
    headgate.get(await later.remote(Fruit("kiwi")))
except headgate.InstanceError:
    print("ERROR", "await it")
"""
LAST = """
print("ANSWER", (await ref).name, handle.call(Fruit("fig")).name)
client.shutdown()
"""


def test_handles_work_in_a_notebook() -> None:
    needs.module("jupyter_client")
    needs.module("ipykernel")
    refused = () if on_ray() else (REFUSED,)  # the answer to a Ray ref does not come through the notebook's loop
    run = subprocess.run(
        [sys.executable, "-c", NOTEBOOK],
        input=json.dumps([PROGRAM, CELL, *refused, LAST]),
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert lines(run.stdout) == [
        *EXPECTED, "ANSWER ['ripe plum', 'ripe plum', 'ripe plum']", *("ERROR await it" for _ in refused),
        "ANSWER ripe fig ripe fig",
    ], run.stdout + run.stderr  # fmt: skip
