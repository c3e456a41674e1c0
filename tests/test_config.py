"""What users may set: accepted, refused with the field's name, and the same after every journey."""

from __future__ import annotations

import copy
import functools
import json
import math
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.middleware import Middleware

from headgate import config
from headgate.config import (
    BackendConfig,
    DeploymentMode,
    HTTPOptions,
    accept_batch,
    accepts_batch,
    as_backend_config,
    as_http_options,
    check_env,
    check_ray_actor_options,
)
from headgate.errors import ArgumentError, ConfigError

BACKEND_DEFAULTS = {
    "num_replicas": 1,
    "max_batch_size": None,
    "batch_wait_timeout": 0.0,
    "max_concurrent_queries": None,
    "user_config": None,
    "max_queued_requests": None,
    "request_timeout_s": None,
    "idempotent": False,
    "graceful_shutdown_timeout_s": 20.0,
    "graceful_shutdown_wait_loop_s": 2.0,
    "health_check_period_s": 10.0,
    "health_check_timeout_s": 30.0,
    "max_requests": None,
    "max_rss_bytes": None,
}

HTTP_DEFAULTS = {
    "host": "127.0.0.1",
    "port": 8000,
    "middlewares": [],
    "location": "HeadOnly",
    "max_head_bytes": 32768,
    "max_header_fields": 100,
    "max_target_bytes": 8192,
    "max_body_bytes": 104857600,
    "max_buffered_bytes": 1073741824,
    "head_timeout_s": 10.0,
    "body_timeout_s": 30.0,
    "write_timeout_s": 30.0,
    "keep_alive_timeout_s": 75.0,
    "max_connections": 10000,
    "expose_tracebacks": False,
    "forwarded_allow_ips": "127.0.0.1",
    "admin_token": None,
    "ssl_certfile": None,
    "ssl_keyfile": None,
}


class Gzip:
    """Stands for an ASGI middleware."""


class Limits(BackendConfig):
    """A user's own subclass."""


# -- Defaults and accepted values


def test_the_defaults_are_those_of_the_contract():
    assert BackendConfig().to_dict() == BACKEND_DEFAULTS
    assert HTTPOptions().to_dict() == HTTP_DEFAULTS
    assert BackendConfig().given == HTTPOptions().given == {}


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [
        ("num_replicas", 3, 3),
        ("num_replicas", "3", 3),
        ("num_replicas", " 3 ", 3),
        ("num_replicas", 3.0, 3),
        ("num_replicas", "3.0", 3),
        ("num_replicas", numpy.int64(3), 3),
        ("num_replicas", 2**63 - 1, 2**63 - 1),
        ("max_batch_size", None, None),
        ("max_batch_size", "8", 8),
        ("max_queued_requests", 0, 0),
        ("batch_wait_timeout", 0, 0.0),
        ("batch_wait_timeout", "0.01", 0.01),
        ("batch_wait_timeout", numpy.float32(0.5), 0.5),
        ("batch_wait_timeout", Fraction(1, 4), 0.25),
        ("request_timeout_s", 1, 1.0),
        ("request_timeout_s", None, None),
        ("idempotent", True, True),
        ("user_config", {"threshold": 0.5}, {"threshold": 0.5}),
        ("graceful_shutdown_timeout_s", "1e-3", 0.001),
    ],
)
def test_a_backend_field_is_kept_in_its_own_type(field, value, kept):
    built = BackendConfig(**{field: value})
    assigned = BackendConfig()
    setattr(assigned, field, value)

    for found in (built, assigned):
        assert getattr(found, field) == kept
        assert type(getattr(found, field)) is type(kept)
        assert found.given == {field: kept}


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [
        ("host", None, None),
        ("host", "node", "node"),
        ("port", 0, 0),
        ("port", "65535", 65535),
        ("max_head_bytes", 60000, 60000),
        ("max_body_bytes", 0, 0),
        ("location", None, None),
        ("location", "EveryNode", DeploymentMode.EveryNode),
        ("location", DeploymentMode.NoServer, DeploymentMode.NoServer),
        ("middlewares", (), []),
        ("forwarded_allow_ips", "*", "*"),
        ("forwarded_allow_ips", ["10.0.0.1", "10.0.0.2"], "10.0.0.1,10.0.0.2"),
        ("admin_token", "s3cret", "s3cret"),
        ("ssl_certfile", Path("/etc/cert.pem"), "/etc/cert.pem"),
    ],
)
def test_an_http_field_is_kept_in_its_own_type(field, value, kept):
    options = HTTPOptions(**{field: value})

    assert getattr(options, field) == kept
    assert type(getattr(options, field)) is type(kept)


