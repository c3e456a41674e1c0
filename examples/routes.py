"""Typed routes: path parameters arrive converted, and a segment that does not convert does not match.

    curl localhost:8000/api/ada          {"username": "ada"}
    curl localhost:8000/api/123/3.14     {"user_id": 123, "number": 3.14}
    curl -i localhost:8000/api/123/pi    404
"""

import os

import headgate


def greet(request):
    return {"username": request.path_params["username"]}


def measure(request):
    user_id, number = request.path_params["user_id"], request.path_params["number"]
    assert type(user_id) is int
    assert type(number) is float
    return {"user_id": user_id, "number": number}


client = headgate.start(http_options={"port": int(os.environ.get("PORT", 8000))})
client.create_backend("greet", greet)
client.create_backend("measure", measure)
client.create_endpoint("user", backend="greet", route="/api/{username}")
client.create_endpoint("number", backend="measure", route="/api/{user_id:int}/{number:float}")
client.wait()
