"""What H, G and T are asked to do: every choice that the method leaves, with the paper's as the default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from ttsi import estimator, prompts
from ttsi.types import PAPER_SAMPLING, Layout, LoraSettings, Sampling, TrainingMode

Uncertain = Literal["margin", "likelihood"]
THRESHOLDS: dict[Uncertain, float] = {"margin": 0.95, "likelihood": 0.5}
"""The natural τ of each H: the paper's; and that at which a whole answer is as likely as not."""
Filter = Literal["valid", "novel", "agreeing", "in_reach"]
"""valid: keeps to the tools' schemas. novel: not the question itself. agreeing: asked the example's
question, the model as it is makes the example's calls. in_reach: of DRAWS sampled answers to it some make
them, not all: there is something to learn, and it can be learnt."""


@dataclass(frozen=True)
class Method:
    """What H, G and T are asked to do; the defaults are the paper's, but for greedy answers.

    uncertainty: H's estimator, the paper's margin over the tools, or the likelihood of the base answer, which
    is then given first. tau: adapted is what H is less certain of. answer_with: "adapted" accepts the adapted
    answer; "surer" only if the adapted model finds it more than `surer_by` times as likely as the base model
    its own. filters: what examples must pass; others are written until K do. constrained: answers are calls
    that keep to the grammar of their tools, see `grammar`; what G writes is free. instructions: words of
    one's own, the last of every prompt's system turn, also where G writes and T teaches.
    """

    uncertainty: Uncertain = "margin"
    tau: float = 0.95
    answer_with: Literal["adapted", "surer"] = "adapted"
    surer_by: float = 1.0
    k: int = 1
    retries: int = 5
    lora: LoraSettings = field(default_factory=LoraSettings)
    answering: Sampling = field(default_factory=Sampling)
    writing: Sampling = PAPER_SAMPLING
    candidate: estimator.Candidate = "name"
    normalise: bool = False
    validate: Literal["none", "schema"] = "none"
    novelty: Literal["any", "reject_copies"] = "any"
    filters: tuple[Filter, ...] = ()
    layout: Layout = "native"
    instructions: str = ""
    answer_opening: bool = False
    constrained: bool = False
    bank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {
            "uncertainty": (self.uncertainty, get_args(Uncertain)),
            "answer_with": (self.answer_with, ("adapted", "surer")),
            "layout": (self.layout, get_args(Layout)),
            "mode": (self.lora.mode, get_args(TrainingMode)),
        } | {f"filters[{i}]": (name, get_args(Filter)) for i, name in enumerate(self.filters)}
        for name, (chosen, known) in choices.items():
            if chosen not in known:
                raise ValueError(f"{name} = {chosen!r} is none of {', '.join(known)}")
        if not self.surer_by > 0:
            raise ValueError(f"surer_by = {self.surer_by!r} is no factor: above 0")

    @property
    def opening(self) -> str:
        """What every reply is made to begin with; "" = nothing."""
        return prompts.opening(self.layout) if self.answer_opening or self.constrained else ""
