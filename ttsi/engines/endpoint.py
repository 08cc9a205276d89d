"""Where a model is served and how to ask it, and what an OpenAI-compatible endpoint says back."""

from __future__ import annotations

import email.utils
import hashlib
import json
import logging
import os
import time
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel, ConfigDict, Field, field_validator

from ttsi.engines.base import Prompt

SHORTEST_KEY = 12  # characters; what is shorter is no secret but a placeholder, and may be a word
_OWN_FIELDS = {"model", "messages", "stream", "n", "seed", "tools"}


class Endpoint(BaseModel):
    """Where a model is served and how to ask it; unknown keys are refused. Holds no key, only its name."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    base_url: str
    """What stands before `/chat/completions`, e.g. `http://localhost:8000/v1`."""
    model: str = Field(min_length=1)
    key_env: str | None = "OPENAI_API_KEY"
    """Environment variable that holds the key; null = the endpoint wants none."""
    decoding: Literal["default", "openai", "vllm"] = "default"
    """"default" leaves decoding to the endpoint, as the paper does for its teacher; "openai" sends
    temperature, top-p and seed; "vllm" also top-k and repetition penalty."""
    reply_tokens: int | None = Field(None, ge=1)
    """Limit to send in place of the caller's: where a model thinks aloud, that counts towards it."""
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls that limit; OpenAI's reasoning models want the second."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """More fields of the request body, e.g. `{reasoning_effort: minimal}`."""
    concurrency: int = Field(4, ge=1, le=256)
    timeout: float = Field(120.0, gt=0)
    """Seconds one try may take."""
    attempts: int = Field(6, ge=1)
    backoff: float = Field(1.0, ge=0)
    """Seconds: the first wait is drawn from [0, backoff], and the span doubles with every try, up to 60."""
    patience: float = Field(300.0, ge=0)
    """Longest wait (seconds) that an endpoint may ask for; a longer one is a failure."""
    max_requests: int | None = Field(None, ge=0)
    max_total_tokens: int | None = Field(None, ge=0)
    """The budget, over all runs that share the ledger. Requests are counted strictly; tokens before each
    request, so that those in flight may exceed it by a reply each."""
    price_prompt: float | None = Field(None, ge=0)
    price_completion: float | None = Field(None, ge=0)
    """US dollars per million tokens."""

    @field_validator("base_url")
    @classmethod
    def _address(cls, value: str) -> str:
        parts = urlsplit(value.strip())
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("base_url is no http(s) address")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("base_url is an address and nothing else; a key belongs in the environment")
        try:
            httpx.URL(value.strip())
        except httpx.InvalidURL:
            raise ValueError("base_url is no http(s) address") from None
        return value.strip().rstrip("/")

    @field_validator("extra")
    @classmethod
    def _more(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(_OWN_FIELDS & set(value)):
            raise ValueError(f"extra sets {', '.join(taken)}, which the engine sets itself")
        return value

    @property
    def host(self) -> str:
        """The server's name, for messages."""
        return urlsplit(self.base_url).netloc

    @property
    def fingerprint(self) -> str:
        """A hash of what affects a reply: what a store keys results by, as it does by a model's file."""
        fields = ("base_url", "model", "decoding", "reply_tokens", "limit_field", "extra")
        text = json.dumps({f: getattr(self, f) for f in fields}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        """Parts of text as one; what a model thinks in parts of their own is no part of its reply."""
        if not isinstance(value, list):
            return value
        texts = [p if isinstance(p, str) else p.get("text") for p in value if isinstance(p, str | dict)]
        return "".join(text for text in texts if isinstance(text, str))


class Choice(BaseModel):
    message: _Message = _Message()
    finish_reason: Any = None
    error: Any = None


class _Tokens(BaseModel):
    prompt_tokens: int | None = Field(default=None, ge=0, le=1_000_000)
    completion_tokens: int | None = Field(default=None, ge=0, le=1_000_000)


class Completion(BaseModel):
    """The part of an endpoint's answer that is read."""

    choices: list[Choice] = []
    usage: _Tokens = _Tokens()
    error: Any = None

    @field_validator("usage", mode="before")
    @classmethod
    def _told(cls, value: Any) -> Any:
        """A count that isn't told is estimated; a side field must not cost a reply."""
        told = value if isinstance(value, dict) else {}
        return {k: told.get(k) for k in _Tokens.model_fields if isinstance(told.get(k), int | float)}


class Reply(BaseModel):
    """What the ledger keeps of it."""

    text: str
    finished: bool
    prompt_tokens: int
    completion_tokens: int


class Discretion(logging.Filter):
    """Strikes keys out of what the HTTP libraries log: an endpoint may quote one in its status or headers."""

    def __init__(self) -> None:
        super().__init__()
        self.variables: frozenset[str] = frozenset()
        for library in ("httpx", "httpcore.connection", "httpcore.http11", "httpcore.proxy"):
            logging.getLogger(library).addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        for key in (os.environ.get(name, "").strip() for name in self.variables):
            if len(key) >= SHORTEST_KEY and key in (text := record.getMessage()):
                record.msg, record.args = text.replace(key, "[key]"), ()
        return True


def turns(prompt: Prompt) -> list[dict[str, str]]:
    """The prompt as an endpoint reads it. A tool's answer is a user's turn, as its call is text."""
    turns = [{"role": "system", "content": prompt.system}] if prompt.system else []
    for message in prompt.messages:
        if message.role == "tool":
            said = f"<tool_response>\n{message.content}\n</tool_response>"
            turns.append({"role": "user", "content": said})
        else:
            turns.append({"role": message.role, "content": message.content})
    return turns


def complaint(data: bytes) -> tuple[str, str]:
    """(code, message on one line) of an error's body; empty where it has none."""
    try:
        body = json.loads(data)
        error = body.get("error", body)
        found = (error.get("code"), error.get("message")) if isinstance(error, dict) else ("", error)
    except (ValueError, AttributeError, RecursionError):
        return "", ""
    code, said = (" ".join(part.split())[:200] if isinstance(part, str) else "" for part in found)
    return code, "".join(c if c.isprintable() else "�" for c in said)


def retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks for, as a number or a date; 0 where there is none."""
    try:
        return min(max(0.0, float(value)), 1e9)
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def counted(count: int | None, text: str) -> int:
    """A count of tokens, estimated from the text where it isn't told."""
    return _estimate(text) if count is None else count


def _estimate(text: str) -> int:
    return len(text.encode("utf-8", "replace")) // 3 + 1
