"""A model behind an OpenAI-compatible endpoint: it generates, and that is all a teacher has to do.

The key is read from the environment when a request is sent and stands nowhere else: not in a setting, an
error, a log or the ledger. Every reply is kept under a hash of its request, so that a second run asks for
nothing. Paper: section 4, TT-D's teacher.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import tenacity
from pydantic import ValidationError

from ttsi.engines.base import EngineError, Prompt, Request, TooLong
from ttsi.engines.endpoint import (
    SHORTEST_KEY,
    Choice,
    Completion,
    Discretion,
    Endpoint,
    Reply,
    complaint,
    counted,
    retry_after,
    turns,
)
from ttsi.engines.ledger import BudgetSpent, Ledger, Usage, default_ledger
from ttsi.seeds import reply_seed
from ttsi.types import Generation, Sampling, Scored

_LONGEST = 8 << 20  # bytes of one answer that are read
_FINAL = {
    "insufficient_quota", "billing_hard_limit_reached", "invalid_api_key", "model_not_found",
    "context_length_exceeded", "invalid_request_error", "content_filter", "content_policy_violation",
}  # fmt: skip
_PASSING = {408, 409, 425, 429}  # and all from 500 on: statuses that another try may mend


class Refused(EngineError):
    """The endpoint won't serve us whatever we ask: no key, a wrong one, no such model, no quota."""


class _Passing(EngineError):
    """What another try may mend."""


_DISCRETION = Discretion()


@dataclass(frozen=True)
class _Ask:
    """One request body, and the name under which its reply is kept."""

    key: str
    body: Mapping[str, Any]


