"""When a replica has served its time: `max_requests` and `max_rss_bytes` of its backend's config.

For code that leaks, or that a long life does no good otherwise. The replica looks at itself
(replica/wear.py) and says so in its report; that a new one is ready first, and that one replica of a
backend leaves at a time, is core/reconcile.py.
"""

from __future__ import annotations

from headgate.core.state import Settings

#: Replicas that began together do not come to their last request together: each adds up to so much to
#: `max_requests` (as gunicorn's max_requests_jitter).
SPREAD = 0.1


def last_request(max_requests: int | None, spread: float) -> int:
    """After how many requests a replica is worn out; 0: never. `spread` in [0, 1) is the replica's own.

    >>> last_request(1000, 0.0), last_request(1000, 0.5), last_request(None, 0.5)
    (1000, 1050, 0)
    """
    return 0 if max_requests is None else max_requests + int(max_requests * SPREAD * spread)


def worn(settings: Settings, served: int, rss_bytes: int, first_rss_bytes: int, spread: float) -> str:
    """Why a replica is to be replaced, "" if it is not.

    served            requests so far
    rss_bytes         its resident memory; `first_rss_bytes` before the first request

    One that was over `max_rss_bytes` before it had served anything is not: a new one would be no better.
    """
    last = last_request(settings.max_requests, spread)
    if last and served >= last:
        return f"it has served {served} requests (max_requests = {settings.max_requests})"
    most = settings.max_rss_bytes
    if most is not None and rss_bytes > most and not is_too_low(settings, first_rss_bytes):
        return f"it takes {rss_bytes} bytes of memory (max_rss_bytes = {most})"
    return ""


def is_too_low(settings: Settings, first_rss_bytes: int) -> bool:
    """Whether `max_rss_bytes` is less than a replica takes before its first request."""
    return settings.max_rss_bytes is not None and first_rss_bytes > settings.max_rss_bytes
