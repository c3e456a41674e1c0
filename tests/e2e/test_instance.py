"""The life of an instance: how it starts, who may end it, and that nothing of it is left then."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from running import Script, eventually, instance_pids, is_alive, is_gone, key_of, on_ray, pid_of, slack
from starlette.middleware import Middleware

import headgate
from headgate import ConfigError, ControllerUnavailable, DeploymentMode, EndpointNotFound, HTTPOptions, InstanceError

NO_HTTP = {"location": None}


def pid(request: Any) -> int:
    return os.getpid()


def folders(run_dir: Path) -> list[str]:
    """The run directories that are there."""
    return [each.name for each in run_dir.glob("headgate/*")]


@pytest.fixture
def own() -> Iterator[headgate.Client]:
    """An instance without HTTP for one test."""
    with headgate.start(http_options=NO_HTTP) as client:
        yield client


# --- start ---


def test_start_returns_an_instance_that_serves(free_port: int) -> None:
    with headgate.start(http_options={"port": free_port}) as client:
        assert client.http_address == f"http://127.0.0.1:{free_port}"
        assert str(free_port) in repr(client)
        assert httpx.get(f"{client.http_address}/-/healthz").status_code == 200
        client.create_backend("it", lambda request: {"path": request.url.path})
        client.create_endpoint("it", backend="it", route="/it")
        assert httpx.get(f"{client.http_address}/it").json() == {"path": "/it"}
        assert httpx.get(f"{client.http_address}/-/routes").json() == {"/it": ["it", ["GET"]]}
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{free_port}/it")


def test_port_0_picks_a_free_one() -> None:
    with headgate.start(http_options=HTTPOptions(port=0)) as client:
        assert client.http_address
        assert not client.http_address.endswith((":0", "/"))
        assert httpx.get(f"{client.http_address}/nothing/here").status_code == 404


@pytest.mark.parametrize(
    "options",
    [{"location": None}, {"location": "NoServer"}, {"location": DeploymentMode.NoServer}, {"host": None}],
)
def test_without_a_server_no_port_is_opened_and_handles_work(options: dict[str, Any]) -> None:
    with headgate.start(http_options={**options, "port": 1}) as client:
        assert client.http_address is None
        assert client.status().proxies == ()
        client.create_backend("it", pid)
        client.create_endpoint("it", backend="it")
        assert client.get_handle("it").call() == client.status().replicas[0].pid


def test_every_node_is_this_node() -> None:
    with headgate.start(http_options={"location": "EveryNode", "port": 0}) as client:
        assert len(client.status().proxies) == 1


def test_the_old_arguments_still_work_and_warn(free_port: int) -> None:
    with pytest.warns(DeprecationWarning, match=r"http_host, http_port.*http_options") as warned:
        client = headgate.start(http_host="127.0.0.1", http_port=free_port)
    client.shutdown()
    assert warned[0].filename == __file__
    assert client.http_address == f"http://127.0.0.1:{free_port}"
    with pytest.warns(DeprecationWarning, match="http_host"):
        client = headgate.start(http_host=None)
    client.shutdown()
    assert client.http_address is None


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"http_host": "127.0.0.1", "http_options": {}}, ValueError, "http_host"),
        ({"http_middlewares": [], "http_port": 0, "http_options": HTTPOptions()}, ValueError, "http_port"),
        ({"http_options": {"prot": 1}}, ValueError, "port"),
        ({"http_options": {"port": 70000}}, ValueError, "port"),
        ({"http_options": {"port": "http"}}, ValueError, "port"),
        ({"http_options": {"location": "Everywhere"}}, ValueError, "location"),
        ({"http_options": {"middlewares": [3]}}, ValueError, "middlewares"),
        ({"http_options": 3}, TypeError, "http_options"),
        ({"engine": "kubernetes"}, ValueError, "engine"),
        ({"namespace": ""}, ValueError, "namespace"),
        ({"namespace": 3}, TypeError, "namespace"),
        ({"detached": 1}, TypeError, "detached must be True or False, got 1"),
        ({"detached": None}, TypeError, "detached"),
        ({"http_options": {"ssl_certfile": "/no/cert.pem"}}, ValueError, "HTTPOptions.ssl_certfile: .*/no/cert.pem"),
        (
            {"http_options": {"ssl_certfile": __file__, "ssl_keyfile": "/no/key.pem"}},
            ValueError,
            "HTTPOptions.ssl_keyfile: .*/no/key.pem",
        ),
        ({"http_options": {"ssl_certfile": __file__}}, ValueError, "HTTPOptions.ssl_certfile: "),
    ],
)
def test_a_bad_option_is_named(options: dict[str, Any], kind: type[Exception], text: str, run_dir: Path) -> None:
    with pytest.raises(kind, match=text) as error:
        headgate.start(**options)
    assert isinstance(error.value, headgate.HeadgateError)
    assert folders(run_dir) == []


def test_a_port_in_use_is_an_error_that_names_its_holder(free_port: int, run_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", free_port)):
        with pytest.raises(InstanceError, match=rf"127\.0\.0\.1:{free_port}.*pid {os.getpid()}"):
            headgate.start(http_options={"port": free_port})
    assert folders(run_dir) == []


def test_two_instances_never_share_a_port(free_port: int) -> None:
    with headgate.start(http_options={"port": free_port}):
        with pytest.raises(InstanceError, match=str(free_port)):
            headgate.start(http_options={"port": free_port})


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "nowhere.invalid"])
def test_a_host_that_cannot_be_bound_is_named(host: str) -> None:
    with pytest.raises(InstanceError, match=host):
        headgate.start(http_options={"host": host, "port": 0})


@pytest.mark.local("a supervisor that cannot import headgate; on Ray, the nodes have it")
def test_an_instance_that_cannot_start_leaves_nothing(run_dir: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "headgate.py").write_text("raise SystemExit('not this one')")  # what the supervisor imports
    monkeypatch.syspath_prepend(str(tmp_path))
    begun = time.monotonic()
    with pytest.raises(InstanceError, match="did not start"):
        headgate.start(http_options=NO_HTTP)
    assert time.monotonic() - begun < 5.0
    assert folders(run_dir) == []


def no_middleware(app: Any) -> Any:
    raise RuntimeError("it does not want to")


def test_a_proxy_that_does_not_start_is_an_error(run_dir: Path) -> None:
    with pytest.raises(InstanceError, match="did not start"):
        headgate.start(http_options={"port": 0, "middlewares": [Middleware(no_middleware)]})
    eventually(lambda: folders(run_dir) == [], 5.0 if on_ray() else 0.0)  # on Ray, an agent's


def test_instances_live_side_by_side() -> None:
    with headgate.start(http_options=NO_HTTP) as one, headgate.start(http_options={"port": 0}) as two:
        for number, client in enumerate((one, two)):
            client.create_backend("it", lambda request, number=number: number)
            client.create_endpoint("it", backend="it")
        handles = [client.get_handle("it") for client in (one, two)]
        assert [handle.call() for handle in handles] == [0, 1]
        one.shutdown()
        assert handles[1].call() == 1
        with pytest.raises(InstanceError, match="already been shut down"):
            handles[0].call()


# --- its end ---


def test_shutdown_ends_everything_and_may_be_repeated() -> None:
    client = headgate.start(http_options={"port": 0})
    client.create_backend("it", pid, config={"num_replicas": 2})
    pids = instance_pids(key_of(client))
    assert len(pids) == (4 if on_ray() else 5)  # replicas and controller, and an agent, or proxy and supervisor
    assert client.shutdown() is None
    assert is_gone(key_of(client))
    eventually(lambda: not any(map(is_alive, pids)), 5.0 if on_ray() else 0.0)  # Ray's workers take their time
    client.shutdown()
    assert "shut down" in repr(client)


def test_any_call_after_shutdown_says_so() -> None:
    client = headgate.start(http_options=NO_HTTP)
    client.create_backend("it", pid)
    client.create_endpoint("it", backend="it")
    handle = client.get_handle("it")
    assert handle.call()
    client.shutdown()
    for call in (
        lambda: client.create_backend("other", pid),
        lambda: client.update_backend("it", pid),
        lambda: client.update_backend_config("it", {}),
        lambda: client.get_backend_config("it"),
        lambda: client.delete_backend("it"),
        lambda: client.list_backends(),
        lambda: client.create_endpoint("other", backend="it"),
        lambda: client.delete_endpoint("it"),
        lambda: client.list_endpoints(),
        lambda: client.set_traffic("it", {"it": 1}),
        lambda: client.shadow_traffic("it", "it", 0.5),
        lambda: client.get_handle("it"),
        lambda: client.status(),
        lambda: client.wait(),
        lambda: handle.call(),
        lambda: handle.remote(),
    ):
        with pytest.raises(InstanceError, match="already been shut down"):
            call()


def test_requests_in_flight_finish_before_the_end(tmp_path: Path) -> None:
    begun = tmp_path / "begun"

    def slow(request: Any) -> str:
        begun.touch()
        time.sleep(0.4)
        return "finished"

    with headgate.start(http_options={"port": 0}) as client:
        client.create_backend("it", slow)
        client.create_endpoint("it", backend="it", route="/it")
        address = client.http_address
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(httpx.get, f"{address}/it")
            eventually(begun.exists)
            client.shutdown()
            assert answer.result().text == "finished"


def test_a_with_block_ends_it_and_lets_errors_through() -> None:
    with pytest.raises(ZeroDivisionError):
        with headgate.start(http_options=NO_HTTP) as client:
            raise ZeroDivisionError
    assert is_gone(key_of(client))


def test_a_client_that_is_collected_ends_its_instance() -> None:
    client = headgate.start(http_options=NO_HTTP)
    key = key_of(client)
    del client
    gc.collect()
    assert is_gone(key)


def test_a_handle_does_not_keep_it() -> None:
    client = headgate.start(http_options=NO_HTTP)
    client.create_backend("it", pid)
    client.create_endpoint("it", backend="it")
    handle = client.get_handle("it")
    del client
    gc.collect()
    with pytest.raises(InstanceError, match="already been shut down"):
        handle.call()


def test_a_client_that_is_collected_on_another_instances_thread_holds_nobody_up(
    own: headgate.Client, tmp_path: Path
) -> None:
    begun, let = tmp_path / "begun", tmp_path / "let"

    def slow(request: Any) -> str:
        begun.touch()
        while not let.exists():
            time.sleep(0.01)
        return "done"

    own.create_backend("it", pid)
    own.create_endpoint("it", backend="it")
    handle = own.get_handle("it")
    clients = [headgate.start(http_options=NO_HTTP)]
    clients[0].create_backend("slow", slow)
    clients[0].create_endpoint("slow", backend="slow")
    key, ref = key_of(clients[0]), clients[0].get_handle("slow").remote()
    eventually(begun.exists)
    own._instance.thread.loop.call_soon_threadsafe(clients.clear)
    eventually(lambda: not clients)
    assert handle.call() == own.status().replicas[0].pid  # else it waits until the request is given up
    let.touch()
    assert headgate.get(ref) == "done"
    eventually(lambda: "headgate-end" not in {thread.name for thread in threading.enumerate()}, 30.0)
    assert is_gone(key)


def test_a_client_does_not_pickle(own: headgate.Client) -> None:
    with pytest.raises(InstanceError, match=r"headgate\.connect\(\)"):
        pickle.dumps(own)
    with pytest.raises(InstanceError, match=r"headgate\.connect\(\)"):
        own.create_backend("it", lambda request: own.status())


SCRIPT = """
import headgate, os, sys, time
def pid(request):
    return os.getpid()

