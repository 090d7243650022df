"""Finding mislabelled training examples: flip labels on purpose, rank by a score, see how soon the flips turn up.

Used with self-influence (Schioppa et al. 2022, Arnoldi) and with influence on validation data (HyperINF, section 5).
There the detection ratio is rt(p) = |mislabelled in the top p| / |mislabelled|, a recall; the denominator printed in
HyperINF's eq. 8 contradicts the range it states.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.errors import expected, missing_extra
from wherefrom.tools.evaluate.arrays import Floats, bool_array, float_array
from wherefrom.tools.evaluate.statistics import Bootstrap


def flip_labels(y: Tensor, fraction: float, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Give a fraction of the examples a wrong label, drawn uniformly from the other classes.

    Args:
        y: (N,) integer labels in 0..num_classes - 1.
        fraction: share to flip; exactly round(fraction * N) examples are.
        num_classes: number of classes, at least 2.
        seed: of the choice of examples and labels.

    Returns:
        The labels (N,), a copy, and ``flipped`` (N,) bool, True where the label was changed.

    Raises:
        InputError: if labels are not class indices, or fraction is outside [0, 1].
    """
    y = torch.as_tensor(y)
    if y.ndim != 1 or y.numel() == 0 or y.is_floating_point() or y.dtype == torch.bool:
        raise expected("y", "(N,) integer labels, N > 0", f"{tuple(y.shape)} {y.dtype}", "Use y.long().")
    if num_classes < 2 or int(y.min()) < 0 or int(y.max()) >= num_classes:
        raise expected("y", f"labels in 0..num_classes - 1 = {num_classes - 1}", f"{int(y.min())}..{int(y.max())}")
    if not 0 <= fraction <= 1:
        raise expected("fraction", "in [0, 1]", fraction)

    rng = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(y), generator=rng)[: round(fraction * len(y))].to(y.device)
    # A shift by 1 to C - 1 classes gives each of the other classes, equally often, and never the right one.
    shift = torch.randint(1, num_classes, chosen.shape, generator=rng).to(y)

    labels = y.clone()
    labels[chosen] = (y[chosen] + shift) % num_classes
    flipped = torch.zeros_like(y, dtype=torch.bool)
    flipped[chosen] = True
    return labels, flipped


@dataclass(frozen=True)
class MislabeledCurve:
    """How well a ranking finds mislabelled examples.

    Intervals are for new examples: flipped and clean ones are each drawn anew.

    Attributes:
        auc: P(a flipped example is ranked above a clean one), ties count one half.
        auc_interval: percentile bootstrap interval of ``auc``.
        average_precision: sum_n (R_n - R_{n-1}) P_n over the distinct scores, with recall R_n and precision P_n.
        average_precision_interval: percentile bootstrap interval of ``average_precision``.
        base_rate: the share of flipped examples; the AUC by chance is 1/2 and the average precision by chance is this.
        fractions: (P,), p, the share of the examples looked at, most suspicious first.
        detection: (P,), rt(p), the share of the flipped examples found there; its mean over random orders among ties.
        detection_interval: (P, 2), percentile bootstrap interval of ``detection`` at each p.
        random: rt(p) of a random order, p.
        oracle: rt(p) of a perfect order, min(p / base_rate, 1).
        n_examples: N.
        level: the probability that the interval covers.
        seed: of the bootstrap.
    """

    auc: float
    auc_interval: tuple[float, float]
    average_precision: float
    average_precision_interval: tuple[float, float]
    base_rate: float
    fractions: Floats
    detection: Floats
    detection_interval: Floats
    random: Floats
    oracle: Floats
    n_examples: int
    level: float
    seed: int

    def __str__(self) -> str:
        (low, high), (least, most) = self.auc_interval, self.average_precision_interval
        return (
            f"mislabelled examples: AUC {self.auc:.3f} ({100 * self.level:g}% interval {low:.3f} to {high:.3f}; "
            f"chance 0.5), average precision {self.average_precision:.3f} ({least:.3f} to {most:.3f}; chance "
            f"{self.base_rate:.3f}); {round(self.base_rate * self.n_examples)} flipped of {self.n_examples}"
        )


