import os
import headgate
client = headgate.start(http_options={"port": int(os.environ.get("PORT", 8000))})
client.create_backend("hello", lambda request: {"hello": request.query_params.get("name", "world")})
client.create_endpoint("hello", backend="hello", route="/hello")
client.wait()