client = headgate.start(http_options={"location": None})
client.create_backend("it", pid)
client.create_endpoint("it", backend="it")
print(client._instance.home.key, client.get_handle("it").call(), flush=True)
"""


def started(run: Script) -> tuple[str, list[int]]:
    """The key and the processes of the instance that SCRIPT has started."""
    key, replica = run.line().split()
    pids = instance_pids(key)
    assert int(replica) in pids
    assert len(pids) == (2 if on_ray() else 3)
    return key, pids


def ended(key: str, pids: list[int], timeout_s: float = 1.0) -> bool:
    eventually(lambda: not any(map(is_alive, pids)) and is_gone(key), timeout_s * slack())
    return True


def test_no_main_guard_is_needed_and_the_interpreters_exit_ends_it(script: Callable[..., Script]) -> None:
    run = script(SCRIPT)
    key, _, _ = run.output().partition(" ")
    assert is_gone(key)
    assert "Traceback" not in run.errors


def test_an_exception_ends_it_too(script: Callable[..., Script]) -> None:
    run = script(SCRIPT + "time.sleep(0.5)\nraise KeyError('mine')")
    key, pids = started(run)
    assert run.end() == 1
    assert ended(key, pids)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_driver_that_is_ended_by_a_signal_leaves_nothing(script: Callable[..., Script], number: int) -> None:
    run = script(SCRIPT + "time.sleep(30)")
    key, pids = started(run)
    begun = time.monotonic()
    run.send(number)
    code = run.end()
    assert ended(key, pids)
    assert time.monotonic() - begun < 2.0 * slack()
    interrupted = {130, -2, 1} if on_ray() else {130, -2}
    assert code in {signal.SIGTERM: {143}, signal.SIGINT: interrupted, signal.SIGKILL: {-9}}[signal.Signals(number)]


def test_a_handler_of_the_users_for_sigterm_stays(script: Callable[..., Script]) -> None:
    run = script(
        "import signal\nseen = []\nsignal.signal(signal.SIGTERM, lambda *_: seen.append(print('mine', flush=True)))\n"
        + SCRIPT
        + "while not seen: time.sleep(0.01)\nprint(client.get_handle('it').call() > 0)"
    )
    run.line()
    run.send(signal.SIGTERM)
    assert run.line() == "mine"
    assert run.output() == "True\n"


@pytest.mark.local("Ray has a handler of its own")
def test_sigterm_has_its_default_again_after_the_last_shutdown() -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with headgate.start(http_options=NO_HTTP), headgate.start(http_options=NO_HTTP):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [(["-"], SCRIPT), (["-i"], SCRIPT), (["-c", SCRIPT], None), (["-q", "-i", "-c", SCRIPT], "print('more')\n")],
)
def test_start_works_from_wherever_code_comes(
    script: Callable[..., Script], arguments: list[str], stdin: str | None
) -> None:
    run = script(arguments=arguments, stdin=stdin)
    key, replica = run.output().splitlines()[0].split()
    assert int(replica) > 0
    assert is_gone(key)


def test_start_works_in_a_thread() -> None:
    def work() -> None:
        client = headgate.start(http_options=NO_HTTP)
        client.create_backend("it", pid)
        client.create_endpoint("it", backend="it")
        found.append(client.get_handle("it").call())
        client.shutdown()
        found.append(client)

    found: list[Any] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0] > 0
    assert is_gone(key_of(found[1]))


@pytest.mark.local("ray.init needs a working directory")
def test_start_works_where_the_working_directory_was_deleted(script: Callable[..., Script]) -> None:
    run = script("import os, tempfile\nos.chdir(tempfile.mkdtemp()); os.rmdir(os.getcwd())\n" + SCRIPT)
    assert int(run.output().split()[1]) > 0


@pytest.mark.local("Ray does not survive a fork of its driver")
def test_a_fork_of_the_driver_ends_nothing(script: Callable[..., Script]) -> None:
    run = script(
        SCRIPT
        + """
