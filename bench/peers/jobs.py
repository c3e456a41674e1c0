"""What each job asks and answers, without a line of any peer: the standard library only.

`JOBS[job].request` is what to send, `wrong(job, body)` is why a body is not the answer ("" if it is).
"""

from __future__ import annotations

import json
import random
import re
from array import array
from typing import Any, NamedTuple

#: What the JSON jobs answer, and what `json_post` sends.
ANSWER = {"id": 4711, "label": "setosa", "score": 0.98, "tags": ["iris", "small"]}
QUESTION = {"sepal": [5.1, 3.5], "petal": [1.4, 0.2]}

#: One request of the batched model: its numbers and their bytes.
FEATURES = 256
ROW_BYTES = FEATURES * 4
MAX_BATCH_SIZE = 32
SECONDS_PER_CALL = 0.005

MIB = 1 << 20

#: How many tokens a stream has, how long `stream_paced` waits before each, and the byte that ends each.
TOKENS = 256
TOKEN_SECONDS = 0.010
TOKEN_END = b";"

BINARY = "application/octet-stream"
JSON = "application/json"


class Request(NamedTuple):
    """One HTTP request, less its Host and Content-Length."""

    method: str
    path: str
    body: bytes = b""
    content_type: str = ""


class Job(NamedTuple):
    """A piece of work. `kind` names its answer, which other jobs may share."""

    kind: str
    request: Request


def row(number: int) -> bytes:
    """The features of one request of the model, another for each number."""
    chance = random.Random(number)
    return array("f", [chance.uniform(-1.0, 1.0) for _ in range(FEATURES)]).tobytes()


def token(number: int) -> str:
    """Text about as long as a word.

    >>> token(7)
    'tok007 ;'
    """
    return f"tok{number:03} ;"


JSON_GET = Request("GET", "/json")
STREAM = Request("GET", "/stream")

JOBS = {
    "json": Job("json", JSON_GET),
    "json_async": Job("json", JSON_GET),
    "json_post": Job("json", Request("POST", "/json", json.dumps(QUESTION).encode(), JSON)),
    "model": Job("model", Request("POST", "/model", row(0), BINARY)),
    "length": Job("length", Request("POST", "/length", bytes(MIB), BINARY)),
    "length_view": Job("length", Request("POST", "/length", bytes(MIB), BINARY)),
    "echo": Job("echo", Request("POST", "/echo", bytes(range(256)) * (MIB // 256), BINARY)),
    "typed": Job("typed", Request("GET", "/api/42/2.5")),
    "stream": Job("stream", STREAM),
    "stream_async": Job("stream", STREAM),
    "stream_paced": Job("stream", STREAM),
}

#: What else is answered as JSON, by the kind of job.
EXPECTED: dict[str, dict[str, Any]] = {
    "json": ANSWER,
    "length": {"length": MIB},
    "typed": {"user_id": 42, "number": 2.5},
}


def label(features: bytes) -> int:
    """What the model says of one row."""
    from . import model

    return model.labels([features])[0]


def wrong(job: str, body: bytes, features: bytes = JOBS["model"].request.body) -> str:
    """Why `body` is no right answer; "" if it is one. `features` is the row that was sent to `model`."""
    kind = JOBS[job].kind
    if kind == "echo":
        return "" if body == JOBS[job].request.body else f"{len(body)} bytes came back, not those that were sent"
    if kind == "stream":
        found = re.findall(rb"tok\d+ ;", body)
        right = [token(number).encode() for number in range(TOKENS)]
        ends = body.count(TOKEN_END)
        return "" if found == right and ends == TOKENS else f"{ends} tokens of {TOKENS}: {body[:60]!r}..."
    expected = {"label": label(features)} if kind == "model" else EXPECTED[kind]
    try:
        value = json.loads(body)
    except ValueError:
        return f"no JSON: {body[:80]!r}"
    return "" if value == expected else f"{value!r} is not {expected!r}"
