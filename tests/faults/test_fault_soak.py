"""A small soak: what grows with each request, or with each backend that comes and goes. The large one: scripts/soak."""

from __future__ import annotations

import pytest
import soak
from promises import Promise

pytestmark = pytest.mark.local("about the processes and files of one machine")


@pytest.mark.timeout(1200)
@pytest.mark.promise("soak: memory, descriptors, threads and files of every process stay as they are")
def test_nothing_grows(promise: Promise) -> None:
    if promise.full:
        found = soak.Soak(promise.size(200_000, 0), cycles=200).run()
    else:
        found = soak.Soak(promise.size(0, 2_000), cycles=6, processes=1, with_wrk=False, rest_s=0.5).run()
    for line in found.lines():
        if "RSS" in line:
            promise.says(" ".join(line.split()))
    # A short warm-up does not show an allocator its peak: then only what is far too much is wrong.
    assert found.verdict(soak.ALLOWED_BYTES if promise.full else 16 * soak.MB) == []
    promise.none_of(found.answers.total(), "requests were answered wrongly")
