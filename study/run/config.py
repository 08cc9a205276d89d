"""Profiles: what to run, in one YAML each; every key can be overridden by a notebook's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from study.data import sources
from study.data.benchmarks import FILES
from study.run.written import NAME, at_most, counts_and_files, folder_name, meant, problems, read_yaml
from ttsi.method import THRESHOLDS, Filter, Method, Uncertain
from ttsi.types import PAPER_SAMPLING, Layout, LoraSettings, Sampling, TrainingMode

PROFILES = Path(__file__).resolve().parents[2] / "profiles"
DEFAULT = "full"
Inference = Literal["direct", "majority", "pass@5"]
_TAKEN = {*FILES, "avg", "pooled", "default"}
"""Names that a benchmark of one's own can't have: those of the study's, and words of tables and profiles."""


def profile_names() -> list[str]:
    """The project's profiles."""
    return sorted(p.stem for p in PROFILES.glob("*.yaml"))


class Profile(BaseModel):
    """The settings of a run; unknown keys are refused. Defaults are the paper's where it has one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """What tables, figures and executed notebooks are filed under."""
    model: str
    teacher: str | dict[str, Any] | None = None
    """Who writes the examples of `tt_d` and answers as `teacher`: a local model, or the settings of an
    endpoint (`engines.openai.Endpoint`)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    benchmarks: dict[str, Annotated[int, Field(ge=0)] | None]
    """Samples per benchmark: a prefix of one fixed permutation; null = all. One of your own is given by the
    path of its records, or as {path: …, n: …}; the path then stands in `files`."""
    files: dict[str, str] = Field(default_factory=dict)
    """Where benchmarks of your own lie, by name: see `study.data.own`."""
    pools: dict[str, str] = Field(default_factory=dict)
    """Where their training pools lie, in the same forms."""
    arms: list[str] | dict[str, list[str]] = ["base", "tt_si"]
    """The same for every benchmark, or per benchmark, "default" for those not named."""
    modes: dict[str, list[TrainingMode]] = Field(default_factory=dict)
    """Training modes per benchmark, "default" for those not named. The first is that of every arm that
    trains; tt_si runs in each of them."""
    inference: list[Inference] = ["direct"]
    """What answers are: one reply, a vote, any of five. Only base, tt_si and tt_d are asked for several."""
    estimators: dict[str, list[Literal["votes", "whole"]]] = Field(default_factory=dict)
    """What the costlier estimators need, per benchmark, "default" for those not named: sampled base replies
    ("votes"), and for each tool the best call that names it ("whole")."""
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Runs beside this one, by name: the keys in which each differs."""
    store: str = ""
    """The profile whose stored results are used and added to, of a run that changes it; "" = its own."""
    seeds: list[int] = [0]
    uncertainty: Uncertain = "margin"
    tau: float = Field(0.95, ge=0, le=1.000001)
    """By default .95, the paper's; with the likelihood ½. What a `Method` has too is explained there."""
    answer_with: Literal["adapted", "surer"] = "adapted"
    surer_by: float = Field(1.0, gt=0)
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
    filters: list[Filter] = []
    constrained: bool = False
    instructions: str = ""
    answer_opening: bool = True
    """Whether a reply begins with the opening behind which H scores the tools: every question wants a call,
    which is what `tool_choice="required"` says in a chat API. False: the model may chat."""
    layout: Layout = "native"
    """How a question is put to the model: see `ttsi.prompts`."""
    sft_samples: int | None = None
    """Training samples of `sft`, a prefix of one seeded order; null = all of the pool's."""
    sft_calls: Literal["single", "all"] = "single"
    """Whether the in-domain pool holds its samples with one call, or all."""
    sft_epochs: int | None = None
    """Passes over a pool; null = `epochs`."""
    ood_sizes: list[int] = [1, 2, 4, 8, 16, 32]
    """Training samples of `sft_ood`: prefixes of one seeded order, each in the next."""
    max_votes: int = Field(40, ge=1)
    """The most replies `self_consistency` may draw for a sample."""
    answer_temperature: float = Field(0.0, ge=0)
    """0: direct answers are greedy, without penalty. Above: the paper's sampling at this temperature."""
    answer_tokens: int = Field(256, ge=1)
    synthesis_tokens: int = Field(256, ge=1)
    batch: int = Field(8, ge=1)
    """Samples that are computed and stored together: fixed groups of the permutation."""
    rows: int | None = Field(None, ge=1)
    """Replies in flight at a time: one that ends makes room for the next of its group; null = all at once."""
    bank: int | None = None
    """Adapters trained side by side; null = 1 on a CPU, the batch on a GPU."""
    threads: int | None = None
    engine: Literal["torch", "vllm"] = "torch"
    """Who answers and scores. "vllm" serves mode `exact` only, and torch trains beside it."""
    gpu_memory_utilization: float = Field(0.5, gt=0, le=1)
    """The share of a GPU's memory that vLLM takes for a model; training and the teacher need the rest."""
    executor: Literal["local", "ray"] = "local"
    """Who computes: this process, or the actors of a Ray cluster, with an engine (and `threads`) each."""
    actors: int | None = Field(None, ge=1)
    """How many; null = one per GPU of the cluster, or one per machine where there are none."""

    @model_validator(mode="before")
    @classmethod
    def _natural_threshold(cls, value: Any) -> Any:
        if isinstance(value, dict) and "tau" not in value and value.get("uncertainty") in THRESHOLDS:
            return value | {"tau": THRESHOLDS[value["uncertainty"]]}
        return value

    @model_validator(mode="before")
    @classmethod
    def _own_files(cls, data: Any) -> Any:
        """A list of names means all samples of each; paths of one's own go where they belong."""
        if not isinstance(data, dict) or not isinstance(data.get("benchmarks"), dict | list):
            return data
        counts, files = counts_and_files(data["benchmarks"])
        return {**data, "benchmarks": counts, "files": {**(data.get("files") or {}), **files}}

    @field_validator("name")
    @classmethod
    def _folder(cls, name: str) -> str:
        return folder_name(name)

    @field_validator("teacher")
    @classmethod
    def _endpoint(cls, value: Any) -> Any:
        if isinstance(value, dict):
            from ttsi.engines.openai import Endpoint  # only profiles with an endpoint need its libraries

            Endpoint.model_validate(value)
        return value

    @model_validator(mode="after")
    def _benchmarks_known(self) -> Profile:
        for name in self.files:
            if name in _TAKEN or name.endswith("_train") or not NAME.fullmatch(name):
                raise ValueError(f"a benchmark of your own can't be called {name!r}")
        for name in self.benchmarks:
            if name not in FILES and name not in self.files:
                path = f"one of your own needs a path: {{{name!r}: 'records.jsonl'}}"
                raise ValueError(f"no benchmark {name!r}{meant(name, [*FILES, *self.files])}; {path}")
        for name in self.pools:
            if name not in self.files:
                raise ValueError(f"pools.{name}: {name!r} is no benchmark of your own")
        return self

    @model_validator(mode="after")
    def _served(self) -> Profile:
        if self.constrained and self.layout == "template":
            raise ValueError("constrained answers have no form in layout template: use native or paper")
        papers = (self.uncertainty, self.answer_with) == ("margin", "adapted")
        if not papers and set(self.inference) != {"direct"}:
            raise ValueError("the likelihood is that of one answer: it can't decide where several are drawn")
        activated = [b for b in self.benchmarks if "activated" in self.modes_of(b)]
        if self.engine == "vllm" and activated:
            raise ValueError(
                f"engine vllm has no activated adapters, which the profile trains on {', '.join(activated)}: "
                "use mode exact, or engine torch"
            )
        return self

    @model_validator(mode="after")
    def _variants_hold(self) -> Profile:
        """A variant that can't be read is found at once, not hours into a run."""
        for name in self.variants:
            try:
                self.variant(name)
            except ValueError as error:
                raise ValueError(f"variants.{name}: {error}") from None
        return self

    @property
    def arm_names(self) -> list[str]:
        """Every arm that runs on some benchmark, in order of mention."""
        return list(dict.fromkeys(arm for b in self.benchmarks for arm in self.arms_of(b)))

    def arms_of(self, benchmark: str) -> list[str]:
        """The arms to run on a benchmark."""
        if isinstance(self.arms, list):
            return self.arms
        return self.arms.get(benchmark, self.arms.get("default", []))

    def modes_of(self, benchmark: str) -> list[TrainingMode]:
        """The training modes to run on a benchmark: the first for all arms, the others for tt_si."""
        return self.modes.get(benchmark) or self.modes.get("default") or ["exact"]

    def estimators_of(self, benchmark: str) -> list[Literal["votes", "whole"]]:
        """What the costlier estimators need on a benchmark."""
        return self.estimators.get(benchmark, self.estimators.get("default", []))

    def variant(self, name: str) -> Profile:
        """This profile under a variant's settings. Raises ValueError for an unknown one or a wrong key."""
        if name not in self.variants:
            known = ", ".join(self.variants) or "none"
            raise ValueError(f"profile {self.name} has no variant {name!r}; it has {known}")
        return self.model_copy(update={"variants": {}, "estimators": {}}).under(self.variants[name])

    def under(self, overrides: Mapping[str, Any]) -> Profile:
        """This profile with other settings; an override of None changes nothing.

        `n` sets the number of samples of every benchmark, and the most of every variant; `benchmarks` keeps
        the named ones with the profile's own counts (or the given ones, or those of a file), `mode` sets one
        training mode throughout. Raises ValueError for a wrong key or value.
        """
        settings, given = self.model_dump(), {k: v for k, v in overrides.items() if v is not None}
        chosen = given.pop("benchmarks", None)
        if chosen is not None:
            counts, files = counts_and_files(chosen)
            if not isinstance(chosen, dict):
                counts = {b: self.benchmarks.get(b) for b in counts}
            settings |= {"benchmarks": counts, "files": settings["files"] | files}
        if "n" in given:
            n = given.pop("n")
            if not isinstance(n, int) or n < 0:
                raise ValueError(f"n = {n!r} is no number of samples: 0 or more")
            settings["benchmarks"] = dict.fromkeys(settings["benchmarks"], n)
            settings["variants"] = {v: at_most(n, of) for v, of in settings["variants"].items()}
        if "mode" in given:
            mode = given.pop("mode")
            if mode not in get_args(TrainingMode):
                raise ValueError(f"mode = {mode!r} is neither 'exact' nor 'activated'")
            settings["modes"] = {"default": [mode]}
        if given.get("uncertainty", self.uncertainty) != self.uncertainty:
            del settings["tau"]  # it was the other's
        try:
            return Profile.model_validate({**settings, **given})
        except ValidationError as error:
            raise ValueError(problems(error, Profile.model_fields)) from None

    def named(self, name: str) -> Profile:
        """This profile as a run filed under another name, over the same store. Raises ValueError."""
        if folder_name(name) == self.name:
            return self
        return Profile.model_validate({**self.model_dump(), "name": name, "store": self.store or self.name})

    @property
    def teacher_name(self) -> str:
        """What records call the teacher; "" without one."""
        return str(self.teacher["model"]) if isinstance(self.teacher, dict) else self.teacher or ""

    def lora(self, mode: TrainingMode) -> LoraSettings:
        """T's settings in a mode."""
        return LoraSettings(
            rank=self.rank,
            alpha=self.alpha,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            mode=mode,
        )

    def method(self, mode: TrainingMode = "exact", voted: bool = False, seed: int = 0) -> Method:
        """What H, G and T are asked to do in a training mode; voted: whether an answer is several replies."""
        return Method(
            uncertainty=self.uncertainty,
            tau=self.tau,
            answer_with=self.answer_with,
            surer_by=self.surer_by,
            k=self.k,
            retries=self.retries,
            lora=self.lora(mode),
            answering=self.vote_sampling if voted else self.direct_sampling,
            writing=self.synthesis_sampling,
            candidate=self.candidate,
            normalise=self.normalise,
            validate=self.validate_examples,
            novelty=self.novelty,
            filters=tuple(self.filters),
            constrained=self.constrained,
            layout=self.layout,
            instructions=self.instructions,
            answer_opening=self.answer_opening,
            bank=self.bank,
            seed=seed,
        )

    @property
    def greedy_sampling(self) -> Sampling:
        """Greedy decoding of so many tokens as an answer may have."""
        return Sampling(max_tokens=self.answer_tokens)

    @property
    def direct_sampling(self) -> Sampling:
        """How a direct answer is decoded."""
        if self.answer_temperature == 0:
            return self.greedy_sampling
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
    """The profile `profiles/<name>.yaml` (or the YAML file `name`), under overrides as in `Profile.under`.

    Raises ValueError, in one line that names file and place, for an unknown profile or key, for what is no
    profile, and for a key given twice.
    """
    path = sources.found(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not path.exists():
        raise ValueError(f"no profile {name!r}{meant(name, profile_names())}; or name a YAML file")
    read = read_yaml(path)
    try:
        profile = Profile.model_validate({"name": path.stem, **read})
    except ValidationError as error:
        raise ValueError(f"{path.name}: {problems(error, Profile.model_fields)}") from None
    return _located(profile.under(overrides), path.parent)


def _located(p: Profile, folder: Path) -> Profile:
    """The profile with the whole paths of its files, which may lie beside it. Raises ValueError for none."""
    whole: dict[str, dict[str, str]] = {"files": {}, "pools": {}}
    for kind in whole:
        for name, path in getattr(p, kind).items():
            found = sources.found(path, folder)
            if not found.is_file():
                raise ValueError(f"{kind.replace('files', 'benchmarks')}.{name}: there is no file {path!r}")
            whole[kind][name] = str(found.absolute())
    return p.model_copy(update=whole)
