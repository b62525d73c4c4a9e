"""Errors of predictions, mixtures of the predictions of several networks, and the weights that fit best; in NumPy.

Scores are log probabilities (N, classes) float32, labels (N,) int32 from 0 to classes - 1.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def errors(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Top-1 and top-5 errors (N,) bool by the rule of the evaluation on devices, step.make_eval_step().

    A class that scores as the right one counts against it, and so does a score that is not a number.
    """
    better = np.sum(~(scores < _right(scores, labels)[:, None]), -1) - 1
    return better >= 1, better >= 5


def _right(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The score (N,) of each image's own class."""
    return np.take_along_axis(scores, labels[:, None], -1)[:, 0]


def figures(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Means over the images: loss, the negative log likelihood in nats; top1_error and top5_error, 0 to 1."""
    top1, top5 = errors(scores, labels)
    loss = -np.mean(_right(scores, labels), dtype=np.float64)
    return {'loss': float(loss), 'top1_error': float(top1.mean()), 'top5_error': float(top5.mean())}


def mixture(scores: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Scores whose probabilities are the mean of those of the members, of sum-to-one `weights` (table 2's ensembles).

    A member of weight 0 is left out, whatever it says.
    """
    mixed = np.full_like(scores[0], -np.inf)
    with np.errstate(invalid='ignore'):
        for member, weight in zip(scores, weights, strict=True):
            if weight > 0:
                np.logaddexp(mixed, member + np.log(weight, dtype=np.float32), out=mixed)
    return mixed


def fit_weights(scores: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """The weights (members,) float64 of the mixture() with the greatest likelihood, by expectation maximisation.

    Each turn gives a member its mean share in the probability of the right classes; the likelihood, concave in the
    weights, never falls. Turns end when its logarithm, the sum over all images, grows by less than 1e-9. A score that
    is not a number stands for the probability 0; images of which no member gives the right class one are left out.
    """
    right = np.stack([_right(member, labels) for member in scores], -1).astype(np.float64)
    right = np.where(np.isnan(right), -np.inf, right)
    right = right[right.max(-1) > -np.inf]
    likelihoods = np.exp(right - right.max(-1, keepdims=True))  # up to a factor an image, which changes no share
    weights = np.full(len(scores), 1 / len(scores))
    reached = -np.inf
    while True:
        mixed = likelihoods @ weights
        before, reached = reached, float(np.log(mixed).sum())
        if not reached - before >= 1e-9:
            return weights
        weights = weights * np.mean(likelihoods / mixed[:, None], 0)


def best(probabilities: np.ndarray, class_names: Sequence[str], top: int) -> list[tuple[str, float]]:
    """The `top` classes with the highest probabilities (classes,), highest first, of equals the first ones."""
    order = np.argsort(-probabilities, kind='stable')[:top]
    return [(class_names[index], float(probabilities[index])) for index in order]


def by_class(scores: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row a class: name, images, top1_error and top5_error (0 to 1, None without images), instead, instead_images.

    `instead` is the name of the class that most often got the best score of the others where the top-1 error counts,
    of several the first, and `instead_images` how often; None and 0 where there is no error.
    """
    top1, top5 = errors(scores, labels)
    others = np.where(np.isnan(scores), -np.inf, scores)
    np.put_along_axis(others, labels[:, None], -np.inf, -1)
    best, known = others.argmax(-1), others.max(-1) > -np.inf
    rows = []
    for label, name in enumerate(names):
        own = labels == label
        counts = np.bincount(best[own & top1 & known], minlength=len(names))
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