# -- Refused values


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("num_replicas", bad) for bad in (0, -1, None, True, 1.5, "1.5", "two", "", "inf", [1], b"1")),
        *(("num_replicas", bad) for bad in (2**63, 10**400, "9" * 5000, math.nan, numpy.bool_(True), 1j)),
        *(("max_batch_size", bad) for bad in (0, "none", False)),
        *(("max_concurrent_queries", bad) for bad in (0, -5)),
        *(("max_queued_requests", bad) for bad in (-1, 0.5)),
        *(("batch_wait_timeout", bad) for bad in (-0.001, None, "soon", math.nan, math.inf, True, 10**400)),
        *(("request_timeout_s", bad) for bad in (0, -1, "nan", -math.inf, "1e999", 10**400, object())),
        *(("idempotent", bad) for bad in (1, "true", None)),
        ("graceful_shutdown_timeout_s", 0),
        ("graceful_shutdown_wait_loop_s", 0),
        ("health_check_period_s", 0),
        ("health_check_timeout_s", None),
        *(("max_requests", bad) for bad in (0, -1, 0.5, "many")),
        *(("max_rss_bytes", bad) for bad in (0, -1, "1 GB", math.inf)),
    ],
)
def test_a_bad_backend_value_is_refused_by_name_and_changes_nothing(field, value):
    named = rf"^BackendConfig\.{field} must be "
    with pytest.raises(ConfigError, match=named):
        BackendConfig(**{field: value})

    existing = BackendConfig(num_replicas=2)
    with pytest.raises(ValueError, match=named):
        setattr(existing, field, value)
    assert existing == BackendConfig(num_replicas=2)
    assert existing.given == {"num_replicas": 2}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("host", bad) for bad in ("", 0, b"::1")),
        *(("port", bad) for bad in (-1, 65536, None, "http", True)),
        *(("middlewares", bad) for bad in (None, "gzip", [Gzip], {}, Gzip)),
        *(("location", bad) for bad in ("Everywhere", "headonly", 1, [])),
        *(("max_head_bytes", bad) for bad in (0, 60001)),
        ("max_header_fields", 0),
        ("max_target_bytes", 0),
        ("max_body_bytes", -1),
        ("max_buffered_bytes", 0),
        ("head_timeout_s", 0),
        ("body_timeout_s", None),
        ("write_timeout_s", -1),
        ("keep_alive_timeout_s", math.inf),
        ("max_connections", 0),
        ("expose_tracebacks", "no"),
        *(("forwarded_allow_ips", bad) for bad in (None, [1], 7)),
        *(("admin_token", bad) for bad in ("", "two words", "line\n", "café", 7)),
        *(("ssl_certfile", bad) for bad in ("", 3, b"cert.pem")),
        ("ssl_keyfile", ""),
    ],
)
def test_a_bad_http_value_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=rf"^HTTPOptions\.{field} must be "):
        HTTPOptions(**{field: value})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BackendConfig(num_replicas=0), "BackendConfig.num_replicas must be an integer >= 1, got 0"),
        (
            lambda: BackendConfig(num_replicas=2**63),
            f"BackendConfig.num_replicas must be an integer from 1 to {2**63 - 1}, got {2**63}",
        ),
        (
            lambda: BackendConfig(batch_wait_timeout="soon"),
            "BackendConfig.batch_wait_timeout must be a number >= 0 (seconds), got 'soon'",
        ),
        (
            lambda: BackendConfig(request_timeout_s=0),
            "BackendConfig.request_timeout_s must be a number > 0 or None (seconds), got 0",
        ),
        (lambda: HTTPOptions(port=-1), "HTTPOptions.port must be an integer from 0 to 65535, got -1"),
        (
            lambda: HTTPOptions(location="Tail"),
            "HTTPOptions.location must be 'NoServer' or 'HeadOnly' or 'EveryNode' or None, got 'Tail'",
        ),
        (
            lambda: BackendConfig(num_replica=2),
            "BackendConfig has no field 'num_replica'; did you mean 'num_replicas'?",
        ),
    ],
)
def test_an_error_says_what_is_wanted_and_what_was_given(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value) == message


