"""How well a margin finds wrong answers: rates at a threshold, ROC and its area, the best threshold.

Shares in [0, 1]. *Positive* means: a wrong base answer, flagged uncertain by margin < tau.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf, nan, sqrt

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

from study.analysis.statistics import Estimate, Floats, TooFew, Z, wilson

Bools = npt.NDArray[np.bool_]
MIN_PER_CLASS = 10
SHUFFLES = 199


@dataclass(frozen=True)
class Rates:
    """How well `margin < tau` finds wrong base answers.

    `tpr`: wrong answers flagged; `fpr`: right answers flagged; `j`: Youden's J = TPR − FPR;
    `f1`: of the flag as a detector of wrong answers (nan if nothing is wrong and nothing flagged).
    `uncertain`: share of all samples flagged. Paper: Table 2 and Figure 4.
    """

    tau: float
    tpr: Estimate
    fpr: Estimate
    j: Estimate
    f1: float
    uncertain: Estimate


@dataclass(frozen=True)
class Curve:
    """The ROC curve: flagging by `margin < tau[i]` gives `fpr[i]`, `tpr[i]`; tau ascends from −inf."""

    tau: Floats
    fpr: Floats
    tpr: Floats


@dataclass(frozen=True)
class BestTau:
    """The threshold with the highest J.

    `taus`, `out_of_fold`: chosen on all folds of clusters but one, judged on the one left out, the
    verdicts pooled (`out_of_fold.tau` is the median of `taus`). `in_sample`: chosen and judged
    on the same samples, hence too good; only ever shown under that name. Neither has intervals: those of
    a fixed threshold leave out that this one was chosen, and from which folds.
    `chance`: the J out of fold that 95 % of scores which know nothing stay below: these very scores,
    shuffled among the samples. `p`: share of them that reach the J seen. Both look upwards only: a J below 0
    shows no more than that no threshold was found.
    """

    taus: tuple[float, ...]
    out_of_fold: Rates
    in_sample: Rates
    chance: float
    p: float


def check_enough(correct: npt.ArrayLike, seeds: int = 1) -> None:
    """Nothing; raises TooFew unless at least 10 samples are right and 10 wrong.

    `correct`: one per sample and seed; `seeds`: how many rows each sample has.
    """
    right = np.asarray(correct, dtype=bool)
    n_right, n_wrong = right.sum() / seeds, (~right).sum() / seeds
    if min(n_right, n_wrong) < MIN_PER_CLASS:
        raise TooFew(f"too few: {n_right:g} right, {n_wrong:g} wrong; {MIN_PER_CLASS} of each are needed")


def roc(margins: npt.ArrayLike, correct: npt.ArrayLike) -> Curve:
    """ROC curve of `margin < tau` as a detector of wrong answers, one point per distinct margin.

    `margins`: higher = more certain. Raises ValueError on non-finite margins, TooFew unless there
    are both right and wrong answers.
    """
    from sklearn import metrics

    m, right = _margins(margins, correct)
    fpr, tpr, thresholds = metrics.roc_curve(~right, -m, drop_intermediate=False)
    # scikit-learn flags −margin ≥ threshold, i.e. ties included; the next float makes `<` agree.
    tau = np.where(np.isinf(thresholds), -inf, np.nextafter(-thresholds, inf))
    return Curve(tau, fpr, tpr)


def auc(margins: npt.ArrayLike, correct: npt.ArrayLike, seeds: int = 1) -> Estimate:
    """Chance that a right answer has a larger margin than a wrong one (ties count half).

    1 = the margin tells right from wrong, 0.5 = it knows nothing. Interval: DeLong's variance
    (1988, Biometrics 44:837) on the logit scale; where that variance is 0 (full separation) the
    score interval from Hanley and McNeil's variance. Raises like `roc`, and TooFew as `check_enough`.
    `seeds`: rows per sample; the interval counts a sample once, whatever the number of seeds.
    """
    from scipy import stats

    m, right = _margins(margins, correct)
    check_enough(right, seeds)
    sure, unsure = m[right], m[~right]
    everyone = stats.rankdata(m)
    above = (everyone[right] - stats.rankdata(sure)) / len(unsure)
    below = 1 - (everyone[~right] - stats.rankdata(unsure)) / len(sure)
    value = float(above.mean())
    variance = float(seeds * (above.var(ddof=1) / len(sure) + below.var(ddof=1) / len(unsure)))
    n = len(m) / seeds
    if variance <= 0 or not 0 < value < 1:
        low, high = _hanley_mcneil(value, len(sure) / seeds, len(unsure) / seeds)
        return Estimate(value, low, high, n, "Hanley–McNeil score")
    half = Z * sqrt(variance) / (value * (1 - value))
    centre = np.log(value / (1 - value))
    low, high = (float(1 / (1 + np.exp(-x))) for x in (centre - half, centre + half))
    return Estimate(value, low, high, n, "DeLong, logit")


def _hanley_mcneil(value: float, n_right: float, n_wrong: float) -> tuple[float, float]:
    """Bounds where the observed AUC is just not rejected, under the exponential model's variance."""

    def variance(t: float) -> float:
        q1, q2 = t / (2 - t), 2 * t**2 / (1 + t)
        return (t * (1 - t) + (n_right - 1) * (q1 - t**2) + (n_wrong - 1) * (q2 - t**2)) / (n_right * n_wrong)

    def bound(limit: float, sign: int) -> float:
        def excess(t: float) -> float:
            return sign * (t - value) - Z * sqrt(max(variance(t), 0.0))

        inner = value + sign * 1e-9
        return (
            float(optimize.brentq(excess, inner, limit))
            if excess(limit - sign * 1e-9) > 0 > excess(inner)
            else limit
        )

    return (bound(0.0, -1) if value > 0 else 0.0), (bound(1.0, 1) if value < 1 else 1.0)


