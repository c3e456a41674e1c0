"""Supervisors of instances that something is wrong with, for test_supervisor.py."""

from __future__ import annotations

import msgspec
import tiny

from headgate.engine import boot, supervisor
from headgate.engine.roles import Role


def supervise(boot_fd: int) -> None:
    roles = {"controller": Role("tiny:controller_that_cannot_start", "tiny-ctl")}
    supervisor.main(boot.read(boot_fd), roles)


def supervise_for_another_driver(boot_fd: int) -> None:
    """Its driver was replaced by another process of whose children it is not."""
    record = msgspec.structs.replace(boot.read(boot_fd), driver_pid=1)
    supervisor.main(record, tiny.ROLES)
