"""The Open Inference Protocol (V2), which MLServer speaks: what to send for a job, and the answer inside a response."""

from __future__ import annotations

import json
from array import array

from .jobs import JSON, Request


def infer(path: str, features: bytes) -> Request:
    """One row of FP32 as a V2 request."""
    row = array("f", features).tolist()
    tensor = {"name": "row", "shape": [1, len(row)], "datatype": "FP32", "data": row}
    return Request("POST", path, json.dumps({"inputs": [tensor]}).encode(), JSON)


def label(body: bytes) -> bytes:
    """The answer to the job `model` inside a V2 response."""
    found = json.loads(body)["outputs"][0]["data"][0]
    return json.dumps({"label": found}).encode()
