"""An HTTP server for one published model: the OpenAI API on ONNX Runtime.

    settings.py   configuration and limits                                 leaf
    problems.py   errors, in the format of the OpenAI API                  leaf
    schemas.py    requests, as pydantic models                             leaf
    responses.py  responses, as pydantic models                            leaf
    scheduler.py  one decode thread, slots and a bounded queue; no asyncio, no HTTP
    delivery.py   connects a request to its generation: ordered text, time limit, disconnect
    answers.py    builds responses, whole or as server-sent events
    turns.py      converts the messages of a chat for the chat template
    prompts.py    converts a validated request to token ids and sampling parameters
    preparing.py  the thread for this conversion
    metrics.py    the metrics of /metrics
    gate.py       middleware: host, key, overload and shutdown checks; metrics and access log
    openapi.py    /openapi.json
    api.py        the routes
    protocol.py   HTTP/1.1 with time limits for slow clients
    server.py     sockets, threads, signals, graceful shutdown

This file imports nothing, so that importing the package stays cheap for the command line.
"""