def test_a_long_value_is_cut_in_the_error():
    with pytest.raises(ConfigError) as caught:
        BackendConfig(num_replicas="x" * 10_000)
    assert len(str(caught.value)) < 200


def test_a_number_too_long_to_print_is_still_refused_by_name():
    with pytest.raises(ConfigError, match=r"num_replicas must be an integer .* got a very large int"):
        BackendConfig(num_replicas=10**5000)


# -- Names of fields


def test_an_unknown_name_without_a_neighbour_lists_the_fields():
    with pytest.raises(ConfigError, match=r"has no field 'zzz'; there are num_replicas, max_batch_size, "):
        BackendConfig(zzz=1)


@pytest.mark.parametrize("name", ["max_request", "given", "_value", "to_dict"])
def test_an_unknown_name_cannot_be_assigned(name):
    with pytest.raises(ConfigError, match=f"BackendConfig has no field {name!r}"):
        setattr(BackendConfig(), name, 1)


def test_an_unknown_name_cannot_be_read():
    with pytest.raises(AttributeError, match="'BackendConfig' object has no attribute 'num_replica'"):
        BackendConfig().num_replica  # noqa: B018
    assert not hasattr(BackendConfig(), "zzz")


@pytest.mark.parametrize("name", ["graceful_shutdown_timeout_s", "graceful_shutdown_wait_loop_s"])
def test_the_experimental_names_are_aliases(name):
    built = BackendConfig(**{f"experimental_{name}": "3"})
    assigned = BackendConfig()
    setattr(assigned, f"experimental_{name}", 3)

    for found in (built, assigned):
        assert found.given == {name: 3.0}
        assert getattr(found, name) == getattr(found, f"experimental_{name}") == 3.0


def test_a_bad_value_of_an_alias_names_the_field():
    with pytest.raises(ConfigError, match="graceful_shutdown_timeout_s must be a number > 0"):
        BackendConfig(experimental_graceful_shutdown_timeout_s=0)


def test_a_field_and_its_alias_together_are_refused():
    with pytest.raises(ConfigError, match="graceful_shutdown_timeout_s is given twice"):
        BackendConfig(graceful_shutdown_timeout_s=1, experimental_graceful_shutdown_timeout_s=2)


def test_every_field_is_one_entry_and_its_default_passes_its_own_check():
    for kind in (BackendConfig, HTTPOptions):
        for name, field in kind._fields.items():
            assert getattr(kind, name) is field
            assert field.name == name
            field.check(field.default)


# -- As values


def test_given_holds_what_was_set_even_to_its_default():
    found = BackendConfig(num_replicas=1)
    found.user_config = None

    assert found.given == {"num_replicas": 1, "user_config": None}


def test_given_and_to_dict_are_copies():
    found = BackendConfig(num_replicas=2)
    found.given["num_replicas"] = 3
    found.to_dict()["num_replicas"] = 4

    assert found.num_replicas == 2


def test_equality_is_by_values_and_within_one_class():
    assert BackendConfig(num_replicas="1") == BackendConfig()
    assert BackendConfig(num_replicas=2) != BackendConfig()
    assert BackendConfig() != BACKEND_DEFAULTS
    assert Limits() != BackendConfig()
    with pytest.raises(TypeError, match="unhashable"):
        hash(BackendConfig())


def test_user_configs_of_arrays_compare_by_their_values():
    numpy = pytest.importorskip("numpy")

    def config(*numbers):
        return BackendConfig(user_config={"weights": numpy.array(numbers)})

    assert config(1, 2) == config(1, 2)
    assert config(1, 2) != config(1, 3)
    assert config(1, 2) != BackendConfig()
    assert config(1, 2) != BackendConfig(user_config={"weights": lambda: None})


