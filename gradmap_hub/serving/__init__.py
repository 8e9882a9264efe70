"""An HTTP server for one published model: the OpenAI API on ONNX Runtime.

    settings.py   what a server is told                                    leaf
    problems.py   refusals, in the error format of the OpenAI API          leaf
    schemas.py    requests and answers, as pydantic models                 leaf
    scheduler.py  one decode thread, slots and a bounded queue; no asyncio, no HTTP
    delivery.py   one generation as its HTTP request sees it: order, time limit, disconnect
    prompts.py    from a validated request to token ids and sampling
    metrics.py    what /metrics shows
    gate.py       what happens before a route sees a request: host, key, overload, shutdown; counting
    openapi.py    /openapi.json
    api.py        the routes
    protocol.py   HTTP/1.1 with limits for clients that neither send nor read
    server.py     sockets, threads, signals, graceful shutdown

Nothing is imported here: the command line imports this package for its names only.
"""
