"""An instance in a process of its own: with an environment, limits, a disk or a clock of its own.

    with Apart(CODE, folder, env={"XDG_RUNTIME_DIR": ...}) as apart:
        apart.address                              # where its HTTP proxy listens
        apart.do('handle.call("x")')               # an expression, run in that process; its value, by way of JSON
        apart.errors                               # what its processes logged

CODE is Python; `client` is there. An exception of an expression is raised here as `Raised`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from running import SECONDS_TO_END, eventually, pid_of

PROGRAM = """
import json, os, sys
import headgate

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what others print are no answers
code, options = json.loads(sys.stdin.readline())
client = headgate.start(**options)
exec(compile(code, "<the test's code>", "exec"), globals())
print(json.dumps([client.http_address]), file=answers, flush=True)
for line in sys.stdin:
    try:
        answer = [eval(json.loads(line), globals())]
    except Exception as error:
        answer = [type(error).__name__, isinstance(error, headgate.HeadgateError), str(error)]
    print(json.dumps(answer), file=answers, flush=True)
client.shutdown()
"""


class Raised(Exception):
    """What an expression raised: the name of its class, whether that is one of headgate's, its text."""

    def __init__(self, kind: str, is_ours: bool, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind
        self.is_ours = is_ours
        self.text = text


class Apart:
    """The process and its instance.

    errors_to   the file for stderr, by default one in `folder`
    command     what goes before the interpreter: `unshare -m`, for one
    options     of headgate.start
    """

    def __init__(
        self,
        code: str,
        folder: Path,
        *,
        env: Mapping[str, str] | None = None,
        errors_to: Path | None = None,
        command: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self._errors = errors_to or folder / "stderr"
        with self._errors.open("ab") as errors:
            self.process = subprocess.Popen(
                [*command, sys.executable, "-c", PROGRAM],
                cwd=folder,
                env={**os.environ, **(env or {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        try:
            self._say([code, {"http_options": {"port": 0}, **options}])
            (self.address,) = self._hear()
        except BaseException:
            self.kill()
            raise

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def logged(self, part: str) -> list[str]:
        """The lines of the log that say so."""
        return [line for line in self.errors.splitlines() if part in line]

    def do(self, expression: str) -> Any:
        self._say(expression)
        answer = self._hear()
        if len(answer) > 1:
            raise Raised(*answer)
        return answer[0]

    def replicas(self, tag: str = "it") -> list[int]:
        """The pids of those that are ready."""
        found: list[int] = self.do(
            f"[one.pid for one in client.status().replicas if one.backend == {tag!r} and one.state == 'ready']"
        )
        return found

    def proxy(self) -> int:
        return int(eventually(lambda: self.do("[one.pid for one in client.status().proxies]"))[0])

    def controller(self) -> int:
        return pid_of(self.do("client._instance.home.key"), "headgate-ctl")

    def _say(self, what: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def _hear(self) -> list[Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, f"it ended: {self.errors[-3000:]}"
        found: list[Any] = json.loads(line)
        return found

    def close(self) -> None:
        """Shut it down; it must end well."""
        assert self.process.stdin
        self.process.stdin.close()
        try:
            assert self.process.wait(SECONDS_TO_END) == 0, self.errors[-3000:]
        finally:
            self.kill()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()
