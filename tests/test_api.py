"""The public API as a contract: its names, its signatures, and where the package may be imported."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest

import headgate

#: As documented. "..." stands for a default that only tells whether the argument was given.
SIGNATURES = {
    headgate.start: (
        "detached=False, http_host=..., http_port=..., http_middlewares=..., http_options=None, *, "
        "engine=None, namespace='default', insecure=False"
    ),
    headgate.connect: "namespace='default'",
    headgate.get: "refs, timeout=None",
    headgate.wait: "refs, num_returns=1, timeout=None",
    headgate.Client.create_backend: (
        "tag, func_or_class, *init_args, ray_actor_options=None, config=None, env=None"
    ),
    headgate.Client.update_backend: (
        "tag, func_or_class, *init_args, ray_actor_options=None, config=None, env=None"
    ),
    headgate.Client.update_backend_config: "tag, config",
    headgate.Client.get_backend_config: "tag",
    headgate.Client.list_backends: "",
    headgate.Client.delete_backend: "tag, force=False",
    headgate.Client.create_endpoint: "name, *, backend, route=None, methods=['GET']",
    headgate.Client.list_endpoints: "",
    headgate.Client.delete_endpoint: "name",
    headgate.Client.set_traffic: "endpoint, weights",
    headgate.Client.shadow_traffic: "endpoint, tag, proportion",
    headgate.Client.get_handle: "endpoint, missing_ok=False, sync=True",
    headgate.Client.status: "",
    headgate.Client.shutdown: "",
    headgate.Client.wait: "",
}


def written(function: Any) -> str:
    """The arguments of a function, without types, as its documentation writes them."""
    arguments = inspect.signature(function).parameters.values()
    bare = [
        one.replace(annotation=one.empty, default=Written(one.default))
        for one in arguments
        if one.name != "self"
    ]
    return str(inspect.Signature(bare))[1:-1]


class Written:
    """A default value whose repr is how it is documented."""

    def __new__(cls, value: Any) -> Any:
        return value if value is inspect.Parameter.empty else super().__new__(cls)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "..." if type(self.value) in (object, type(...)) else repr(self.value)


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda one: one.__name__)
def test_a_signature_is_the_documented_one(function: Any) -> None:
    assert written(function) == SIGNATURES[function]


def test_every_public_method_of_a_client_is_documented() -> None:
    methods = {one for name, one in vars(headgate.Client).items() if callable(one) and name[0] != "_"}
    assert methods <= set(SIGNATURES)


def test_every_public_name_can_be_had() -> None:
    assert all(getattr(headgate, name) for name in headgate.__all__)


@pytest.mark.parametrize(
    ("system", "implementation", "version", "missing"),
    [
        ("linux", "cpython", (3, 11), None),
        ("linux", "cpython", (3, 14, 1), None),
        ("darwin", "cpython", (3, 12), "runs on Linux only, not on darwin"),
        ("linux", "pypy", (3, 11), "CPython 3.11 or newer, not pypy 3.11"),
        ("linux", "cpython", (3, 10, 9, "final", 0), "CPython 3.11 or newer, not cpython 3.10"),
    ],
)
def test_a_platform_without_what_is_needed_is_named(
    system: str, implementation: str, version: tuple[Any, ...], missing: str | None
) -> None:
    problem = headgate._unsupported(system, implementation, version)
    assert (problem is None) if missing is None else (problem is not None and missing in problem)
    assert "\n" not in (problem or "")


def test_the_import_fails_where_it_could_not_work() -> None:
    program = "import sys; sys.platform = 'darwin'\ntry: import headgate\nexcept ImportError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Linux" in done.stdout
