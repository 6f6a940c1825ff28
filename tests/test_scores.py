"""Scores against their definitions written out as loops, and what must not change them."""

import doctest
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from factor_cases import quick
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_squeeze import scores
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.scores import (
    adaptive_calibration_error,
    aurac,
    brier_score,
    classwise_adaptive_calibration_error,
    classwise_calibration_error,
    expected_calibration_error,
    expected_calibration_error_interval,
    maximum_calibration_error,
    thresholded_adaptive_calibration_error,
    top_label,
)

Score = Callable[[Tensor, Tensor], float]
GOLDEN = ([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]], [0, 1, 1, 0])
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def of_top_label(error: Callable[..., float], **options: int) -> Score:
    return lambda probabilities, labels: error(*top_label(probabilities, labels), **options)


# Every score as a function of probabilities and labels.
SCORES: dict[str, Score] = {
    "ece": of_top_label(expected_calibration_error),
    "mce": of_top_label(maximum_calibration_error),
    "ace": of_top_label(adaptive_calibration_error),
    "classwise ece": classwise_calibration_error,
    "classwise ace": classwise_adaptive_calibration_error,
    "tace": thresholded_adaptive_calibration_error,
}
every_error = pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)


def drawn(n: int, classes: int, seed: int = 0, sharpness: float = 2.0) -> tuple[Tensor, Tensor]:
    """Probabilities that favour the first classes, and labels drawn from them: a calibrated model."""
    g = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(n, classes, generator=g, dtype=torch.float64) - torch.arange(classes)
    probabilities = logits.softmax(-1)
    return probabilities, torch.multinomial(probabilities, 1, generator=g).squeeze(1)


# --- the definitions, as loops ----------------------------------------------------------------------------------------


def gap(bin_: list[tuple[float, float]]) -> float:
    return abs(sum(value for value, _ in bin_) - sum(hit for _, hit in bin_)) / len(bin_)


def wide(pairs: list[tuple[float, float]], bins: int) -> list[list[tuple[float, float]]]:
    """Bins of equal width that are not empty."""
    found: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for pair in pairs:
        found[next(j for j in range(bins) if pair[0] <= (j + 1) / bins)].append(pair)
    return [bin_ for bin_ in found if bin_]


