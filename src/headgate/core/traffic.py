"""Choose the backends of a request: one by weight or shard key, and the shadows that get a copy.

The rule: each request chooses for itself, a backend with share 0.3 gets three of ten, one
with share 0 gets none. Requests with the same shard key choose the same, in every process.
Each shadow has a chance of its own, independent of the choice.

The caller passes chances in [0, 1). Which replica of the backend: core/assignment.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from hashlib import sha256
from math import fsum, isfinite
from numbers import Real

from headgate.core.state import Traffic
from headgate.errors import ArgumentError, ConfigError

#: How far the sum of weights may be off 1; the last digits are room for binary fractions.
SUM_TOLERANCE = 1e-6 + 1e-12

Weights = tuple[tuple[str, float], ...]


def check_weights(endpoint: str, weights: object, known_tags: Collection[str]) -> Weights:
    """The (tag, share) pairs of a traffic policy, in the order given.

    Raises ArgumentError (not a mapping) and ConfigError (empty, an unregistered backend, a
    weight that is no number >= 0, a sum that is off 1 by more than 1e-6).
    """
    what = f"traffic of endpoint {endpoint!r}"
    if not isinstance(weights, Mapping):
        raise ArgumentError(f"{what} must be a dict of backend tag -> weight, got {type(weights).__name__}")
    if not weights:
        raise ConfigError(f"{what} is empty; name at least one backend")
    checked = tuple((tag, _share(what, tag, weight, known_tags)) for tag, weight in weights.items())
    total = fsum(share for _, share in checked)
    if abs(total - 1.0) > SUM_TOLERANCE:
        raise ConfigError(f"{what}: weights must sum to 1, got {total:.9g}")
    return checked


def _share(what: str, tag: object, weight: object, known_tags: Collection[str]) -> float:
    if not isinstance(tag, str) or tag not in known_tags:
        raise ConfigError(f"{what}: backend {tag!r} is not registered; create it with create_backend first")
    share = _number(weight)
    if share is None or share < 0.0:
        raise ConfigError(f"{what}: weight of backend {tag!r} must be a number >= 0, got {weight!r}")
    return share


def check_proportion(proportion: object) -> float:
    """The share of requests that a shadow gets; ArgumentError unless a number in [0, 1]."""
    share = _number(proportion)
    if share is None or not 0.0 <= share <= 1.0:
        raise ArgumentError(f"proportion must be a number in [0, 1], got {proportion!r}")
    return share


def _number(value: object) -> float | None:
    """A finite number as a float, also one of numpy; None for all else, bool included."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if isfinite(number) else None


def choose(traffic: Traffic, chance: float, shard_key: str | None = None) -> str:
    """The tag of the backend that answers.

    chance   in [0, 1), a new one for each request; a shard key takes its place

    With a key the order in which the weights were given does not count.
    """
    weights = traffic.weights
    if len(weights) == 1:
        return weights[0][0]
    if shard_key is not None:
        chance = _point(shard_key)
        weights = tuple(sorted(weights))
    for tag, share in weights:
        chance -= share
        if chance < 0.0:
            return tag
    return next(tag for tag, share in reversed(weights) if share > 0.0)  # a sum a little below 1


def _point(shard_key: str) -> float:
    """The place of a key in [0, 1): the first 53 bits of its sha256, all that a float can hold."""
    digest = sha256(shard_key.encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)


def sole(traffic: Traffic) -> str:
    """The tag of the backend that gets every request; "" where there are several, or a shadow gets a copy."""
    return traffic.weights[0][0] if len(traffic.weights) == 1 and not traffic.shadows else ""


def shadows(traffic: Traffic, chance: Callable[[], float]) -> list[str]:
    """The tags that get a copy of this request; `chance` is asked once for each shadow."""
    return [tag for tag, proportion in traffic.shadows if chance() < proportion]


def with_weights(traffic: Traffic, weights: Weights) -> Traffic:
    """The policy with another split; the shadows stay."""
    return Traffic(weights=weights, shadows=traffic.shadows)


def with_shadow(traffic: Traffic, tag: str, proportion: float) -> Traffic:
    """The policy where the shadow `tag` has this proportion; 0 removes it."""
    shares = dict(traffic.shadows) | {tag: proportion}
    kept = tuple((name, share) for name, share in shares.items() if share > 0.0)
    return Traffic(weights=traffic.weights, shadows=kept)


def uses(traffic: Traffic) -> set[str]:
    """The tags of all backends that the policy names, weight 0 and shadows included."""
    return {tag for tag, _ in traffic.weights + traffic.shadows}
