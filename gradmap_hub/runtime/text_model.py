"""A loaded text model: text in, generations out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from gradmap_hub.errors import GradmapError
from gradmap_hub.runtime.artifacts import Artifact
from gradmap_hub.runtime.batch import Batch
from gradmap_hub.runtime.constraints import Constraint, Constraints, Wanted
from gradmap_hub.runtime.continuing import cut_after
from gradmap_hub.runtime.generation import Generation, losses_of
from gradmap_hub.runtime.prompting import ModelError, TextCodec
from gradmap_hub.runtime.sampling import Sampler, Sampling
from gradmap_hub.runtime.scores import Scoring
from gradmap_hub.runtime.token_text import TokenBytes
from gradmap_hub.runtime.tool_formats import format_of

if TYPE_CHECKING:  # importing it needs ONNX Runtime; `load` reports when it is missing
    from gradmap_hub.runtime.session import Session, Steps


class PromptError(GradmapError):
    """The model cannot use this prompt. `tokens` and `limit` are set if it is too long."""

    def __init__(self, message: str, *, tokens: int | None = None, limit: int | None = None) -> None:
        super().__init__(message)
        self.tokens = tokens
        self.limit = limit


class TextModel:
    """A loaded model, made by `load`: text in, `Generation` out. A generation adds only its KV cache.

    `name`: of the folder, or the repository id; `artifact`: path of the ONNX graph in the model folder; `provider`:
    ONNX Runtime execution provider; `context_length`: limit of prompt plus output tokens; `vocabulary`: number of token
    ids; `threads`: threads per step; `tool_format`: how the model writes tool calls; None: it does not, or in an
    unsupported format; `call_tokens`: the special tokens (id to text) that are part of calls.
    """

    def __init__(
        self,
        name: str,
        artifact: Artifact,
        session: Session,
        codec: TextCodec,
        context_length: int,
        vocabulary: int,
        threads: int,
        tool_template: str | None = None,
    ) -> None:
        self.name = name
        self.artifact = artifact.path
        self.provider = session.provider
        self.context_length = context_length
        self.vocabulary = vocabulary
        self.threads = threads
        self._session = session
        self._codec = codec
        self._tool_codec = replace(codec, chat_template=tool_template or codec.chat_template)
        added = codec.tokenizer.get_added_tokens_decoder()
        self.tool_format = format_of(self._tool_codec.chat_template or "", [each.content for each in added.values()])
        written = "" if self.tool_format is None else self.tool_format.written
        self.call_tokens = {
            token: each.content for token, each in added.items() if each.special and each.content in written
        }

    @property
    def chat_template(self) -> str | None:
        return self._codec.chat_template

    @property
    def has_chat_template(self) -> bool:
        return self._codec.chat_template is not None

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The special tokens by name, such as eos_token."""
        return self._codec.tokens

    @property
    def end_ids(self) -> frozenset[int]:
        """The token ids that end an answer."""
        return self._codec.ends

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the token ids of plain text; `special`: including the special tokens that the tokenizer adds.

        Raises:
            PromptError: the text has no tokens or cannot be encoded.
        """
        return self._encoded(lambda: self._codec.encode_text(text, special=special))

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Return the token ids of messages ({"role", "content"}), rendered by the model's chat template in a sandbox.

        `add_generation_prompt`: end with the start of an answer; `continue_final_message`: end within the last message
        instead, so that the answer continues it; `tools`: functions that the model may call, as in the OpenAI API.

        Raises:
            PromptError: the model has no chat template, or the template rejects these messages.
        """

        def encode() -> list[int]:
            begin = add_generation_prompt and not continue_final_message
            codec, more = (self._tool_codec, {"tools": list(tools)}) if tools else (self._codec, {})
            text = codec.rendered(messages, add_generation_prompt=begin, **more)
            if continue_final_message:
                text = cut_after(text, messages[-1]["content"])
            return self._codec.encode_rendered(text)

        return self._encoded(encode)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, including special tokens."""
        return self._codec.tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one token, which need not be valid UTF-8."""
        return self._token_bytes(token)

    def is_special(self, token: int) -> bool:
        """Whether this is a special token, which the text of an answer leaves out."""
        return token in self._token_bytes.special

    def constrain(self, wanted: Wanted) -> Constraint:
        """Return a constraint for one answer, such as a JSON schema; the first call takes up to a second.

        Raises:
            MissingExtra: llguidance is not installed.
            ConstraintError: `wanted` is invalid, or llguidance does not support it or the tokenizer.
        """
        return self._constraints.of(wanted)

    @cached_property
    def _constraints(self) -> Constraints:
        return Constraints(self._codec.tokenizer, self.vocabulary, self.end_ids)

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self._codec.tokenizer)

    def _encoded(self, encode: Any) -> list[int]:
        try:
            return encode()
        except ModelError as error:
            raise PromptError(str(error)) from error
        except (UnicodeError, OverflowError) as error:
            raise PromptError(f"The text cannot be encoded: {error}") from error

    def start(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        ignore_end: bool = False,
        min_tokens: int = 0,
        scoring: Scoring | None = None,
        echo: str = "",
        constraint: Constraint | None = None,
        room: Callable[[int], Steps] | None = None,
        keep: Callable[[np.ndarray, Steps], None] | None = None,
        shown: Mapping[int, str] | None = None,
    ) -> Generation:
        """Create a generation of at most `max_tokens` tokens, fewer if the context ends first. Computes nothing yet.

        Args:
            prompt_ids: token ids of the prompt.
            max_tokens: limit of the output; 0 only prefills the prompt, to score it.
            sampling: default: greedy.
            stop: strings that end the answer, which does not include them.
            ignore_end: do not stop at end tokens, for benchmarks.
            min_tokens: before this many tokens, neither an end token nor a stop string ends the answer.
            scoring: what `Generation.take_scores` returns; None: nothing.
            echo: text that the answer begins with.
            constraint: which tokens the answer may have.
            room: returns an empty KV cache for a number of tokens; default: a cache of its own.
            keep: called at the end with the prompt tokens in the cache and the cache.
            shown: id to text of special tokens that the answer shows; others are left out.

        Raises:
            PromptError: the prompt is empty, leaves no room in the context, or contains an invalid token id; or
                `max_tokens` < 0.
        """
        count = len(prompt_ids)
        if not count or max_tokens < 0:
            raise PromptError(
                f"Give at least 1 prompt token and max_tokens of at least 0; got {count} and {max_tokens}."
            )
        strange = next((token for token in prompt_ids if not 0 <= token < self.vocabulary), None)
        if strange is not None:
            raise PromptError(f"{strange} is not a token id of this model; valid ids are 0 to {self.vocabulary - 1}.")
        longest = self.context_length - min(1, max_tokens)
        if count > longest:
            raise PromptError(
                f"The prompt is {count} tokens long; shorten it to {longest} tokens or fewer.",
                tokens=count,
                limit=longest,
            )
        limit = min(max_tokens, self.context_length - count)
        sampler = Sampler(sampling or Sampling(), list(prompt_ids))
        ends = frozenset() if ignore_end else self.end_ids
        # The last token generated needs no place in the cache, but a cache for all tokens is simpler to reason about.
        steps = (room or self._session.start)(count + limit)
        return Generation(
            steps, self._codec, list(prompt_ids), limit, sampler, stop, ends, scoring=scoring, echo=echo,
            min_tokens=min_tokens, constraint=constraint, keep=keep, shown=shown,
        )  # fmt: skip

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values per token."""
        return self._session.cache_bytes

    def batch(self, rows: int, *, prefix_cache: int | None = None, in_turn: bool = False) -> Batch:
        """Return a batch that decodes up to `rows` generations together; options as in `Batch`."""
        return Batch(self, self._session, rows, prefix_cache=prefix_cache, in_turn=in_turn)

    def losses(self, token_ids: Sequence[int]) -> np.ndarray:
        """Return the negative log-likelihood in nats of all tokens but the first: (tokens - 1,) float64.

        Raises:
            PromptError: fewer than two tokens, or more than the context holds.
        """
        count = len(token_ids)
        if not 2 <= count <= self.context_length:
            raise PromptError(f"Losses need 2 to {self.context_length} tokens; got {count}.")
        return losses_of(self._session.start(count), token_ids)

    def warm_up(self) -> None:
        """Run one step and discard it: the first run of a session also allocates memory."""
        answer = self.start([min(self.end_ids, default=0)], max_tokens=1)
        answer.advance()
        answer.close()
