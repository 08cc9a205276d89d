"""Estimates with intervals that hold at small n. Pure: arrays in, frozen results out, no torch.

Everything is a share in [0, 1] (tables turn it into per cent). The sample is the unit: several
seeds are averaged per sample first, so that more seeds never pass for more samples.
For the estimator (H) *positive* means: a wrong base answer, flagged uncertain by margin < tau.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isnan, nan, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

LEVEL = 0.95  # of every interval
RESAMPLES = 9999
BOOTSTRAP_FROM_N = 50
BOOTSTRAP_FROM_DISCORDANT = 10
MIN_CLUSTERS = 30
MIN_PER_CLASS = 10
_Z = float(special.ndtri((1 + LEVEL) / 2))


class TooFew(ValueError):
    """There is too little data for the asked statistic; the message says what there is."""


@dataclass(frozen=True)
class Estimate:
    """A value with its interval. `n`: the independent samples behind it; `method`: the interval's name."""

    value: float
    low: float
    high: float
    n: float
    method: str


@dataclass(frozen=True)
class Paired:
    """Two arms on the same samples. `difference` is second minus first, above 0 = the second is better.

    `gained`, `lost`: samples on which the second arm is better, worse (by their mean over seeds).
    `p`: two-sided; exact McNemar at one seed, sign-flip test of the per-sample means at several.
    `p_by_seed`: exact McNemar of each seed alone. `detectable`: see `smallest_detectable`.
    """

    difference: Estimate
    gained: int
    lost: int
    p: float
    p_by_seed: tuple[float, ...]
    detectable: float


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
    on the same samples, hence too good; only ever shown under that name.
    """

    taus: tuple[float, ...]
    out_of_fold: Rates
    in_sample: Rates


def wilson(successes: float, n: float) -> Estimate:
    """Share of successes with the Wilson score interval.

    A fractional count (sum of per-sample means over seeds) is allowed: the interval is then at most
    too wide, since a mean of seeds varies less than one draw. n = 0 gives nan in [0, 1].
    Raises ValueError unless 0 ≤ successes ≤ n.
    """
    if not 0 <= successes <= n + 1e-9:
        raise ValueError(f"{successes} successes of {n}")
    if n == 0:
        return Estimate(nan, 0.0, 1.0, 0, "Wilson")
    z, share = _Z, min(successes / n, 1.0)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # At 0 and n the bound is exactly the share; rounding must not push it past.
    low, high = min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share)
    return Estimate(share, low, high, n, "Wilson")


def paired(first: npt.ArrayLike, second: npt.ArrayLike, seed: int = 0) -> Paired:
    """Second minus first arm on the same samples, with interval, counts and tests.

    `first`, `second`: correct or not, shape (samples,) or (samples, seeds); nan = not scored. A pair
    with a nan is left out; a sample without any pair is left out. The interval is Bonett–Price
    (2012), right at small n and with no discordant pair; from n ≥ 50 with ≥ 10 discordant samples
    a seeded percentile bootstrap over samples. Raises TooFew without a single pair.
    """
    a, b = (np.asarray(x, dtype=float) for x in (first, second))
    if a.shape != b.shape or a.ndim not in (1, 2):
        raise ValueError(f"arms have shapes {a.shape} and {b.shape}")
    by_seed = (b - a).reshape(len(a), -1)
    by_seed = by_seed[~np.isnan(by_seed).all(axis=1)]
    by_seed = by_seed[:, ~np.isnan(by_seed).all(axis=0)]
    if by_seed.size == 0:
        raise TooFew("too few: no sample was scored under both arms")
    differences = np.nanmean(by_seed, axis=1)
    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    p_by_seed = tuple(mcnemar(int((s > 0).sum()), int((s < 0).sum())) for s in by_seed.T)
    return Paired(
        difference=_difference_interval(differences, seed),
        gained=gained,
        lost=lost,
        p=p_by_seed[0] if len(p_by_seed) == 1 else sign_flip(differences, seed),
        p_by_seed=p_by_seed,
        # The variance of a paired difference is the mean square; at one seed that is the discordant share.
        detectable=smallest_detectable(len(differences), float(np.mean(differences**2))),
    )


def _difference_interval(differences: Floats, seed: int) -> Estimate:
    n, discordant = len(differences), int((differences != 0).sum())
    varies = differences.min() < differences.max()
    if n >= BOOTSTRAP_FROM_N and discordant >= BOOTSTRAP_FROM_DISCORDANT and varies:
        # Few values are distinct, so drawing how often each comes up is drawing the samples, only faster.
        values, counts = np.unique(differences, return_counts=True)
        draws = np.random.default_rng(seed).multinomial(n, counts / n, size=RESAMPLES)
        low, high = np.quantile(draws @ values / n, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(float(differences.mean()), float(low), float(high), n, "bootstrap")
    return bonett_price(differences)


def bonett_price(differences: npt.ArrayLike) -> Estimate:
    """Mean paired difference with the Bonett–Price adjusted Wald interval, clipped to [−1, 1].

    `differences`: one per sample, in {−1, 0, 1} at one seed or [−1, 1] as a mean over seeds. One
    pseudo-sample gained and one lost are added, which at one seed is the published formula
    (Bonett and Price 2012, Statistical Methods in Medical Research 21:479); without any discordant
    pair the interval keeps a width of about 2.8 z / n. The value itself is the plain mean.
    """
    d = np.asarray(differences, dtype=float)
    if not d.size or not np.isfinite(d).all() or np.abs(d).max() > 1:
        raise ValueError("differences must be finite, in [−1, 1], and at least one")
    n = len(d) + 2
    centre = d.sum() / n
    half = _Z * sqrt(((d**2).sum() + 2) / n - centre**2) / sqrt(n)
    return Estimate(
        float(d.mean()), max(centre - half, -1.0), min(centre + half, 1.0), len(d), "Bonett–Price"
    )


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar p value from the discordant pairs of one seed; 1 if there are none."""
    return min(1.0, 2 * float(special.bdtr(min(gained, lost), gained + lost, 0.5))) if gained + lost else 1.0


