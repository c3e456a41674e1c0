"""Who may command a cluster: seen from a process without its token.

Ray does not say whether a cluster asks for a token, and with a wrong one its client tries for 20 s before it
gives up. So a process of its own asks the cluster's head one question.
"""

from __future__ import annotations

import ipaddress
import os
import sys

from headgate.errors import InstanceError

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


def is_loopback(address: str) -> bool:
    """Whether "host:port" leads to this machine only."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
