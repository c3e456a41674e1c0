"""W8: 32 streams of 256 tokens, as fast as they come, and one token each 10 ms; read by bench/streams.py."""

from __future__ import annotations

import processes
import servers
from figures import Figures

from .contest import contest, cpu_us, of_all_peers
from .program import run_client
from .session import Session
from .workload import Bars, Column, Table, Workload

STREAMS = 32
FAST = "as fast as possible"
PACED = "a token each 10 ms"
SLACK_S = 45.0


def measure(session: Session) -> None:
    fast = of_all_peers(session, "W8", {"stream": "", "stream_async": "async def"})
    contest(session, "W8", fast, {FAST: read_streams})
    contest(session, "W8", of_all_peers(session, "W8", {"stream_paced": ""}), {PACED: read_streams})


def read_streams(server: servers.Server, seconds: int) -> Figures:
    before = cpu_us(server)
    options = (f"--streams={STREAMS}", f"--seconds={seconds}")
    found = run_client("streams.py", server.url, server.request, seconds + SLACK_S, *options)
    spent = processes.cpu_per_request(before, cpu_us(server), found["tokens"])
    return {**found, "cpu_us": sum(spent.values()), "cpu_by_process": spent}


ABOUT = """
`GET /stream`, 256 tokens of 8 bytes from a generator, chunked, on 32 connections at once: as fast as they come, and
one each 10 ms, which shows what is added to the time between two tokens.
"""

W8 = Workload(
    "W8",
    "streams of tokens",
    ABOUT,
    measure,
    (
        Table(
            FAST,
            (
                Column("tokens/s", FAST, "tokens_per_s"),
                Column("headgate is", FAST, "tokens_per_s", "ratio"),
                Column("first token p50 ms", FAST, "first_p50_ms", ".1f"),
                Column("p99 ms", FAST, "first_p99_ms", ".1f"),
                Column("CPU µs per token", FAST, "cpu_us", ".2f"),
                Column("of which", FAST, "cpu_by_process", "parts"),
                Column("client's CPU %", FAST, "client_cpu", ".0f", 0.01),
            ),
        ),
        Table(
            PACED,
            (
                Column("first token p50 ms", PACED, "first_p50_ms", ".2f"),
                Column("p99 ms", PACED, "first_p99_ms", ".2f"),
                Column("between tokens p50 ms", PACED, "gap_p50_ms", ".2f"),
                Column("p99 ms", PACED, "gap_p99_ms", ".2f"),
                Column("longest ms", PACED, "gap_max_ms", ".1f"),
                Column("CPU µs per token", PACED, "cpu_us", ".2f"),
            ),
            least_first=True,
        ),
    ),
    (Bars("streams", "32 streams of tokens, as fast as possible", "tokens/s", FAST, "tokens_per_s", log=True),),
)
