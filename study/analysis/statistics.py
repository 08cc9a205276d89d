"""Estimates with intervals that hold at small n. Pure: arrays in, frozen results out.

Everything is a share in [0, 1] (tables turn it into per cent). The sample is the unit: several
seeds are averaged per sample first, so that more seeds never pass for more samples.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import isnan, nan, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]

LEVEL = 0.95  # of every interval
RESAMPLES = 9999
CLUSTER_DRAWS = 2000
EXACT = 150  # samples up to which the power of a test is summed up, not approximated
BOOTSTRAP_FROM_N = 50
BOOTSTRAP_FROM_DISCORDANT = 10
MIN_CLUSTERS = 30
Z = float(special.ndtri((1 + LEVEL) / 2))  # 1.96


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
    z, share = Z, min(successes / n, 1.0)
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
    half = Z * sqrt(((d**2).sum() + 2) / n - centre**2) / sqrt(n)
    return Estimate(
        float(d.mean()), max(centre - half, -1.0), min(centre + half, 1.0), len(d), "Bonett–Price"
    )


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar p value from the discordant pairs of one seed; 1 if there are none."""
    return min(1.0, 2 * float(special.bdtr(min(gained, lost), gained + lost, 0.5))) if gained + lost else 1.0


def mcnemar_power(n: int, discordant: float, d: float) -> float:
    """Probability that the exact test on n pairs has p < .05 at a true difference d of `discordant` pairs."""
    from scipy import stats  # slow to import

    m = np.arange(n + 1)
    # The most on the smaller side that still tells the arms apart, of m pairs that differ; -1: nothing does.
    most = stats.binom.ppf((1 - LEVEL) / 2, m, 0.5) - 1
    most += special.bdtr(most + 1, m, 0.5) < (1 - LEVEL) / 2
    gains = (discordant + d) / (2 * discordant)
    one_sided = [np.where(most >= 0, stats.binom.cdf(most, m, p), 0) for p in (gains, 1 - gains)]
    return float(stats.binom.pmf(m, n, discordant) @ sum(one_sided))


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
    # statsmodels' own collects all of Python's garbage at each call: a tenth of the time of a table.
    p = np.array(list(p_values.values()))
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return dict(zip(p_values, map(float, adjusted), strict=True))


@cache  # a table asks it for the same few pairs, row after row
def smallest_detectable(n: int, discordant: float, power: float = 0.8) -> float:
    """Smallest true paired difference that McNemar's test finds with the given power; nan if none.

    `discordant`: share of samples on which the arms differ. Normal approximation (Connor 1987,
    Biometrics 43:207): √n d = z_α √ψ + z_β √(ψ − d²). A difference d needs at least d discordant,
    so ψ is taken as max(discordant, d). Up to EXACT samples the test's power is summed up instead.
    """
    if n < 1 or not 0 <= discordant <= 1:
        raise ValueError(f"n = {n}, discordant share {discordant}")
    z_alpha, z_beta = Z, float(special.ndtri(power))

    def excess(d: float) -> float:
        psi = max(discordant, d)
        if n <= EXACT:
            return mcnemar_power(n, psi, d) - power
        return sqrt(n) * d - z_alpha * sqrt(psi) - z_beta * sqrt(max(psi - d**2, 0.0))

    return float(optimize.brentq(excess, 1e-9, 1.0)) if excess(1.0) > 0 else nan


def cluster_bootstrap(
    value: Callable[[Places], float], clusters: Sequence[Hashable], seed: int = 0
) -> Estimate:
    """A value of samples with a percentile interval from resampling whole clusters; seeded.

    value: of the samples at these positions, which may come more than once; nan of a draw is left out.
    clusters: what each sample hangs together with. Raises TooFew under 30 clusters, where such an interval is
    known to be too narrow.
    """
    members: dict[Hashable, list[int]] = {}
    for position, name in enumerate(clusters):
        members.setdefault(name, []).append(position)
    k = len(members)
    if k < MIN_CLUSTERS:
        raise TooFew(f"too few: {k} clusters, a cluster bootstrap needs {MIN_CLUSTERS}")
    # In the order of their names: the order of records is an accident of who exported them.
    groups = [np.array(members[name]) for name in sorted(members, key=repr)]
    rng = np.random.default_rng(seed)
    every, size = np.concatenate(groups), np.array([len(g) for g in groups])
    start = np.cumsum(size) - size

    def draw() -> Places:
        picked = rng.integers(k, size=k)
        n = size[picked]
        return every[np.repeat(start[picked] - np.cumsum(n) + n, n) + np.arange(n.sum())]

    drawn = (draw() for _ in range(CLUSTER_DRAWS))
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile([value(places) for places in drawn], [tail, 1 - tail])
    return Estimate(value(np.arange(len(clusters))), float(low), float(high), k, "cluster bootstrap")


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
