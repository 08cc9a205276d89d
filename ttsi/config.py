"""Profiles: what to run, in one YAML each; every key can be overridden by a notebook's parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator

from ttsi.types import LoraSettings, Sampling

PROFILES = Path(__file__).resolve().parent.parent / "profiles"
PAPER_SAMPLING = Sampling(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1)
"""The paper's decoding settings (section 4): used for synthesis and for votes in every profile."""


class Profile(BaseModel):
    """The settings of a run; unknown keys are refused. Defaults are the paper's where it has one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    model: str
    teacher: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    benchmarks: dict[str, int | None]
    """Samples per benchmark: a prefix of one fixed permutation; null = all."""
    arms: list[str] = ["base", "tt_si"]
    modes: dict[str, list[Literal["exact", "activated"]]] = Field(default_factory=dict)
    """Training modes of the adapting arms per benchmark, "default" for those not named."""
    inference: list[Literal["direct", "majority"]] = ["direct"]
    seeds: list[int] = [0]
    tau: float = Field(0.95, ge=0, le=1.000001)
    k: int = Field(1, ge=1)
    epochs: int = Field(3, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    rank: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    retries: int = Field(5, ge=0)
    votes: int = Field(5, ge=1)
    tool_order: Literal["shuffled", "original"] = "shuffled"
    keep_components: bool = False
    judge: Literal["schema", "string", "bfcl"] = "schema"
    accept: Literal["lenient", "tagged"] = "lenient"
    strict_types: bool = False
    candidate: Literal["name", "name+opening"] = "name"
    normalise: bool = False
    validate_examples: Literal["none", "schema"] = "none"
    novelty: Literal["any", "reject_copies"] = "any"
    answer_temperature: float = Field(0.0, ge=0)
    """0: direct answers are greedy, without penalty. Above: the paper's sampling at this temperature."""
    answer_tokens: int = Field(256, ge=1)
    synthesis_tokens: int = Field(256, ge=1)
    batch: int = Field(8, ge=1)
    """Samples decoded together: fixed groups of the permutation."""
    bank: int | None = None
    """Adapters trained side by side; null = 1 on a CPU, the batch on a GPU."""
    threads: int | None = None

    @field_validator("benchmarks", mode="before")
    @classmethod
    def _counts(cls, value: Any) -> Any:
        """A list of names means all samples of each."""
        return dict.fromkeys(value) if isinstance(value, list) else value

    def modes_of(self, benchmark: str) -> list[Literal["exact", "activated"]]:
        """The training modes to run on a benchmark."""
        return self.modes.get(benchmark) or self.modes.get("default") or ["exact"]

    def lora(self, mode: Literal["exact", "activated"]) -> LoraSettings:
        """T's settings in a mode."""
        return LoraSettings(
            rank=self.rank, alpha=self.alpha, epochs=self.epochs, learning_rate=self.learning_rate, mode=mode
        )

    @property
    def direct_sampling(self) -> Sampling:
        """How a direct answer is decoded."""
        if self.answer_temperature == 0:
            return Sampling(max_tokens=self.answer_tokens)
        return self._paper(self.answer_tokens, temperature=self.answer_temperature)

    @property
    def vote_sampling(self) -> Sampling:
        """How the replies of a majority vote are drawn."""
        return self._paper(self.answer_tokens, n=self.votes)

    @property
    def synthesis_sampling(self) -> Sampling:
        """How synthetic examples are drawn."""
        return self._paper(self.synthesis_tokens)

    def _paper(
        self, max_tokens: int, n: int = 1, temperature: float = PAPER_SAMPLING.temperature
    ) -> Sampling:
        p = PAPER_SAMPLING
        return Sampling(temperature, p.top_p, p.top_k, p.repetition_penalty, max_tokens, n)


def load_profile(name: str, **overrides: Any) -> Profile:
    """The profile `profiles/<name>.yaml` (or the YAML file `name`); an override of None changes nothing.

    `n` sets the number of samples of every benchmark, `benchmarks` keeps the named ones with the profile's
    own counts, `mode` sets one training mode throughout. Raises ValueError for an unknown profile or key.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not path.exists():
        known = sorted(p.stem for p in PROFILES.glob("*.yaml"))
        raise ValueError(f"no profile {name!r}; there are {', '.join(known)}")
    settings: dict[str, Any] = {"name": path.stem, **yaml.safe_load(path.read_text())}
    given = {k: v for k, v in overrides.items() if v is not None}
    chosen = given.pop("benchmarks", None)
    if chosen is not None:
        own = Profile.model_validate(settings).benchmarks
        settings["benchmarks"] = chosen if isinstance(chosen, dict) else {b: own.get(b) for b in chosen}
    if "n" in given:
        settings["benchmarks"] = dict.fromkeys(settings["benchmarks"], given.pop("n"))
    if "mode" in given:
        settings["modes"] = {"default": [given.pop("mode")]}
    return Profile.model_validate({**settings, **given})
