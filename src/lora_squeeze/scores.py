"""Scores of trained models: a curve of accuracy over rank as one number, and how far confidence can be trusted.

Calibration: of all predictions made with confidence 0.8, are 80 % right? Predictions are put into bins; in each bin the
gap is the distance of the mean confidence from the share that is right.

======================================  =============================================================================
function                                what it is
======================================  =============================================================================
aurac                                   mean height of the curve of accuracy over rank
expected_calibration_error              ECE: mean gap over bins of equal width, weighted by their size
maximum_calibration_error               MCE: largest gap of such a bin
adaptive_calibration_error              ACE: mean gap over bins of equal size, weighted by their size
expected_calibration_error_interval     what resampling says about the ECE
--------------------------------------  -----------------------------------------------------------------------------
classwise_calibration_error             ECE of the probability of every class, mean over classes
classwise_adaptive_calibration_error    ACE of the probability of every class, mean over classes and bins
thresholded_adaptive_calibration_error  TACE: ACE of all probabilities above a threshold together
brier_score                             mean squared distance of the probabilities from the truth
======================================  =============================================================================

The first group looks at the likeliest choice alone: its probability and whether it is right, both from `top_label`. The
second takes all probabilities. Bins of equal width are (0, 1/bins], ... with 0 in the first; a border is the number
nearest to it in the dtype of the input, so that 0.6 in float32 lies on the border 0.6. Sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lora_squeeze.errors import LoraSqueezeError

BINS = 10
AXES = ("log2", "linear")
_ROUNDING = 1e-2  # of sums of probabilities, which bfloat16 keeps to 2^-8


def aurac(ranks: Sequence[float], accuracies: Sequence[float], *, axis: str = "log2") -> float:
    """AURAC, the area under the rank-accuracy curve: sum (x_j+1 - x_j)(a_j + a_j+1) / 2 / (x_n - x_1), x = log2 rank.

    Args:
        ranks: in rising order.
        accuracies: of these ranks; any score, in any unit.
        axis: "log2" gives equal weight to every doubling of the rank, "linear" to every unit: high ranks then decide.

    Returns:
        The mean height of the curve, in the unit of `accuracies`; with one rank its accuracy.

    Raises:
        LoraSqueezeError: no ranks, ranks that do not rise or are not positive, numbers that do not match or are not
            finite, or an unknown axis.

    Notes:
        Compare curves over the same ranks alone. Source: MatryoshkaLoRA (arXiv 2605.07850).

    Example:
        >>> aurac([1, 2, 4], [0.0, 1.0, 1.0])
        0.75
    """
    if axis not in AXES:
        raise LoraSqueezeError(f"axis must be one of {', '.join(AXES)}, got {axis!r}")
    if len(ranks) != len(accuracies) or not ranks:
        raise LoraSqueezeError(f"one accuracy for each rank is needed, got {len(accuracies)} for {len(ranks)} ranks")
    if ranks[0] <= 0 or any(not low < high for low, high in pairwise(ranks)):
        raise LoraSqueezeError(f"ranks must be positive and rise strictly, got {list(ranks)}")
    if not all(map(math.isfinite, [*ranks, *accuracies])):
        raise LoraSqueezeError(f"ranks and accuracies must be finite, got {list(ranks)} and {list(accuracies)}")
    if len(ranks) == 1:
        return float(accuracies[0])
    x = [math.log2(rank) if axis == "log2" else float(rank) for rank in ranks]
    pieces = [(x[j + 1] - x[j]) * (accuracies[j] + accuracies[j + 1]) / 2 for j in range(len(x) - 1)]
    return math.fsum(pieces) / (x[-1] - x[0])


def top_label(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest choice of each row: its probability, and whether it is right.

    Args:
        probabilities: (n, classes), rows sum to 1.
        labels: (n), the right class, a whole number.

    Returns:
        confidence (n), in the dtype of `probabilities`, and right (n), bool.

    Raises:
        LoraSqueezeError: as `brier_score`.
    """
    _check_probabilities(probabilities, labels)
    confidence, choice = probabilities.max(-1)
    return confidence, choice == labels


