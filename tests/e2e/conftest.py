"""Fixtures for tests of whole instances: the engine, and an instance for each module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from running import on_ray, one_instance

import headgate


@pytest.fixture(scope="module", autouse=True)
def engine(request: pytest.FixtureRequest) -> None:
    """With --engine ray: a cluster, to which this process is connected, so that `start` picks it."""
    if on_ray():
        request.getfixturevalue("clusters").one_node()


@pytest.fixture(scope="module")
def shared() -> Iterator[headgate.Client]:
    """An instance without HTTP, for all tests of the module."""
    with one_instance(http_options={"location": None}) as client:
        yield client


@pytest.fixture
def client(shared: headgate.Client) -> Iterator[headgate.Client]:
    """The module's instance; what the test creates in it is deleted afterwards."""
    yield shared
    for name in shared.list_endpoints():
        shared.delete_endpoint(name)
    for tag in shared.list_backends():
        shared.delete_backend(tag, force=True)
    actors = getattr(shared._instance.home, "actors", None)
    if actors is not None:
        actors.close()  # its couriers would be left behind by this test
