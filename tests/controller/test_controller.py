"""A controller does what its calls promise: with replicas that fail, clients that are slow, and restarts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_instance import FACTS, HABITS, START_S, Decorated, Test, World, on_virtual_time
from fake_peers import FakePeer
from msgspec.structs import replace

from headgate.controller.proxies import JOIN_S
from headgate.controller.publisher import PATIENCE_S
from headgate.errors import (
    ArgumentError,
    BackendStartError,
    ConfigError,
    HeadgateError,
    InstanceError,
    ProtocolError,
)
from headgate.wire import messages


def instance(*, location: str | None = None, **habits: Any) -> Callable[[Test], Decorated]:
    """Run a test with a started instance, on virtual time."""

    return on_virtual_time(lambda directory: World(directory, location=location, habits=replace(HABITS, **habits)))


def now() -> float:
    return asyncio.get_running_loop().time()


# --- backends ---


@instance()
async def test_a_backend_is_created_when_all_its_replicas_are_ready(world: World) -> None:
    await world.create(num_replicas=3)

    assert now() == pytest.approx(START_S)
    assert world.served() == ["b#0001", "b#0002", "b#0003"]
    assert world.view().replicas[0].address == "fake/b#0001"
    assert world.view().replicas[0].pid == 10_001


@instance()
async def test_a_replica_is_told_what_to_run(world: World) -> None:
    await world.call(
        "create_backend",
        tag="b",
        code=b"code",
        facts=FACTS,
        given={"batch_wait_timeout": 0.5},
        user_config=b"config",
        env={"B": "2", "A": "1"},
        resources={"num_gpus": 0.5, "runtime_env": {"pip": ["x"]}},
    )
    (spec,) = world.engine.started

    assert Path(spec.code_path).read_bytes() == b"code"
    assert spec.user_config_path is not None
    assert Path(spec.user_config_path).read_bytes() == b"config"
    assert spec.env == (("A", "1"), ("B", "2"))
    assert spec.resources == {"num_gpus": 0.5, "runtime_env": {"pip": ["x"]}}
    assert spec.settings.batch_wait_timeout_s == 0.5
    described = (await world.call("list_backends"))["b"]
    assert described["given"] == {"batch_wait_timeout": 0.5}
    assert described["user_config"] == b"config"
    assert described["settings"]["max_concurrent_queries"] == 8


@instance()
async def test_code_that_cannot_start_is_an_error_with_its_words_and_leaves_nothing(world: World) -> None:
    with pytest.raises(BackendStartError, match=r"backend 'b'.*did not start(.|\n)*no module named petals"):
        await world.create(code="raise: ImportError: no module named petals", num_replicas=2)

    assert now() < 1.0
    assert await world.call("list_backends") == {}
    await asyncio.sleep(2.0)
    assert world.living() == []
    await world.create(code="mended")
    assert len(world.living()) == 1


@instance(dies_while_starting=1.0)
async def test_a_process_that_dies_while_it_starts_is_an_error(world: World) -> None:
    with pytest.raises(BackendStartError, match="killed by SIGSEGV"):
        await world.create()

    assert await world.call("list_backends") == {}


@instance()
async def test_a_tag_that_is_taken_is_refused(world: World) -> None:
    await world.create()
    with pytest.raises(ConfigError, match="'b' exists"):
        await world.create()


@instance()
async def test_of_two_that_create_the_same_tag_at_once_one_wins(world: World) -> None:
    outcomes = await asyncio.gather(world.create(), world.create(), return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [type(None), ConfigError]
    assert len(world.living()) == 1


@instance()
async def test_batches_without_accept_batch_are_refused_before_anything_starts(world: World) -> None:
    with pytest.raises(ConfigError, match="accept_batch"):
        await world.create(max_batch_size=4)

    assert world.engine.started == []


@instance()
async def test_what_only_a_replica_can_load_gets_its_defaults_from_there(world: World) -> None:
    await world.call("create_backend", tag="b", code=b"module:name", facts=None, given={})
    assert (await world.call("list_backends"))["b"]["settings"]["max_concurrent_queries"] == 8

    with pytest.raises(ConfigError, match="accept_batch"):
        await world.call(
            "create_backend", tag="c", code=b"module:name", facts=None, given={"max_batch_size": 2}
        )
    await asyncio.sleep(2.0)
    assert world.living() == ["b#0001"]


@instance()
async def test_a_repeated_create_is_answered_as_done(world: World) -> None:
    await world.create(call="the same")
    await world.create(call="the same")

    assert len(world.living()) == 1


@instance()
async def test_a_call_that_is_repeated_while_it_runs_runs_once(world: World) -> None:
    await asyncio.gather(world.create(call="the same"), world.create(call="the same"))

    assert len(world.engine.started) == 1


# --- updates ---


@instance()
async def test_an_update_switches_all_at_once_and_then_drains_the_old(world: World) -> None:
    await world.create(num_replicas=2)
    await world.update()

    assert world.served() == ["b#0003", "b#0004"]
    seen = [[one.id for one in view.replicas] for shot in world.client.snapshots for view in shot.backends]
    assert seen == [["b#0001", "b#0002"], ["b#0003", "b#0004"]]
    await asyncio.sleep(0.1)
    assert [id for id, _ in world.told(messages.Drain)] == ["b#0001", "b#0002"]
    await asyncio.sleep(1.0)
    assert world.living() == ["b#0003", "b#0004"]


@instance()
async def test_an_update_keeps_what_it_does_not_change(world: World) -> None:
    await world.create(num_replicas=2)
    await world.reconfigure("user config")
    await world.update(max_queued_requests=5)

    described = (await world.call("list_backends"))["b"]
    assert described["given"] == {"num_replicas": 2, "max_queued_requests": 5}
    assert described["user_config"] == b"user config"


@instance()
async def test_an_update_that_does_not_start_leaves_the_old_version_serving(world: World) -> None:
    await world.create(num_replicas=2)
    with pytest.raises(BackendStartError, match="no such layer"):
        await world.update(code="raise: ValueError: no such layer")

    await asyncio.sleep(2.0)
    assert world.living() == ["b#0001", "b#0002"]
    assert world.served() == ["b#0001", "b#0002"]
    assert world.told(messages.Drain) == []


@instance()
async def test_no_old_replica_drains_before_every_client_has_left_it(world: World) -> None:
    await world.create()
    slow = FakePeer("client", "slow", world.hears)
    slow.hello()
    await asyncio.sleep(0.1)
    slow.silent = True
    await world.update()

    assert now() == pytest.approx(0.1 + 2 * START_S + PATIENCE_S, abs=0.01)
    await asyncio.sleep(0.1)
    assert [id for id, _ in world.told(messages.Drain)] == ["b#0001"]


@instance()
async def test_an_unknown_backend_cannot_be_updated(world: World) -> None:
    with pytest.raises(ConfigError, match="no backend 'b'"):
        await world.update()
    with pytest.raises(ConfigError, match="no backend 'b'"):
        await world.configure(num_replicas=2)


# --- configs ---


@instance()
async def test_more_replicas_are_there_when_the_call_returns(world: World) -> None:
    await world.create()
    await world.configure(num_replicas=3)

    assert now() == pytest.approx(2 * START_S)
    assert world.served() == ["b#0001", "b#0002", "b#0003"]


@instance()
async def test_fewer_replicas_are_left_when_the_call_returns(world: World) -> None:
    await world.create(num_replicas=3)
    await world.configure(num_replicas=1)

    assert world.living() == ["b#0001"]
    assert world.served() == ["b#0001"]
    assert [id for id, _ in world.told(messages.Drain)] == ["b#0002", "b#0003"]


@instance(drain_s=(100.0, 100.0))
async def test_a_replica_that_does_not_finish_is_stopped_at_its_time(world: World) -> None:
    await world.create(num_replicas=2, graceful_shutdown_timeout_s=3.0)
    begun = now()
    await world.configure(num_replicas=1)

    assert now() - begun == pytest.approx(3.0, abs=0.1)
    (drain,) = world.told(messages.Drain)
    assert drain == ("b#0002", messages.Drain(3.0))


@instance()
async def test_new_limits_reach_running_replicas(world: World) -> None:
    await world.create(num_replicas=2)
    await world.configure(max_concurrent_queries=3)

    assert len(world.engine.started) == 2
    told = world.told(messages.Configure)
    assert [(id, message.settings.max_concurrent_queries) for id, message in told] == [
        ("b#0001", 3),
        ("b#0002", 3),
    ]
    assert world.view().settings.max_concurrent_queries == 3


@instance()
async def test_a_new_user_config_is_in_force_everywhere_when_the_call_returns(world: World) -> None:
    await world.create(num_replicas=2)
    await world.reconfigure("first")

    told = world.told(messages.Configure)
    assert [(id, message.config_version) for id, message in told] == [("b#0001", 1), ("b#0002", 1)]
    path = told[0][1].user_config_path
    assert Path(path).read_bytes() == b"first"


@instance()
async def test_a_user_config_that_is_refused_is_an_error_and_the_old_one_is_back(world: World) -> None:
    await world.create(num_replicas=2)
    await world.reconfigure("good")
    with pytest.raises(BackendStartError, match=r"new user_config(.|\n)*no such key"):
        await world.reconfigure("raise: KeyError: no such key")

    last = dict(world.told(messages.Configure))
    assert all(Path(message.user_config_path).read_bytes() == b"good" for message in last.values())
    assert (await world.call("list_backends"))["b"]["user_config"] == b"good"
    assert world.living() == ["b#0001", "b#0002"]
    await world.reconfigure("better")
    assert (await world.call("list_backends"))["b"]["user_config"] == b"better"


@instance()
async def test_a_scale_up_that_does_not_start_changes_nothing(world: World) -> None:
    await world.create()
    world.store.texts[next(iter(world.store.texts))] = "raise: OSError: no memory left"
    with pytest.raises(BackendStartError, match="no memory left"):
        await world.configure(num_replicas=2)

    assert (await world.call("list_backends"))["b"]["given"] == {}
    assert world.served() == ["b#0001"]


# --- deletion ---


@instance()
async def test_a_backend_is_gone_when_delete_returns(world: World) -> None:
    await world.create(num_replicas=2)
    await world.call("delete_backend", tag="b")

    assert world.living() == []
    assert world.snapshot.backends == ()
    await world.create()


@instance(drain_s=(100.0, 100.0))
async def test_a_deleted_backend_has_the_time_that_was_set(world: World) -> None:
    await world.create(num_replicas=2, graceful_shutdown_timeout_s=30.0)
    begun = now()
    await world.call("delete_backend", tag="b")

    assert now() - begun == pytest.approx(30.0, abs=0.1)


@instance(drain_s=(100.0, 100.0))
async def test_force_lets_nobody_finish(world: World) -> None:
    await world.create(num_replicas=2)
    begun = now()
    await world.call("delete_backend", tag="b", force=True)

    assert world.living() == []
    assert now() - begun < 0.1


@instance()
async def test_a_backend_in_use_cannot_be_deleted(world: World) -> None:
    await world.create()
    await world.call("create_endpoint", name="e", backend="b", route=None, methods=["GET"])
    with pytest.raises(ConfigError, match="'b' is used by endpoint 'e'"):
        await world.call("delete_backend", tag="b")

    assert world.served() == ["b#0001"]


@instance()
async def test_deleting_what_is_not_there_is_fine(world: World) -> None:
    await world.call("delete_backend", tag="nobody")


@instance()
async def test_deleting_what_is_being_started_ends_that(world: World) -> None:
    create = asyncio.ensure_future(world.create(code="hang"))
    await asyncio.sleep(1.0)
    await world.call("delete_backend", tag="b")

    assert world.living() == []
    with pytest.raises(BackendStartError, match="deleted"):
        await create


# --- endpoints ---


@instance(location="HeadOnly")
async def test_an_endpoint_is_in_force_everywhere_when_the_call_returns(world: World) -> None:
    await world.create()
    await world.call("create_endpoint", name="e", backend="b", route="/e", methods=["get"])

    (proxy,) = world.engine.peers.values()
    assert [endpoint.name for endpoint in proxy.snapshots[-1].endpoints] == ["e"]
    assert await world.call("list_endpoints") == {
        "e": {"route": "/e", "methods": ["GET"], "traffic": {"b": 1.0}, "shadows": {}}
    }
    await world.call("delete_endpoint", name="e")
    assert proxy.snapshots[-1].endpoints == ()


@instance()
async def test_traffic_and_shadows_change_at_once(world: World) -> None:
    await world.create("a")
    await world.create("b")
    await world.call("create_endpoint", name="e", backend="a", route=None, methods=["GET"])
    begun = now()
    await world.call("set_traffic", endpoint="e", weights={"a": 0.25, "b": 0.75})
    await world.call("shadow_traffic", endpoint="e", tag="b", proportion=0.5)

    assert now() == begun
    (endpoint,) = world.snapshot.endpoints
    assert endpoint.traffic.weights == (("a", 0.25), ("b", 0.75))
    assert endpoint.traffic.shadows == (("b", 0.5),)
    with pytest.raises(ConfigError):
        await world.call("set_traffic", endpoint="e", weights={"a": 0.25})
    with pytest.raises(ArgumentError):
        await world.call("create_endpoint", name="x", backend=None, route=None, methods=["GET"])


# --- faults ---


@instance()
async def test_a_replica_that_dies_is_replaced(world: World) -> None:
    await world.create(num_replicas=2)
    world.engine.crash("b#0001")
    await asyncio.sleep(0.01)
    assert world.served() == ["b#0002"]

    await asyncio.sleep(0.1 + START_S)
    assert world.served() == ["b#0002", "b#0003"]
    (one, _) = (await world.status())["replicas"]
    assert (one["restarts"], one["last_error"]) == (1, "killed by SIGSEGV")


@instance()
async def test_routers_learn_why_nobody_serves(world: World) -> None:
    await world.create()
    world.store.texts[next(iter(world.store.texts))] = "raise: OSError: no memory left"
    world.engine.crash("b#0001")
    await asyncio.sleep(5.0)

    assert world.view().trouble == "its replicas fail: OSError: no memory left"
    (backend,) = (await world.status())["backends"]
    assert backend["trouble"] == "OSError: no memory left"
    (waiting,) = (await world.status())["waiting"]
    assert "next try in" in waiting
    assert 4 <= len(world.engine.started) <= 7


@instance()
async def test_the_reason_is_one_short_line_and_gone_when_one_is_ready(world: World) -> None:
    await world.create()
    name = next(iter(world.store.texts))
    world.store.texts[name] = "raise: the constructor raised\n\nTraceback ...\nOSError: " + 5000 * "x"
    world.engine.crash("b#0001")
    await asyncio.sleep(1.0)
    assert world.view().trouble.startswith("its replicas fail: OSError: xxx")
    assert len(world.view().trouble) < 300

    world.store.texts[name] = "fine"
    await asyncio.sleep(10.0)
    assert world.served()
    assert world.view().trouble == ""


@instance(location="HeadOnly")
async def test_a_proxy_that_is_not_up_is_waited_for(world: World) -> None:
    await world.call("wait_ready")
    assert (await world.status())["waiting"] == []
    for proxy in world.living("proxy"):
        world.engine.crash(proxy)
    world.engine.peers.clear()
    world.engine.broken_proxy = "exited with status 1"
    await asyncio.sleep(2.0)
    (text,) = (await world.status())["waiting"]
    assert text.startswith("0 of 1 HTTP proxies are up")
    assert "exited with status 1" in text
    assert "next try in" in text


@instance()
async def test_a_failed_update_is_no_restart_of_the_version_that_serves(world: World) -> None:
    await world.create(num_replicas=1)
    with pytest.raises(BackendStartError, match="no luck"):
        await world.update(code="raise: no luck")
    (one,) = [each for each in (await world.status())["replicas"] if each["state"] == "ready"]
    assert (one["restarts"], one["last_error"]) == (0, "")


@instance()
async def test_what_is_asked_for_and_has_no_process_is_no_replica_yet(world: World) -> None:
    creating = asyncio.ensure_future(world.create())
    await asyncio.sleep(START_S / 2)
    world.controller.fleet.ask(world.controller.deployments.candidates()[0], now())
    assert [one["id"] for one in (await world.status())["replicas"]] == ["b#0001"]
    await creating


@instance()
async def test_a_health_check_that_hangs_is_reported_once(world: World) -> None:
    await world.create()
    world.controller.on_event(_health("b#0001", "check_health did not return in 30 s", hangs=True))
    await asyncio.sleep(2.0)
    assert world.served() == ["b#0002"]
    assert world.living() == ["b#0002"]


@instance()
async def test_a_replica_that_is_unhealthy_three_times_is_replaced(world: World) -> None:
    await world.create()
    for error in ("ill", "ill", "", "ill", "ill"):
        world.controller.on_event(_health("b#0001", error))
    await asyncio.sleep(1.0)
    assert world.served() == ["b#0001"]

    world.controller.on_event(_health("b#0001", "ill"))
    await asyncio.sleep(2.0)
    assert world.served() == ["b#0002"]
    assert world.living() == ["b#0002"]
    assert [id for id, _ in world.told(messages.Drain)] == ["b#0001"]


@instance()
async def test_a_health_check_that_passes_asks_for_nothing(world: World) -> None:
    await world.create()
    await asyncio.sleep(1.0)
    ticks = []
    world.controller.tick = lambda: ticks.append(1)  # type: ignore[method-assign]
    for _ in range(100):
        world.controller.on_event(_health("b#0001", ""))
    await asyncio.sleep(0.0)
    assert not ticks


def _health(id: str, error: str, *, hangs: bool = False) -> Any:
    from headgate.engine.interface import Reported

    return Reported(id, messages.Health(error, hangs))


@instance(location="HeadOnly")
async def test_a_proxy_that_dies_is_replaced_at_once(world: World) -> None:
    await world.call("wait_ready")
    (proxy,) = world.living("proxy")
    world.engine.crash(proxy)
    await asyncio.sleep(0.01)

    (other,) = world.living("proxy")
    assert other != proxy
    assert world.engine.peers[other].snapshots


@instance(location="HeadOnly")
async def test_a_proxy_that_never_connects_is_replaced(world: World) -> None:
    await world.call("wait_ready")
    world.engine.mute_proxies = True
    for proxy in world.living("proxy"):
        world.engine.crash(proxy)
    await asyncio.sleep(JOIN_S - 1.0)
    (stuck,) = world.living("proxy")
    world.engine.mute_proxies = False
    await asyncio.sleep(2.0)
    (other,) = world.living("proxy")
    assert other != stuck
    assert world.engine.peers[other].snapshots


@instance(location="HeadOnly")
async def test_a_proxy_that_does_not_follow_is_replaced_and_the_call_returns(world: World) -> None:
    await world.call("wait_ready")
    (old,) = world.engine.peers.values()
    old.silent = True
    await world.create()

    assert now() == pytest.approx(START_S + PATIENCE_S, abs=0.01)
    await asyncio.sleep(0.01)
    (new,) = world.engine.peers.values()
    assert new is not old
    assert [one.id for view in new.snapshots[-1].backends for one in view.replicas] == ["b#0002"]


@instance(location="HeadOnly")
async def test_a_proxy_that_is_frozen_is_replaced(world: World) -> None:
    world.peers.beat()
    await world.call("wait_ready")
    (old,) = world.engine.peers.values()
    await asyncio.sleep(10.0)
    assert list(world.engine.peers.values()) == [old]

    old.silent = True
    await asyncio.sleep(3.1)
    assert list(world.engine.peers.values()) != [old]


@instance()
async def test_a_replica_whose_thread_is_silent_is_killed_at_its_time(world: World) -> None:
    world.peers.beat()
    await world.create(health_check_timeout_s=5.0)
    replica = FakePeer("replica", "b#0001", world.hears)
    replica.hello(follows=False)
    await asyncio.sleep(10.0)
    assert world.living() == ["b#0001"]

    replica.silent = True
    await asyncio.sleep(7.0)
    assert world.living() == ["b#0002"]


@instance(location="HeadOnly")
async def test_a_start_without_a_proxy_is_an_error_that_says_why(world: World) -> None:
    for proxy in world.living("proxy"):
        world.engine.crash(proxy)
    world.engine.peers.clear()
    world.engine.broken_proxy = "exited with status 1"
    with pytest.raises(InstanceError, match=r"proxy does not start: .*status 1"):
        await world.call("wait_ready")


@instance()
async def test_a_full_disk_is_a_typed_error_and_everything_serves_on(world: World) -> None:
    await world.create()
    world.store.shelf._write = _full  # type: ignore[attr-defined]
    with pytest.raises(InstanceError, match="No space left on device"):
        await world.call("create_endpoint", name="e", backend="b", route=None, methods=["GET"])
    with pytest.raises(InstanceError, match="No space left on device"):
        await world.update()
    assert world.served() == ["b#0001"]
    assert await world.call("list_endpoints") == {}


def _full(fd: int, data: bytes) -> int:
    raise OSError(28, "No space left on device")


@instance()
async def test_a_call_that_does_not_exist_and_one_that_cannot_be_read_are_typed_errors(world: World) -> None:
    with pytest.raises(ProtocolError, match="no call 'dance'"):
        await world.call("dance")
    with pytest.raises(ProtocolError, match=r"create_backend: .*tag"):
        await world.call("create_backend", tag=7)


@instance()
async def test_a_bug_is_logged_and_answered_as_an_error(
    world: World,
) -> None:
    with pytest.raises(HeadgateError, match="failed in the controller: KeyError"):
        await world.call("delete_endpoint")


# --- the controller's end ---


@instance(location="HeadOnly")
async def test_a_restarted_controller_adopts_what_runs(world: World) -> None:
    await world.create(num_replicas=2)
    await world.call("create_endpoint", name="e", backend="b", route="/e", methods=["GET"])
    before = world.living(), world.living("proxy")
    newest = world.snapshot.version
    world.crash()
    await world.start()
    await asyncio.sleep(5.0)

    assert (world.living(), world.living("proxy")) == before
    assert len(world.engine.started) == 2
    assert world.snapshot.version > newest
    assert world.served() == ["b#0002", "b#0003"]
    assert [endpoint.name for endpoint in world.snapshot.endpoints] == ["e"]
    assert world.told(messages.Drain) == []


@instance()
async def test_a_process_that_was_frozen_over_a_restart_is_fenced_before_a_change_is_confirmed(world: World) -> None:
    await world.create()
    replica = FakePeer("replica", "b#0001", world.hears)
    world.crash()
    await world.start()
    replica.hello(follows=False, routers=("driver", "frozen"))
    begun = now()
    await world.configure(max_concurrent_queries=3)
    assert now() == pytest.approx(begun + PATIENCE_S, abs=0.01)
    assert list(replica.fences()[-1]) == ["frozen"]

    replica.say(messages.Linked("frozen", False))
    await asyncio.sleep(0.01)
    assert replica.fences()[-1] == {}


@instance()
async def test_who_comes_back_at_once_after_a_restart_holds_up_nothing(world: World) -> None:
    await world.create()
    replica = FakePeer("replica", "b#0001", world.hears)
    world.crash()
    await world.start()
    replica.hello(follows=False, routers=("driver",))
    begun = now()
    await world.configure(max_concurrent_queries=3)
    assert now() < begun + 0.01


@instance()
async def test_what_was_being_started_is_cleared_away_and_the_repeat_does_it_anew(world: World) -> None:
    await world.create()
    lost = asyncio.ensure_future(world.update(call="the same"))
    await asyncio.sleep(START_S / 2)
    assert len(world.living()) == 2
    world.crash()
    await world.start()
    await world.update(call="the same")
    await asyncio.sleep(5.0)

    assert len(world.living()) == 1
    assert world.served() == world.living()
    assert world.view().version == 2 or world.view().version == 3
    lost.cancel()


@instance()
async def test_a_repeat_after_the_restart_of_what_was_stored_is_done_already(world: World) -> None:
    await world.create(call="first", num_replicas=2)
    await world.configure(call="second", num_replicas=1)
    world.crash()
    await world.start()
    await world.configure(call="second", num_replicas=1)

    assert len(world.engine.started) == 2
    assert world.served() == ["b#0001"]


@instance()
async def test_a_new_controller_drains_nobody_that_unknown_routers_may_use(world: World) -> None:
    await world.create(num_replicas=2)
    world.crash()
    world.store.save(replace(world.controller.goals, backends=()))
    await world.start()
    await asyncio.sleep(0.4)
    assert world.told(messages.Drain) == []
    await asyncio.sleep(2.0)
    assert world.living() == []


@instance()
async def test_a_pid_that_is_another_process_s_by_now_adopts_nothing(world: World) -> None:
    await world.create()
    (gone,) = world.engine.observe()
    world.crash()
    world.engine.crash(gone.id)
    await asyncio.sleep(0.1)
    id = await world.engine.start_replica(replace(world.engine.started[0], backend="other"))
    other = world.engine._living[id]
    other.process = replace(other.process, pid=gone.pid)
    await world.start()
    await asyncio.sleep(2.0)

    assert id not in world.living()  # nobody wants it
    assert world.served() == world.living() != [gone.id]


@instance()
async def test_whoever_says_hello_with_another_pid_changes_nothing(world: World) -> None:
    await world.create()
    (known,) = world.engine.observe()
    impostor = FakePeer("replica", known.id, world.hears)
    impostor.pid = 4711
    impostor.hello(follows=False)
    await asyncio.sleep(1.0)

    assert [one["pid"] for one in (await world.status())["replicas"]] == [known.pid]


@instance()
async def test_lost_goals_stop_nothing_and_every_call_says_so(world: World) -> None:
    await world.create()
    world.crash()
    for path in Path(world.directory).glob("goals.json*"):
        path.write_bytes(b"\0")
    await world.start()
    await asyncio.sleep(10.0)

    assert world.living() == ["b#0001"]
    for method in ("create_endpoint", "list_backends", "wait_ready"):
        with pytest.raises(InstanceError, match=r"goals record .* is lost"):
            await world.call(method)
    assert "is lost" in (await world.status())["waiting"][0]
    await world.call("shutdown")
    assert world.living() == []


@instance()
async def test_a_call_to_a_new_controller_waits_until_that_may_publish(world: World) -> None:
    await world.create()
    world.crash()
    slow = FakePeer("client", "slow", world.hears)
    world.engine.freeze("b#0001")
    await world.start()
    slow.hello()
    await world.call("create_endpoint", name="e", backend="b", route=None, methods=["GET"])

    assert now() == pytest.approx(START_S + 1.0, abs=0.01)
    assert [endpoint.name for endpoint in slow.snapshots[-1].endpoints] == ["e"]


@instance()
async def test_a_controller_that_ended_before_it_stored_anything_lost_nothing(world: World) -> None:
    world.crash()
    for path in Path(world.directory).glob("goals.json*"):
        path.unlink()
    await world.start()
    await world.create()

    assert world.served() == ["b#0001"]


# --- shutdown ---


@instance(location="HeadOnly")
async def test_shutdown_lets_proxies_finish_then_replicas_and_then_ends(world: World) -> None:
    await world.create(num_replicas=2)
    assert world.snapshot.ready
    shutdown = asyncio.ensure_future(world.call("shutdown"))
    await asyncio.sleep(0.1)
    (proxy,) = world.engine.peers.values()
    assert isinstance(proxy.told[-1], messages.Goodbye)
    assert not proxy.snapshots[-1].ready
    assert not world.engine.accepting
    assert world.served() == ["b#0002", "b#0003"]
    with pytest.raises(InstanceError, match="already been shut down"):
        await world.create("c")
    await shutdown

    assert world.engine.observe() == ()
    await asyncio.wait_for(world.calls.over, 1.0)


@instance(location="HeadOnly")
async def test_shutdown_does_not_wait_for_ever(world: World) -> None:
    await world.create()
    (proxy,) = world.engine.peers.values()
    create = asyncio.ensure_future(world.create("c", "hang"))
    await asyncio.sleep(0.1)
    proxy.silent = True
    begun = now()
    await world.call("shutdown")

    assert now() - begun < 25.0
    assert world.engine.observe() == ()
    with pytest.raises(BackendStartError, match="shuts down"):
        await create


@instance()
async def test_a_tick_with_nothing_to_do_does_nothing(world: World) -> None:
    await world.create(num_replicas=4)
    version = world.snapshot.version
    told = len(world.engine.told)
    for _ in range(100):
        world.controller.tick()

    assert world.controller.publisher.snapshot.version == version
    assert len(world.engine.told) == told