def expected_calibration_error(confidence: Tensor, right: Tensor, *, bins: int = BINS) -> float:
    """ECE: sum_b n_b / n |right_b - confidence_b| over bins of equal width.

    Args:
        confidence: (n), probability of the likeliest choice.
        right: (n) bool, whether it is right.
        bins: number of bins. More bins see finer errors, and more of the noise.

    Returns:
        From 0, calibrated, to 1.

    Raises:
        LoraSqueezeError: nothing to score, shapes or dtypes that do not fit, a confidence outside [0, 1] or NaN, or no
            bins.

    Notes:
        Biased upwards, the more the fewer predictions: compare models on the same ones with the same bins, and see
        `expected_calibration_error_interval`. Source: Naeini et al. 2015.

    Example:
        >>> expected_calibration_error(torch.tensor([0.75, 0.75, 0.75, 0.75]), torch.tensor([True, True, False, False]))
        0.25
    """
    _check_top(confidence, right, bins)
    sizes, gaps = _gaps(confidence.double(), right.double(), _equal_width(confidence, bins), bins)
    return float((sizes * gaps).sum() / len(right))


def maximum_calibration_error(confidence: Tensor, right: Tensor, *, bins: int = BINS) -> float:
    """MCE: the largest |right_b - confidence_b| of a bin of equal width.

    Args:
        confidence, right, bins: as for `expected_calibration_error`.

    Returns:
        At least the ECE, at most 1.

    Raises:
        LoraSqueezeError: as `expected_calibration_error`.

    Notes:
        One bin with few predictions decides it, so it is noisy. Source: Naeini et al. 2015.
    """
    _check_top(confidence, right, bins)
    return float(_gaps(confidence.double(), right.double(), _equal_width(confidence, bins), bins)[1].max())


def adaptive_calibration_error(confidence: Tensor, right: Tensor, *, bins: int = BINS) -> float:
    """ACE of the likeliest choice: sum_b n_b / n |right_b - confidence_b| over bins of equal size.

    Args:
        confidence, right: as for `expected_calibration_error`.
        bins: number of bins; each holds n // bins predictions in the order of confidence, the last takes the remainder.
            With fewer predictions than bins each is a bin of its own.

    Returns:
        From 0 to 1.

    Raises:
        LoraSqueezeError: as `expected_calibration_error`.

    Notes:
        Where most predictions are sure, bins of equal width are nearly all empty and these are not. Equal confidences
        cannot be told apart: each counts as right to the share of them that is. Source: HypeLoRA (arXiv 2603.19278);
        Nixon et al. 2019 define it for every class, see `classwise_adaptive_calibration_error`.
    """
    _check_top(confidence, right, bins)
    sizes, gaps = _gaps(*_equal_size(confidence.double(), right.double(), bins))
    return float((sizes * gaps).sum() / len(right))


