"""The HTTP edge: OpenAI's wire types, streaming, auth, limits.

    app.py           puts the pieces together: `create_app`
    config.py        what an app is told (ServerConfig) and holds (ServerContext)
    openai_types.py  request bodies (pydantic); fields.py names what is not supported
    chat.py, completions.py, tokenize.py, models.py, health.py   the endpoints
    prompts.py       text or messages → token ids
    sampling.py      body → SamplingParams → GenerateRequests
    generation.py    GenerateRequests → updates of text
    express.py       plain text straight from the router to the socket, past all of these
    proxy.py         the same endpoints where upstreams do the work; proxy_stream.py
    respond.py       updates → a response; sse.py: event streams, clients that hang up or stall
    responses.py, logprobs.py   the JSON that goes out
    middleware.py, auth.py, limits.py, errors.py   around every request

Knows nothing of torch, KV, replicas or how a token is made: a `Router` gives tokens.
"""

from shoal.server.app import create_app, create_proxy_app
from shoal.server.config import EdgeContext, Router, ServerConfig

__all__ = ["EdgeContext", "Router", "ServerConfig", "create_app", "create_proxy_app"]