def test_the_repr_shows_every_field_and_builds_the_same_value():
    found = BackendConfig(num_replicas=2, user_config={"a": [1]})

    assert eval(repr(found)) == found
    assert eval(repr(HTTPOptions(location="EveryNode"))) == HTTPOptions(location="EveryNode")


def test_the_token_is_never_shown():
    assert "s3cret" not in repr(HTTPOptions(admin_token="s3cret"))
    assert "admin_token='***'" in repr(HTTPOptions(admin_token="s3cret"))
    assert "admin_token=None" in repr(HTTPOptions())
    with pytest.raises(ConfigError) as caught:
        HTTPOptions(admin_token="s3cret\n")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "journey",
    [copy.copy, copy.deepcopy, *(functools.partial(pickle.dumps, protocol=n) for n in range(6))],
)
def test_a_copy_is_equal_and_independent(journey):
    original = Limits(num_replicas=2, user_config={"a": 1}, experimental_graceful_shutdown_timeout_s=5)
    twin = journey(original)
    twin = pickle.loads(twin) if isinstance(twin, bytes) else twin

    assert type(twin) is Limits
    assert twin == original
    assert twin.given == original.given
    twin.num_replicas = 7
    assert original.num_replicas == 2
    with pytest.raises(ConfigError):
        twin.num_replicas = 0


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "num_replicas": st.integers(1, 2**63 - 1),
            "max_batch_size": st.none() | st.integers(1, 10**6),
            "batch_wait_timeout": st.floats(0, allow_infinity=False),
            "user_config": st.text() | st.integers(),
            "idempotent": st.booleans(),
            "request_timeout_s": st.none() | st.floats(0, exclude_min=True, allow_infinity=False),
        },
    )
)
def test_what_was_given_comes_back_through_a_pickle_and_through_text(values: dict[str, Any]):
    original = BackendConfig(**values)
    as_text = {name: repr(v) if type(v) in (int, float) else v for name, v in values.items()}
    if type(values.get("user_config")) is int:
        as_text["user_config"] = values["user_config"]

    assert original.given == values
    assert pickle.loads(pickle.dumps(original)).given == values
    assert BackendConfig(**as_text) == original
    assert BackendConfig(**original.to_dict()) == original


@given(st.text() | st.floats() | st.integers() | st.binary() | st.none() | st.booleans())
def test_any_value_is_either_usable_or_a_config_error(value: object):
    for name in BackendConfig._fields:
        try:
            kept = getattr(BackendConfig(**{name: value}), name)
        except ConfigError:
            continue
        else:
            assert name == "user_config" or kept is None or math.isfinite(kept)


# -- HTTPOptions


def test_middlewares_are_the_options_own_list():
    mine = [Middleware(Gzip)]
    options = HTTPOptions(middlewares=mine)
    mine.clear()
    fresh = HTTPOptions()
    fresh.middlewares.append(Middleware(Gzip))

    assert len(options.middlewares) == 1
    assert HTTPOptions().middlewares == []
    assert list(fresh.given) == ["middlewares"]
    assert len(as_http_options(fresh).middlewares) == 1


def test_what_was_appended_in_place_is_checked_when_it_is_used():
    options = HTTPOptions()
    options.middlewares.append(Gzip)

    with pytest.raises(ConfigError, match="middlewares"):
        as_http_options(options)


@pytest.mark.parametrize(
    ("values", "serves"),
    [
        ({}, True),
        ({"location": "EveryNode"}, True),
        ({"location": "NoServer"}, False),
        ({"location": DeploymentMode.NoServer}, False),
        ({"location": None}, False),
        ({"host": None}, False),
    ],
)
def test_no_host_or_no_location_means_no_server(values, serves):
    assert HTTPOptions(**values).serves is serves


def test_a_deployment_mode_is_its_own_name():
    assert DeploymentMode.HeadOnly == "HeadOnly"
    assert [mode.value for mode in DeploymentMode] == ["NoServer", "HeadOnly", "EveryNode"]


