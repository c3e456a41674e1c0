from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.core.placement import busy, demand, lacking, proxy_nodes

GIB = 1024**3

# --- proxies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("location", "nodes"),
    [(None, ()), ("NoServer", ()), ("HeadOnly", ("a",)), ("EveryNode", ("b", "a"))],
)
def test_the_location_says_which_nodes_get_a_proxy(location, nodes):
    assert proxy_nodes(location, "a", ["b", "a"]) == nodes


def test_where_home_does_not_live_only_every_node_gets_proxies():
    assert proxy_nodes("HeadOnly", "a", ["b"]) == ()
    assert proxy_nodes("EveryNode", "a", ["b"]) == ("b",)


# --- what a replica needs -----------------------------------------------------------------------


def test_a_replica_needs_one_cpu_if_nothing_is_said():
    assert demand({}) == demand({"num_cpus": None, "resources": None, "memory": None}) == {"CPU": 1.0}


def test_what_is_not_needed_is_left_out():
    assert demand({"num_cpus": 0, "num_gpus": 0.0, "resources": {"tpu": 0}, "accelerator_type": None}) == {}


def test_everything_has_the_name_that_ray_gives_it():
    options = {
        "num_cpus": 2,
        "num_gpus": Fraction(1, 2),
        "memory": GIB,
        "object_store_memory": 7,
        "resources": {"tpu": 4},
        "accelerator_type": "A100",
        "runtime_env": {"pip": []},
    }

    assert demand(options) == {
        "CPU": 2.0,
        "GPU": 0.5,
        "memory": float(GIB),
        "object_store_memory": 7.0,
        "tpu": 4.0,
        "accelerator_type:A100": 0.001,
    }
    assert {type(amount) for amount in demand(options).values()} == {float}


# --- what no node can hold ----------------------------------------------------------------------


@pytest.mark.parametrize("needed", [{}, {"CPU": 2}, {"CPU": 2.00001}, {"GPU": 0.3}, {"CPU": 1, "GPU": 0.1}], ids=str)
def test_nothing_lacks_if_one_node_has_it_all(needed):
    assert lacking(needed, {"a": {"CPU": 2}, "b": {"CPU": 1, "GPU": 0.1 + 0.2}}) == ""


def test_without_a_node_everything_lacks():
    assert lacking({}, {}) == lacking({"CPU": 1}, {}) == "the cluster has no living node"


@pytest.mark.parametrize(
    ("needed", "sentence"),
    [
        ({"CPU": 3}, "no node of the cluster has 3 CPUs: the largest has 2"),
        ({"CPU": 2.5, "GPU": 1}, "no node of the cluster has 2.5 CPUs: the largest has 2"),
        ({"GPU": 2}, "no node of the cluster has 2 GPUs: the largest has 1"),
        ({"tpu": 2}, "no node of the cluster has the resource 'tpu' (2 needed)"),
        ({"disk": 8}, "no node of the cluster has 8 of the resource 'disk': the largest has 4"),
        ({"accelerator_type:A100": 0.001}, "no node of the cluster has an accelerator of type 'A100'"),
        ({"memory": 6 * GIB}, "no node of the cluster has 6 GiB of memory: the largest has 2 GiB"),
        ({"memory": 2 * GIB + 1}, "no node of the cluster has 2.1 GiB of memory: the largest has 2 GiB"),
        (
            {"object_store_memory": 700},
            "no node of the cluster has 700 bytes of object store memory: the largest has 500 bytes",
        ),
        (
            {"CPU": 3, "tpu": 1, "GPU": 4},
            "no node of the cluster has 3 CPUs: the largest has 2; no node has the resource 'tpu' (1 needed); "
            "no node has 4 GPUs: the largest has 1",
        ),
        (
            {"CPU": 2, "GPU": 1},
            "no node of the cluster has all of 2 CPUs and 1 GPU together: the closest has 1 CPU and 1 GPU",
        ),
        (
            {"CPU": 2, "GPU": 1, "memory": 1.5 * GIB},
            "no node of the cluster has all of 2 CPUs, 1 GPU and 1.5 GiB of memory together: "
            "the closest has 1 CPU, 1 GPU and 1 GiB of memory",
        ),
    ],
)
def test_what_lacks_is_said_in_numbers(needed, sentence):
    nodes = {
        "a": {"CPU": 2, "memory": 2 * GIB, "disk": 4},
        "b": {"CPU": 1, "GPU": 1, "memory": 1 * GIB, "object_store_memory": 500},
    }

    assert lacking(needed, nodes) == sentence