def rates(margins: npt.ArrayLike, correct: npt.ArrayLike, tau: float, seeds: int = 1) -> Rates:
    """TPR, FPR, J, F1 and share flagged by `margin < tau`, with intervals.

    TPR, FPR: Wilson; J: Newcombe's (1998, method 10) from those two. `seeds`: rows per sample,
    counts are divided by it. Raises like `roc`; whether ten of each are there is the caller's question.
    """
    m, right = _margins(margins, correct)
    return _rates(m < tau, right, tau, seeds)


def _rates(flagged: Bools, right: Bools, tau: float, seeds: int) -> Rates:
    wrong_flagged, right_flagged = (flagged & ~right).sum() / seeds, (flagged & right).sum() / seeds
    n_wrong, n_right = (~right).sum() / seeds, right.sum() / seeds
    tpr, fpr = wilson(wrong_flagged, n_wrong), wilson(right_flagged, n_right)
    j = tpr.value - fpr.value
    below = sqrt((tpr.value - tpr.low) ** 2 + (fpr.high - fpr.value) ** 2)
    above = sqrt((tpr.high - tpr.value) ** 2 + (fpr.value - fpr.low) ** 2)
    size = n_wrong + wrong_flagged + right_flagged
    return Rates(
        tau=tau,
        tpr=tpr,
        fpr=fpr,
        j=Estimate(j, j - below, j + above, n_wrong + n_right, "Newcombe"),
        f1=float(2 * wrong_flagged / size) if size else nan,
        uncertain=wilson(wrong_flagged + right_flagged, n_wrong + n_right),
    )


def best_tau(
    margins: npt.ArrayLike,
    correct: npt.ArrayLike,
    clusters: Sequence[Hashable],
    folds: int = 5,
    seed: int = 0,
    seeds: int = 1,
    samples: Sequence[Hashable] | None = None,
) -> BestTau:
    """The threshold of highest J, honestly (out of fold, by cluster) and in sample; see `BestTau`.

    Among equally good thresholds the smallest wins: it adapts the fewest samples. Fewer clusters than
    `folds` means as many folds as clusters. `samples`: whose row each is, where a sample has several seeds'.
    Raises TooFew under ten right or wrong, with a single
    cluster, or if a fold leaves nothing wrong (or right) to choose by.
    """
    m, right = _margins(margins, correct)
    check_enough(right, seeds)
    index = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    if len(index) < 2:
        raise TooFew("too few: a single cluster leaves nothing to choose tau by")
    parts = _folds(tuple(right.tolist()), tuple(index[name] for name in clusters), folds, seed)
    if any(right[train].all() or not right[train].any() for train, _ in parts):
        raise TooFew("too few: a fold leaves only right or only wrong answers to choose tau by")

    dealt = np.stack([m, *_shuffled(m, samples or range(len(m)), seed)])  # the margins, then chance
    flagged, taus = np.zeros(dealt.shape, bool), []
    for train, held_out in parts:
        chosen = _peaks(dealt[:, train], right[train])
        flagged[:, held_out] = dealt[:, held_out] < chosen[:, None]
        taus.append(float(chosen[0]))
    js = flagged[:, ~right].mean(axis=1) - flagged[:, right].mean(axis=1)
    middle = float(np.median(taus))
    return BestTau(
        tuple(taus),
        _without_intervals(_rates(flagged[0], right, middle, seeds)),
        _without_intervals(rates(m, right, float(_peaks(m[None], right)[0]), seeds)),
        float(np.quantile(js[1:], 0.95)),
        float((1 + (js[1:] >= js[0] - 1e-9).sum()) / (1 + SHUFFLES)),
    )