def even(pairs: list[tuple[float, float]], bins: int) -> list[list[tuple[float, float]]]:
    """Bins of equal size; the values differ, or their order would matter."""
    ordered, size = sorted(pairs), max(1, len(pairs) // bins)
    starts = [j * size for j in range(min(bins, len(pairs)))]
    return [ordered[a:b] for a, b in zip(starts, [*starts[1:], len(ordered)], strict=True)]


def weighted(bins: list[list[tuple[float, float]]]) -> float:
    return sum(len(bin_) * gap(bin_) for bin_ in bins) / sum(map(len, bins))


def reference(probabilities: Tensor, labels: Tensor, bins: int, threshold: float) -> dict[str, float]:
    rows, right, classes = probabilities.tolist(), labels.tolist(), range(probabilities.shape[1])
    top = [(max(row), float(row.index(max(row)) == y)) for row, y in zip(rows, right, strict=True)]
    by_class = [[(row[k], float(y == k)) for row, y in zip(rows, right, strict=True)] for k in classes]
    gaps = [gap(bin_) for pairs in by_class for bin_ in even(pairs, bins)]
    return {
        "ece": weighted(wide(top, bins)),
        "mce": max(map(gap, wide(top, bins))),
        "ace": weighted(even(top, bins)),
        "classwise ece": sum(weighted(wide(pairs, bins)) for pairs in by_class) / len(classes),
        "classwise ace": sum(gaps) / len(gaps),
        "tace": weighted(even([pair for pairs in by_class for pair in pairs if pair[0] >= threshold], bins)),
        "brier": sum((p - hit) ** 2 for pairs in by_class for p, hit in pairs) / len(rows),
    }


@pytest.mark.parametrize("bins", [1, 4, 10])
@pytest.mark.parametrize(("n", "classes"), [(1, 2), (7, 3), (43, 5), (250, 2)])
def test_equal_to_the_definitions(n: int, classes: int, bins: int) -> None:
    for seed in range(4):
        probabilities, labels = drawn(n, classes, seed)
        expected = reference(probabilities, labels, bins, threshold=0.05)
        confidence, right = top_label(probabilities, labels)
        found = {
            "ece": expected_calibration_error(confidence, right, bins=bins),
            "mce": maximum_calibration_error(confidence, right, bins=bins),
            "ace": adaptive_calibration_error(confidence, right, bins=bins),
            "classwise ece": classwise_calibration_error(probabilities, labels, bins=bins),
            "classwise ace": classwise_adaptive_calibration_error(probabilities, labels, bins=bins),
            "tace": thresholded_adaptive_calibration_error(probabilities, labels, bins=bins, threshold=0.05),
            "brier": brier_score(probabilities, labels),
        }
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_golden_example(dtype: torch.dtype) -> None:
    probabilities, labels = torch.tensor(GOLDEN[0], dtype=dtype), torch.tensor(GOLDEN[1])
    near = partial(pytest.approx, abs=2 * torch.finfo(dtype).eps)
    confidence, right = top_label(probabilities, labels)
    assert right.tolist() == [True, False, True, False]
    assert expected_calibration_error(confidence, right) == near(0.45)
    assert classwise_calibration_error(probabilities, labels) == near(0.45)
    assert maximum_calibration_error(confidence, right) == near(0.80)
    assert adaptive_calibration_error(confidence, right, bins=4) == near(0.45)
    assert adaptive_calibration_error(confidence, right, bins=2) == near(0.25)
    assert brier_score(probabilities, labels) == near(0.55)


# --- what must hold of calibration errors -----------------------------------------------------------------------------


@every_error
@pytest.mark.parametrize("n", [4, 100])
def test_a_calibrated_constant_has_no_error(score: Score, n: int) -> None:
    """Also in bins of equal size, where all predictions are tied."""
    labels = (torch.arange(n) % 4 == 0).long()
    for order in (torch.arange(n), labels.argsort(), labels.argsort(descending=True)):
        assert score(torch.tensor([[0.75, 0.25]]).expand(n, 2), labels[order]) == pytest.approx(0, abs=1e-12)


@every_error
@pytest.mark.parametrize("classes", [2, 3])
def test_labels_drawn_from_the_probabilities_have_next_to_no_error(score: Score, classes: int) -> None:
    """Classes of different sizes: pairing a probability with the label of another row or class would show."""
    assert score(*drawn(200_000, classes, sharpness=1.0)) < 0.01


@every_error
def test_sharpening_keeps_the_choices_and_raises_the_error(score: Score) -> None:
    probabilities, labels = drawn(5000, 3)
    sharp = (3 * probabilities.log()).softmax(-1)
    assert top_label(sharp, labels)[1].equal(top_label(probabilities, labels)[1])
    assert score(sharp, labels) > 2 * score(probabilities, labels)


@quick
@given(st.integers(1, 60), st.integers(2, 5), st.integers(0, 1000), st.booleans())
def test_order_of_samples_and_names_of_classes_do_not_matter(n: int, classes: int, seed: int, tied: bool) -> None:
    probabilities, labels = drawn(n, classes, seed)
    if tied:  # rows from a handful of different ones
        probabilities = probabilities[torch.arange(n) % 3 % n]
    g = torch.Generator().manual_seed(seed)
    rows, names = torch.randperm(n, generator=g), torch.randperm(classes, generator=g)
    for name, score in {**SCORES, "brier": brier_score}.items():
        again = score(probabilities[rows][:, names], names.argsort()[labels[rows]])
        assert again == pytest.approx(score(probabilities, labels), abs=1e-12), name


@quick
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30), st.integers(1, 12))
def test_ece_is_at_most_mce_and_all_lie_between_0_and_1(pairs: list[tuple[float, bool]], bins: int) -> None:
    confidence = torch.tensor([value for value, _ in pairs], dtype=torch.float64)
    right = torch.tensor([hit for _, hit in pairs])
    ece = expected_calibration_error(confidence, right, bins=bins)
    mce = maximum_calibration_error(confidence, right, bins=bins)
    assert 0 <= ece <= mce + 1e-12 and mce <= 1 + 1e-12
    assert 0 <= adaptive_calibration_error(confidence, right, bins=bins) <= 1 + 1e-12
    mean_gap = abs(float(confidence.mean() - right.double().mean()))
    assert min(ece, adaptive_calibration_error(confidence, right, bins=bins)) >= mean_gap - 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("border", range(1, 10))
