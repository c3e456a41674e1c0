"""Take part in a cluster, and see who else may.

Nobody joins or starts a Ray by accident: RAY_ADDRESS says which one. Ray does not say whether a
cluster asks for a token, and with a wrong one its client tries for 20 s before it gives up; so a process
of its own asks the cluster's head one question.
"""

from __future__ import annotations

import os
import sys

from headgate import logs
from headgate.engine import cluster
from headgate.errors import InstanceError
from headgate.wire.address import is_loopback

__all__ = ["answers_strangers", "check_token", "is_loopback", "take_part"]

log = logs.get("ray")

_PROBE_S = 20.0
_PROBE = """
import sys
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1]).internal_kv_get(b"headgate", namespace=b"headgate", timeout=4)
    print("open")
except Exception as error:
    print("closed" if type(error).__name__ == "AuthenticationError" else repr(error))
"""


def take_part(*, may_start: bool) -> bool:
    """Have this process take part in the cluster that RAY_ADDRESS names; True if it started one of its own instead.

    Raises InstanceError: no token or a wrong one, nobody there, or no RAY_ADDRESS and it may not start one.
    """
    if cluster.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        if not may_start:
            raise InstanceError(
                "this process takes part in no Ray cluster: call ray.init(...) first, or set RAY_ADDRESS; one that is "
                "started here would end with this process"
            )
        log.info("RAY_ADDRESS is not set: Ray is started on this machine, and ends with this process")
        cluster.start_local()
        return True
    if "://" in address:
        raise InstanceError(
            f"RAY_ADDRESS={address}: a process outside of the cluster cannot start or reach instances there; run the "
            "program on one of its nodes, with RAY_ADDRESS=auto, or submit it as a job"
        )
    address = cluster.resolve(address)
    check_token(address)
    cluster.join(address)
    return False


def answers_strangers(address: str) -> bool:
    """Whether the cluster at `address` serves a process without its token. InstanceError if it does not answer."""
    said = _probe(address, without_token=True)
    if said in ("open", "closed"):
        return said == "open"
    raise InstanceError(f"the cluster at {address} does not answer: {said}")


def check_token(address: str) -> None:
    """InstanceError if the cluster at `address` does not answer, or does not take this process's token."""
    said = _probe(address, without_token=False)
    if said == "closed":
        raise InstanceError(
            f"the cluster at {address} asks for a token, and this process has a wrong one or none: set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, before ray is imported"
        )
    if said != "open":
        raise InstanceError(f"the cluster at {address} does not answer: {said}")


def _probe(address: str, *, without_token: bool) -> str:
    import subprocess

    environment = dict(os.environ)
    if without_token:
        environment = {name: value for name, value in environment.items() if not name.startswith("RAY_AUTH")}
        environment.update(HOME="/nonexistent", RAY_AUTH_MODE="disabled")
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, address],
            env=environment, capture_output=True, text=True, timeout=_PROBE_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no word within {_PROBE_S:g} s"
    return (done.stdout.strip().splitlines() or ["no answer"])[-1]