@lru_cache(maxsize=16)  # the estimators that are compared share their samples
def _folds(
    right: tuple[bool, ...], groups: tuple[int, ...], folds: int, seed: int
) -> list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]]:
    """(rows to choose by, rows held out) of each fold, right and wrong alike in all, no cluster in two."""
    from sklearn import model_selection

    n = min(folds, len(set(groups)))
    splitter = model_selection.StratifiedGroupKFold(n, shuffle=True, random_state=seed)
    return list(splitter.split(np.zeros(len(right)), right, groups))


def _shuffled(values: Floats, samples: Sequence[Hashable], seed: int) -> Iterator[Floats]:
    """The values dealt to other samples, time and again; the rows of a sample stay together."""
    index = {name: i for i, name in enumerate(dict.fromkeys(samples))}
    unit = np.array([index[name] for name in samples])
    rows = [np.flatnonzero(unit == u) for u in range(len(index))]
    most = max(map(len, rows))
    table = np.stack([np.resize(r, most) for r in rows])  # a sample that lacks a seed's row repeats another
    rank = np.empty(len(unit), dtype=int)
    for r in rows:
        rank[r] = np.arange(len(r))
    rng = np.random.default_rng(seed)
    for _ in range(SHUFFLES):
        yield values[table[rng.permutation(len(rows))[unit], rank]]


def _without_intervals(rates: Rates) -> Rates:
    bare = {
        name: replace(getattr(rates, name), low=nan, high=nan, method="none") for name in ("tpr", "fpr", "j")
    }
    return replace(rates, **bare)


def _peaks(margins: Floats, right: Bools) -> Floats:
    """Smallest tau of highest J for each row of margins, (rows, samples). Candidates lie halfway between
    neighbouring margins."""
    order = np.argsort(margins, axis=1)
    rising, n_right = np.take_along_axis(margins, order, 1), np.cumsum(right[order], axis=1)
    flagged, total = np.arange(1, len(right) + 1), right.sum()
    j = (flagged - n_right) / (len(right) - total) - n_right / total
    j[:, :-1][rising[:, 1:] == rising[:, :-1]] = -inf  # only behind the last of equal margins
    best = j.argmax(axis=1)[:, None]
    below = np.take_along_axis(rising, best, 1)
    above = np.take_along_axis(rising, np.minimum(best + 1, len(right) - 1), 1)
    tau = np.maximum((below + above) / 2, np.nextafter(below, inf))
    tau = np.where(np.take_along_axis(j, best, 1) > 0, tau, rising[:, :1])  # else nothing is flagged
    return tau[:, 0]


def _margins(margins: npt.ArrayLike, correct: npt.ArrayLike) -> tuple[Floats, Bools]:
    m, right = np.asarray(margins, dtype=float), np.asarray(correct, dtype=bool)
    if m.shape != right.shape or m.ndim != 1:
        raise ValueError(f"margins have shape {m.shape}, correct {right.shape}")
    if not np.isfinite(m).all():
        raise ValueError("a margin is not finite: an unscored sample must not pass for a sure one")
    if right.all() or not right.any():
        raise TooFew(f"too few: {right.sum()} right, {(~right).sum()} wrong")
    return m, right


def delong(first: Sequence[float], second: Sequence[float], right: Sequence[bool]) -> Estimate:
    """AUC(first) − AUC(second) as detectors of right answers, both on the same samples, ties counting half.

    DeLong, DeLong and Clarke-Pearson (1988), Biometrics 44:837; `pooled` gives the p-value. Raises TooFew
    where there are fewer than MIN_PER_CLASS right or wrong answers.
    """
    known, parts = np.asarray(right, bool), []
    if min(known.sum(), (~known).sum()) < MIN_PER_CLASS:
        raise TooFew(f"{known.sum()} right and {(~known).sum()} wrong answers: fewer than {MIN_PER_CLASS}")
    for scores in (np.asarray(first, float), np.asarray(second, float)):
        gap = scores[known][:, None] - scores[~known][None, :]
        parts.append((gap > 0) + 0.5 * (gap == 0))
    differs = parts[0] - parts[1]
    value = float(differs.mean())
    variance = differs.mean(1).var(ddof=1) / known.sum() + differs.mean(0).var(ddof=1) / (~known).sum()
    spread = float(np.sqrt(variance))
    return Estimate(value, value - Z * spread, value + Z * spread, len(known), "DeLong")


def pooled(estimates: Sequence[Estimate]) -> tuple[Estimate, float]:
    """Estimates with normal intervals, weighted by 1 / variance, and the two-sided p of their being 0."""
    spreads: Floats = np.array([(e.high - e.low) / (2 * Z) for e in estimates])
    weights = 1 / np.maximum(spreads, 1e-12) ** 2
    value = float((weights * [e.value for e in estimates]).sum() / weights.sum())
    spread = float(1 / np.sqrt(weights.sum()))
    n = sum(e.n for e in estimates)
    p = float(2 * stats.norm.sf(abs(value) / spread))
    return Estimate(value, value - Z * spread, value + Z * spread, n, "inverse variance"), p
