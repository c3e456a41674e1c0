"""A search service from three backends: one embeds text, one finds the nearest titles, one asks both.

    curl "localhost:8000/search?q=bicycle+repair"
    {"query": "bicycle repair", "titles": ["How to repair a bicycle", ...]}
"""

import os
import zlib

import headgate
import numpy

TITLES = [
    "How to repair a bicycle", "The history of bread", "Sailing around the world", "A garden in the city",
    "Repairing old radios", "Bread and butter", "The world of sailing ships", "City bicycles compared",
]  # fmt: skip


def embed(request):
    """A unit vector of the text's letter triples, hashed into 256 numbers."""
    text = f"  {request.data.lower()}  "
    vector = numpy.zeros(256)
    for start in range(len(text) - 2):
        vector[zlib.crc32(text[start : start + 3].encode()) % 256] += 1
    return vector / numpy.linalg.norm(vector)


class Nearest:
    """Holds the titles' vectors, which it asks the first backend for."""

    async def __call__(self, request):
        if not hasattr(self, "vectors"):
            embedder = headgate.connect().get_handle("embed", sync=False)
            self.vectors = numpy.array([await embedder.call(title) for title in TITLES])
        closeness = self.vectors @ request.data
        return [TITLES[index] for index in numpy.argsort(-closeness)[: request.query_params["limit"]]]


class Search:
    """The one that users talk to."""

    def __init__(self):
        client = headgate.connect()
        self.embed = client.get_handle("embed", sync=False)
        self.nearest = client.get_handle("nearest", sync=False)

    async def __call__(self, request):
        query = request.query_params["q"]
        vector = await self.embed.call(query)
        return {"query": query, "titles": await self.nearest.call(vector, limit=3)}


client = headgate.start(http_options={"port": int(os.environ.get("PORT", 8000))})
client.create_backend("embed", embed)
client.create_endpoint("embed", backend="embed")
client.create_backend("nearest", Nearest)
client.create_endpoint("nearest", backend="nearest")
client.create_backend("search", Search)
client.create_endpoint("search", backend="search", route="/search")
client.wait()