def test_a_border_belongs_to_the_bin_below(dtype: torch.dtype, border: int) -> None:
    """In a bin of its own each of two predictions shows its whole gap; in one bin they make up for each other."""
    on = torch.tensor(border / 10, dtype=dtype)
    above, below = torch.nextafter(on, torch.ones_like(on)), torch.nextafter(on, torch.zeros_like(on))
    right = torch.tensor([True, False])

    def apart(a: Tensor, b: Tensor) -> float:
        return float((1 - a.double() + b.double()) / 2)

    assert expected_calibration_error(torch.stack([on, above]), right) == pytest.approx(apart(on, above))
    together = abs(float(1 - on.double() - below.double())) / 2
    assert expected_calibration_error(torch.stack([on, below]), right) == pytest.approx(together, abs=1e-12)


def test_zero_is_in_the_first_bin_and_one_in_the_last() -> None:
    right = torch.tensor([True, False])
    assert expected_calibration_error(torch.tensor([0.0, 0.1]), right) == pytest.approx(0.45)
    assert expected_calibration_error(torch.tensor([0.95, 1.0]), right) == pytest.approx(0.475)


def test_half_precision_counts_in_float64() -> None:
    """A sum in bfloat16 would stop growing at 256."""
    right = torch.arange(4000) % 2 == 0
    assert expected_calibration_error(torch.full((4000,), 0.5, dtype=torch.bfloat16), right) == 0


def test_brier_score_of_the_extremes() -> None:
    sure = torch.tensor([[1.0, 0.0]])
    assert brier_score(sure, torch.tensor([0])) == 0 and brier_score(sure, torch.tensor([1])) == 2


# --- the interval -----------------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_the_error_itself_over_resamples() -> None:
    confidence, right = top_label(*drawn(60, 3))
    g = torch.Generator().manual_seed(5)
    found = []
    for _ in range(200):
        rows = torch.randint(60, (60,), generator=g)
        found.append(expected_calibration_error(confidence[rows], right[rows]))
    expected = np.quantile(found, [0.1, 0.9])
    interval = expected_calibration_error_interval(confidence, right, resamples=200, level=0.8, seed=5)
    assert interval == pytest.approx(tuple(expected), abs=1e-12)


def test_the_interval_depends_on_its_seed_alone() -> None:
    confidence, right = top_label(*drawn(60, 3))
    before = torch.random.get_rng_state()
    first = expected_calibration_error_interval(confidence, right, seed=1)
    assert torch.random.get_rng_state().equal(before)
    torch.manual_seed(99)
    assert expected_calibration_error_interval(confidence, right, seed=1) == first
    assert expected_calibration_error_interval(confidence, right, seed=2) != first


def test_the_interval_narrows_with_the_number_of_predictions() -> None:
    few, many = top_label(*drawn(50, 3)), top_label(*drawn(5000, 3))
    widths = [high - low for low, high in (expected_calibration_error_interval(*data) for data in (few, many))]
    assert widths[1] < widths[0] / 3


# --- AURAC ------------------------------------------------------------------------------------------------------------

curves = st.lists(st.tuples(st.integers(1, 512), st.floats(0, 1)), min_size=1, max_size=8, unique_by=lambda p: p[0])
axes = st.sampled_from(scores.AXES)


def test_aurac_of_the_example_by_hand() -> None:
    assert aurac([1, 2, 4], [0, 1, 1]) == aurac([1, 2, 4], [0, 1, 1], axis="log2") == 0.75
    assert aurac([1, 2, 4], [0, 1, 1], axis="linear") == pytest.approx((0.5 + 2) / 3)


@quick
@given(curves, axes)
def test_aurac_is_the_trapezoid_over_its_width(curve: list[tuple[int, float]], axis: str) -> None:
    ranks, heights = map(list, zip(*sorted(curve), strict=True))
    x = np.log2(ranks) if axis == "log2" else np.array(ranks, dtype=float)
    expected = np.trapezoid(heights, x) / (x[-1] - x[0]) if len(ranks) > 1 else heights[0]
    assert aurac(ranks, heights, axis=axis) == pytest.approx(float(expected), abs=1e-12)


