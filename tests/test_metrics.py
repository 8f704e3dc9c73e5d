"""Distances between sets of features against closed forms, scipy and loops in numpy."""

import numpy as np
import pytest
import scipy.linalg
import torch

from ddpm_diffusers.evaluation import metrics
from ddpm_diffusers.evaluation.metrics import frechet_distance, kernel_distance, precision_recall


def normal(count: int, size: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_moments(mean, covariance, seed: int) -> torch.Tensor:
    """300 features whose mean and sample covariance are exactly these."""
    draws = normal(300, len(mean), seed).numpy()
    draws -= draws.mean(0)
    white = draws @ np.linalg.inv(np.linalg.cholesky(np.cov(draws, rowvar=False))).T
    return torch.from_numpy(white @ np.linalg.cholesky(covariance).T + mean)


def random_covariance(seed: int) -> np.ndarray:
    factor = normal(3, 3, seed).numpy()
    return factor @ factor.T + 0.1 * np.eye(3)


FIRST, SECOND = random_covariance(1), random_covariance(2)
MEANS = np.array([5.0, -2.0, 0.5]), np.array([4.0, 0.0, 0.5])  # 5 apart, squared
VARIANCES = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 0.25])
GAUSSIANS = {
    "one covariance": (FIRST, FIRST, 5.0),
    "diagonal covariances": (*map(np.diag, VARIANCES), 5 + sum((VARIANCES[0] ** 0.5 - VARIANCES[1] ** 0.5) ** 2)),
    "covariances that do not commute": (
        FIRST, SECOND, 5 + np.trace(FIRST + SECOND - 2 * scipy.linalg.sqrtm(FIRST @ SECOND).real)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GAUSSIANS)
def test_the_frechet_distance_is_that_of_the_gaussians(case):
    first, second, expected = GAUSSIANS[case]
    real, generated = with_moments(MEANS[0], first, seed=3), with_moments(MEANS[1], second, seed=4)
    assert frechet_distance(real, generated) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(generated, real) == pytest.approx(expected, rel=1e-9)


def test_the_frechet_distance_of_a_set_to_itself_is_zero_and_never_below():
    for seed in range(20):
        features = normal(40, 6, seed)
        features[:, 5] = features[:, 4]  # a singular covariance
        features[:, 3] = 0
        assert 0 <= frechet_distance(features, features.flip(0)) < 1e-6


def unbiased_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Of all pairs, none with itself."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_of_others(a):
        return (kernel(a, a).sum() - np.trace(kernel(a, a))) / (len(a) * (len(a) - 1))

    return mean_of_others(x) + mean_of_others(y) - 2 * kernel(x, y).mean()


def test_the_kernel_distance_is_the_unbiased_estimate_over_all_pairs():
    real, generated = normal(120), 1.5 * normal(120, seed=1) + 0.5
    expected = unbiased_mmd(real.numpy(), generated.numpy())
    assert kernel_distance(real, generated) == pytest.approx(expected, rel=1e-9)
    assert kernel_distance(generated, real) == pytest.approx(expected, rel=1e-9)


def test_the_kernel_distance_of_subsets_has_the_mean_of_all_pairs():
    real, generated = normal(400), 1.5 * normal(80, seed=1) + 0.5  # subsets of 80 of the real ones
    rng = np.random.default_rng(0)
    subsets = [unbiased_mmd(rng.permutation(real.numpy())[:80], generated.numpy()) for _ in range(100)]
    error = np.std(subsets, ddof=1) / 100**0.5
    found = kernel_distance(real, generated)
    assert abs(found - unbiased_mmd(real.numpy(), generated.numpy())) < 4 * error < 0.2 * found


def test_the_kernel_distance_is_repeatable_and_draws_nothing_from_the_callers_generator():
    real, generated = normal(400), normal(80, seed=1)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(kernel_distance(real, generated))
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]


def share_within(points, others, k: int) -> float:
    """The share of `points` that lie in the ball of any of `others`, a pair at a time."""
    distances = [sorted(np.linalg.norm(centre - other) for other in others) for centre in others]
    balls = [(centre, of_centre[k]) for centre, of_centre in zip(others, distances, strict=True)]  # [0] is to itself
    within = [any(np.linalg.norm(point - centre) <= radius for centre, radius in balls) for point in points]
    return sum(within) / len(within)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_a_loop_over_pairs(k, monkeypatch):
    real, generated = normal(60), 0.8 * normal(45, seed=1) + 0.7
    expected = share_within(generated.numpy(), real.numpy(), k), share_within(real.numpy(), generated.numpy(), k)
    assert 0.1 < min(expected) < max(expected) < 1
    assert precision_recall(real, generated, k) == expected
    assert k != 3 or precision_recall(real, generated) == expected  # the default
    assert precision_recall(generated.float(), real.float(), k) == expected[::-1]
    monkeypatch.setattr(metrics, "ROWS_AT_A_TIME", 7)
    assert precision_recall(real, generated, k) == expected


def test_dropped_modes_cost_recall_and_outliers_precision():
    mode, other, far = normal(100), normal(100, seed=1) + 50, 1000 * normal(50, seed=2) + 10_000
    both = torch.cat([mode, other])
    assert precision_recall(both, both) == (1, 1)
    assert precision_recall(mode, other) == (0, 0)
    assert precision_recall(both, mode) == (1, 0.5)
    assert precision_recall(mode, torch.cat([mode, far])) == (pytest.approx(100 / 150), 1)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance, precision_recall])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(distance, number):
    broken = normal(20)
    broken[7, 2] = number
    with pytest.raises(ValueError, match="features of the generated images hold NaN or infinity"):
        distance(normal(20), broken)
    with pytest.raises(ValueError, match="features of the real images hold NaN or infinity"):
        distance(broken, normal(20))


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance, precision_recall])
def test_features_of_two_kinds_are_refused(distance):
    with pytest.raises(ValueError, match=r"shapes \(20, 4\) and \(20, 5\); both must be \(images, features\)"):
        distance(normal(20), normal(20, 5))
    with pytest.raises(ValueError, match="of one extractor"):
        distance(normal(20), normal(20).view(20, 2, 2))


def test_too_few_images_are_refused():
    assert frechet_distance(normal(5), normal(5)) >= 0
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match="There are 4 generated images for 4 features; there must be at least 5"):
            distance(normal(5), normal(4))
    precision_recall(normal(4), normal(4))
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"`k` is {k} with 9 real and 4 generated images; it must be at least 1"):
            precision_recall(normal(9), normal(4), k)
