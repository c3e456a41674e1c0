"""What scripts/fuzz kept, run once more: each input reached something that no other had reached."""

from __future__ import annotations

from collections.abc import Iterator

import fuzz_targets
import pytest
from fuzz_targets import TARGETS, kept
from http_in_memory import Rig, cuts
from promises import Promise


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    fuzz_targets.close()


def replay(name: str) -> int:
    """How many inputs of that target were run."""
    inputs = kept(name)
    for data in inputs:
        TARGETS[name](data)
    return len(inputs)


@pytest.mark.promise("any bytes: no unexpected exception, whole = cut, nothing after a refusal (kept fuzz corpus)")
def test_the_kept_corpus_breaks_nothing(promise: Promise) -> None:
    inputs = 0
    for name in TARGETS:
        assert kept(name), f"tests/security/corpus/{name}.txt is empty"
        inputs += replay(name)
    promise.none_of(inputs, "inputs that broke something")


def test_the_kept_streams_may_be_cut_anywhere() -> None:
    rig = Rig()
    for data in kept("http"):
        whole = rig.run(data)
        for cut in cuts(data, 20):
            assert fuzz_targets.same(whole, rig.run(*cut)), data


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_notices_what_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle can fail: with a body that loses bytes, a framer that does, an acceptor that lets all in."""
    if name == "http":
        from headgate.proxy.chunked import Chunked

        whole = Chunked.take
        monkeypatch.setattr(Chunked, "take", lambda self, data: whole(self, data[:5]) and len(data))
    elif name == "framing":
        from headgate.core.framing import Framer

        keep = Framer._keep
        monkeypatch.setattr(Framer, "_keep", lambda self, data, *rest: keep(self, data[:-1], *rest))
    else:

        async def accept(sock: object, token: bytes) -> None: ...

        monkeypatch.setattr(fuzz_targets, "accept", accept)
    with pytest.raises(AssertionError):
        replay(name)
