"""Bring version 2 of a model into service: shadow it, give it a tenth, then everything.

    python examples/rollout.py     runs the whole rollout, then serves version 2 on /price
"""

import os
import time
from collections import Counter

import headgate


class Price:
    """A model with a version; it counts what it was asked."""

    def __init__(self, version, rate):
        self.version = version
        self.rate = rate
        self.asked = 0

    def __call__(self, request):
        if "count" in request.query_params:
            return self.asked
        self.asked += 1
        return {"version": self.version, "price": round(self.rate * float(request.query_params["km"]), 2)}


def versions(handle, keys):
    """How many of the calls with these shard keys (None: no key) each version answers."""
    return Counter(handle.options(shard_key=key).call(km=10)["version"] for key in keys)


client = headgate.start(http_options={"port": int(os.environ.get("PORT", 8000))})
client.create_backend("price:1", Price, 1, 1.20)
client.create_endpoint("price", backend="price:1", route="/price")
client.create_backend("price:2", Price, 2, 1.15)
client.create_endpoint("price:2 alone", backend="price:2")
price = client.get_handle("price")
second = client.get_handle("price:2 alone")

# Every request goes to version 2 as well; users still get the answers of version 1.
client.shadow_traffic("price", "price:2", 1.0)
print("shadowed:", dict(versions(price, [None] * 50)), flush=True)
deadline = time.monotonic() + 5
while second.call(count=True) < 50 and time.monotonic() < deadline:
    time.sleep(0.01)  # shadows are not waited for
print("version 2 saw", second.call(count=True), "shadow requests", flush=True)
client.shadow_traffic("price", "price:2", 0)

# One request in ten is for version 2; with a shard key, a user stays with one version.
client.set_traffic("price", {"price:1": 0.9, "price:2": 0.1})
print("split:", dict(sorted(versions(price, [None] * 500).items())), flush=True)
users = [f"user-{number}" for number in range(100)]
assert all(len(versions(price, [user] * 3)) == 1 for user in users)
print("each of", len(users), "users always met the same version", flush=True)

# Promotion: from the moment set_traffic returns, nobody meets version 1.
client.set_traffic("price", {"price:2": 1.0})
client.delete_backend("price:1")
print("promoted:", dict(versions(price, [None] * 50)), flush=True)
client.wait()
