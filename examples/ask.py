"""Run another example, ask it once over HTTP, print the answer, and end it.

    python examples/ask.py digits.py /digits/42
"""

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PATIENCE_S = 60


def get(port, path):
    """(status, body), or (None, what went wrong)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    except (OSError, http.client.HTTPException) as error:
        return None, str(error)
    finally:
        connection.close()


def ask(example, port, path):
    """The body of the first answer with status 200; ends this program if there will be none."""
    deadline = time.monotonic() + PATIENCE_S
    while example.poll() is None:
        status, body = get(port, path)
        if status == 200:
            return body
        if time.monotonic() > deadline:
            sys.exit(f"{path} was not answered with 200 within {PATIENCE_S} s, but with {status}: {body}")
        time.sleep(0.05)
    sys.exit(f"the example ended with status {example.returncode}; what it printed stands above")


def main(name, path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    script = Path(__file__).with_name(name)
    example = subprocess.Popen([sys.executable, script], env={**os.environ, "PORT": str(port)})
    try:
        print(ask(example, port, path))
        time.sleep(0.5)  # a route answers a moment before the call that makes it returns
    finally:
        example.send_signal(signal.SIGINT)
        try:
            example.wait(30)
        except subprocess.TimeoutExpired:
            example.kill()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