def sign_flip(differences: npt.ArrayLike, seed: int = 0) -> float:
    """Two-sided p value of a mean paired difference of 0, by flipping each sample's sign at random.

    For one seed this tends to the exact McNemar; it also holds for means over seeds, where pooling
    the seeds into one McNemar would count each sample several times. Monte Carlo, seeded.
    """
    d = np.asarray(differences, dtype=float)
    d = d[d != 0]
    if not d.size:
        return 1.0
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(RESAMPLES, len(d)))
    # A sum of thirds is not exact: without the slack a flip equal to what was seen may count as less.
    extreme = np.abs(signs @ d) >= abs(d.sum()) - 1e-9
    return float((1 + extreme.sum()) / (1 + RESAMPLES))


def holm(p_values: Mapping[Any, float]) -> dict[Any, float]:
    """Holm-adjusted p value per name, in the order given. Raises ValueError on one outside [0, 1] or nan."""
    if any(isnan(p) or not 0 <= p <= 1 for p in p_values.values()):
        raise ValueError(f"p values out of range: {dict(p_values)}")
    if not p_values:
        return {}
    # Here and below: what takes a second to import, every notebook would wait for, and few need.
    from statsmodels.stats.multitest import multipletests

    adjusted = multipletests(list(p_values.values()), method="holm")[1]
    return dict(zip(p_values, map(float, adjusted), strict=True))


def smallest_detectable(n: int, discordant: float, power: float = 0.8) -> float:
    """Smallest true paired difference that McNemar's test finds with the given power; nan if none.

    `discordant`: share of samples on which the arms differ. Normal approximation (Connor 1987,
    Biometrics 43:207): √n d = z_α √ψ + z_β √(ψ − d²). A difference d needs at least d discordant,
    so ψ is taken as max(discordant, d).
    """
    if n < 1 or not 0 <= discordant <= 1:
        raise ValueError(f"n = {n}, discordant share {discordant}")
    z_alpha, z_beta = _Z, float(special.ndtri(power))

    def excess(d: float) -> float:
        psi = max(discordant, d)
        return sqrt(n) * d - z_alpha * sqrt(psi) - z_beta * sqrt(max(psi - d**2, 0.0))

    return float(optimize.brentq(excess, 1e-9, 1.0)) if excess(1.0) > 0 else nan


def cluster_bootstrap(values: npt.ArrayLike, clusters: Sequence[Hashable], seed: int = 0) -> Estimate:
    """Mean of the values with a percentile interval from resampling whole clusters; seeded.

    `values`: one per sample (correct, or a paired difference); `clusters`: what each sample hangs
    together with. Raises TooFew under 30 clusters, where such an interval is known to be too narrow.
    """
    v = np.asarray(values, dtype=float)
    names = list(clusters)
    if len(v) != len(names):
        raise ValueError(f"{len(v)} values, {len(names)} clusters")
    order = {name: i for i, name in enumerate(dict.fromkeys(names))}
    if len(order) < MIN_CLUSTERS:
        raise TooFew(f"too few: {len(order)} clusters, a cluster bootstrap needs {MIN_CLUSTERS}")
    index = np.array([order[name] for name in names])
    sums, sizes = np.bincount(index, weights=v), np.bincount(index)
    k = len(order)
    draws = np.random.default_rng(seed).multinomial(k, np.full(k, 1 / k), size=RESAMPLES)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile((draws @ sums) / (draws @ sizes), [tail, 1 - tail])
    return Estimate(float(v.mean()), float(low), float(high), k, "cluster bootstrap")