def mislabeled_curve(
    ranking_scores: object,
    flipped: object,
    *,
    higher_is_suspicious: bool = True,
    fractions: object = None,
    bootstrap: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> MislabeledCurve:
    """Compare a ranking of the training examples with the labels that were flipped.

    Args:
        ranking_scores: (N,) one score per training example.
        flipped: (N,) bool, True where the label is wrong.
        higher_is_suspicious: True for self-influence; False for a helpful-positive influence on validation data, where
            the most negative score is the most harmful example.
        fractions: (P,) values of p in [0, 1]; None: 0, 0.01, ..., 1.
        bootstrap: number of bootstrap samples of the interval.
        level: the probability that the interval should cover.
        seed: of the bootstrap.

    Raises:
        InputError: if shapes disagree, a score is not finite, or all or none of the examples are flipped.
        MissingExtraError: if scikit-learn is not installed.
    """
    scores = float_array(ranking_scores, "ranking_scores", (1,))
    is_flipped = bool_array(flipped, "flipped", 1)
    n, n_flipped = len(scores), int(is_flipped.sum())
    if is_flipped.shape != scores.shape:
        raise expected("flipped", f"of the shape of ranking_scores {scores.shape}", is_flipped.shape)
    if n_flipped in (0, n):
        raise expected("flipped", "True for some examples and False for others", f"{n_flipped} True of {n}")
    p = np.linspace(0, 1, 101) if fractions is None else float_array(fractions, "fractions", (1,))
    if p.min() < 0 or p.max() > 1:
        raise expected("fractions", "in [0, 1]", f"{p.min()}..{p.max()}")
    boot = Bootstrap(bootstrap, level, np.random.default_rng(seed))

    suspicion = scores if higher_is_suspicious else -scores
    auc, average_precision = _detect(is_flipped, suspicion)

    # Examples with the same score form a group; group 0 is the most suspicious.
    _, group = np.unique(-suspicion, return_inverse=True)
    flipped_in_group = np.bincount(group[is_flipped], minlength=group.max() + 1)
    clean_in_group = np.bincount(group[~is_flipped], minlength=group.max() + 1)
    detection = _measure(flipped_in_group, clean_in_group, p)[2:]

    # A sample changes only how many examples each group has, so that the scores are sorted once for all samples.
    # Scikit-learn sorts each sample anew, which takes thirty times as long on a thousand examples.
    samples = []
    for _ in range(bootstrap):
        resampled_flipped = boot.rng.multinomial(n_flipped, flipped_in_group / n_flipped)
        resampled_clean = boot.rng.multinomial(n - n_flipped, clean_in_group / (n - n_flipped))
        samples.append(_measure(resampled_flipped, resampled_clean, p))
    intervals = boot.percentile_interval(np.stack(samples, -1))  # (2 + P, 2)

    return MislabeledCurve(
        auc=auc,
        auc_interval=(float(intervals[0, 0]), float(intervals[0, 1])),
        average_precision=average_precision,
        average_precision_interval=(float(intervals[1, 0]), float(intervals[1, 1])),
        base_rate=n_flipped / n,
        fractions=p,
        detection=detection,
        detection_interval=intervals[2:],
        random=p,
        oracle=np.minimum(p * n / n_flipped, 1),
        n_examples=n,
        level=level,
        seed=seed,
    )


def _detect(is_flipped: NDArray[np.bool_], suspicion: Floats) -> tuple[float, float]:
    """Compute the area under the ROC curve and the average precision, by scikit-learn."""
    try:
        from sklearn.metrics import average_precision_score, roc_auc_score
    except ImportError as error:
        raise missing_extra("mislabeled_curve", "scikit-learn", "eval") from error
    return float(roc_auc_score(is_flipped, suspicion)), float(average_precision_score(is_flipped, suspicion))


def _measure(flipped_in_group: NDArray[np.int64], clean_in_group: NDArray[np.int64], p: Floats) -> Floats:
    """Compute AUC, average precision and rt(p), (2 + P,), from counts by group, the most suspicious group first."""
    n_flipped, n_clean = flipped_in_group.sum(), clean_in_group.sum()
    flipped_so_far = np.cumsum(flipped_in_group)
    seen_so_far = np.cumsum(flipped_in_group + clean_in_group)

    # A flipped example is ranked above all the clean ones of later groups, and above half of those of its own.
    clean_after = n_clean - np.cumsum(clean_in_group)
    auc = flipped_in_group @ (clean_after + clean_in_group / 2) / (n_flipped * n_clean)
    precision = flipped_so_far / np.maximum(seen_so_far, 1)
    average_precision = flipped_in_group @ precision / n_flipped
    # Within a group in random order the expected number found grows linearly, so interpolation is exact.
    looked_at = p * (n_flipped + n_clean)
    detection = np.interp(looked_at, np.append(0, seen_so_far), np.append(0, flipped_so_far)) / n_flipped
    return np.array([auc, average_precision, *detection])
