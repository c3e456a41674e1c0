"""One program for one machine and for a Ray cluster: two versions of a greeter, asked over HTTP and by a handle.

    python examples/cluster.py                  its replicas are processes of this machine
    python examples/cluster.py --engine ray     they are actors of the cluster that RAY_ADDRESS names, else of a new one
    python examples/cluster.py --once           ends after the first answers instead of serving on

    curl localhost:8000/greet/3/Ada
"""

import argparse
import json
import os
import urllib.request
from collections import Counter

import headgate


class Greeter:
    """Greets, and says which replica and process it is."""

    def __init__(self, greeting):
        self.greeting = greeting

    def __call__(self, request):
        times, name = request.path_params["times"], request.path_params["name"]
        return self.answer(" ".join([self.greeting] * times) + f", {name}!")

    def by_name(self, request):
        """What the handle calls: it has no path, so the name is the request's data."""
        return self.answer(f"{self.greeting}, {request.data}!")

    def answer(self, text):
        return {"text": text, "replica": headgate.get_current_replica_tag(), "pid": os.getpid()}


def over_http(name):
    with urllib.request.urlopen(f"{client.http_address}/greet/2/{name}", timeout=10) as response:
        return json.load(response)


def show(how, answers):
    """Which replicas answered, and where they are."""
    nodes = {replica.id: replica.node for replica in client.status().replicas}
    print(f"{how}: {answers[0]['text']}", flush=True)
    for (replica, pid), count in sorted(Counter((each["replica"], each["pid"]) for each in answers).items()):
        print(f"  {count} answers from {replica}, pid {pid}, node {nodes.get(replica, 'left')[:8]}", flush=True)


parser = argparse.ArgumentParser()
parser.add_argument("--engine", choices=["local", "ray"], help="default: as headgate.start decides")
parser.add_argument("--once", action="store_true", help="end after the first answers")
options = parser.parse_args()

client = headgate.start(http_options={"port": int(os.environ.get("PORT", 8000))}, engine=options.engine)
# A tenth of a CPU each, so that they fit on any cluster. One machine does not count CPUs.
share = {"num_cpus": 0.1}
client.create_backend("greet:1", Greeter, "hello", config={"num_replicas": 3}, ray_actor_options=share)
client.create_backend("greet:2", Greeter, "good day", ray_actor_options=share)
client.create_endpoint("greet", backend="greet:1", route="/greet/{times:int}/{name}")
client.set_traffic("greet", {"greet:1": 0.75, "greet:2": 0.25})

show("HTTP", [over_http("Ada") for _ in range(40)])

handle = client.get_handle("greet").options(method_name="by_name")
show("handle.call", [handle.call("Grace") for _ in range(40)])  # the value, directly
show("handle.remote", headgate.get([handle.remote("Grace") for _ in range(40)]))  # refs; on Ray they are Ray's own

if options.once:
    client.shutdown()
else:
    print(f"serving on {client.http_address}; Ctrl-C ends it", flush=True)
    client.wait()