@quick
@given(curves, axes, st.floats(0, 1))
def test_aurac_of_a_constant_is_the_constant(curve: list[tuple[int, float]], axis: str, height: float) -> None:
    ranks = sorted(rank for rank, _ in curve)
    assert aurac(ranks, [height] * len(ranks), axis=axis) == pytest.approx(height)


@quick
@given(curves, axes, st.data())
def test_aurac_rises_with_each_accuracy(curve: list[tuple[int, float]], axis: str, data: st.DataObject) -> None:
    ranks, heights = map(list, zip(*sorted(curve), strict=True))
    place = data.draw(st.integers(0, len(ranks) - 1))
    better = [height + (j == place) for j, height in enumerate(heights)]
    assert aurac(ranks, better, axis=axis) > aurac(ranks, heights, axis=axis)


def test_with_two_ranks_the_axis_does_not_matter_and_with_one_there_is_none() -> None:
    assert aurac([2, 16], [0.25, 0.5]) == aurac([2, 16], [0.25, 0.5], axis="linear") == 0.375
    assert aurac([8], [0.3]) == aurac([8], [0.3], axis="linear") == 0.3


def test_on_the_log2_axis_every_doubling_counts_alike() -> None:
    ranks = [1, 2, 4, 8, 16]
    assert aurac(ranks, [0, 1, 0, 0, 0]) == pytest.approx(aurac(ranks, [0, 0, 0, 1, 0]))
    assert aurac(ranks, [0, 1, 0, 0, 0], axis="linear") < aurac(ranks, [0, 0, 0, 1, 0], axis="linear")


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "accuracies", "axis", "text"),
    [
        ([], [], "log2", "one accuracy for each rank is needed, got 0 for 0 ranks"),
        ([1, 2], [0.5], "log2", "one accuracy for each rank is needed, got 1 for 2 ranks"),
        ([2, 1], [0.5, 0.5], "log2", "ranks must be positive and rise strictly, got [2, 1]"),
        ([1, 1], [0.5, 0.5], "linear", "ranks must be positive and rise strictly, got [1, 1]"),
        ([0, 1], [0.5, 0.5], "linear", "ranks must be positive and rise strictly, got [0, 1]"),
        ([1, math.nan], [0.5, 0.5], "log2", "ranks must be positive and rise strictly, got [1, nan]"),
        ([1, 2], [0.5, math.nan], "log2", "ranks and accuracies must be finite, got [1, 2] and [0.5, nan]"),
        ([1, 2], [0.5, 0.5], "log", "axis must be one of log2, linear, got 'log'"),
    ],
)
def test_curves_without_an_area_are_refused(
    ranks: list[float], accuracies: list[float], axis: str, text: str
) -> None:  # fmt: skip
    with pytest.raises(LoraSqueezeError) as error:
        aurac(ranks, accuracies, axis=axis)
    assert str(error.value) == text


@pytest.mark.parametrize(
    "error",
    [
        expected_calibration_error,
        maximum_calibration_error,
        adaptive_calibration_error,
        expected_calibration_error_interval,
    ],
    ids=lambda error: str(error.__name__),
)
@pytest.mark.parametrize(
    ("confidence", "right", "bins", "text"),
    [
        (torch.ones(0), torch.ones(0).bool(), 10, "confidence is empty: there is nothing to score"),
        (
            torch.ones(2), torch.ones(3).bool(), 10,
            "confidence and right must be two lists of equal length, got shapes (2,) and (3,)",
        ),
        (
            torch.ones(2, 2), torch.ones(2, 2).bool(), 10,
            "confidence and right must be two lists of equal length, got shapes (2, 2) and (2, 2)",
        ),
        (
            torch.ones(2), torch.ones(2), 10,
            "confidence must be floating point and right bool, got torch.float32 and torch.float32",
        ),
        (
            torch.ones(2).long(), torch.ones(2).bool(), 10,
            "confidence must be floating point and right bool, got torch.int64 and torch.bool",
        ),
        (
            torch.tensor([0.5, math.nan]), torch.ones(2).bool(), 10,
            "confidence holds NaN: the model has diverged, or a row had no choice left",
        ),
        (
            torch.tensor([0.5, 1.5]), torch.ones(2).bool(), 10,
            "confidence must lie in [0, 1], found 0.5 to 1.5; apply a softmax first",
        ),
        (
            torch.tensor([-0.5, 0.5]), torch.ones(2).bool(), 10,
            "confidence must lie in [0, 1], found -0.5 to 0.5; apply a softmax first",
        ),
        (torch.ones(2), torch.ones(2).bool(), 0, "bins must be a whole number from 1, got 0"),
    ],
)  # fmt: skip
def test_what_is_no_confidence_is_refused(
    error: Callable[..., object], confidence: Tensor, right: Tensor, bins: int, text: str
) -> None:
    with pytest.raises(LoraSqueezeError) as raised:
        error(confidence, right, bins=bins)
    assert str(raised.value) == text


