"""Let requests that others wrote judge the proxy; `scripts/http-corpora` runs this. Ends with 1 if it judges otherwise.

They come from source distributions (gunicorn's own; aiohttp's, which brings llhttp's), unpacked into a temporary
folder. Each request is run in one piece, cut at each byte, and in single bytes. What is counted: how many of the
invalid ones are refused, how many of the valid ones are accepted, and whether cutting changes anything. Where this
server decides otherwise on purpose the reason stands in `POLICY`; anything else makes it fail.

Most of them were made for parsers that do not ask for a Host. They get one, so that nothing is refused for that alone.
Those that are about limits are run with limits as small as their author's.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from http_in_memory import Outcome, Rig, cuts


class Sample(NamedTuple):
    name: str
    valid: bool
    data: bytes
    config: str = ""  # what its author set for it


_OTHER = "of no effect here: its author's option asks for it"
_CODINGS = "no transfer coding but chunked is taken (RFC 9112 §6.1 lets a server refuse); promised"
_TUNNEL = "CONNECT asks for a tunnel (RFC 9110 §9.3.6 is for proxies)"
_PROTOCOL = "another protocol than HTTP/1"
_STAR = "the target * is for OPTIONS alone (RFC 9112 §3.2.4)"
_USER = "user information in a target is an error (RFC 9110 §4.2.4)"
#: What the name of a sample begins with -> why this server decides otherwise.
POLICY: dict[str, str] = {
    "gunicorn invalid/019": "X-Forwarded-Ssl is nobody's field here; X-Forwarded-Proto alone says the scheme",
    "gunicorn invalid/040": "names with _ are other names; it is CGI that confuses them. " + _OTHER,
    "gunicorn invalid/041": "Content-Type twice is the app's business: it ends no body",
    "gunicorn invalid/chunked_07": "names with _ are other names; it is CGI that confuses them. " + _OTHER,
    "gunicorn valid/025": _CODINGS,
    "gunicorn valid/028": "white space before the colon is refused (RFC 9112 §5.1). " + _OTHER,
    "gunicorn valid/029": _CODINGS,
    "gunicorn valid/030": _CODINGS,
    "gunicorn valid/compat_obs_fold": "obs-fold is refused (RFC 9112 §5.2). " + _OTHER,
    "gunicorn valid/pp_": "there is no proxy protocol here. " + _OTHER,
    "gunicorn valid/rfc9112_smuggle_gzip_chunked_01": _CODINGS,
    "gunicorn valid/rfc9112_smuggle_te_identity_chunked_01": _CODINGS,
    "gunicorn valid/rfc9112_target_absolute_userinfo": _USER,
    "gunicorn valid/rfc9112_target_authority": _TUNNEL,
    "llhttp connection 3 ": "the first is answered, the connection ends, and what follows is never read",
    "llhttp method 2 CONNECT": _TUNNEL,
    "llhttp method 3 CONNECT": _TUNNEL,
    "llhttp method 4 CONNECT": _TUNNEL,
    "llhttp method 5 M-SEARCH": _STAR,
    "llhttp method 12 SOURCE": _PROTOCOL,
    "llhttp method 13 OPTIONS request with RTSP": _PROTOCOL,
    "llhttp method 14 ANNOUNCE request with RTSP": _PROTOCOL,
    "llhttp method 15 PRI": _PROTOCOL,
    "llhttp sample 10 No HTTP version": "HTTP/0.9 is refused",
    "llhttp transfer-encoding 20 ": _CODINGS,
    "llhttp transfer-encoding 21 ": _CODINGS,
    "llhttp uri 9 ": _TUNNEL,
    "llhttp uri 10 ": _USER,
}
#: The start line of a request of HTTP/1.1 whose head has no Host field.
_HOSTLESS = re.compile(
    rb"((?:\A|\n)[^\r\n ]+ (?:https?://([^\r\n/?# ]*))?[^\r\n]* HTTP/1\.1\r\n)"
    rb"(?!(?:[^\r\n]+\r\n)*?[Hh][Oo][Ss][Tt]:)"
)
#: About limits: the author's are in their options, or gunicorn's defaults of 4 and 8 KB.
LIMITED = re.compile(r"gunicorn invalid/(?:00[6-9]|01[0-3]|017|limit_)")
SMALL = {"max_target_bytes": 30, "max_head_bytes": 40, "max_header_fields": 2}


def sources(package: str, folder: Path) -> Path:
    """The unpacked source distribution."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:", "--no-deps", package]
    subprocess.run([*command, "-d", str(folder)], check=True)
    (archive,) = folder.glob(f"{package}-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return next(path for path in folder.glob(f"{package}-*") if path.is_dir())


def gunicorn(folder: Path) -> Iterator[Sample]:
    """Its request files: a line end that counts is written out, one in the file does not count."""
    root = sources("gunicorn", folder) / "tests" / "requests"
    for path in sorted(root.glob("*/*.http")):
        data = path.read_bytes().replace(b"\n", b"")
        for written, meant in ((rb"\r\n", b"\r\n"), (rb"\0", b"\0"), (rb"\n", b"\n"), (rb"\t", b"\t")):
            data = data.replace(written, meant)
        data = re.sub(rb"\\x([0-9A-Fa-f]{2})", lambda found: bytes.fromhex(found[1].decode()), data)
        config = " ".join(re.findall(r"cfg\.set\((.*)\)", path.with_suffix(".py").read_text()))
        yield Sample(f"gunicorn {path.parent.name}/{path.stem}", path.parent.name == "valid", data, config)


def llhttp(folder: Path) -> Iterator[Sample]:
    """Its cases of requests that are read strictly: valid if llhttp reports no error."""
    root = sources("aiohttp", folder) / "vendor" / "llhttp" / "test" / "request"
    case = re.compile(r"<!-- meta=(\{[^\n]*\}) -->\n+```http\n(.*?)```\n+```log\n(.*?)```", re.DOTALL)
    for path in sorted(root.glob("*.md")):
        for number, found in enumerate(case.finditer(path.read_text()), start=1):
            meta, text, log = found.groups()
            if json.loads(meta)["type"] != "request":
                continue
            log = re.sub(r"error code=\d+ reason=\"Pause[^\n]*", "", log)  # of an Upgrade: others read on from there
            title = re.findall(r"^#+ (.*)$", path.read_text()[: found.start()], re.MULTILINE)[-1]
            data = _meant(text.removesuffix("\n"))
            yield Sample(f"llhttp {path.stem} {number} {title}", "error code=" not in log, data, meta)


def _meant(text: str) -> bytes:
    """The bytes that the text of a case stands for: its line ends are CR LF, but for those written out."""
    text = re.sub(r"\\(?:\r\n|\r|\n)", "", text).replace("\n", "\r\n")
    for written, meant in (("\\r", "\r"), ("\\n", "\n"), ("\\t", "\t"), ("\\f", "\f")):
        text = text.replace(written, meant)
    text = re.sub(r"\\x([0-9a-fA-F]+)", lambda found: chr(int(found[1], 16)), text)
    text = re.sub(r"\\([0-7]{1,3})", lambda found: chr(int(found[1], 8)), text)
    return text.encode()


def judge(rig: Rig, sample: Sample) -> tuple[bool, Outcome, list[bytes]]:
    """Whether it came out as its author says, what came of it, and where cutting it changes that."""
    data = _HOSTLESS.sub(lambda found: found[1] + b"Host: " + (found[2] or b"a") + b"\r\n", sample.data)
    if b"\r\n\r\n" not in data:  # some end where their author's parser gave up
        data = data.removesuffix(b"\r\n") + b"\r\n\r\n"
    whole = rig.run(data)
    odd = [cut[0] for cut in cuts(data) if not _same(rig.run(*cut), whole)]
    refused = bool(whole.statuses) and whole.statuses[-1] >= 400  # 405: of a method nobody knows the app sees nothing
    never_seen = refused or (whole.waits and not whole.seen)  # what never ends is answered with 408
    right = not whole.refused if sample.valid else never_seen
    return right, whole, odd


def _same(first: Outcome, second: Outcome) -> bool:
    """A body for nobody is not waited for: then the connection ends, if the body did not come with the head."""
    if first.statuses == second.statuses and set(first.statuses) & {404, 405}:
        return first.seen == second.seen
    return first == second


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/http-corpora", description=(__doc__ or "").partition(";")[0])
    parser.add_argument("--verbose", action="store_true", help="name what came out otherwise")
    verbose = parser.parse_args().verbose
    usual, small = Rig(), Rig(**SMALL)
    failed = False
    for read in (gunicorn, llhttp):
        with tempfile.TemporaryDirectory() as folder:
            samples = list(read(Path(folder)))
        tally = {True: [0, 0], False: [0, 0]}
        for sample in samples:
            right, outcome, odd = judge(small if LIMITED.match(sample.name) else usual, sample)
            tally[sample.valid][0] += right
            tally[sample.valid][1] += 1
            if not right:
                reason = next((why for name, why in POLICY.items() if sample.name.startswith(name)), None)
                failed = failed or reason is None
                if verbose or reason is None:
                    verdict = "valid, refused" if sample.valid else "invalid, accepted"
                    print(f"  {sample.name} {sample.config} is {verdict}: {reason or 'NO REASON'}")
                if reason is None:
                    print(f"    {sample.data[:300]!r}\n    {outcome!r:.300}")
            if odd or outcome.broken or any(status >= 500 for status in outcome.statuses):
                failed = True
                print(f"  {sample.name}: cutting after {odd[:1]} changes what comes of it, or 5xx: {outcome!r:.300}")
        print(
            f"{read.__name__}: {tally[False][0]} of {tally[False][1]} invalid refused, "
            f"{tally[True][0]} of {tally[True][1]} valid accepted, each also cut at each byte"
        )
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