child = os.fork()
if child == 0:
    try:
        client.status()
    except headgate.InstanceError:
        pass
    else:
        os._exit(7)
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
print(len(client.status().replicas))
"""
    )
    assert run.output().splitlines()[-1] == "1"


@pytest.mark.local("Ray opens descriptors and threads in its driver at will")
def test_many_starts_leak_nothing(run_dir: Path) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    for attempt in range(4):
        with headgate.start(http_options=NO_HTTP) as client:
            client.create_backend("it", pid)
            client.create_endpoint("it", backend="it")
            client.get_handle("it").call()
        if attempt == 0:
            before = count(), threading.active_count()
    assert (count(), threading.active_count()) == before
    assert folders(run_dir) == []


# --- wait ---

WAITING = SCRIPT + "client.wait()\nprint('bye')"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_wait_ends_well_on_a_signal(script: Callable[..., Script], number: int) -> None:
    run = script(WAITING)
    key, pids = started(run)
    time.sleep(0.1)
    begun = time.monotonic()
    run.send(number)
    assert run.line() == "bye"
    assert run.end() == 0
    assert time.monotonic() - begun < 1.0 * slack()
    assert ended(key, pids, 0.1)
    assert "Traceback" not in run.errors


def test_a_second_signal_ends_it_at_once(script: Callable[..., Script]) -> None:
    run = script(
        SCRIPT.replace("def pid(request):", "def pid(request):\n    time.sleep(request.data or 0)")
        + "ref = client.get_handle('it').remote(60)\nprint('sent', flush=True)\nclient.wait()"
    )
    key, pids = started(run)
    assert run.line() == "sent"
    time.sleep(0.1)
    run.send(signal.SIGINT)
    time.sleep(0.3)
    assert run.process.poll() is None  # it waits for the request
    begun = time.monotonic()
    run.send(signal.SIGINT)
    assert run.end() == 130
    assert time.monotonic() - begun < 1.0 * slack()
    assert ended(key, pids)


@pytest.mark.local("kills the embedded engine's supervisor")
def test_wait_says_so_when_the_instance_ends_by_itself(script: Callable[..., Script]) -> None:
    run = script(
        SCRIPT + "try:\n    client.wait()\nexcept headgate.InstanceError as error:\n    print(error, flush=True)\n"
        "print(os.path.exists(client._instance.home.key))"
    )
    folder, _ = started(run)
    time.sleep(0.1)
    os.kill(pid_of(folder, "headgate-super"), signal.SIGKILL)
    assert "were killed" in run.line()
    assert run.line() == "False"
    assert run.end() == 0


def test_wait_in_a_thread_ends_with_the_instance(own: headgate.Client) -> None:
    def work() -> None:
        with contextlib.suppress(InstanceError):
            own.wait()

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.05)
    own.shutdown()
    thread.join(2.0)
    assert not thread.is_alive()


# --- detached ---


@pytest.fixture
def detached() -> Iterator[headgate.Client]:
    client = headgate.start(detached=True, http_options=NO_HTTP)
    yield client
    client.shutdown()


def test_a_detached_instance_outlives_its_starter(script: Callable[..., Script]) -> None:
    run = script(SCRIPT.replace("start(", "start(detached=True, namespace='mine', "))
    key, replica = run.output().split()
    with pytest.raises(InstanceError, match=r"'default'.*headgate\.start\(detached=True"):
        headgate.connect()
    client = headgate.connect("mine")
    assert client.get_handle("it").call() == int(replica)
    assert list(client.list_backends()) == ["it"]
    with pytest.raises(InstanceError, match=r"headgate\.connect\('mine'\)"):
        headgate.start(detached=True, namespace="mine", http_options=NO_HTTP)
    del client
    gc.collect()
    client = headgate.connect("mine")
    assert client.get_handle("it").call() == int(replica)
    client.shutdown()
    assert is_gone(key)
    client.shutdown()
    with pytest.raises(InstanceError, match="already been shut down"):
        client.list_backends()
    with pytest.raises(InstanceError):
        headgate.connect("mine")


def test_a_detached_instance_may_be_shut_down_from_elsewhere(
    detached: headgate.Client, script: Callable[..., Script]
) -> None:
    script("import headgate\nheadgate.connect().shutdown()").output()
    with pytest.raises(InstanceError, match="already been shut down"):
        detached.status()
    assert is_gone(key_of(detached))


def test_its_namespaces_are_apart(detached: headgate.Client) -> None:
    with pytest.raises(InstanceError, match="'default' runs already"):
        headgate.start(detached=True, http_options=NO_HTTP)
    other = headgate.start(detached=True, namespace="odd/ ☃", http_options=NO_HTTP)
    try:
        other.create_backend("it", pid)
        assert detached.list_backends() == {}
        assert list(headgate.connect("odd/ ☃").list_backends()) == ["it"]
    finally:
        other.shutdown()
    assert detached.list_backends() == {}


def test_connected_clients_know_the_address(free_port: int) -> None:
    client = headgate.start(detached=True, http_options={"port": free_port})
    try:
        assert headgate.connect().http_address == client.http_address
    finally:
        client.shutdown()


def test_a_detached_instance_does_not_end_with_its_client(detached: headgate.Client) -> None:
    key = key_of(detached)
    with headgate.start(http_options=NO_HTTP):  # sweeps what has ended
        assert instance_pids(key)
    other = headgate.connect()
    del other
    gc.collect()
    assert detached.status().backends == ()


def test_the_end_of_a_with_block_ends_no_instance_that_was_connected_to(detached: headgate.Client) -> None:
    with headgate.connect() as client:
        client.create_backend("it", pid)
    with pytest.raises(ZeroDivisionError), headgate.connect():
        _ = 1 / 0
    assert list(detached.list_backends()) == ["it"]


def test_the_end_of_a_with_block_ends_a_detached_instance_that_was_started_here() -> None:
    with headgate.start(detached=True, http_options=NO_HTTP) as client:
        assert instance_pids(key_of(client))
    assert is_gone(key_of(client))


# --- inside a backend ---


class Composed:
    """Makes another backend while it is constructed, and more when it is asked."""

    def __init__(self) -> None:
        client = headgate.connect()
        client.create_backend("inner", pid)
        client.create_endpoint("inner", backend="inner")
        self.inner = client.get_handle("inner")

    def __call__(self, request: Any) -> Any:
        client = headgate.connect()
        client.create_backend(request.data, pid)
        client.create_endpoint(request.data, backend=request.data)
        return self.inner.call(), client.get_handle(request.data).call(), client.http_address


class AsyncComposed(Composed):
    async def __call__(self, request: Any) -> Any:
        return super().__call__(request)


@pytest.mark.parametrize("kind", [Composed, AsyncComposed])
def test_a_backend_may_change_its_own_instance(kind: Any) -> None:
    with headgate.start(http_options={"port": 0}) as client:
        client.create_backend("outer", kind)
        client.create_endpoint("outer", backend="outer")
        inner, more, address = client.get_handle("outer").call("more")
        assert {inner, more} < {one.pid for one in client.status().replicas}
        assert inner != more
        assert address == client.http_address
        assert set(client.list_backends()) == {"outer", "inner", "more"}


def test_a_client_inside_a_backend_ends_nothing(own: headgate.Client) -> None:
    def look(request: Any) -> int:
        found = len(headgate.connect().list_backends())
        gc.collect()
        return found

    own.create_backend("it", look)
    own.create_endpoint("it", backend="it")
    handle = own.get_handle("it")
    assert [handle.call() for _ in range(3)] == [1, 1, 1]


def test_a_with_block_inside_a_backend_ends_nothing(own: headgate.Client) -> None:
    def look(request: Any) -> int:
        with headgate.connect() as client:
            return len(client.list_backends())

    own.create_backend("it", look)
    own.create_endpoint("it", backend="it")
    handle = own.get_handle("it")
    assert [handle.call() for _ in range(2)] == [1, 1]


# --- status ---


def test_status_shows_all_of_it() -> None:
    with headgate.start(http_options={"port": 0}) as client:
        client.create_backend("it", pid, config={"num_replicas": 2})
        client.create_endpoint("e", backend="it", route="/e", methods=["POST"])
        client.shadow_traffic("e", "it", 0.5)
        status = client.status()
        (endpoint,) = status.endpoints
        assert (endpoint.name, endpoint.route, tuple(endpoint.methods)) == ("e", "/e", ("POST",))
        assert (endpoint.traffic, endpoint.shadows) == ({"it": 1.0}, {"it": 0.5})
        (backend,) = status.backends
        assert (backend.tag, backend.num_replicas, backend.ready, backend.version) == ("it", 2, 2, 1)
        assert len(status.replicas) == 2
        for replica in status.replicas:
            assert replica.id.startswith("it#")
            assert (replica.backend, replica.state, replica.restarts, replica.last_error) == ("it", "ready", 0, "")
            assert is_alive(replica.pid)
        (proxy,) = status.proxies
        assert (proxy.address, proxy.state) == (client.http_address, "ready")
        assert is_alive(proxy.pid)
        assert status.waiting == ()
        known = {replica.pid for replica in status.replicas} | (set() if on_ray() else {proxy.pid})
        assert known < set(instance_pids(key_of(client)))
        with pytest.raises(AttributeError):
            status.waiting = ("changed",)  # type: ignore[misc]


def test_status_says_what_is_waited_for_and_why(own: headgate.Client, tmp_path: Path) -> None:
    class Once:
        def __init__(self, path: str) -> None:
            if os.path.exists(path):
                raise RuntimeError("only once")
            open(path, "w").close()

        def __call__(self, request: Any) -> None:
            pass

    own.create_backend("it", Once, str(tmp_path / "was here"))
    os.kill(own.status().replicas[0].pid, signal.SIGKILL)
    status = eventually(lambda: "only once" in (found := own.status()).backends[0].trouble and found)
    assert any("'it'" in sentence for sentence in status.waiting)
    os.unlink(tmp_path / "was here")
    eventually(lambda: own.status().waiting == ())
    assert own.status().backends[0].ready == 1


# --- processes that are killed ---


@pytest.mark.local("on Ray each node with a proxy has a supervisor; tests/ray kills agents and nodes")
def test_a_killed_supervisor_takes_everything_along() -> None:
    client = headgate.start(http_options={"port": 0})
    client.create_backend("it", pid, config={"num_replicas": 2})
    client.create_endpoint("it", backend="it")
    handle = client.get_handle("it")
    handle.call()
    pids = instance_pids(key_of(client))
    os.kill(pid_of(key_of(client), "headgate-super"), signal.SIGKILL)
    eventually(lambda: not any(map(is_alive, pids)), 1.0)
    with pytest.raises(InstanceError, match="were killed"):
        client.status()
    with pytest.raises(headgate.HeadgateError):
        handle.call()
    eventually(lambda: is_gone(key_of(client)), 1.0)
    client.shutdown()


def test_a_killed_controller_is_replaced_and_nobody_notices(own: headgate.Client) -> None:
    own.create_backend("it", pid, config={"num_replicas": 2})
    own.create_endpoint("it", backend="it")
    handle = own.get_handle("it")
    before = sorted(one.pid for one in own.status().replicas)
    over = threading.Event()

    def send() -> set[int]:
        found = set()
        while not over.is_set():
            found.add(handle.call())
        return found

    with ThreadPoolExecutor(1) as pool:
        seen = pool.submit(send)
        try:
            for _ in range(3):
                old = pid_of(key_of(own), "headgate-ctl")
                os.kill(old, signal.SIGKILL)
                own.create_endpoint(f"after {old}", backend="it")
                assert sorted(one.pid for one in own.status().replicas) == before
                assert pid_of(key_of(own), "headgate-ctl") != old
        finally:
            over.set()
        assert seen.result() <= set(before)
    assert len(own.list_endpoints()) == 4
    assert sorted(one.pid for one in own.status().replicas) == before


@contextlib.contextmanager
def frozen(key: str, title: str) -> Iterator[None]:
    process = pid_of(key, title)
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


def test_a_controller_that_gives_no_sign_of_life_is_an_error_until_it_does(detached: headgate.Client) -> None:
    detached.create_backend("it", pid)
    detached.create_endpoint("it", backend="it")
    handle = detached.get_handle("it")
    replica = handle.call()
    with frozen(key_of(detached), "headgate-ctl"), ThreadPoolExecutor() as pool:
        begun = time.monotonic()
        stranger = pool.submit(subprocess.run, [sys.executable, "-c", CONNECT], check=True, stdout=subprocess.PIPE)
        change = pool.submit(detached.create_backend, "late", pid)
        with pytest.raises(ControllerUnavailable, match=r"no sign of life for 5 s.*may or may not.*repeat"):
            detached.list_backends()
        with pytest.raises(ControllerUnavailable, match="create_backend"):
            change.result()
        assert b"no sign of life" in stranger.result().stdout
        assert 4.0 < time.monotonic() - begun < (20.0 if on_ray() else 8.0)  # joining a cluster takes seconds
        assert handle.call() == replica  # requests do not need it
    assert set(detached.list_backends()) <= {"it", "late"}
    with contextlib.suppress(ConfigError):  # it happened
        detached.create_backend("late", pid)
    assert list(detached.list_backends()) == ["it", "late"]


CONNECT = """
import headgate
try:
    headgate.connect()