def test_a_key_without_a_certificate_is_refused_rather_than_served_in_the_clear():
    with pytest.raises(ConfigError, match="ssl_keyfile is set without ssl_certfile"):
        as_http_options({"ssl_keyfile": "key.pem"})

    assert as_http_options({"ssl_keyfile": "key.pem", "ssl_certfile": "cert.pem"}).ssl_keyfile == "key.pem"
    assert as_http_options({"ssl_certfile": "both.pem"}).ssl_certfile == "both.pem"


# -- as_backend_config, as_http_options


@pytest.mark.parametrize(
    ("convert", "kind", "field"),
    [(as_backend_config, BackendConfig, "num_replicas"), (as_http_options, HTTPOptions, "port")],
)
def test_none_a_dict_or_the_class_itself_is_accepted(convert, kind, field):
    own = kind(**{field: 5})

    assert convert(None) == kind()
    assert convert({field: "5"}) == own
    assert convert(own) == own
    assert convert(own) is not own


@pytest.mark.parametrize("wrong", [3, "{}", [("num_replicas", 1)], BackendConfig, object()])
@pytest.mark.parametrize("convert", [as_backend_config, as_http_options])
def test_anything_else_is_a_type_error_that_names_the_argument(convert, wrong):
    got = type(wrong).__name__
    with pytest.raises(TypeError, match=rf"^(config|http_options) must be a dict or \w+, got {got}$"):
        convert(wrong)


def test_the_two_classes_are_not_taken_for_each_other():
    with pytest.raises(ArgumentError, match="config must be a dict or BackendConfig, got HTTPOptions"):
        as_backend_config(HTTPOptions())


@pytest.mark.parametrize("name", [1, None, "self", "values", "num-replicas"])
def test_a_dict_with_a_wrong_key_is_a_config_error(name):
    with pytest.raises(ConfigError, match="has no field"):
        as_backend_config({name: 1})


# -- ray_actor_options and env


def test_actor_options_are_copied_and_unknown_ones_left_alone():
    mine = {"num_cpus": 0, "num_gpus": 0.5, "memory": 1, "resources": {"tpu": 2}, "runtime_env": {"pip": []}}
    found = check_ray_actor_options(mine)

    assert found == mine
    assert found is not mine
    assert check_ray_actor_options({"resources": None}) == {"resources": None}
    assert check_ray_actor_options(None) == {}


@pytest.mark.parametrize("options", ["num_cpus", 1, [("num_cpus", 1)]])
def test_actor_options_that_are_no_dict_are_a_type_error(options):
    with pytest.raises(TypeError, match="ray_actor_options must be a dict"):
        check_ray_actor_options(options)


@pytest.mark.parametrize("name", ["lifetime", "name", "max_restarts", "placement_group"])
def test_actor_options_that_belong_to_headgate_are_refused(name):
    with pytest.raises(ConfigError, match=f"must not contain '{name}'"):
        check_ray_actor_options({name: None})


@pytest.mark.parametrize("name", ["num_cpus", "num_gpus", "memory", "object_store_memory"])
def test_an_amount_is_a_number_that_is_not_negative(name):
    for wrong in ("1", None, True, [1]):
        with pytest.raises(TypeError, match=rf"ray_actor_options\['{name}'\] must be a number"):
            check_ray_actor_options({name: wrong})
    for bad in (-1, -0.5, math.nan, math.inf):
        with pytest.raises(ConfigError, match=rf"ray_actor_options\['{name}'\] must be a number >= 0"):
            check_ray_actor_options({name: bad})


def test_resources_are_a_dict_of_amounts():
    with pytest.raises(TypeError, match=r"\['resources'\] must be a dict, got list"):
        check_ray_actor_options({"resources": ["tpu"]})
    with pytest.raises(TypeError, match=r"\['resources'\]\['tpu'\] must be a number"):
        check_ray_actor_options({"resources": {"tpu": "one"}})
    with pytest.raises(ConfigError, match=r"\['resources'\]\['tpu'\] must be a number >= 0, got -1"):
        check_ray_actor_options({"resources": {"tpu": -1}})