@pytest.mark.parametrize(
    ("needed", "sentence"),
    [
        ({"CPU": 1}, "no node of the cluster has CPUs (1 needed)"),
        ({"GPU": 0.5}, "no node of the cluster has GPUs (0.5 needed)"),
        ({"memory": 3 * 1024**7}, "no node of the cluster has memory (3072 EiB needed)"),
        ({"object_store_memory": 2000}, "no node of the cluster has object store memory (2 KiB needed)"),
    ],
)
def test_what_is_nowhere_is_said_by_name(needed, sentence):
    assert lacking(needed, {"a": {}}) == sentence


# --- what is taken ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("needed", "words"),
    [
        ({}, ""),
        ({"CPU": 1}, ""),
        ({"CPU": 2}, "for 2 CPUs: the freest node has 1 free"),
        ({"tpu": 1}, "for 1 of the resource 'tpu': the freest node has 0 free"),
        ({"memory": 2 * GIB}, "for 2 GiB of memory: the freest node has 928.6 MiB free"),
        ({"CPU": 2, "GPU": 2}, "for 2 CPUs: the freest node has 1 free; for 2 GPUs: the freest node has 0.5 free"),
        ({"CPU": 1, "GPU": 0.5}, "for 1 CPU and 0.5 GPUs on one node: the closest has 1 CPU free"),
    ],
    ids=str,
)
def test_what_a_replica_waits_for_is_said_in_numbers(needed, words):
    assert busy(needed, {"a": {"CPU": 1.0, "GPU": 0}, "b": {"GPU": 0.5, "memory": GIB - 10**8}}) == words


def test_without_a_node_a_replica_waits_for_one():
    assert busy({"CPU": 1}, {}) == busy({}, {}) == "for a living node"


# --- whatever is needed and there ---------------------------------------------------------------

NAMES = ["CPU", "GPU", "memory", "object_store_memory", "accelerator_type:T4", "tpu"]
amounts = st.one_of(st.integers(1, 4), st.integers(1, 2**45), st.sampled_from([0.001, 0.25, 0.5]))
needs = st.dictionaries(st.sampled_from(NAMES), amounts, max_size=4)
clusters = st.dictionaries(
    st.sampled_from("abc"), st.dictionaries(st.sampled_from(NAMES), amounts | st.just(0)), max_size=3
)


@given(needs, clusters)
def test_there_are_words_exactly_if_no_node_has_it_all(needed, nodes):
    fits = any(all(has.get(name, 0) >= amount for name, amount in needed.items()) for has in nodes.values())

    assert (lacking(needed, nodes) == "") is (busy(needed, nodes) == "") is fits


@given(needed=st.integers(1, 2**53), there=st.integers(1, 2**53))  # Ray counts resources in floats, exact so far
def test_more_bytes_never_look_like_fewer(needed, there):
    units = {"bytes": 1, "KiB": 1024, "MiB": 1024**2, "GiB": GIB, "TiB": 1024**4, "PiB": 1024**5, "EiB": 1024**6}
    words = lacking({"memory": needed}, {"a": {"memory": there}})
    if words:
        number, unit, *_, other, other_unit = words.removeprefix("no node of the cluster has ").split()
        assert float(number) * units[unit] > float(other) * units[other_unit]


@given(needs)
def test_options_become_what_is_needed(needed):
    named = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory", "object_store_memory": "object_store_memory"}
    options = {"num_cpus": 0, "resources": {}}
    for name, amount in needed.items():
        if name in named:
            options[named[name]] = amount
        elif name == "tpu":
            options["resources"][name] = amount
        else:
            options["accelerator_type"] = "T4"

    expected = {name: 0.001 if name.startswith("acc") else amount for name, amount in needed.items()}
    assert demand(options) == expected
