"""A sample that takes its process with it: put into every process of a Ray cluster by the tests."""

from __future__ import annotations

import os
import signal
from typing import Any

from study.run.study import Study

QUESTION = "DEADLY_QUESTION"


def install() -> None:
    """Makes every engine loaded from now on kill its process when the question is among what it is asked."""
    load = Study._load

    def loaded(study: Study, model: str) -> Any:
        engine = load(study, model)
        for name in ("generate", "score"):
            setattr(engine, name, _deadly(getattr(engine, name)))
        return engine

    Study._load = loaded  # type: ignore[method-assign]


def _deadly(method: Any) -> Any:
    def asked(requests: Any, *args: Any, **kwargs: Any) -> Any:
        if any(os.environ[QUESTION] in repr(request) for request in requests):
            os.kill(os.getpid(), signal.SIGKILL)
        return method(requests, *args, **kwargs)

    return asked