def test_actor_options_become_what_json_holds():
    mine = {
        "num_gpus": Fraction(1, 4),
        "num_cpus": numpy.int64(2),
        "resources": {"tpu": numpy.float32(0.5)},
        "runtime_env": {"py_modules": ("a", "b"), "env_vars": {"A": "ä"}, "deep": [None, True, {"x": []}]},
        "scheduling_strategy": None,
    }
    found = check_ray_actor_options(mine)

    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["num_gpus"] == 0.25
    assert type(found["num_cpus"]) is int
    assert found["runtime_env"]["py_modules"] == ["a", "b"]
    assert found["scheduling_strategy"] is None
    assert type(mine["runtime_env"]["py_modules"]) is tuple


def endless():
    found = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (Path("/tmp"), "is a PosixPath"),
        ({"pip": {"numpy"}}, "is a set"),
        ([b"bytes"], "b'bytes' is a bytes"),
        ({"env_vars": {1: "x"}}, "the key 1 is a int"),
        ([math.nan], "nan is no finite number"),
        (2**64, "does not fit into 64 bits"),
        ("\ud800", "text that UTF-8 cannot encode"),
        ({"\ud800": 1}, "text that UTF-8 cannot encode"),
        (endless(), "it contains itself"),
    ],
)
def test_an_actor_option_that_json_cannot_hold_is_named(value, why):
    with pytest.raises(ArgumentError) as error:
        check_ray_actor_options({"num_cpus": 1, "runtime_env": value})

    assert str(error.value).startswith("ray_actor_options['runtime_env'] must consist of what JSON can hold")
    assert why in str(error.value)


def test_the_name_of_an_actor_option_is_a_str():
    with pytest.raises(ArgumentError, match="the name 7 must be a str, got int"):
        check_ray_actor_options({7: 1})


def test_env_is_copied():
    mine = {"A": "1", "EMPTY": ""}
    found = check_env(mine)

    assert found == mine
    assert found is not mine
    assert check_env(None) == {}


@pytest.mark.parametrize("env", ["A=1", [("A", "1")], {1: "x"}, {"PORT": 8000}, {"A": None}])
def test_env_of_other_types_is_a_type_error(env):
    with pytest.raises(TypeError, match=r"^env"):
        check_env(env)


@pytest.mark.parametrize("env", [{"": "x"}, {"A=B": "x"}, {"A\0": "x"}, {"A": "x\0"}])
def test_env_that_no_process_can_have_is_a_config_error(env):
    with pytest.raises(ConfigError, match=r"^env"):
        check_env(env)


# -- accept_batch


def test_accept_batch_returns_the_same_function_marked():
    def double(requests):
        return [2 * int(r.body()) for r in requests]

    assert not accepts_batch(double)
    assert accept_batch(double) is double
    assert accepts_batch(double)


def test_a_class_or_an_object_accepts_batches_if_its_call_does():
    class Model:
        @accept_batch
        async def __call__(self, requests):
            return requests

        @accept_batch
        def embed(self, requests):
            return requests

        def one(self, request):
            return request

    for marked in (Model, Model(), Model.embed, Model().embed):
        assert accepts_batch(marked)
    assert not accepts_batch(Model().one)


@pytest.mark.parametrize("thing", [None, 3, "f", Gzip, Gzip(), len, print])
def test_what_is_not_marked_accepts_no_batches(thing):
    assert accepts_batch(thing) is False


@pytest.mark.parametrize("thing", [None, 3, "module:f", [len]])
def test_only_a_callable_can_be_marked(thing):
    with pytest.raises(TypeError, match="@accept_batch marks functions and methods, got "):
        accept_batch(thing)


def test_a_class_is_told_to_mark_its_call():
    with pytest.raises(ArgumentError, match=r"put it on Gzip\.__call__"):
        accept_batch(Gzip)


def test_a_builtin_is_told_to_be_wrapped():
    with pytest.raises(ArgumentError, match="wrap it in your own function"):
        accept_batch(len)


def test_everything_public_exists():
    assert all(hasattr(config, name) for name in config.__all__)
