"""The certificate that a handshake gets, whatever happens to the files on disk."""

from __future__ import annotations

import logging
import os
import shutil
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import certificates
import pytest
from certificates import Made

from headgate.proxy import tls
from headgate.proxy.tls import Certificate, Files, Kept, Pair


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Made]:
    folder = tmp_path_factory.mktemp("made")
    return [certificates.make(folder, name, kind) for name, kind in (("one", "rsa"), ("two", "ec"), ("three", "ec"))]


@pytest.fixture
def kept() -> Iterator[Kept]:
    fd = os.memfd_create("test")
    yield Kept(fd)
    os.close(fd)


@pytest.fixture
def files(tmp_path: Path, made: list[Made]) -> Files:
    """Those of `made[0]`."""
    found = Files(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))
    put(files_of(found), made[0])
    return found


def files_of(files: Files) -> Made:
    assert files.key
    return Made(Path(files.certificate), Path(files.key))


def put(place: Made, what: Made) -> None:
    """Write the files anew, where they are."""
    place.certificate.write_bytes(what.certificate.read_bytes())
    place.key.write_bytes(what.key.read_bytes())


def seen(certificate: Certificate, name: str | None = "127.0.0.1") -> bytes:
    """The certificate that a client sees."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = certificate.context.wrap_bio(to_server, to_client, server_side=True)
    client = certificates.unchecked().wrap_bio(to_client, to_server, server_hostname=name)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            pass
    found = client.getpeercert(binary_form=True)
    assert found
    return found


def look(certificate: Certificate) -> None:
    """What happens in two seconds: what was seen to change is taken the second time."""
    certificate.look()
    certificate.look()


def by_writing(place: Made, what: Made) -> None:
    put(place, what)


def by_renaming(place: Made, what: Made) -> None:
    for there, new in zip(place, what, strict=True):
        shutil.copy(new, f"{there}.new")
        os.replace(f"{there}.new", there)


def by_keeping_age_and_size(place: Made, what: Made) -> None:
    for there, new in zip(place, what, strict=True):
        before = there.stat()
        there.write_bytes(new.read_bytes())
        os.utime(there, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("replace", [by_writing, by_renaming, by_keeping_age_and_size])
def test_new_files_are_taken_once_they_have_settled(
    files: Files, made: list[Made], kept: Kept, replace: Callable[[Made, Made], None]
) -> None:
    certificate = Certificate(files, kept)
    assert seen(certificate) == seen(certificate, None) == made[0].der
    for new in (made[1], made[2], made[0]):
        replace(files_of(files), new)
        before = seen(certificate)
        certificate.look()
        assert seen(certificate) == before, "somebody may still be writing"
        certificate.look()
        assert seen(certificate) == seen(certificate, None) == new.der


def test_links_that_are_swapped_are_followed(tmp_path: Path, made: list[Made], kept: Kept) -> None:
    """As certbot (a link for each file) and Kubernetes (a link to a folder) do it."""
    for number, one in enumerate(made):
        (tmp_path / str(number)).mkdir()
        put(Made(tmp_path / str(number) / "cert.pem", tmp_path / str(number) / "key.pem"), one)
    (tmp_path / "data").symlink_to("0")
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).symlink_to(f"data/{name}")
    certificate = Certificate(Files(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")), kept)

    (tmp_path / "new").symlink_to("1")
    os.replace(tmp_path / "new", tmp_path / "data")
    look(certificate)
    assert seen(certificate) == made[1].der

    for name in ("key.pem", "cert.pem"):
        (tmp_path / "new").symlink_to(f"2/{name}")
        os.replace(tmp_path / "new", tmp_path / name)
        look(certificate)
    assert seen(certificate) == made[2].der


@pytest.mark.parametrize("first", [0, 1])
def test_half_a_swap_changes_nothing(
    files: Files, made: list[Made], kept: Kept, first: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Certificate before key, or key before certificate, and much later the other."""
    certificate = Certificate(files, kept)
    parts = list(zip(files_of(files), made[1], strict=True))
    for number, (there, new) in enumerate(parts if first == 0 else parts[::-1]):
        there.write_bytes(new.read_bytes())
        for _ in range(3):
            look(certificate)
        assert seen(certificate) == made[number].der
    assert len(complaints(caplog)) == 1


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def test_files_that_cannot_be_used_are_named_once_and_the_old_stay(
    files: Files, made: list[Made], kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    certificate = Certificate(files, kept)
    place = files_of(files)
    whole = made[1].certificate.read_text()
    for number, text in enumerate(("", "no certificate", whole[: len(whole) // 2], None), 1):
        if text is None:
            place.certificate.unlink()
        else:
            place.certificate.write_text(text)
        for _ in range(5):
            look(certificate)
        assert seen(certificate) == made[0].der
        assert len(complaints(caplog)) == number
        assert files.certificate in complaints(caplog)[-1]
        assert "stays in force" in complaints(caplog)[-1]
    put(place, made[2])
    look(certificate)
    assert seen(certificate) == made[2].der


def test_a_trouble_that_passes_is_got_over(
    files: Files, made: list[Made], kept: Kept, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No file descriptors left, say: the files did not change meanwhile."""
    certificate = Certificate(files, kept)
    put(files_of(files), made[1])
    with monkeypatch.context() as trouble:
        trouble.setattr(os, "memfd_create", raise_emfile)
        for _ in range(3):
            look(certificate)
        assert seen(certificate) == made[0].der
        assert len(complaints(caplog)) == 1
    certificate.look()
    assert seen(certificate) == made[1].der


def raise_emfile(*_: object) -> int:
    raise OSError(24, "Too many open files")


def test_a_file_that_is_only_touched_is_no_news(files: Files, kept: Kept, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    certificate = Certificate(files, kept)
    os.utime(files.certificate)
    look(certificate)
    assert not caplog.records


def test_key_and_certificate_may_be_one_file(tmp_path: Path, made: list[Made], kept: Kept) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(made[0].key.read_bytes() + made[0].certificate.read_bytes())
    certificate = Certificate(Files(str(both), None), kept)
    assert seen(certificate) == made[0].der
    both.write_bytes(made[1].certificate.read_bytes() + made[1].key.read_bytes())
    look(certificate)
    assert seen(certificate) == made[1].der


def test_the_next_proxy_falls_back_to_the_pair_that_was_in_force(
    files: Files, made: list[Made], kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    first = Certificate(files, kept)
    put(files_of(files), made[1])
    look(first)
    os.unlink(files.certificate)

    second = Certificate(files, kept)
    assert seen(second) == made[1].der
    assert len(complaints(caplog)) == 1
    put(files_of(files), made[2])
    look(second)
    assert seen(second) == made[2].der
    assert seen(Certificate(files, kept)) == made[2].der


def test_without_a_pair_that_was_in_force_bad_files_are_an_error(files: Files, kept: Kept) -> None:
    for none in (kept, Kept(-1)):
        Path(files.certificate).write_text("no certificate")
        with pytest.raises(ssl.SSLError):
            Certificate(files, none)
        os.unlink(files.certificate)
        with pytest.raises(OSError, match="No such file"):
            Certificate(files, none)


def test_what_is_kept_is_whole_or_nothing(made: list[Made], kept: Kept) -> None:
    pairs = [Pair(one.certificate.read_bytes(), one.key.read_bytes()) for one in made]
    assert kept.read() is None
    for pair in (*pairs, Pair(b"short"), pairs[0]):
        kept.write(pair)
        assert kept.read() == pair

    fd = os.memfd_create("test")
    torn = Kept(fd)
    torn.write(pairs[0])
    for size in range(0, os.fstat(fd).st_size, 97):
        os.ftruncate(fd, size)
        assert torn.read() is None
        torn.write(pairs[0])
    os.close(fd)
    nowhere = Kept(-1)
    nowhere.write(pairs[0])
    assert nowhere.read() is None


def test_an_encrypted_key_is_an_error_and_no_question(made: list[Made], tmp_path: Path) -> None:
    locked = tmp_path / "locked.key"
    command = ["openssl", "pkcs8", "-topk8", "-passout", "pass:x", "-in", str(made[0].key), "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises((ssl.SSLError, ValueError)):
        tls.context_of(Pair(made[0].certificate.read_bytes(), locked.read_bytes()))


def test_no_file_descriptor_is_left_open(files: Files, made: list[Made], kept: Kept) -> None:
    before = os.listdir("/proc/self/fd")
    certificate = Certificate(files, kept)
    for new in (made[1], made[2]):
        put(files_of(files), new)
        look(certificate)
    put(files_of(files), Made(made[0].key, made[0].certificate))
    look(certificate)
    assert os.listdir("/proc/self/fd") == before
