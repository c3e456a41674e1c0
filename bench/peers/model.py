"""The model of the job `model`: a product and a sleep, so that a call takes 5 ms whatever its batch.

The sleep stands for a kernel that runs without the GIL. Only servers of that job import this: numpy takes memory.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy

from .jobs import FEATURES, SECONDS_PER_CALL

_WEIGHTS = numpy.random.default_rng(4711).standard_normal((FEATURES, FEATURES), dtype=numpy.float32)


def labels(rows: Sequence[bytes]) -> list[int]:
    """The largest output of each row, at once."""
    batch = numpy.frombuffer(b"".join(rows), dtype=numpy.float32).reshape(len(rows), FEATURES)
    return [int(index) for index in (batch @ _WEIGHTS).argmax(axis=1)]


def predict(rows: Sequence[bytes]) -> list[dict[str, int]]:
    """The answer to each row, oldest first."""
    began = time.perf_counter()
    answers = [{"label": index} for index in labels(rows)]
    time.sleep(max(0.0, SECONDS_PER_CALL - (time.perf_counter() - began)))
    return answers
