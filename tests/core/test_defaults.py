"""core/defaults.py: what a config says, and what goes with the code where it says nothing."""

from __future__ import annotations

import pytest

from headgate.config import BackendConfig
from headgate.core.defaults import resolve
from headgate.core.state import Facts, Settings
from headgate.errors import ConfigError

PLAIN, ASYNC, BATCH = Facts(), Facts(is_async=True), Facts(accepts_batch=True)


def test_what_is_not_given_has_its_default():
    assert resolve({}, PLAIN) == Settings()


def test_every_config_field_is_understood():
    fields = BackendConfig().to_dict()
    fields.pop("user_config")

    assert resolve(fields, PLAIN) == Settings()


def test_given_values_are_taken_over():
    settings = resolve({"num_replicas": 3, "batch_wait_timeout": 0.5, "max_queued_requests": 0}, PLAIN)

    assert (settings.num_replicas, settings.batch_wait_timeout_s, settings.max_queued_requests) == (3, 0.5, 0)


@pytest.mark.parametrize(
    ("given", "facts", "queries"),
    [
        ({}, PLAIN, 8),
        ({"max_batch_size": None}, BATCH, 8),
        ({"max_batch_size": 1}, PLAIN, 2),
        ({"max_batch_size": 5}, BATCH, 10),
        ({"max_concurrent_queries": None, "max_batch_size": 5}, BATCH, 10),
        ({"max_concurrent_queries": 3, "max_batch_size": 5}, BATCH, 3),
        ({}, ASYNC, 100),
        ({"max_batch_size": 5}, Facts(is_async=True, accepts_batch=True), 100),
    ],
)
def test_concurrent_queries_follow_from_the_code_and_the_batch_size(given, facts, queries):
    assert resolve(given, facts).max_concurrent_queries == queries


def test_batches_need_code_that_accepts_them():
    with pytest.raises(ConfigError, match="accept_batch"):
        resolve({"max_batch_size": 2}, PLAIN)


def test_an_unknown_field_is_named():
    with pytest.raises(ConfigError, match="num_replica'"):
        resolve({"num_replica": 2}, PLAIN)
