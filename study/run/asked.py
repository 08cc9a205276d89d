"""What a notebook is asked for on a command line, tried before it runs: a wrong value is one line."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from study.analysis.look import write
from study.data import sources
from study.run.arms import ARMS
from study.run.config import Profile, load_profile
from study.run.results import Results
from study.run.study import Study
from study.run.written import WrongParameter, meant

_SETTINGS = ("benchmarks", "arms", "n", "seeds", "tau", "mode", "k", "epochs", "tool_order")
"""Parameters of notebooks that are settings of a profile."""


def opened(parameters: Mapping[str, Any]) -> Study | Results:
    """The run that a notebook's parameters ask for. Raises WrongParameter for a value that there isn't."""
    asked = {key: parameters[key] for key in _SETTINGS if parameters.get(key) is not None}
    one = parameters.get("benchmark")
    if one is not None:
        asked["benchmarks"] = one if isinstance(one, dict) else [one]
    taus = asked.pop("tau") if isinstance(asked.get("tau"), list | tuple) else []
    source, profile = parameters.get("source"), str(parameters["profile"])
    whole = Results(sources.found(source)).whole if source else load_profile(profile)
    if isinstance(one, dict) and len(one) != 1:
        raise WrongParameter(f"benchmark = {one!r}: one name with the path of its records")
    if isinstance(one, str) and one not in whole.benchmarks:
        raise WrongParameter(
            f"benchmark = {one!r} is not in profile {whole.name}{meant(one, whole.benchmarks)}"
        )
    for arm in asked.get("arms", []):
        if arm not in ARMS:
            raise WrongParameter(f"no arm {arm!r}{meant(str(arm), ARMS)}")
    try:
        for tau in taus:
            whole.under({"tau": tau})
        if source:
            return Results.under(sources.found(source), asked)
        return Study(profile, **asked)
    except ValueError as error:
        raise WrongParameter(str(error)) from error


def read_or_run(parameters: Mapping[str, Any], committed: Path, reads: bool) -> dict[str, Any]:
    """A notebook's parameters with their `source`: a profile's committed records, if they answer them.

    Else None, and it is run. committed: folder of the records of profiles. reads: whether it reads any unless
    told otherwise.
    """
    if parameters.get("source"):
        return {**parameters, "profile": Results(sources.found(parameters["source"])).profile.name}
    folder = sources.found(committed / str(parameters["profile"]))
    if reads and "source" not in parameters and (folder / "header.json").exists():
        read = {**parameters, "source": str(folder.absolute())}
        with suppress(WrongParameter):
            opened(read)
            print(f"read from {committed / folder.name}, nothing is computed; source=None runs it here")
            return read
    return {**parameters, "source": None}


def with_own_data(parameters: Mapping[str, Any], p: Profile, name: str) -> dict[str, Any]:
    """The parameters, with a profile of the run's own for files among them, and names in their place.

    p: the profile that they come to. name: what the run is filed under. Not every notebook takes a file.
    """
    key = next((k for k in ("benchmark", "benchmarks") if isinstance(parameters.get(k), dict)), None)
    if key is None or not p.files:
        return dict(parameters)
    whole = p.named(name).model_dump()
    path = write(sources.runs_dir() / name / "profile.yaml", yaml.safe_dump(whole, sort_keys=False).encode())
    names = list(p.benchmarks)
    return {**parameters, "profile": str(path.absolute()), key: names[0] if key == "benchmark" else names}
