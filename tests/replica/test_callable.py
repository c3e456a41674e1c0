"""Code is packed in one process and loaded in another, which is a child here where it matters."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import subprocess
import sys
import threading

import pytest

from headgate.config import accept_batch
from headgate.core.state import Facts
from headgate.errors import (
    ArgumentError,
    BackendStartError,
    ConfigError,
    EndpointNotFound,
    InstanceError,
    SerializationError,
)
from headgate.replica import callable as code
from headgate.replica import context, shape


@pytest.fixture(autouse=True)
def _this_process_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(os.getcwd())


def loaded(target, *init_args):
    blob, _ = code.pack(target, init_args)
    result = code.load(blob)
    result.construct()
    return result


def plain(request):
    return request


async def later(request):
    return request


async def items(request):
    yield request


@accept_batch
def batch(requests):
    return requests


def two(request, other):
    """Not for a backend."""


def needs_keyword(request, *, key):
    """Not for a backend."""


def nothing():
    return "nothing"


def timed(function):
    @functools.wraps(function)
    def wrapper(*arguments):
        return function(*arguments)

    return wrapper


class Called:
    def __call__(self, request):
        return request


class CalledLater:
    async def __call__(self, request):
        return request


class Model:
    static_value = Called()

    def __init__(self, factor=1):
        self.factor = factor
        self.instance_value = plain

    @accept_batch
    async def __call__(self, requests):
        return [request * self.factor for request in requests]

    def reconfigure(self, config):
        self.factor = config

    async def check_health(self):
        """Well."""

    def other(self, request):
        return -request

    def bare(self):
        return self.factor

    @staticmethod
    def fixed(request):
        return request

    @classmethod
    def of_class(cls, request):
        return cls.__name__

    @property
    def secret(self):
        raise AssertionError("a request reached a property")

    def _private(self, request):
        """Not for requests."""

    class Inner:
        """Not a method."""


class Cached:
    @functools.lru_cache  # noqa: B019
    def __call__(self, request):
        return request


class Static:
    @staticmethod
    def __call__(request):
        return request


class Uncallable:
    def method(self, request):
        return request


class NeedsTwo:
    def __call__(self, request, other):
        """Not for a backend."""


class Broken:
    def __init__(self, error):
        raise error

    def __call__(self, request):
        return None


class Empty:
    pass


class OnlyNamed:
    def predict(self, request):
        return "predicted"


def test_a_class_that_no_request_could_call_is_refused():
    with pytest.raises(ArgumentError, match=r"'Empty' has no __call__"):
        code.pack(Empty)


def test_a_class_may_have_named_methods_only():
    loaded = code.load(code.pack(OnlyNamed)[0])
    loaded.construct()
    assert not loaded.is_callable
    assert loaded.method("predict").function(None) == "predicted"
    with pytest.raises(EndpointNotFound):
        loaded.method()


# -- Packing


@pytest.mark.parametrize(
    ("target", "facts"),
    [
        (plain, Facts()),
        (lambda request: request, Facts()),
        (nothing, Facts()),
        (later, Facts(is_async=True)),
        (items, Facts(is_async=True)),
        (batch, Facts(accepts_batch=True)),
        (timed(later), Facts(is_async=True)),
        (timed(batch), Facts(accepts_batch=True)),
        (functools.partial(two, other=1), Facts()),
        (functools.partial(later), Facts(is_async=True)),
        (functools.partial(batch), Facts(accepts_batch=True)),
        (staticmethod(later), Facts(is_async=True)),
        (len, Facts()),
        (print, Facts()),
        (min, Facts()),
        (Called(), Facts()),
        (CalledLater(), Facts(is_async=True)),
        (CalledLater().__call__, Facts(is_async=True)),
        (Called, Facts()),
        (CalledLater, Facts(is_async=True)),
        (Model, Facts(is_async=True, accepts_batch=True)),
        (Cached, Facts()),
        (Static, Facts()),
        (Uncallable, Facts()),
        (dict, Facts()),
    ],
)
def test_what_may_be_a_backend_tells_its_facts(target, facts):
    assert code.pack(target)[1] == facts
    assert loaded(target).facts == facts


def test_an_import_path_tells_nothing_yet():
    assert code.pack("json:dumps")[1] is None


@pytest.mark.parametrize("target", [None, 1, [], {}, object(), os])
def test_what_is_neither_function_nor_class_nor_path_is_named(target):
    with pytest.raises(ArgumentError, match=f"got {type(target).__name__}"):
        code.pack(target)


@pytest.mark.parametrize(
    "target", ["", "json", "a b:c", "json:", ":dumps", "a..b", "a:b:c", "a/b.py:c", "1a.b"]
)
def test_a_malformed_import_path_is_refused(target):
    with pytest.raises(ArgumentError, match="module:name"):
        code.pack(target)


@pytest.mark.parametrize("target", [two, needs_keyword, NeedsTwo, functools.partial(two)])
def test_what_one_request_cannot_call_is_refused(target):
    with pytest.raises(ArgumentError, match="one positional argument"):
        code.pack(target)


@pytest.mark.parametrize("target", [plain, Called(), functools.partial(plain)])
def test_init_args_on_a_function_are_refused(target):
    with pytest.raises(ConfigError, match="takes no init args; got 2"):
        code.pack(target, (1, 2))


def test_code_that_does_not_pickle_is_named():
    lock = threading.Lock()

    def captures(request):
        return lock

    with pytest.raises(SerializationError, match="captures"):
        code.pack(captures)


def test_an_argument_that_refuses_to_travel_says_so_itself():
    class Client:
        def __reduce__(self):
            raise InstanceError("use connect()")

    with pytest.raises(InstanceError, match="connect"):
        code.pack(Called, (Client(),))


# -- Loading


def test_a_class_is_built_with_its_arguments_and_its_methods_are_described():
    model = loaded(Model, 3)
    call = model.method()

    assert model.is_class
    assert (call.is_async, call.accepts_batch, call.takes_request) == (True, True, True)
    assert asyncio.run(call.function([1, 2])) == [3, 6]
    assert model.method("__call__") is call
    assert model.method("other").function(2) == -2
    assert not model.method("other").is_async
    assert model.method("fixed").function(5) == 5
    assert model.method("of_class").function(None) == "Model"
    assert model.method("static_value").function(5) == 5
    bare = model.method("bare")
    assert not bare.takes_request
    assert bare.function() == 3


def test_the_constructor_runs_when_it_is_told_to():
    blob, _ = code.pack(Broken, (ValueError("no"),))
    broken = code.load(blob)

    with pytest.raises(BackendStartError, match=r"constructor of .*Broken' raised: ValueError: no") as caught:
        broken.construct()
    assert "raise error" in str(caught.value)
    assert "replica/callable.py" not in str(caught.value)


def test_a_constructor_that_wants_to_exit_has_failed():
    with pytest.raises(BackendStartError, match="SystemExit: 3"):
        loaded(Broken, SystemExit(3))


@pytest.mark.parametrize(
    "name",
    [
        "gone",
        "_private",
        "__init__",
        "__class__",
        "reconfigure",
        "check_health",
        "secret",
        "Inner",
        "instance_value",
    ],
)
def test_what_a_request_may_not_call_is_not_found(name):
    with pytest.raises(EndpointNotFound, match=f"no method '{name}'") as caught:
        loaded(Model).method(name)
    assert caught.value.http_status == 404


def test_a_function_has_one_method():
    function = loaded(plain)

    assert function.method().function(7) == 7
    assert function.method("__call__") is function.method()
    with pytest.raises(EndpointNotFound, match="leave the method out"):
        function.method("other")


def test_a_class_without_call_has_its_other_methods():
    uncallable = loaded(Uncallable)

    assert uncallable.method("method").function(1) == 1
    with pytest.raises(EndpointNotFound):
        uncallable.method()


def test_hooks_are_found_and_described():
    model = loaded(Model)

    assert (model.has_reconfigure, model.has_check_health) == (True, True)
    model.hook("reconfigure").function(9)
    assert model.instance.factor == 9
    assert model.hook("check_health").is_async
    assert not model.hook("check_health").takes_request
    assert model.hook("other") is None
    for without in (loaded(Called), loaded(plain)):
        assert (without.has_reconfigure, without.has_check_health) == (False, False)
        assert without.hook("reconfigure") is None


@pytest.mark.parametrize(
    "target", [later, timed(later), functools.partial(later), CalledLater(), CalledLater]
)
def test_whatever_is_async_can_be_awaited(target):
    call = loaded(target).method()

    assert call.is_async
    assert asyncio.run(call.function(7)) == 7


def test_an_async_generator_function_gives_its_generator_when_awaited():
    async def read():
        return [item async for item in await loaded(items).method().function(7)]

    assert asyncio.run(read()) == [7]


@pytest.mark.parametrize(
    ("target", "takes_request"),
    [
        (nothing, False),
        (lambda *, key=1: key, False),
        (lambda **more: more, False),
        (lambda x=1: x, True),
        (print, True),
    ],
)
def test_a_function_without_parameters_is_called_without(target, takes_request):
    assert loaded(target).method().takes_request is takes_request


@pytest.mark.parametrize("path", ["json:dumps", "json.dumps", "json:JSONEncoder.default", "os.path:join"])
def test_an_import_path_leads_to_what_it_names(path):
    if path in ("json:JSONEncoder.default",):  # takes self
        with pytest.raises(ArgumentError, match="one positional argument"):
            loaded(path)
    else:
        assert loaded(path).method().takes_request


def test_an_import_path_to_a_class_takes_init_args():
    assert loaded("collections:Counter", "aab").instance["a"] == 2


def test_what_an_import_path_leads_to_is_checked_as_well():
    with pytest.raises(ConfigError, match="no init args"):
        loaded("json:dumps", 1)
    with pytest.raises(ArgumentError, match="got str"):
        loaded("os:sep")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("headgate_gone.sub:f", "needs the module 'headgate_gone'"),
        ("json:gone", r"module 'json' \(.*json/__init__.py\) has no 'gone'"),
        ("json:dumps.gone", "has no 'dumps.gone'"),
    ],
)
def test_an_import_path_that_leads_nowhere_says_where_it_broke(path, text):
    with pytest.raises(BackendStartError, match=text):
        loaded(path)


def test_a_module_that_raises_shows_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "headgate_raises.py").write_text("def deep():\n    raise SystemExit('stop')\ndeep()\n")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(
        BackendStartError, match=r"SystemExit: stop(?s:.*)headgate_raises.py.*in deep"
    ) as caught:
        loaded("headgate_raises:f")
    assert "importlib" not in str(caught.value)


# -- Another process

REPLICA = """
import sys
from headgate.replica import callable as code
blob = sys.stdin.buffer.read()
loaded = code.load(blob)
loaded.construct()
print(loaded.method().function(20))
"""


def run_replica(blob: bytes, cwd: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", REPLICA], input=blob, cwd=cwd, capture_output=True, check=False
    )


def test_a_function_of_main_travels_by_value_with_path_and_directory(tmp_path):
    driver, replica = tmp_path / "driver", tmp_path / "replica"
    driver.mkdir()
    replica.mkdir()
    (driver / "neighbour.py").write_text("OFFSET = 1\n")
    (driver / "data.txt").write_text("21")
    (driver / "script.py").write_text(
        "import sys, neighbour\n"
        "from headgate.replica.callable import pack\n"
        "class Model:\n"
        "    def __init__(self, n): self.n = n\n"
        "    def __call__(self, request): return helper(request) + self.n\n"
        "def helper(n): return n + int(open('data.txt').read()) + neighbour.OFFSET\n"
        "sys.stdout.buffer.write(pack(Model, (100,))[0])\n"
    )
    blob = subprocess.run([sys.executable, "script.py"], cwd=driver, capture_output=True, check=True).stdout

    done = run_replica(blob, replica)
    assert done.stdout == b"142\n", done.stderr


def test_a_module_that_the_replica_lacks_is_named(tmp_path):
    (tmp_path / "headgate_lost.py").write_text("def f(request): return request\n")
    script = (
        "import sys, headgate_lost\n"
        "from headgate.replica.callable import pack\n"
        "sys.stdout.buffer.write(pack(headgate_lost.f)[0])"
    )
    blob = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, check=True
    ).stdout
    (tmp_path / "headgate_lost.py").unlink()

    done = run_replica(blob, "/")
    assert b"needs the module 'headgate_lost', which the replica cannot find" in done.stderr


def test_a_directory_that_is_gone_is_no_obstacle(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    blob, _ = code.pack(plain)
    gone.rmdir()
    assert code.load(blob).method().function(1) == 1
    blob, _ = code.pack(plain)

    assert code.load(blob).method().function(1) == 1


def test_loading_the_packer_imports_no_web_framework():
    script = (
        "import sys, json, headgate.replica.callable\n"
        "print(json.dumps(sorted({'starlette', 'pydantic', 'cloudpickle'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert json.loads(done.stdout) == []


# -- Tracebacks


def test_a_traceback_shows_the_users_frames_and_causes_only():
    def user():
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ValueError("second") from error

    blob, _ = code.pack(Called)
    try:
        code.load(blob).method("gone")
    except EndpointNotFound as error:
        own = code.user_traceback(error)
    with pytest.raises(ValueError, match="second") as caught:
        asyncio.run(shape.awaitable(user)())
    text = code.user_traceback(caught.value)

    assert "KeyError: 'first'" in text
    assert text.endswith("ValueError: second")
    assert "in user" in text
    assert "replica/callable.py" not in text
    assert "replica/callable.py" not in own


def test_a_traceback_of_a_group_shows_its_members():
    text = code.user_traceback(ExceptionGroup("many", [ValueError("one"), KeyError("two")]))

    assert "ValueError: one" in text
    assert "KeyError: 'two'" in text


# -- The context


def test_outside_of_a_replica_there_is_no_context():
    with pytest.raises(InstanceError, match="not inside a replica"):
        context.get_replica_context()


def test_a_process_is_one_replica_for_good(monkeypatch):
    monkeypatch.setattr(context, "_context", None)
    context.set_replica_context(context.ReplicaContext("iris", "iris#0007"))

    assert context.get_replica_context() == context.ReplicaContext(
        backend_tag="iris", replica_tag="iris#0007"
    )
    assert context.get_current_backend_tag() == "iris"
    assert context.get_current_replica_tag() == "iris#0007"
    with pytest.raises(InstanceError, match="iris#0007"):
        context.set_replica_context(context.ReplicaContext("other", "other#1"))


def test_a_function_of_a_module_that_is_marked_elsewhere_is_marked_where_it_is_loaded(monkeypatch):
    import shlex

    monkeypatch.setattr(shlex, "quote", shlex.quote)  # undone at the end, and the mark with it

    def quote(requests):
        return requests

    quote.__module__, quote.__qualname__ = "shlex", "quote"
    monkeypatch.setattr(shlex, "quote", quote)
    blob, facts = code.pack(accept_batch(quote))
    assert facts.accepts_batch
    del quote.__headgate_accept_batch__  # as in a process that only imported the module
    assert code.load(blob).facts.accepts_batch
