"""Each interval and test against a library that computes it too, and by how often it covers the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics
from statsmodels.stats import contingency_tables, multitest, proportion

from study.analysis import detection, statistics
from study.analysis.statistics import TooFew


def covered(intervals, truth):
    """Share of (low, high) pairs that hold the truth."""
    return np.mean([low <= truth <= high for low, high in intervals])


# --- one accuracy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("successes", "n"), [(0, 8), (8, 8), (3, 8), (98, 294), (12.4, 40)])
def test_wilson_equals_statsmodels(successes, n):
    ours = statistics.wilson(successes, n)
    low, high = proportion.proportion_confint(successes, n, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=1e-12)
    assert ours.value == pytest.approx(successes / n)


def test_wilson_of_nothing_is_everything():
    nothing = statistics.wilson(0, 0)
    assert np.isnan(nothing.value)
    assert (nothing.low, nothing.high) == (0, 1)


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="successes of"):
        statistics.wilson(successes, n)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_its_value_and_stays_a_share(counts):
    e = statistics.wilson(*counts)
    assert 0 <= e.low <= e.value <= e.high <= 1


def test_wilson_over_seeds_covers_when_seeds_agree():
    """Five seeds that repeat each other carry the information of one; counted as five they undercover."""
    rng = np.random.default_rng(0)
    per_sample = rng.random((2000, 20)) < 0.4
    honest = [statistics.wilson(x.sum(), 20) for x in per_sample]
    pooled = [statistics.wilson(5 * x.sum(), 100) for x in per_sample]
    assert covered([(e.low, e.high) for e in honest], 0.4) > 0.93
    assert covered([(e.low, e.high) for e in pooled], 0.4) < 0.7


# --- two arms -------------------------------------------------------------------------------------------


def test_bonett_price_by_hand():
    """10 samples, 3 gained, 1 lost: p̃ = 4/12 and 2/12, d̃ = 1/6, se = √((1/2 − 1/36)/12)."""
    e = statistics.bonett_price([1, 1, 1, -1] + [0] * 6)
    half = 1.959963985 * np.sqrt((1 / 2 - 1 / 36) / 12)
    assert e.value == pytest.approx(0.2)
    assert (e.low, e.high) == pytest.approx((1 / 6 - half, 1 / 6 + half))


def test_no_discordant_pair_still_has_an_interval():
    result = statistics.paired(np.ones(24), np.ones(24))
    assert result.difference.value == 0
    assert result.difference.low < -0.05 < 0.05 < result.difference.high
    assert (result.gained, result.lost, result.p) == (0, 0, 1.0)


def test_method_follows_n_and_discordant_counts():
    def method(n, gained, lost):
        second = np.zeros(n)
        second[:gained] = 1
        first = np.zeros(n)
        first[-lost:] = 1
        return statistics.paired(first, second).difference.method

    assert method(50, 6, 4) == "bootstrap"
    assert method(49, 6, 4) == "Bonett–Price"
    assert method(300, 5, 4) == "Bonett–Price"


def test_bootstrap_equals_scipy_and_is_seeded():
    rng = np.random.default_rng(5)
    first, second = rng.random(120) < 0.4, rng.random(120) < 0.5
    ours = statistics.paired(first, second, seed=3).difference
    assert ours == statistics.paired(first, second, seed=3).difference
    difference = (second.astype(float) - first,)
    theirs = stats.bootstrap(difference, np.mean, n_resamples=20_000, rng=np.random.default_rng(9))
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.02)


@pytest.mark.parametrize(
    ("n", "gained", "lost"),
    [(8, 0.1, 0.05), (8, 0.3, 0.05), (20, 0.2, 0.2), (60, 0.2, 0.1), (294, 0.1, 0.05)],
)
def test_paired_interval_covers(n, gained, lost):
    rng = np.random.default_rng(n)
    intervals = []
    for _ in range(1000 if n < 50 else 400):
        second = rng.choice([1, -1, 0], p=[gained, lost, 1 - gained - lost], size=n)
        e = statistics.paired(np.zeros(n), second).difference
        intervals.append((e.low, e.high))
    assert covered(intervals, gained - lost) >= 0.93


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 1), (3, 9), (20, 20)])
def test_mcnemar_equals_statsmodels(gained, lost):
    table = [[10, gained], [lost, 10]]
    theirs = contingency_tables.mcnemar(table, exact=True).pvalue
    assert statistics.mcnemar(gained, lost) == pytest.approx(float(theirs))


def test_swapping_the_arms_only_turns_the_sign():
    rng = np.random.default_rng(1)
    a, b = rng.random(30) < 0.3, rng.random(30) < 0.6
    there, back = statistics.paired(a, b), statistics.paired(b, a)
    assert there.difference.value == pytest.approx(-back.difference.value)
    assert there.difference.low == pytest.approx(-back.difference.high)
    assert (there.gained, there.lost, there.p) == (back.lost, back.gained, back.p)


def test_several_seeds_count_a_sample_once():
    """Ten copies of the same seed must not turn a coin toss into a discovery."""
    first, second = np.zeros(20), np.r_[np.ones(4), np.zeros(16)]
    one = statistics.paired(first, second)
    ten = statistics.paired(np.tile(first, (10, 1)).T, np.tile(second, (10, 1)).T)
    assert ten.difference.n == 20
    assert (ten.difference.low, ten.difference.high) == (one.difference.low, one.difference.high)
    assert ten.p == pytest.approx(one.p, abs=0.02)
    assert ten.p_by_seed == (one.p,) * 10


def test_sign_flip_tends_to_mcnemar():
    assert statistics.sign_flip([1] * 9 + [-1] * 2 + [0] * 5) == pytest.approx(
        statistics.mcnemar(9, 2), abs=0.01
    )
    assert statistics.sign_flip(np.zeros(8)) == 1


def test_what_was_not_scored_is_left_out_of_the_pair():
    nan = float("nan")
    result = statistics.paired([[1, nan], [0, 0], [nan, nan]], [[1, 1], [1, nan], [1, 1]])
    assert result.difference.n == 2
    assert result.difference.value == 0.5
    with pytest.raises(TooFew):
        statistics.paired([nan], [1])
    with pytest.raises(ValueError, match="shapes"):
        statistics.paired([0, 1], [0, 1, 1])


def test_holm_by_hand_and_in_order():
    assert statistics.holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx(
        {"a": 0.06, "b": 0.03, "c": 0.06}
    )
    assert statistics.holm({}) == {}
    with pytest.raises(ValueError, match="out of range"):
        statistics.holm({"a": float("nan")})


@pytest.mark.parametrize("n", [1, 2, 17])
def test_holm_equals_statsmodels_also_where_p_values_tie(n):
    drawn = np.random.default_rng(n).choice([0.0, 0.001, 0.01, 0.012, 0.04, 0.3, 1.0], size=n)
    theirs = multitest.multipletests(drawn, method="holm")[1]
    assert list(statistics.holm(dict(enumerate(drawn))).values()) == theirs.tolist()


def test_smallest_detectable_is_six_points_at_the_papers_n():
    assert statistics.smallest_detectable(294, 0.15) == pytest.approx(0.063, abs=0.001)
    assert np.isnan(statistics.smallest_detectable(3, 0.5))


def test_the_exact_tests_power_by_enumeration():
    for n, discordant, d in ((10, 0.5, 0.4), (8, 0.9, 0.9), (20, 0.3, 0.2)):
        gain, lose = (discordant + d) / 2, (discordant - d) / 2
        found = sum(
            math.comb(n, a) * math.comb(n - a, b) * gain**a * lose**b * (1 - discordant) ** (n - a - b)
            for a in range(n + 1)
            for b in range(n + 1 - a)
            if statistics.mcnemar(a, b) < 0.05
        )
        assert statistics.mcnemar_power(n, discordant, d) == pytest.approx(found)
    assert np.isnan(statistics.smallest_detectable(5, 0.5)), "p = .0625 is the least there is"
    d = statistics.smallest_detectable(8, 0.15)
    assert statistics.mcnemar_power(8, max(d, 0.15), d) == pytest.approx(0.8)


def test_smallest_detectable_has_its_power():
    """Simulated: the asymptotic McNemar test finds that difference about four times in five."""
    n, discordant = 294, 0.15
    d = statistics.smallest_detectable(n, discordant)
    rng = np.random.default_rng(2)
    draws = rng.multinomial(n, [(discordant + d) / 2, (discordant - d) / 2, 1 - discordant], size=4000)
    chi = (draws[:, 0] - draws[:, 1]) ** 2 / np.maximum(draws[:, 0] + draws[:, 1], 1)
    assert np.mean(chi > stats.chi2.ppf(0.95, 1)) == pytest.approx(0.8, abs=0.03)


def mean_of(values):
    return lambda places: float(values[places].mean())


def test_cluster_bootstrap_is_wider_where_clusters_agree():
    rng = np.random.default_rng(4)
    clusters = np.repeat(np.arange(40), 5)
    values = np.repeat(rng.random(40) < 0.5, 5).astype(float)
    e = statistics.cluster_bootstrap(mean_of(values), clusters.tolist())
    naive = statistics.wilson(values.sum(), len(values))
    assert e.n == 40
    assert e.high - e.low > 1.7 * (naive.high - naive.low)
    with pytest.raises(TooFew, match="29 clusters"):
        statistics.cluster_bootstrap(mean_of(values), clusters[:145].tolist())


def test_cluster_bootstrap_covers():
    rng = np.random.default_rng(8)
    intervals = []
    for _ in range(100):
        share = rng.beta(2, 2, size=50)
        e = statistics.cluster_bootstrap(
            mean_of((rng.random((50, 4)) < share[:, None]).ravel()), np.repeat(np.arange(50), 4).tolist()
        )
        intervals.append((e.low, e.high))
    assert covered(intervals, 0.5) >= 0.88


def test_average_of_equal_parts_shrinks_like_a_root():
    e = statistics.Estimate(0.5, 0.4, 0.6, 100, "Wilson")
    mean = statistics.average([e, e, e])
    assert (mean.low, mean.high) == pytest.approx((0.5 - 0.1 / np.sqrt(3), 0.5 + 0.1 / np.sqrt(3)))
    with pytest.raises(ValueError, match="nothing"):
        statistics.average([])


# --- the estimator --------------------------------------------------------------------------------------


def margins(n_right=30, n_wrong=20, gap=1.0, seed=0):
    """Margins in (0, 1) with ties at both ends, and whether the answer is right."""
    rng = np.random.default_rng(seed)
    raw = np.r_[rng.normal(gap, 1, n_right), rng.normal(0, 1, n_wrong)]
    return np.round(1 / (1 + np.exp(-2 * raw)), 2), np.r_[np.ones(n_right), np.zeros(n_wrong)].astype(bool)


def test_auc_equals_scikit_learn_whatever_the_ties():
    m, right = margins()
    assert len(np.unique(m)) < len(m)
    assert detection.auc(m, right).value == pytest.approx(metrics.roc_auc_score(right, m))


def test_higher_margin_means_more_certain():
    m, right = margins()
    assert detection.auc(m, right).value > 0.5
    assert detection.auc(1 - m, right).value < 0.5


def test_auc_interval_equals_the_stratified_bootstrap():
    m, right = margins(120, 100)
    rng = np.random.default_rng(0)

    def drawn():
        keep = np.r_[rng.choice(np.flatnonzero(right), 120), rng.choice(np.flatnonzero(~right), 100)]
        return metrics.roc_auc_score(right[keep], m[keep])

    low, high = np.quantile([drawn() for _ in range(600)], [0.025, 0.975])
    ours = detection.auc(m, right)
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.02)


@pytest.mark.parametrize(("n_right", "n_wrong", "gap"), [(10, 10, 0.5), (10, 40, 1.5), (40, 15, 2.0)])
def test_auc_interval_covers(n_right, n_wrong, gap):
    truth = stats.norm.cdf(gap / np.sqrt(2))
    rng = np.random.default_rng(n_wrong)
    right = np.r_[np.ones(n_right), np.zeros(n_wrong)].astype(bool)
    drawn = (np.r_[rng.normal(gap, 1, n_right), rng.normal(0, 1, n_wrong)] for _ in range(600))
    intervals = [(e.low, e.high) for e in (detection.auc(m, right) for m in drawn)]
    assert covered(intervals, truth) >= 0.92


@pytest.mark.parametrize("ahead", [True, False])
def test_full_separation_keeps_an_interval(ahead):
    right = np.r_[np.ones(12), np.zeros(12)].astype(bool)
    e = detection.auc(right == ahead, right)
    assert e.value == (1 if ahead else 0)
    assert 0.05 < e.high - e.low < 0.4
    assert e.low <= e.value <= e.high


def test_seeds_do_not_narrow_the_auc():
    m, right = margins()
    one, five = detection.auc(m, right), detection.auc(np.tile(m, 5), np.tile(right, 5), seeds=5)
    assert five.n == one.n
    assert (five.low, five.high) == pytest.approx((one.low, one.high), abs=0.01)


def test_roc_agrees_with_the_rates_at_each_of_its_thresholds():
    m, right = margins()
    curve = detection.roc(m, right)
    assert curve.tau[0] == -np.inf
    assert metrics.auc(curve.fpr, curve.tpr) == pytest.approx(detection.auc(m, right).value)
    for tau, fpr, tpr in zip(curve.tau, curve.fpr, curve.tpr, strict=True):
        rates = detection.rates(m, right, tau)
        assert (rates.fpr.value, rates.tpr.value) == pytest.approx((fpr, tpr))


def test_rates_by_hand():
    """Wrong at .1, .5, .96 and right at .2, .95, .99, 1: below .95 lie two of three and one of four."""
    m, right = [0.1, 0.5, 0.96, 0.2, 0.95, 0.99, 1.0], [0, 0, 0, 1, 1, 1, 1]
    r = detection.rates(m, right, 0.95)
    assert (r.tpr.value, r.fpr.value) == pytest.approx((2 / 3, 1 / 4))
    assert r.j.value == pytest.approx(2 / 3 - 1 / 4)
    assert r.uncertain.value == pytest.approx(3 / 7)
    assert r.f1 == pytest.approx(metrics.f1_score([1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0]))


def test_j_interval_equals_statsmodels_newcombe():
    m, right = margins()
    r = detection.rates(m, right, 0.7)
    wrong, flagged = ~right, m < 0.7
    low, high = proportion.confint_proportions_2indep(
        (flagged & wrong).sum(), wrong.sum(), (flagged & right).sum(), right.sum(), method="newcomb"
    )
    assert (r.j.low, r.j.high) == pytest.approx((low, high), abs=1e-6)


def test_in_sample_peak_is_the_best_of_all_thresholds():
    m, right = margins()
    best = detection.best_tau(m, right, range(len(m)))
    js = [detection.rates(m, right, tau).j.value for tau in np.unique(np.r_[m, np.nextafter(m, 2)])]
    assert best.in_sample.j.value == pytest.approx(max(js))


def test_out_of_fold_sees_no_advantage_in_noise():
    """Margins that know nothing: the in-sample peak looks good on average, J out of fold is about 0."""
    rng = np.random.default_rng(3)
    honest, flattering = [], []
    for seed in range(60):
        best = detection.best_tau(rng.random(40), rng.random(40) < 0.5, range(40), seed=seed)
        honest.append(best.out_of_fold.j.value)
        flattering.append(best.in_sample.j.value)
    assert np.mean(flattering) > 0.15
    assert abs(np.mean(honest)) < 0.08


def test_a_useless_score_beats_chance_as_often_as_p_says():
    """Random numbers reach p ≤ 0.1 in a tenth of the runs, and pass the 95 % mark in a twentieth."""
    rng = np.random.default_rng(11)
    found = [
        detection.best_tau(rng.random(60), np.arange(60) < 27, range(60), seed=seed) for seed in range(120)
    ]
    assert np.mean([b.p <= 0.1 for b in found]) == pytest.approx(0.1, abs=0.06)
    assert np.mean([b.out_of_fold.j.value > b.chance for b in found]) < 0.11
    assert all(np.isnan(b.out_of_fold.j.low) and np.isnan(b.in_sample.j.high) for b in found)


def test_a_score_that_knows_beats_chance():
    m, right = margins(60, 60, gap=1.5)
    best = detection.best_tau(m, right, range(120))
    assert best.p == 1 / (1 + detection.SHUFFLES) and 0 < best.chance < best.out_of_fold.j.value


def test_shuffling_keeps_a_samples_seeds_together():
    """Five seeds that agree are no more evidence than one: as wide a chance, whatever the order of rows."""
    rng = np.random.default_rng(5)
    m, right = rng.random(40), np.arange(40) < 18
    one = detection.best_tau(m, right, range(40))
    order = rng.permutation(200)
    rows = [np.tile(x, 5)[order] for x in (m, right, np.arange(40))]
    five = detection.best_tau(*rows, seeds=5, samples=rows[2].tolist())
    alone = detection.best_tau(*rows, seeds=5)
    assert five.chance == pytest.approx(one.chance, abs=0.08)
    assert alone.chance < 0.75 * one.chance, "shuffled row by row, they would look like five times the data"


def test_folds_never_split_a_cluster():
    """Twins with one margin, one right and one wrong: no threshold can be learnt from the other twin."""
    rng = np.random.default_rng(6)
    cluster = np.repeat(np.arange(24), 2)
    m = np.repeat(rng.random(24), 2)
    right = np.tile([True, False], 24)
    best = detection.best_tau(m, right, cluster.tolist())
    assert len(best.taus) == 5
    assert best.out_of_fold.j.value == 0
    assert len(detection.best_tau(m, right, (cluster % 4).tolist()).taus) == 4


def test_too_few_is_said_and_not_computed():
    m, right = margins(9, 30)
    for statistic in (detection.auc, lambda m, r: detection.best_tau(m, r, range(len(m)))):
        with pytest.raises(TooFew, match="9 right, 30 wrong"):
            statistic(m, right)
    with pytest.raises(TooFew, match="single cluster"):
        detection.best_tau(*margins(), ["one"] * 50)
    with pytest.raises(TooFew):
        detection.roc([0.5, 0.6], [True, True])


def test_an_unscored_sample_never_passes_for_a_sure_one():
    with pytest.raises(ValueError, match="not finite"):
        detection.rates([0.5, float("nan")], [True, False], 0.95)
