"""Which GPUs a replica may see: CUDA_VISIBLE_DEVICES from num_gpus.

Pure but for `visible`. A whole number takes GPUs of its own; a fraction shares one whose fractions
sum to 1 at most, the fullest that still has room, so that whole ones stay free.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence

from headgate.errors import InstanceError

VARIABLE = "CUDA_VISIBLE_DEVICES"
_EPSILON = 1e-9


def visible(environment: Mapping[str, str], devices: Iterable[str]) -> tuple[str, ...]:
    """The GPUs of this machine that may be used: those already chosen in the environment, else all.

    >>> visible({}, ["null", "nvidia0", "nvidia1", "nvidiactl"])
    ('0', '1')
    >>> visible({"CUDA_VISIBLE_DEVICES": "3,1"}, ["nvidia0"])
    ('3', '1')
    """
    if VARIABLE in environment:
        return tuple(name.strip() for name in environment[VARIABLE].split(",") if name.strip())
    return tuple(str(n) for n in range(sum(bool(re.fullmatch(r"nvidia\d+", name)) for name in devices)))


def here() -> tuple[str, ...]:
    """The GPUs that this process may use."""
    return visible(os.environ, os.listdir("/dev"))


def pick(all_gpus: Sequence[str], taken: Iterable[tuple[str, float]], wanted: float) -> tuple[str, ...]:
    """The GPUs for a replica that wants `wanted` of them.

    taken   (GPU, share of it) of the replicas that run

    Raises InstanceError that says what is there and what is free.

    >>> pick(["0", "1"], [("0", 0.5)], 0.5), pick(["0", "1"], [("0", 0.5)], 1)
    (('0',), ('1',))
    """
    free = dict.fromkeys(all_gpus, 1.0)
    for name, share in taken:
        if name in free:
            free[name] -= share
    count, share = (int(wanted), 1.0) if wanted >= 1 else (1, wanted)
    if wanted > 1 and wanted != count:
        raise InstanceError(f"num_gpus={wanted:g} cannot be given: above 1 it must be a whole number")
    roomy = sorted((name for name in all_gpus if free[name] >= share - _EPSILON), key=lambda name: free[name])
    if len(roomy) < count:
        left = sum(max(0.0, room) for room in free.values())
        raise InstanceError(
            f"num_gpus={wanted:g} cannot be given: this machine has {len(all_gpus)} GPUs, {left:g} of them "
            f"free; lower num_gpus or num_replicas, or check {VARIABLE}"
        )
    return tuple(roomy[:count])
