"""Configuration of a server: every limit with its unit and default."""

from __future__ import annotations

from dataclasses import dataclass, field

from gradmap_hub.errors import UsageError
from gradmap_hub.machine import is_loopback

MAX_MESSAGES = 1024  # per chat request
MAX_TOOL_CALLS = 128  # per message
MAX_PATTERN = 4096  # characters of a regular expression
MAX_GRAMMAR = 65_536  # characters
MAX_CHOICES_OF_TEXT = 1024  # strings of which the answer must be one
MAX_TOOLS = 128  # per request, as in the OpenAI API
MAX_OTHER_NAMES = 10  # unknown model names in requests that get a warning in the log
MAX_STOPS = 16  # the OpenAI API has 4; tasks of lm-evaluation-harness such as humaneval have more
MAX_STOP_CHARACTERS = 512
MAX_TOP_LOGPROBS = 20  # as in the OpenAI API for chats; it has 5 for completions
MAX_SCORES = 300_000  # log-probabilities of one request, each some hundred bytes; 64 prompts of 2,048 tokens have fewer
MAX_BIASES = 1024  # tokens in logit_bias; each costs time in every step
MAX_CHOICES = 128  # per prompt, as in the OpenAI API; all choices of a request must fit into slots and queue
MAX_PROMPTS = 1024  # per request
# JSON values of a request body, not counting prompts in token ids. The event loop parses both, in at most 0.05 s; a
# thousand messages of a few parts each have fewer than 10,000.
MAX_VALUES = 20_000
MAX_PROMPT_IDS = 2**18  # of all prompts of a request
MAX_CONNECTIONS = 512  # or four per place in slots and queue; at most half of what the system lets a process open
# A longer prompt is refused before it is tokenised, which takes a second for a megabyte. English has 4 to 5 characters
# per token, deeply indented code about 10.
CHARACTERS_PER_TOKEN = 32
STUCK_SECONDS = 30.0  # to prepare a prompt; the longest takes about 1 s to tokenise, a chat template at its limit 20 s
BODY_SECONDS = 30.0  # for a request body to arrive
HEAD_SECONDS = 30.0  # for the head of a request to arrive
STALL_SECONDS = 30.0  # for a client to read from a blocked response


@dataclass(frozen=True)
class Settings:
    """How a model is served.

    Args:
        host: address to bind to.
        port: 0 selects a free one.
        slots: maximum number of concurrent generations.
        queue: maximum number of requests that wait for a slot; further ones get 429.
        timeout: seconds per request, queueing included.
        drain: seconds to finish running and waiting requests at shutdown.
        max_body: maximum size of a request body, in bytes.
        prefix_cache: bytes for prefixes of prompts that later prompts may share; None: two full contexts; 0: none.
        name: the model id; None: the name of the engine.
        strict_model: refuse requests for another model id instead of answering them.
        api_key: the bearer token that clients must send; None: no authentication.
        allow_origins: origins of web pages that may call the server (CORS); empty: none.
        allow_hosts: further names accepted in the Host header, for a server on loopback behind a proxy.
        log_requests: log one line per request to stderr.

    Raises:
        UsageError: invalid argument.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    slots: int = 8
    queue: int = 64
    timeout: float = 300.0
    drain: float = 60.0
    max_body: int = 1024 * 1024
    prefix_cache: int | None = None
    name: str | None = None
    api_key: str | None = field(default=None, repr=False)
    allow_origins: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    log_requests: bool = False
    strict_model: bool = False

    def __post_init__(self) -> None:
        for name, least in (("slots", 1), ("queue", 0), ("drain", 0), ("max_body", 1024)):
            if not getattr(self, name) >= least:
                raise UsageError(f"{name} must be at least {least}; got {getattr(self, name)}.")
        if self.prefix_cache is not None and self.prefix_cache < 0:
            raise UsageError(f"prefix_cache must be at least 0; got {self.prefix_cache}.")
        if not 0 < self.timeout < float("inf"):
            raise UsageError(f"timeout must be a positive, finite number of seconds; got {self.timeout}.")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise UsageError("The API key must be one line of printable ASCII characters.")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)
