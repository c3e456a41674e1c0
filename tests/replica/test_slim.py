"""replica/slim.py: Starlette's requests come without http.client, and nobody else can tell."""

from __future__ import annotations

import subprocess
import sys

import pytest

START = "import sys\nimport headgate.replica.slim\nimport starlette.requests\n"


def run(code: str) -> list[str]:
    """What is printed by a fresh interpreter that has imported Starlette's requests in this way."""
    done = subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_requests_come_without_http_client_and_email() -> None:
    assert run("print('http.client' in sys.modules, 'email' in sys.modules)") == ["False", "False"]


def test_an_exception_of_starlettes_still_has_its_text() -> None:
    assert run("print(starlette.exceptions.HTTPException(418).detail)") == ["I'm", "a", "Teapot"]


FORMS = ["import http.client as client", "from http import client", "import http; client = http.client"]


@pytest.mark.parametrize("form", FORMS)
def test_http_client_is_imported_in_every_way(form: str) -> None:
    seen = run(f"{form}\nprint(client is sys.modules['http.client'], client.HTTPConnection.__name__)")

    assert seen == ["True", "HTTPConnection"]


def test_http_has_nothing_else_that_it_had_not() -> None:
    assert run("import http\nprint(hasattr(http, 'clients'), http.HTTPStatus(200).phrase)") == ["False", "OK"]


def test_an_http_client_that_is_there_stays() -> None:
    code = "import http.client, sys\nbefore = http.client\nimport headgate.replica.slim\nprint(http.client is before)"

    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["True"]
