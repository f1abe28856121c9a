"""Who answers in `shoal chat`: a model in this process, or a server over HTTP.

Both take the messages of a conversation and give pieces of the answer as they come. Knows
nothing of terminals.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import httpx

from shoal.core.errors import RequestError, UnavailableError
from shoal.core.request import ErrorInfo, SamplingParams

if TYPE_CHECKING:
    from shoal.llm import LLM

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Piece:
    """More of an answer; `num_tokens` add up to what was generated."""

    text: str
    num_tokens: int = 0
    finish_reason: str | None = None


class Talker(Protocol):
    """Something that answers; leaving the iterator early cancels the answer."""

    @property
    def name(self) -> str: ...

    def answer(
        self, messages: Sequence[Message], params: SamplingParams
    ) -> Generator[Piece, None, None]:
        """Pieces of the answer.

        Raises:
            RequestError: refused or failed; code "context_length_exceeded" if it is too long.
        """
        ...

    def close(self) -> None: ...


class LocalTalker:
    """A model in this process."""

    def __init__(self, llm: LLM, name: str) -> None:
        self.name = name
        self._llm = llm

    def answer(
        self, messages: Sequence[Message], params: SamplingParams
    ) -> Generator[Piece, None, None]:
        for chunk in self._llm.stream(messages=list(messages), params=params):
            yield Piece(chunk.text, len(chunk.token_ids), chunk.finish_reason)

    def close(self) -> None:
        self._llm.close()


class RemoteTalker:
    """An OpenAI-compatible server.

    Args:
        url: of the server, with or without /v1.
        model: None: the first one that the server offers.
        transport: how to reach it; None: the network.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        root = url.rstrip("/").removesuffix("/v1")
        self._url = root
        self._client = httpx.Client(
            base_url=f"{root}/v1/",
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(None, connect=10),
            transport=transport,
        )
        self.name = model or self._first_model()

    def answer(
        self, messages: Sequence[Message], params: SamplingParams
    ) -> Generator[Piece, None, None]:
        body = {
            "model": self.name,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": params.temperature,
            "top_p": params.top_p,
        }
        optional = {
            "max_tokens": params.max_tokens,
            "top_k": params.top_k or None,
            "seed": params.seed,
            "stop": list(params.stop) or None,
        }
        body |= {name: value for name, value in optional.items() if value is not None}
        try:
            with self._client.stream("POST", "chat/completions", json=body) as response:
                self._check(response)
                yield from self._pieces(response.iter_lines())
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def close(self) -> None:
        self._client.close()

    def _first_model(self) -> str:
        try:
            response = self._client.send(self._client.build_request("GET", "models"), stream=True)
            self._check(response)
            response.read()
            return str(response.json()["data"][0]["id"])
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error
        except (ValueError, LookupError, TypeError) as error:
            raise UnavailableError(
                f"{self._url} does not list its models as OpenAI's API does; check --url"
            ) from error

    def _pieces(self, lines: Iterator[str]) -> Iterator[Piece]:
        finished = False
        for line in lines:
            field, _, data = line.partition(":")
            data = data.strip()
            if field != "data" or data == "[DONE]":
                continue
            event: dict[str, Any] = json.loads(data)
            if "error" in event:
                raise _refusal(500, event)
            for choice in event.get("choices", []):
                finished = finished or choice.get("finish_reason") is not None
                text = choice.get("delta", {}).get("content") or ""
                yield Piece(text, 0, choice.get("finish_reason"))
            if usage := event.get("usage"):
                yield Piece("", usage["completion_tokens"])
        if not finished:
            raise UnavailableError(f"{self._url} ended its answer in the middle; ask again")

    def _check(self, response: httpx.Response) -> None:
        if response.status_code < 400:
            return
        response.read()
        if response.status_code in (401, 403):
            raise RequestError(
                f"{self._url} wants an API key that it knows; pass --api-key or set SHOAL_API_KEY"
            )
        try:
            body = response.json()
        except ValueError:
            body = {}
        raise _refusal(response.status_code, body)

    def _unreachable(self, error: Exception) -> UnavailableError:
        return UnavailableError(
            f"no server answers at {self._url} ({error or type(error).__name__}); start one "
            f"with `shoal serve`, or check --url"
        )


def _refusal(status: int, body: Any) -> RequestError:
    """The exception that an OpenAI-shaped error body stands for."""
    error = body.get("error") if isinstance(body, dict) else None
    told = error if isinstance(error, dict) else {}
    return ErrorInfo(
        status=status,
        code=str(told.get("code") or "http_error"),
        message=str(told.get("message") or f"the server answered {status}; see its log"),
    ).to_exception()
