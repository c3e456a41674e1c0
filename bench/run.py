"""headgate beside its peers: W1 to W10, round by round. docs/performance.md has the method and the last figures.

    scripts/bench --quick                           the targets that need no Ray, in about two minutes
    scripts/bench                                   everything: more than an hour
    scripts/bench --only W1,W3 --peers headgate,floor,starlette --rounds 5 --seconds 10
    scripts/bench --only W1 --peers headgate,starlette,ray-serve-throughput,ray-serve --seconds 2    some minutes
    scripts/bench --report bench/results/A.json bench/results/B.json

Each round is stored when it is over, in bench/results, so that a run that is interrupted keeps what it has. Stored runs
are put together by `--report`, which writes docs/performance.md. `python -m peers.check` checks the peers.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import record
import report
import wrk
from peers import PEERS
from workloads import WORKLOADS
from workloads.session import QUICK, Options, Session

QUICK_SECONDS = 1


def main() -> None:
    options = parsed()
    if options.report:
        report.write(record.merged(map(record.read, options.report)))
        print(f"wrote {report.PAGE.name}, its plots and {report.PUBLISHED.name}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated; what was measured is stored"))  # no server is left
    try:
        wrk.find()
        run(options)
    except wrk.WrkFailed as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted; what was measured is stored")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="scripts/bench"
    )
    parser.add_argument("--quick", action="store_true", help=f"{','.join(QUICK)} with a few peers, about two minutes")
    parser.add_argument("--only", type=names_of("workload", WORKLOADS), help="workloads, comma-separated")
    parser.add_argument("--peers", type=names_of("peer", PEERS), help=f"comma-separated: {','.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (3)")
    parser.add_argument("--seconds", type=int, help=f"how long each time (5; --quick: {QUICK_SECONDS})")
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="write the page from stored runs")
    options = parser.parse_args()
    options.seconds = options.seconds or (QUICK_SECONDS if options.quick else 5)
    options.only = options.only or tuple(QUICK if options.quick else WORKLOADS)
    return options


def names_of(kind: str, known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """What reads a comma-separated choice of known names.

    >>> names_of("peer", ["floor", "mosec"])("mosec,floor")
    ('mosec', 'floor')
    """

    def read(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        if unknown := [name for name in chosen if name not in known]:
            there_are = f"there are: {', '.join(known)}"
            raise argparse.ArgumentTypeError(f"unknown {kind} {', '.join(unknown)}; {there_are}")
        return chosen

    return read


def run(options: argparse.Namespace) -> None:
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    path = record.RESULTS / f"{name}.json"
    about = {"machine": record.machine(), "rounds": options.rounds, "seconds": options.seconds, "versions": {}}
    measured = record.begun(name, about)
    session = Session(name, Options(options.rounds, options.seconds, options.peers, options.quick), measured, path)
    began = time.monotonic()
    for workload in (WORKLOADS[each] for each in options.only):
        workload.measure(session)
        print(f"\n## {workload.id}: {workload.title}\n\n{report.section(measured, workload)}\n", flush=True)
    print(f"{report.peers_table(measured)}\n\n## Targets\n\n{report.targets_table(measured, only_measured=True)}\n")
    print(f"{time.monotonic() - began:.0f} s; stored in {path.relative_to(path.parent.parent.parent)}")


if __name__ == "__main__":
    main()
