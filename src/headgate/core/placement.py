"""On which nodes proxies run, and what keeps a replica from being placed: sentences for users.

Resources have Ray's names: "CPU", "GPU", "memory", "object_store_memory", "accelerator_type:A100"
and those that users make up. Ray itself places replicas; here is only said why it does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

#: What Ray expresses an accelerator type as.
ACCELERATOR = "accelerator_type:"
ACCELERATOR_AMOUNT = 0.001

_AMOUNTS = {"num_gpus": "GPU", "memory": "memory", "object_store_memory": "object_store_memory"}
_COUNTED = {"CPU": "CPU", "GPU": "GPU"}
_BYTES = {"memory": "memory", "object_store_memory": "object store memory"}
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_HALF_A_STEP = 0.00005  # Ray counts in steps of 0.0001

Resources = Mapping[str, float]


def proxy_nodes(location: str | None, home: str, nodes: Sequence[str]) -> tuple[str, ...]:
    """The nodes that get a proxy: a DeploymentMode, where `start` was called, those that live.

    >>> proxy_nodes("HeadOnly", "a", ["a", "b"]), proxy_nodes("EveryNode", "a", ["a", "b"])
    (('a',), ('a', 'b'))
    """
    if location == "EveryNode":
        return tuple(nodes)
    return (home,) if location == "HeadOnly" and home in nodes else ()


def demand(options: Mapping[str, Any]) -> dict[str, float]:
    """What a replica with these ray_actor_options needs on one node.

    >>> demand({"num_gpus": 0.5, "resources": {"tpu": 2}})
    {'CPU': 1.0, 'tpu': 2.0, 'GPU': 0.5}
    """
    cpus = options.get("num_cpus")
    amounts = {"CPU": 1 if cpus is None else cpus, **(options.get("resources") or {})}
    amounts |= {resource: options.get(option) for option, resource in _AMOUNTS.items()}
    if kind := options.get("accelerator_type"):
        amounts[ACCELERATOR + kind] = ACCELERATOR_AMOUNT
    return {name: float(amount) for name, amount in amounts.items() if amount}


def lacking(needed: Resources, nodes: Mapping[str, Resources]) -> str:
    """Why no node can ever hold what is needed; "" if some node can.

    nodes   all that each living node has, free or not

    >>> lacking({"CPU": 3, "tpu": 2}, {"a": {"CPU": 2}, "b": {"CPU": 1}})
    "no node of the cluster has 3 CPUs: the largest has 2; no node has the resource 'tpu' (2 needed)"
    """
    if any(_fits(needed, has) for has in nodes.values()):
        return ""
    if not nodes:
        return "the cluster has no living node"
    if not (scarce := _scarce(needed, nodes)):
        return f"no node of the cluster has all of {_list(needed)} together: {_closest(needed, nodes)}"
    found = [_lack(name, needed[name], most) for name, most in scarce.items()]
    return "; ".join(["no node of the cluster has " + found[0], *("no node has " + each for each in found[1:])])


def busy(needed: Resources, free: Mapping[str, Resources]) -> str:
    """What a replica waits for that some node could hold; "" if some node has it free.

    free   what is left of each living node

    >>> busy({"CPU": 2, "GPU": 1}, {"a": {"CPU": 1, "GPU": 1}, "b": {}})
    'for 2 CPUs: the freest node has 1 free'
    """
    if any(_fits(needed, has) for has in free.values()):
        return ""
    if not free:
        return "for a living node"
    if not (scarce := _scarce(needed, free)):
        return f"for {_list(needed)} on one node: {_closest(needed, free)} free"
    return "; ".join(
        f"for {_amount(name, needed[name])}: the freest node has {_number(name, most)} free"
        for name, most in scarce.items()
    )


# --- comparing ---


def _enough(needed: float, has: float) -> bool:
    return needed - has <= _HALF_A_STEP


def _fits(needed: Resources, has: Resources) -> bool:
    return all(_enough(amount, has.get(name, 0.0)) for name, amount in needed.items())


def _scarce(needed: Resources, nodes: Mapping[str, Resources]) -> dict[str, float]:
    """What no node has enough of: the most that one has."""
    most = {name: max(has.get(name, 0.0) for has in nodes.values()) for name in needed}
    return {name: amount for name, amount in most.items() if not _enough(needed[name], amount)}


def _closest(needed: Resources, nodes: Mapping[str, Resources]) -> str:
    """What the node has of it that has the largest parts of what is needed."""

    def parts(has: Resources) -> float:
        return sum(min(1.0, has.get(name, 0.0) / amount) for name, amount in needed.items())

    best = max(nodes.values(), key=parts)
    return f"the closest has {_list({name: best.get(name, 0.0) for name in needed}, math.floor)}"


# --- saying ---


def _lack(name: str, needed: float, most: float) -> str:
    if name.startswith(ACCELERATOR):
        return _amount(name, needed)
    if most > 0:
        return f"{_amount(name, needed)}: the largest has {_number(name, most)}"
    kind = f"{_COUNTED[name]}s" if name in _COUNTED else _BYTES.get(name, f"the resource {name!r}")
    return f"{kind} ({_number(name, needed, math.ceil)} needed)"


def _list(amounts: Resources, rounded: Callable[[float], int] = math.ceil) -> str:
    """As in "3 CPUs, 2 GPUs and 1.5 GiB of memory"."""
    shown = [_amount(name, amount, rounded) for name, amount in amounts.items() if amount]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _amount(name: str, amount: float, rounded: Callable[[float], int] = math.ceil) -> str:
    number = _number(name, amount, rounded)
    if name in _COUNTED:
        return f"{number} {_COUNTED[name]}{'' if number == '1' else 's'}"
    if name in _BYTES:
        return f"{number} of {_BYTES[name]}"
    if name.startswith(ACCELERATOR):
        return f"an accelerator of type {name.removeprefix(ACCELERATOR)!r}"
    return f"{number} of the resource {name!r}"


def _number(name: str, amount: float, rounded: Callable[[float], int] = math.floor) -> str:
    """Bytes are rounded: up if needed, down if there, so that the two never look alike."""
    if name not in _BYTES:
        return f"{amount:.10g}"
    step = min(int(math.log2(max(1.0, amount))) // 10, len(_UNITS) - 1)
    return f"{rounded(amount / 1024**step * 10) / 10:g} {_UNITS[step]}"
