"""NumPy functions for prediction errors, weighted ensembles of networks, and fitting of the ensemble weights.

Scores are log probabilities; labels are class indices from 0.
"""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Integer

Scores = Float32[np.ndarray, 'n classes']
Labels = Integer[np.ndarray, ' n']


class ClassErrors(TypedDict):
    """The errors of one class, see per_class_errors()."""

    name: str
    images: int
    top1_error: float | None
    top5_error: float | None
    instead: str | None
    instead_images: int


def errors(scores: Scores, labels: Labels) -> tuple[Bool[np.ndarray, ' n'], Bool[np.ndarray, ' n']]:
    """Returns whether each image is a top-1 or a top-5 error, by the rule of eval_step.topk_errors().

    A class that ties with the correct class ranks above the correct class, and so does a class with a NaN score.
    """
    better = np.sum(~(scores < _right(scores, labels)[:, None]), -1) - 1
    return better >= 1, better >= 5


def _right(scores: Scores, labels: Labels) -> Float32[np.ndarray, ' n']:
    """Returns the score of the correct class of each image."""
    return np.take_along_axis(scores, labels[:, None], -1)[:, 0]


def with_best_label(
    scores: Scores, labels: Labels, right: Bool[np.ndarray, 'n classes'] | None
) -> tuple[Scores, Labels]:
    """Returns scores and labels for images with several right labels, see error_rates(); unchanged if `right` is None.

    The label of an image becomes the most probable of its right labels, and the other right labels get the score -inf.
    An image is then right if any of its right labels is.
    """
    if right is None:
        return scores, labels
    best = np.where(right & ~np.isnan(scores), scores, -np.inf)
    labels = np.where(best.max(-1) > -np.inf, best.argmax(-1), right.argmax(-1)).astype(np.int32)
    others = right.copy()
    np.put_along_axis(others, labels[:, None], False, -1)
    return np.where(others, np.float32(-np.inf), scores), labels


def error_rates(scores: Scores, labels: Labels) -> dict[str, float]:
    """Returns the mean loss (negative log likelihood in nats), top1_error and top5_error (0 to 1)."""
    top1, top5 = errors(scores, labels)
    loss = -np.mean(_right(scores, labels), dtype=np.float64)
    return {'loss': float(loss), 'top1_error': float(top1.mean()), 'top5_error': float(top5.mean())}


def average_log_probs(scores: Sequence[Scores], weights: Sequence[float]) -> Scores:
    """Returns the log of the weighted mean probabilities of the members (table 2).

    `weights` sum to 1. A member with weight 0 has no effect, even if its scores are NaN.
    """
    mixed = np.full_like(scores[0], -np.inf)
    with np.errstate(invalid='ignore'):
        for member, weight in zip(scores, weights, strict=True):
            if weight > 0:
                np.logaddexp(mixed, member + np.log(weight, dtype=np.float32), out=mixed)
    return mixed


def fit_weights(scores: Sequence[Scores], labels: Labels) -> Float64[np.ndarray, ' members']:
    """Fits the weights of average_log_probs() by expectation maximization of the likelihood.

    Each iteration sets the weight of a member to the member's mean share of the probability of the correct class. The
    log likelihood of all images is concave in the weights, and an iteration never decreases it; the iterations end when
    the log likelihood grows by less than 1e-9. A NaN score counts as probability 0. Images for which all members give
    the correct class probability 0 are ignored.
    """
    right = np.stack([_right(member, labels) for member in scores], -1).astype(np.float64)
    right = np.where(np.isnan(right), -np.inf, right)
    right = right[right.max(-1) > -np.inf]
    likelihoods = np.exp(right - right.max(-1, keepdims=True))  # scaled per image; the scale cancels in the shares
    weights = np.full(len(scores), 1 / len(scores))
    reached = -np.inf
    while True:
        mixed = likelihoods @ weights
        before, reached = reached, float(np.log(mixed).sum())
        if not reached - before >= 1e-9:
            return weights
        weights = weights * np.mean(likelihoods / mixed[:, None], 0)


def top_k(
    probabilities: Float[np.ndarray, ' classes'], class_names: Sequence[str], top: int
) -> list[tuple[str, float]]:
    """Returns (name, probability) of the `top` most probable classes, highest first; ties keep the order of classes."""
    order = np.argsort(-probabilities, kind='stable')[:top]
    return [(class_names[index], float(probabilities[index])) for index in order]


def per_class_errors(scores: Scores, labels: Labels, names: Sequence[str]) -> list[ClassErrors]:
    """Returns the errors of each class, in the order of `names`.

    The errors are 0 to 1, or None for a class without images. `instead` is the most frequent wrong prediction among the
    top-1 errors (the first class in a tie), and `instead_images` is the number of errors with that prediction. Without
    a wrong prediction, they are None and 0.
    """
    top1, top5 = errors(scores, labels)
    others = np.where(np.isnan(scores), -np.inf, scores)
    np.put_along_axis(others, labels[:, None], -np.inf, -1)
    confused, known = others.argmax(-1), others.max(-1) > -np.inf
    rows: list[ClassErrors] = []
    for label, name in enumerate(names):
        own = labels == label
        counts = np.bincount(confused[own & top1 & known], minlength=len(names))
        images, most = int(own.sum()), int(np.argmax(counts))
        rows.append(
            {
                'name': name,
                'images': images,
                'top1_error': float(top1[own].mean()) if images else None,
                'top5_error': float(top5[own].mean()) if images else None,
                'instead': names[most] if counts[most] else None,
                'instead_images': int(counts[most]),
            }
        )
    return rows
