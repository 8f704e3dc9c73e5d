"""Distances between two sets of features, (N, D) each, from torchmetrics where it has them."""

import warnings

import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
ROWS_AT_A_TIME = 1000  # of a matrix of distances


class GivenFeatures(torch.nn.Identity):
    """Stands in for the network by which torchmetrics extracts features, and is asked for their number."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


def frechet_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    """|mean - mean'|^2 + tr(C + C' - 2 (C C')^1/2) of Gaussians with the sets' means and covariances, at least 0.

    On Inception's features, it is the FID (arXiv:1706.08500, eq. 6). With few images it is too large, the more so the
    more features there are; the excess falls as 1/N. Compare only values measured with the same numbers of images.

    Args:
        real, generated: (N, D), with N larger than D in both, else the covariance is singular.

    Raises:
        ValueError: If there are not more images than features, D differs, or a value is not finite.
    """
    check_features(real, generated)
    check_counts(real, generated)
    # these are all the features: other processes have none to add
    metric = FrechetInceptionDistance(feature=GivenFeatures(real.shape[1]), sync_on_compute=False)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return max(metric.compute().item(), 0.0)  # for equal sets, rounding can leave -1e-9


def kernel_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    """Squared maximum mean discrepancy under the kernel (x y / D + 1)^3: KID (arXiv:1801.01401, section 4).

    The mean over 100 pairs of random subsets of up to 1,000 images. Unbiased: for sets of one distribution, it is 0 on
    average and may be negative.

    Args:
        real, generated: (N, D).

    Raises:
        ValueError: As in `frechet_distance`.
    """
    check_features(real, generated)
    check_counts(real, generated)
    size = min(KID_SUBSET_SIZE, len(real), len(generated))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about keeping the features: they are in memory already
        metric = KernelInceptionDistance(
            feature=torch.nn.Identity(), subsets=KID_SUBSETS, subset_size=size, sync_on_compute=False
        )
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # seed of the subsets
        return metric.compute()[0].item()  # the mean of the subsets' scores; [1] is their standard deviation


def precision_recall(real: torch.Tensor, generated: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """How much of each set lies within the other's neighbourhoods (arXiv:1904.06991, eq. 1 and 2).

    A set's neighbourhoods are balls around its members; each radius is the distance to the k-th nearest other member.
    Both figures depend on the numbers of members: compare only values measured with the same.

    Args:
        real, generated: (N, D), with N larger than k in both.
        k: At least 1.

    Returns:
        Precision, the share of `generated` within the neighbourhoods of `real`, and recall, the reverse.

    Raises:
        ValueError: If `k` or a set is too small, D differs, or a value is not finite.
    """
    if min(len(real), len(generated)) <= k or k < 1:
        raise ValueError(
            f"`k` is {k} with {len(real)} real and {len(generated)} generated images; it must be at least 1, and less"
            " than the images of each: sample more."
        )
    check_features(real, generated)
    real, generated = real.double(), generated.double()
    real_radii, generated_radii = neighbourhood_radii(real, k), neighbourhood_radii(generated, k)
    precise = torch.zeros(len(generated), dtype=torch.bool, device=real.device)
    recalled = []
    for rows, radii in zip(real.split(ROWS_AT_A_TIME), real_radii.split(ROWS_AT_A_TIME), strict=True):
        distances = torch.cdist(rows, generated)  # (rows, generated)
        precise |= (distances <= radii[:, None]).any(0)
        recalled.append((distances <= generated_radii).any(1))
    return precise.double().mean().item(), torch.cat(recalled).double().mean().item()


def neighbourhood_radii(features: torch.Tensor, k: int) -> torch.Tensor:
    """Distance of each row to its k-th nearest other row, (N,)."""
    radii = []
    for rows in features.split(ROWS_AT_A_TIME):
        distances = torch.cdist(rows, features)  # (rows, N)
        radii.append(distances.topk(k + 1, largest=False).values[:, -1])  # the nearest is the row itself
    return torch.cat(radii)


def check_features(real: torch.Tensor, generated: torch.Tensor) -> None:
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"The features have shapes {tuple(real.shape)} and {tuple(generated.shape)}; both must be (images,"
            " features), of one extractor."
        )
    for name, features in (("real", real), ("generated", generated)):
        if not features.isfinite().all():
            raise ValueError(f"The features of the {name} images hold NaN or infinity; they must be finite.")


def check_counts(real: torch.Tensor, generated: torch.Tensor) -> None:
    for name, features in (("real", real), ("generated", generated)):
        images, count = features.shape
        if images <= count:
            raise ValueError(
                f"There are {images} {name} images for {count} features; there must be at least {count + 1}, more"
                " images than features: use more of them."
            )