except headgate.ControllerUnavailable as error:
    print(error)
"""


def test_a_call_may_take_longer_than_the_controller_may_be_silent(own: headgate.Client) -> None:
    class Slow:
        def __init__(self) -> None:
            time.sleep(6.5)

        def __call__(self, request: Any) -> None: ...

    own.create_backend("slow", Slow)
    assert list(own.list_backends()) == ["slow"]


@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.03, 0.1])
def test_a_call_during_which_the_controller_is_killed_is_repeated(own: headgate.Client, delay_s: float) -> None:
    class Slow:
        def __init__(self) -> None:
            time.sleep(0.08)

        def __call__(self, request: Any) -> int:
            return os.getpid()

    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(own.create_backend, "it", Slow, config={"num_replicas": 2})
        time.sleep(delay_s)
        os.kill(pid_of(key_of(own), "headgate-ctl"), signal.SIGKILL)
        call.result(10)
    assert own.status().backends[0].ready == 2
    eventually(lambda: len(own.status().replicas) == 2)
    eventually(lambda: len(instance_pids(key_of(own))) == (3 if on_ray() else 4))


def test_a_killed_proxy_is_replaced_on_the_same_port() -> None:
    with headgate.start(http_options={"port": 0}) as client:
        (old,) = client.status().proxies
        os.kill(old.pid, signal.SIGKILL)
        assert httpx.get(f"{client.http_address}/-/healthz", timeout=10).status_code == 200
        (new,) = eventually(lambda: [one for one in client.status().proxies if one.state == "ready"])
        assert new.pid != old.pid


@pytest.mark.local("there is no run directory to sweep")
def test_leftovers_of_a_killed_instance_are_swept_by_the_next(script: Callable[..., Script], run_dir: Path) -> None:
    run = script(SCRIPT + "time.sleep(30)")
    folder, pids = started(run)
    os.kill(run.pid, signal.SIGSTOP)  # so that it cannot remove anything
    os.kill(pid_of(folder, "headgate-super"), signal.SIGKILL)
    eventually(lambda: not any(map(is_alive, pids)))
    run.send(signal.SIGKILL)
    run.end()
    assert os.path.exists(folder)
    with headgate.start(http_options=NO_HTTP):
        assert not os.path.exists(folder)


# --- calls from several threads ---


def test_one_client_serves_many_threads(own: headgate.Client) -> None:
    own.create_backend("it", pid)

    def change(number: int) -> None:
        own.create_endpoint(f"e{number}", backend="it")
        own.get_handle(f"e{number}").call()
        own.delete_endpoint(f"e{number}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(change, range(40)))
    assert own.list_endpoints() == {}


def test_an_unknown_handle_is_an_error(own: headgate.Client) -> None:
    with pytest.raises(EndpointNotFound, match="nobody"):
        own.get_handle("nobody")
    assert "nobody" in repr(own.get_handle("nobody", missing_ok=True))


def test_importing_the_package_starts_nothing(script: Callable[..., Script]) -> None:
    run = script("import headgate, threading\nprint(threading.active_count(), headgate.ConfigError.__name__)")
    assert run.output() == "1 ConfigError\n"


def test_a_config_field_that_means_nothing_here_is_accepted_and_ignored(own: headgate.Client) -> None:
    own.create_backend("it", pid, config={"graceful_shutdown_wait_loop_s": 9, "batch_wait_timeout": 0.5})
    own.update_backend_config("it", {"experimental_graceful_shutdown_wait_loop_s": 7})
    shown = own.get_backend_config("it")
    assert shown.graceful_shutdown_wait_loop_s == headgate.BackendConfig().graceful_shutdown_wait_loop_s
    assert shown.batch_wait_timeout == 0.5


@pytest.mark.local("it says what holds without Ray")
def test_an_engine_is_local_by_default(script: Callable[..., Script]) -> None:
    run = script(SCRIPT + "print('ray' in sys.modules)")
    assert run.output().endswith("\nFalse\n")
