"""Search for bytes that break what fuzz_targets.py says of all bytes, led by coverage; `scripts/fuzz` runs this.

Starts from the kept corpus and from the cases of http_cases.py. Ends with 1 if anything was found. Each target is
fuzzed by a process of its own: this file again, with --child.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

_WORDS = (
    "GET", "POST", "HEAD", "PUT", "OPTIONS", "CONNECT", "HTTP/1.1", "HTTP/1.0", "Host: a", "Content-Length: ", "0",
    "5", "Transfer-Encoding: chunked", "Connection: close", "keep-alive", "Upgrade: h2c", "Expect: 100-continue",
    "http://a/", "X-Headgate-", "X-Forwarded-For: ", "\\x0d\\x0a", "\\x0d\\x0a\\x0d\\x0a", "\\x0a", "\\x0d", "\\x00",
    " ", "\\x09", ":", ";", "0\\x0d\\x0a\\x0d\\x0a", "1\\x0d\\x0aa\\x0d\\x0a", ";a=b", "*", "%00", "%2e", "#", "?",
    "HGT1",
)  # fmt: skip
_MAX_BYTES = 600


def child(arguments: list[str]) -> None:
    """Fuzz one target; libFuzzer's arguments follow its name. Does not return."""
    import atheris

    with atheris.instrument_imports(include=["headgate"]):
        import headgate.core.framing
        import headgate.core.http11
        import headgate.proxy.connection
        import headgate.wire.handshake  # noqa: F401
    import fuzz_targets

    target = fuzz_targets.TARGETS[arguments[0]]
    atheris.Setup([sys.argv[0], *arguments[1:]], lambda data: target(bytes(data)))
    atheris.Fuzz()


def seeds(target: str) -> list[bytes]:
    import fuzz_targets
    from http_cases import AFTER, CASES

    found = fuzz_targets.kept(target)
    if target == "http":
        found += [case.data + AFTER for case in CASES if len(case.data) < _MAX_BYTES - len(AFTER)]
    elif target == "framing":
        from headgate.core.framing import CALL, CONTROL, pack

        found += [pack(kind, 0, 2, 7, 9, 5) + b"hello" for kind in range(CALL, CONTROL + 1)]
    else:
        found += [b"HGT1\x01\0\0\0" + b"n" * 32 + b"name".ljust(64, b"\0") + b"p" * 32]
    return found


def minimized(target: str, found: list[bytes]) -> list[bytes]:
    """Those of the inputs, shortest first, that go a way through headgate's code which none before them went."""
    import fuzz_targets

    ways: set[tuple[str, int, int]] = set()
    least = []
    for data in found:
        mine: set[tuple[str, int, int]] = set()

        def trace(frame: FrameType, event: str, _: object, mine: set[tuple[str, int, int]] = mine) -> Any:
            name = frame.f_code.co_filename
            if "/headgate/" not in name:
                return None
            last = frame.f_lineno

            def lines(frame: FrameType, event: str, _: object) -> Any:
                nonlocal last
                mine.add((name, last, frame.f_lineno))
                last = frame.f_lineno
                return lines

            return lines

        sys.settrace(trace)
        try:
            fuzz_targets.TARGETS[target](data)
        finally:
            sys.settrace(None)
        if not mine <= ways:
            ways |= mine
            least.append(data)
    return least


def fuzz(target: str, seconds: int, keep: bool) -> bool:
    """Whether nothing was found."""
    import fuzz_targets

    with tempfile.TemporaryDirectory() as folder:
        work, words = Path(folder, "work"), Path(folder, "words")
        work.mkdir()
        words.write_text("".join(f'"{word}"\n' for word in _WORDS))
        for number, data in enumerate(seeds(target)):
            (work / f"{number}").write_bytes(data)
        run = [sys.executable, __file__, "--child", target]
        limits = [f"-max_len={_MAX_BYTES}", "-timeout=10", "-rss_limit_mb=2048"]
        process = subprocess.run(
            [*run, f"-max_total_time={seconds}", f"-dict={words}", "-print_final_stats=1", *limits, str(work)],
            capture_output=True,
            text=True,
        )
        said = process.stderr.splitlines()
        figures = [line for line in said if "number_of_executed_units" in line or "cov:" in line]
        print(f"{target}: {figures[-2:] if figures else ''}")
        if process.returncode != 0:
            print("\n".join((process.stdout + process.stderr).splitlines()[-40:]))
            return False
        if keep:
            found = sorted({path.read_bytes() for path in work.iterdir()}, key=lambda data: (len(data), data))
            least = minimized(target, found)
            path = fuzz_targets.CORPUS / f"{target}.txt"
            path.write_text("".join(f"{data!r}\n" for data in least))
            print(f"{target}: kept {len(least)} of {len(found)}")
    return True


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=(__doc__ or "").partition(";")[0])
    parser.add_argument("targets", nargs="*", help="http, framing, handshake; the default is all")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (60)")
    parser.add_argument("--keep", action="store_true", help="write what covers something new to the kept corpus")
    options = parser.parse_args()
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("atheris is missing; pip install -e .[fuzz] brings it", file=sys.stderr)
        return 2
    import fuzz_targets

    targets = options.targets or list(fuzz_targets.TARGETS)
    unbroken = [fuzz(target, options.seconds, options.keep) for target in targets]
    return 0 if all(unbroken) else 1


if __name__ == "__main__":
    raise SystemExit(main())
