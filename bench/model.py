"""The work that both sides do: a small answer, and a model that takes 5 ms per batch."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy

#: What the JSON job answers.
ANSWER = {"id": 4711, "label": "setosa", "score": 0.98, "tags": ["iris", "small"]}

#: Numbers of one request of the batched model, and the bytes they take.
FEATURES = 64
ROW_BYTES = FEATURES * 4
MAX_BATCH_SIZE = 32
SECONDS_PER_CALL = 0.005

_WEIGHTS = numpy.linspace(0.0, 1.0, FEATURES, dtype=numpy.float32)


def predict(rows: Sequence[bytes]) -> list[float]:
    """One number per row. The sleep stands for a kernel that runs without the GIL."""
    batch = numpy.frombuffer(b"".join(rows), dtype=numpy.float32).reshape(len(rows), FEATURES)
    time.sleep(SECONDS_PER_CALL)
    return [float(value) for value in batch @ _WEIGHTS]