class OpenAIEngine:
    """An `Engine` that generates through an endpoint; it can't score, and takes no adapter or grammar.

    ledger: file of replies and requests, by default in the cache folder; the budget is counted over it.
    Failures of the endpoint raise EngineError after the tries that the settings allow, a spent budget
    BudgetSpent, a refused key or model Refused: for good, so that a wrong key costs one request. Other
    requests of the same call are still sent and their replies kept. Safe for several threads.
    """

    concurrent = True

    def __init__(self, endpoint: Endpoint, *, ledger: Path | None = None, name: str | None = None) -> None:
        self.endpoint = endpoint
        if endpoint.key_env:
            _DISCRETION.variables |= {endpoint.key_env}
        self.name = name or endpoint.model
        self.loaded = 0
        """Replies that came from the ledger and cost nothing."""
        self._ledger = Ledger(ledger or default_ledger())
        self._account = f"{endpoint.base_url} {endpoint.model}"
        self._client = httpx.Client(
            timeout=httpx.Timeout(endpoint.timeout, connect=min(10.0, endpoint.timeout)),
            limits=httpx.Limits(max_connections=endpoint.concurrency),
            follow_redirects=False,  # a key goes to the address it was meant for and no other
        )
        self._refusal = ""
        self._down = False
        self._not_before = 0.0

    @classmethod
    def from_settings(
        cls, settings: Mapping[str, Any] | Endpoint, *, ledger: Path | None = None
    ) -> OpenAIEngine:
        """An engine from a profile's `{base_url, model, key_env, …}`; wrong settings raise ValueError."""
        endpoint = settings if isinstance(settings, Endpoint) else Endpoint.model_validate(dict(settings))
        return cls(endpoint, ledger=ledger)

    def close(self) -> None:
        """Closes connections and ledger."""
        self._client.close()
        self._ledger.close()

    @property
    def usage(self) -> Usage:
        """Requests, tokens and cost so far, over all runs that share the ledger."""
        used, e = self._ledger.usage(self._account), self.endpoint
        if e.price_prompt is None or e.price_completion is None:
            return used
        dollars = used.prompt_tokens * e.price_prompt + used.completion_tokens * e.price_completion
        return replace(used, cost=dollars / 1e6)

    # --- the protocol -----------------------------------------------------------------------------------

    def score(
        self,
        prompts: Sequence[Prompt],
        opening: str,
        continuations: Sequence[Sequence[str]],
        upto: object = None,
    ) -> list[list[Scored]]:
        """Never returns: an endpoint tells no log-probabilities of a text that it is given."""
        raise NotImplementedError(
            f"{self.name} is behind an endpoint, which can't score given text: use it as a teacher, and a "
            "model on this machine for H"
        )

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Generation]]:
        """`sampling.n` replies to each request, each asked for once, however often it is wanted.

        Token ids and log-probabilities are unknown: `tokens` holds a −1 for each that was used (the
        endpoint's count, or a third of the bytes where it gives none), `log_probs` is empty.
        A reply can't be made to continue `Request.opening`; what stands before the opening is cut off,
        and a reply without it stays as it is.
        """
        if any(r.adapter is not None or r.grammar for r in requests):
            raise NotImplementedError(f"{self.name} is behind an endpoint: no adapter and no grammar there")
        asks = [[self._ask(r, sampling, i) for i in range(sampling.n)] for r in requests]
        wanted = {a.key: a for row in asks for a in row}
        replies = self._known(wanted)
        self.loaded += len(replies)
        replies |= self._send([a for key, a in wanted.items() if key not in replies])
        return [[_generation(r, replies[a.key]) for a in row] for r, row in zip(requests, asks, strict=True)]

    # --- requests ---------------------------------------------------------------------------------------

    def _ask(self, request: Request, sampling: Sampling, index: int) -> _Ask:
        e = self.endpoint
        seed = reply_seed(request.seed, index) % (1 << 31)
        body: dict[str, Any] = {
            "model": e.model,
            "messages": turns(request.prompt),
            e.limit_field: e.reply_tokens or sampling.max_tokens,
        }
        if e.decoding != "default":
            body |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": seed}
        if e.decoding == "vllm":
            body |= {"top_k": sampling.top_k or -1, "repetition_penalty": sampling.repetition_penalty}
        body |= e.extra
        # The seed counts even where it isn't sent: a retry wants another draw, not the same reply again.
        text = json.dumps([e.base_url, body, seed], sort_keys=True)
        return _Ask(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest(), body)

    def _known(self, wanted: Mapping[str, _Ask]) -> dict[str, Reply]:
        found = {}
        for key, value in self._ledger.replies(wanted).items():
            try:
                found[key] = Reply.model_validate_json(value)
            except ValidationError:
                continue  # damaged: asked for again
        return found

    def _send(self, asks: Sequence[_Ask]) -> dict[str, Reply]:
        """Replies by key. Raises the first failure, once every request has come to its end."""
        if not asks:
            return {}
        stop = threading.Event()
        pool = ThreadPoolExecutor(min(self.endpoint.concurrency, len(asks)))
        try:
            futures = {a.key: pool.submit(self._persist, a, stop) for a in asks}
            failures = [error for f in futures.values() if (error := f.exception())]
        finally:  # an interrupt leaves no thread waiting for its turn
            stop.set()
            pool.shutdown(cancel_futures=True)
        if failures:
            raise failures[0]
        return {key: future.result() for key, future in futures.items()}

    def _persist(self, ask: _Ask, stop: threading.Event) -> Reply:
        """A reply, after as many tries as are allowed: one only while the endpoint is known to be down."""
        e = self.endpoint
        tries = 1 if self._down else e.attempts
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Passing),
            stop=tenacity.stop_after_attempt(tries) | tenacity.stop_when_event_set(stop),
            wait=tenacity.wait_random_exponential(multiplier=e.backoff, max=60),
            sleep=tenacity.sleep_using_event(stop),
            reraise=True,
        )
        try:
            reply = retrying(self._try, ask, stop)
        except _Passing as error:
            self._down = True
            raise EngineError(f"{e.host}: {error} ({tries} {'try' if tries == 1 else 'tries'})") from None
        self._down = False
        return reply

    def _try(self, ask: _Ask, stop: threading.Event) -> Reply:
        if self._refusal:
            raise Refused(self._refusal)
        stop.wait(max(0.0, self._not_before - time.monotonic()))
        if stop.is_set():  # what waits is paid for when it is sent
            raise EngineError(f"{self.endpoint.host}: interrupted")
        self._key()
        e = self.endpoint
        number = self._ledger.begin(self._account, e.max_requests, e.max_total_tokens)
        try:
            status, headers, data = self._post(ask.body, stop)
            if status != 200:
                raise self._refused(status, headers, data)
            reply = self._read(ask.body, data)
        except Refused as error:
            self._refusal = str(error)
            self._ledger.settle(number, str(error))
            raise
        except EngineError as error:
            self._ledger.settle(number, str(error))
            raise
        self._ledger.settle(number, "ok", reply.prompt_tokens, reply.completion_tokens)
        self._ledger.keep(ask.key, reply.model_dump_json(), number)
        return reply

    def _post(self, body: Mapping[str, Any], stop: threading.Event) -> tuple[int, httpx.Headers, bytes]:
        began, data = time.monotonic(), bytearray()
        content = json.dumps(body).encode("utf-8", "replace")
        try:
            with self._client.stream(
                "POST",
                f"{self.endpoint.base_url}/chat/completions",
                content=content,
                headers={"Content-Type": "application/json", "Accept": "application/json"},
                auth=self._authorise,
            ) as response:
                for part in response.iter_bytes():
                    data += part
                    if len(data) > _LONGEST:
                        raise EngineError(f"{self.endpoint.host} sent more than {_LONGEST >> 20} MiB")
                    # A read's own timeout starts anew with every byte.
                    if time.monotonic() - began > self.endpoint.timeout or stop.is_set():
                        raise _Passing(f"no whole answer within {self.endpoint.timeout:g} s")
                return response.status_code, response.headers, bytes(data)
        except httpx.TimeoutException:
            raise _Passing(f"no answer within {self.endpoint.timeout:g} s") from None
        except httpx.HTTPError as error:  # its message may quote a header, its cause holds the request
            raise _Passing(f"the connection failed ({type(error).__name__})") from None

    def _refused(self, status: int, headers: httpx.Headers, data: bytes) -> EngineError:
        """The failure that a status other than 200 stands for."""
        e, (code, said) = self.endpoint, complaint(data)
        said = self._without_key(said)
        if status in (401, 403):  # what is said there may quote the key
            if e.key_env is None:
                return Refused(f"{e.host} wants a key (HTTP {status}): name its variable in key_env")
            return Refused(f"{e.host} refused the key in {e.key_env} (HTTP {status})")
        if code == "insufficient_quota":
            return Refused(f"{e.host}: the account of the key in {e.key_env} has no quota left")
        if status == 404:
            return Refused(f"{e.base_url} has no model {e.model!r}, or is the wrong address (HTTP 404)")
        if 300 <= status < 400:
            return Refused(f"{e.base_url} leads elsewhere (HTTP {status}): give the final address")
        if status in _PASSING or status >= 500:
            wait = retry_after(headers.get("Retry-After", ""))
            if wait > e.patience:
                return EngineError(f"{e.host} asks for a wait of {wait:.0f} s (HTTP {status})")
            self._not_before = max(self._not_before, time.monotonic() + wait)
            return _Passing(f"HTTP {status}{said and f': {said}'}")
        if code == "context_length_exceeded" or "context length" in said.lower():
            return TooLong(f"{e.host}: {said or 'the prompt is too long'}")
        return EngineError(f"{e.host} refused the request (HTTP {status}){said and f': {said}'}")

    def _read(self, body: Mapping[str, Any], data: bytes) -> Reply:
        try:
            answer = Completion.model_validate_json(data)
        except ValidationError:
            raise _Passing("HTTP 200 without a reply that can be read") from None
        choice = answer.choices[0] if answer.choices else Choice(error=answer.error)
        error = answer.error or choice.error
        if error or not answer.choices or choice.finish_reason == "error":
            raise self._failed(error)
        if choice.finish_reason == "content_filter":
            raise EngineError(f"{self.endpoint.host} withheld the reply (content filter)")
        text = self._without_key(choice.message.content or choice.message.refusal or "")
        told = answer.usage
        return Reply(
            text=text,
            finished=choice.finish_reason != "length",
            prompt_tokens=counted(told.prompt_tokens, json.dumps(body["messages"])),
            completion_tokens=counted(told.completion_tokens, text),
        )

    def _failed(self, error: Any) -> EngineError:
        """The failure that an error in an answer of HTTP 200 is: final where trying again is vain."""
        data = json.dumps({"error": error}).encode()
        numbers = [error.get(k) for k in ("code", "status")] if isinstance(error, dict) else []
        status = next((s for n in numbers if str(n).isdecimal() and 400 <= (s := int(str(n))) < 600), 0)
        code, said = complaint(data)
        if status or code in _FINAL:
            return self._refused(status or 400, httpx.Headers(), data)
        said = self._without_key(said)
        return _Passing(f"HTTP 200 without a reply that can be read{said and f': {said}'}")

    # --- the key ----------------------------------------------------------------------------------------

    def _key(self) -> str:
        """The key, "" where none is wanted. Raises Refused for a missing one and for what can't be one."""
        name = self.endpoint.key_env
        if name is None:
            return ""
        key = os.environ.get(name, "").strip()
        if not key:
            raise Refused(f"no key for {self.endpoint.host}: put it into the environment as {name}")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise Refused(f"what {name} holds is no key: it has spaces or characters that no key has")
        return key

    def _authorise(self, request: httpx.Request) -> httpx.Request:
        if key := self._key():
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    def _without_key(self, text: str) -> str:
        """The text with the key, should an endpoint send it back, struck out."""
        key = self._key()
        return text.replace(key, "[key]") if len(key) >= SHORTEST_KEY else text


def _generation(request: Request, reply: Reply) -> Generation:
    start = max(0, reply.text.find(request.opening))
    text = reply.text[start:]
    return Generation(text, (-1,) * reply.completion_tokens, (), reply.finished, reply.prompt_tokens)


__all__ = ["BudgetSpent", "Endpoint", "OpenAIEngine", "Refused", "Usage"]