@pytest.mark.parametrize(
    "score",
    [
        top_label,
        classwise_calibration_error,
        classwise_adaptive_calibration_error,
        thresholded_adaptive_calibration_error,
        brier_score,
    ],
    ids=lambda score: str(score.__name__),
)
@pytest.mark.parametrize(
    ("probabilities", "labels", "text"),
    [
        (torch.ones(0, 2), torch.ones(0).long(), "probabilities is empty: there is nothing to score"),
        (
            torch.ones(2), torch.ones(2).long(),
            "probabilities must be (n, classes) and labels (n), got shapes (2,) and (2,)",
        ),
        (
            torch.ones(2, 2) / 2, torch.ones(3).long(),
            "probabilities must be (n, classes) and labels (n), got shapes (2, 2) and (3,)",
        ),
        (
            torch.ones(1, 2) / 2, torch.ones(1),
            "probabilities must be floating point and labels whole numbers, got torch.float32 and torch.float32",
        ),
        (
            torch.tensor([[0.5, math.nan]]), torch.tensor([0]),
            "probabilities holds NaN: the model has diverged, or a row had no choice left",
        ),
        (
            torch.tensor([[2.5, -1.5]]), torch.tensor([0]),
            "probabilities must lie in [0, 1], found -1.5 to 2.5; apply a softmax first",
        ),
        (
            torch.tensor([[0.5, 0.5], [0.5, 0.25]]), torch.tensor([0, 0]),
            "each row of probabilities must sum to 1, found 0.75; apply a softmax first",
        ),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([2]), "labels must be classes from 0 to 1, found 2 to 2"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([-100]), "labels must be classes from 0 to 1, found -100 to -100"),
    ],
)  # fmt: skip
def test_what_are_no_probabilities_is_refused(
    score: Callable[..., object], probabilities: Tensor, labels: Tensor, text: str
) -> None:
    with pytest.raises(LoraSqueezeError) as raised:
        score(probabilities, labels)
    assert str(raised.value) == text


def test_settings_that_leave_nothing_are_refused() -> None:
    probabilities, labels = drawn(5, 2)
    confidence, right = top_label(probabilities, labels)
    with pytest.raises(LoraSqueezeError, match=r"^no probability reaches the threshold 1\.5; the largest is 0\.\d+$"):
        thresholded_adaptive_calibration_error(probabilities, labels, threshold=1.5)
    for options in ({"resamples": 0}, {"level": 1.0}, {"level": 0.0}):
        asked = {"resamples": 1000, "level": 0.95} | options
        with pytest.raises(LoraSqueezeError) as error:
            expected_calibration_error_interval(confidence, right, **options)
        found = f"{asked['resamples']} and {asked['level']}"
        assert str(error.value) == f"resamples must be from 1 and level within (0, 1), got {found}"


# --- examples ---------------------------------------------------------------------------------------------------------


def test_the_examples_in_the_documentation_print_what_they_say() -> None:
    assert doctest.testmod(scores).failed == 0
    page = Path(__file__).parents[1] / "docs" / "scores.md"
    ran = doctest.testfile(str(page), module_relative=False)
    assert ran.attempted > 3 and ran.failed == 0