def expected_calibration_error_interval(
    confidence: Tensor, right: Tensor, *, bins: int = BINS, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """A bootstrap interval of the ECE: its quantiles over samples drawn with replacement.

    Args:
        confidence, right, bins: as for `expected_calibration_error`.
        resamples: number of samples.
        level: share of them within the interval.
        seed: of the draws; the global generator is not used.

    Returns:
        The lower and the upper end.

    Raises:
        LoraSqueezeError: as `expected_calibration_error`; no resamples, or a level outside (0, 1).

    Notes:
        O(resamples n). It shows the spread and does not take the bias of the ECE away: for a calibrated model the lower
        end is above 0, too. Predictions are taken as independent, which the tokens of one text are not quite.
    """
    _check_top(confidence, right, bins)
    if resamples < 1 or not 0 < level < 1:
        raise LoraSqueezeError(f"resamples must be from 1 and level within (0, 1), got {resamples} and {level}")
    surplus, groups = (confidence.double() - right.double()).cpu(), _equal_width(confidence, bins).cpu()
    generator = torch.Generator().manual_seed(seed)
    found = torch.empty(resamples, dtype=torch.float64)
    for i in range(resamples):
        drawn = torch.randint(len(surplus), (len(surplus),), generator=generator)
        found[i] = groups[drawn].bincount(surplus[drawn], bins).abs().sum() / len(surplus)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = found.quantile(ends).tolist()
    return low, high


def classwise_calibration_error(probabilities: Tensor, labels: Tensor, *, bins: int = BINS) -> float:
    """Classwise ECE: the ECE of each class's probability against "is it this class", mean over the classes.

    Args:
        probabilities: (n, classes), rows sum to 1.
        labels: (n), the right class, a whole number.
        bins: number of bins of equal width.

    Returns:
        From 0 to 1. With many classes most probabilities are near 0, and so is this.

    Raises:
        LoraSqueezeError: as `brier_score`, or no bins.
    """
    values, hits = _by_class(probabilities, labels, bins)
    errors = []
    for value, hit in zip(values, hits, strict=True):
        sizes, gaps = _gaps(value.double(), hit, _equal_width(value, bins), bins)
        errors.append(float((sizes * gaps).sum() / len(labels)))
    return math.fsum(errors) / len(errors)


def classwise_adaptive_calibration_error(probabilities: Tensor, labels: Tensor, *, bins: int = BINS) -> float:
    """ACE as first defined: mean gap over all classes and their bins of equal size.

    Args:
        probabilities, labels: as for `classwise_calibration_error`.
        bins: of equal size, as for `adaptive_calibration_error`.

    Returns:
        From 0 to 1.

    Raises:
        LoraSqueezeError: as `brier_score`, or no bins.

    Notes:
        All bins count alike, the larger last one too. Source: Nixon et al. 2019.
    """
    values, hits = _by_class(probabilities, labels, bins)
    pairs = zip(values.double(), hits, strict=True)
    return float(torch.stack([_gaps(*_equal_size(value, hit, bins))[1].mean() for value, hit in pairs]).mean())


def thresholded_adaptive_calibration_error(
    probabilities: Tensor, labels: Tensor, *, bins: int = BINS, threshold: float = 1e-3
) -> float:
    """TACE: the ACE of the probabilities of all classes together, without those below a threshold.

    Args:
        probabilities, labels: as for `classwise_calibration_error`.
        bins: of equal size, as for `adaptive_calibration_error`.
        threshold: smallest probability that counts; otherwise with many classes those near 0 are nearly all there are.

    Returns:
        From 0 to 1.

    Raises:
        LoraSqueezeError: as `brier_score`; no bins, or no probability as large as the threshold.

    Notes:
        Source: Nixon et al. 2019, pooled over the classes as in HypeLoRA (arXiv 2603.19278). Each probability is set
        against its own class and row.
    """
    values, hits = _by_class(probabilities, labels, bins)
    counted = values >= threshold
    if not bool(counted.any()):
        raise LoraSqueezeError(f"no probability reaches the threshold {threshold}; the largest is {values.max():g}")
    sizes, gaps = _gaps(*_equal_size(values[counted].double(), hits[counted], bins))
    return float((sizes * gaps).sum() / sizes.sum())


def brier_score(probabilities: Tensor, labels: Tensor) -> float:
    """Brier score: mean over the rows of sum_k (p_k - [k is right])^2.

    Args:
        probabilities: (n, classes), rows sum to 1.
        labels: (n), the right class, a whole number.

    Returns:
        From 0, sure and right, to 2, sure and wrong. Unlike the calibration errors it sees accuracy, too.

    Raises:
        LoraSqueezeError: nothing to score, shapes or dtypes that do not fit, labels that are no classes, or rows that
            are no probabilities.

    Example:
        >>> brier_score(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([0, 0]))
        0.25
    """
    values, hits = _by_class(probabilities, labels, BINS)
    return float((values.double() - hits).square().sum() / len(labels))


def _equal_width(values: Tensor, bins: int) -> Tensor:
    """The bin of each value: (j / bins, (j + 1) / bins], 0 in the first."""
    borders = torch.arange(1, bins, dtype=torch.float64, device=values.device) / bins
    return torch.bucketize(values, borders.to(values.dtype))


def _equal_size(values: Tensor, hits: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Values in rising order, the mean hit of all that equal each of them, and the bin of each."""
    distinct, place, sizes = values.unique(return_inverse=True, return_counts=True)
    shares = place.bincount(hits, len(distinct)) / sizes
    order = values.argsort()
    groups = torch.arange(len(values), device=values.device) // max(1, len(values) // bins)
    return values[order], shares[place[order]], groups.clamp(max=bins - 1), bins


def _gaps(values: Tensor, hits: Tensor, groups: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Size of each bin that is not empty, and the distance of its mean value from its share of hits."""
    sizes = groups.bincount(minlength=bins)
    surplus = groups.bincount(values - hits, bins)
    return sizes[sizes > 0], (surplus.abs() / sizes)[sizes > 0]


def _by_class(probabilities: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """(classes, n): probabilities, and 1 where the class is right."""
    _check_probabilities(probabilities, labels)
    _check_bins(bins)
    hits = torch.nn.functional.one_hot(labels.long(), probabilities.shape[1]).double()
    return probabilities.mT.contiguous(), hits.mT.contiguous()


def _check_top(confidence: Tensor, right: Tensor, bins: int) -> None:
    _check_bins(bins)
    if confidence.ndim != 1 or confidence.shape != right.shape:
        shapes = f"{tuple(confidence.shape)} and {tuple(right.shape)}"
        raise LoraSqueezeError(f"confidence and right must be two lists of equal length, got shapes {shapes}")
    if not confidence.is_floating_point() or right.dtype != torch.bool:
        found = f"{confidence.dtype} and {right.dtype}"
        raise LoraSqueezeError(f"confidence must be floating point and right bool, got {found}")
    _check_range("confidence", confidence)


def _check_probabilities(probabilities: Tensor, labels: Tensor) -> None:
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        shapes = f"{tuple(probabilities.shape)} and {tuple(labels.shape)}"
        raise LoraSqueezeError(f"probabilities must be (n, classes) and labels (n), got shapes {shapes}")
    if not probabilities.is_floating_point() or labels.is_floating_point() or labels.dtype == torch.bool:
        found = f"{probabilities.dtype} and {labels.dtype}"
        raise LoraSqueezeError(f"probabilities must be floating point and labels whole numbers, got {found}")
    _check_range("probabilities", probabilities)
    sums = probabilities.double().sum(1)
    worst = sums[(sums - 1).abs().argmax()]
    if abs(worst - 1) > _ROUNDING:
        raise LoraSqueezeError(f"each row of probabilities must sum to 1, found {worst:g}; apply a softmax first")
    classes = probabilities.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        found = f"{int(labels.min())} to {int(labels.max())}"
        raise LoraSqueezeError(f"labels must be classes from 0 to {classes - 1}, found {found}")


def _check_range(name: str, values: Tensor) -> None:
    if values.numel() == 0:
        raise LoraSqueezeError(f"{name} is empty: there is nothing to score")
    if bool(values.isnan().any()):
        raise LoraSqueezeError(f"{name} holds NaN: the model has diverged, or a row had no choice left")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        raise LoraSqueezeError(f"{name} must lie in [0, 1], found {low:g} to {high:g}; apply a softmax first")


def _check_bins(bins: int) -> None:
    if bins < 1:
        raise LoraSqueezeError(f"bins must be a whole number from 1, got {bins}")
