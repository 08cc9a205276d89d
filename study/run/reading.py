"""What a study's store says, as frames; nothing is computed for them, but for `embeddings_frame`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import pandas as pd

from study.data import benchmarks
from study.data.models import is_here
from study.run import frames
from study.run.arms import ARMS, Step
from study.run.config import Profile
from study.run.frames import Run
from study.run.rivals import vector
from study.run.stages import Remembered
from ttsi.algorithm import Outcome
from ttsi.types import Query, Sample, Synthesis


class Reading:
    """The frames of a study, out of what it knows of its samples and stages."""

    profile: Profile
    dtype: str
    variant_name: str

    @abstractmethod
    def samples(self, benchmark: str, seed: int) -> list[Sample]: ...

    @abstractmethod
    def stages(self, benchmark: str, seed: int, step: Step = ..., compute: bool = False) -> Remembered: ...

    @abstractmethod
    def selections(self, names: Sequence[str] | None, benchmark: str, seed: int) -> Iterator[Step]: ...

    @abstractmethod
    def play(
        self, step: tuple[Any, ...], queries: Sequence[Query], benchmark: str, seed: int, compute: bool
    ) -> Any: ...

    @abstractmethod
    def embed(self, benchmarks: Sequence[str] | None = None) -> None: ...

    @property
    def run_rows(self) -> Run:
        """What every row says of the run."""
        return Run(self.profile, self.dtype, self.variant_name)

    def records(self, arms: Sequence[str] | None = None) -> pd.DataFrame:
        """One judged row per benchmark, sample, seed, arm, mode and inference of what is stored.

        status "error": the machine failed; the row has no verdict and is never scored.
        Columns: `frames.RECORDS`.
        """
        rows = []
        for benchmark, seed in self._pairs():
            samples = {s.id: s for s in self.samples(benchmark, seed)}
            for step in self.selections(arms, benchmark, seed):
                done = self.play(step, self._queries(benchmark, seed), benchmark, seed, False).outcomes
                likely = self.stages(benchmark, seed, step).likelihood if self._reads else None
                rows += [
                    frames.record(self.run_rows, samples[o.id], o, step, seed, likely)
                    for o in self._ran(step, done)
                ]
        return frames.outcomes_frame(rows, frames.RECORDS)

    @property
    def _reads(self) -> bool:
        """Whether replies' tokens can be told apart here: nothing is fetched for it."""
        return self.profile.answer_opening or is_here(self.profile.model)

    def _ran(self, step: Step, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """The outcomes of an arm as far as it was run: whole groups from the first on, or all samples.

        Of a run that was cut, what is known first are the samples that nothing had to be computed for: to
        count those alone would be to count the certain ones; so would whole groups of them behind a gap.
        """
        size = len(outcomes) if ARMS[step.arm].mixed else self.profile.batch
        groups = [outcomes[i : i + size] for i in range(0, len(outcomes), max(1, size))]
        ran = takewhile(lambda group: all(map(frames.known, group)), groups)
        return [o for group in ran for o in group]

    def scores(self) -> pd.DataFrame:
        """One row per benchmark, sample and seed: what H and its rivals say. Columns: `frames.SCORES`."""
        rows = [
            row
            for b, seed in self._pairs()
            for row in frames.scores(self.run_rows, self.samples(b, seed), self.stages(b, seed), self._reads)
        ]
        return frames.outcomes_frame(rows, frames.SCORES)

    def examples_frame(self) -> pd.DataFrame:
        """One row per synthetic example, without its text. Columns: `frames.EXAMPLES`."""
        rows = [
            row
            for b, seed in self._pairs()
            for row in frames.examples(self.run_rows, self._queries(b, seed), self.stages(b, seed))
        ]
        return frames.outcomes_frame(rows, frames.EXAMPLES)

    def embeddings_frame(self, compute: bool = True) -> pd.DataFrame:
        """One row per question, asked or written: principal components of the model's hidden states.

        kind: "seed" or "synthetic". compute: embeds first what isn't yet.
        """
        if compute:
            self.embed()
        vectors: list[tuple[dict[str, Any], np.ndarray]] = []
        for benchmark, seed in self._pairs():
            queries, stages = self._queries(benchmark, seed), self.stages(benchmark, seed)
            for kind, texts in (("seed", None), ("synthetic", stages.written_questions)):
                for i, done in stages.embed(queries, texts).items():
                    key = {"variant": self.variant_name, "benchmark": benchmark, "sample": i, "seed": seed}
                    vectors += [
                        ({**key, "kind": kind, "index": n}, vector(v)) for n, v in enumerate(done.value or ())
                    ]
        return frames.embeddings_frame(vectors)

    def samples_frame(self) -> pd.DataFrame:
        """One row per sample of what is studied: counts and flags, no text. Columns: `frames.SAMPLES`."""
        p, rows = self.profile, []
        for benchmark, seed in self._pairs():
            samples = self.samples(benchmark, seed)
            original = benchmarks.load(benchmark, len(samples), "original", seed, p.keep_components)
            rows += [frames.sample_row(s, o, seed) for s, o in zip(samples, original, strict=True)]
        return frames.outcomes_frame(rows, frames.SAMPLES)

    def examples(self, benchmark: str, seed: int = 0) -> dict[str, Synthesis]:
        """The synthetic examples stored for a benchmark, by sample id."""
        queries = self._queries(benchmark, seed)
        done = self.stages(benchmark, seed).under(filters=()).synthesize(queries) if queries else {}
        return {i: d.value for i, d in done.items() if d.value is not None}

    def _queries(self, benchmark: str, seed: int) -> list[Query]:
        return [s.query for s in self.samples(benchmark, seed)]

    def _pairs(self, benchmarks: Sequence[str] | None = None) -> Iterator[tuple[str, int]]:
        """Every benchmark and seed that can be had."""
        for benchmark in benchmarks or self.profile.benchmarks:
            for seed in self.profile.seeds:
                if self.samples(benchmark, seed):
                    yield benchmark, seed