def average(estimates: Sequence[Estimate]) -> Estimate:
    """Unweighted mean of independent estimates; its interval combines their own (MOVER).

    Zou and Donner 2008, Statistics in Medicine 27:1693: each side's distances add in squares, so
    that skewed intervals stay skewed. Raises ValueError on an empty list.
    """
    if not estimates:
        raise ValueError("nothing to average")
    k = len(estimates)
    value = sum(e.value for e in estimates) / k
    below = sqrt(sum((e.value - e.low) ** 2 for e in estimates)) / k
    above = sqrt(sum((e.high - e.value) ** 2 for e in estimates)) / k
    return Estimate(value, value - below, value + above, sum(e.n for e in estimates), "MOVER")


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
    half = _Z * sqrt(variance) / (value * (1 - value))
    centre = np.log(value / (1 - value))
    low, high = (float(1 / (1 + np.exp(-x))) for x in (centre - half, centre + half))
    return Estimate(value, low, high, n, "DeLong, logit")


def _hanley_mcneil(value: float, n_right: float, n_wrong: float) -> tuple[float, float]:
    """Bounds where the observed AUC is just not rejected, under the exponential model's variance."""
    z = _Z

    def variance(t: float) -> float:
        q1, q2 = t / (2 - t), 2 * t**2 / (1 + t)
        return (t * (1 - t) + (n_right - 1) * (q1 - t**2) + (n_wrong - 1) * (q2 - t**2)) / (n_right * n_wrong)

    def bound(limit: float, sign: int) -> float:
        def excess(t: float) -> float:
            return sign * (t - value) - z * sqrt(max(variance(t), 0.0))

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
) -> BestTau:
    """The threshold of highest J, honestly (out of fold, by cluster) and in sample; see `BestTau`.

    Among equally good thresholds the smallest wins: it adapts the fewest samples. Fewer clusters than
    `folds` means as many folds as clusters. Raises TooFew under ten right or wrong, with a single
    cluster, or if a fold leaves nothing wrong (or right) to choose by.
    """
    from sklearn import model_selection

    m, right = _margins(margins, correct)
    check_enough(right, seeds)
    index = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    groups = np.array([index[name] for name in clusters])
    if len(index) < 2:
        raise TooFew("too few: a single cluster leaves nothing to choose tau by")
    splitter = model_selection.StratifiedGroupKFold(min(folds, len(index)), shuffle=True, random_state=seed)
    flagged, taus = np.zeros(len(m), dtype=bool), []
    for train, held_out in splitter.split(m, right, groups):
        if right[train].all() or not right[train].any():
            raise TooFew("too few: a fold leaves only right or only wrong answers to choose tau by")
        tau = _peak(m[train], right[train])
        taus.append(tau)
        flagged[held_out] = m[held_out] < tau
    out_of_fold = _rates(flagged, right, float(np.median(taus)), seeds)
    return BestTau(tuple(taus), out_of_fold, rates(m, right, _peak(m, right), seeds))


def _peak(margins: Floats, right: Bools) -> float:
    """Smallest tau of highest J. Candidates lie halfway between neighbouring margins."""
    distinct = np.unique(margins)
    halfway = np.maximum((distinct[:-1] + distinct[1:]) / 2, np.nextafter(distinct[:-1], inf))
    candidates = np.concatenate([distinct[:1], halfway, np.nextafter(distinct[-1:], inf)])
    tpr, fpr = (
        np.searchsorted(np.sort(margins[kind]), candidates, side="left") / kind.sum()
        for kind in (~right, right)
    )
    return float(candidates[np.argmax(tpr - fpr)])


def _margins(margins: npt.ArrayLike, correct: npt.ArrayLike) -> tuple[Floats, Bools]:
    m, right = np.asarray(margins, dtype=float), np.asarray(correct, dtype=bool)
    if m.shape != right.shape or m.ndim != 1:
        raise ValueError(f"margins have shape {m.shape}, correct {right.shape}")
    if not np.isfinite(m).all():
        raise ValueError("a margin is not finite: an unscored sample must not pass for a sure one")
    if right.all() or not right.any():
        raise TooFew(f"too few: {right.sum()} right, {(~right).sum()} wrong")
    return m, right
