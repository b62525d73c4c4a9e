"""The errors of checkpoints and ensembles, as JSON and as text tables. This module does not import jax."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from alexnet_jax import metrics
from alexnet_jax.config import ConfigError
from alexnet_jax.metrics import Labels, Scores
from alexnet_jax.runtime.files import JsonObject

FIT_SPLIT, REPORT_SPLIT = slice(0, None, 2), slice(1, None, 2)  # of the validation images, for --fit_weights


def summarize(
    members: Sequence[JsonObject],
    scores: Sequence[Scores],
    labels: Labels,
    class_names: Sequence[str],
    weights: Sequence[float] | None,
    per_class: bool = False,
    right: Bool[np.ndarray, 'n classes'] | None = None,
) -> tuple[JsonObject, Scores]:
    """Returns the report that --json prints, without `views`, and the ensemble's log probabilities for all images.

    Args:
      members: entries of the report for each member, such as its name.
      scores: log probabilities of each member.
      labels: true labels of the images.
      class_names: one name per label.
      weights: weights of the members, which sum to 1; None fits the weights on images 0, 2, 4, ... and reports the
        errors on the other images.
      per_class: add the errors of each class to the report.
      right: the right labels of the images if they may have several, see metrics.with_best_label(); `weights` is then
        not None.
    """
    reported = slice(None)
    if weights is None:
        weights = metrics.fit_weights([member[FIT_SPLIT] for member in scores], labels[FIT_SPLIT]).tolist()
        reported = REPORT_SPLIT
    mixed = metrics.average_log_probs(scores, weights)

    def judged(all_scores: Scores) -> tuple[Scores, Labels]:
        rows = None if right is None else right[reported]
        return metrics.with_best_label(all_scores[reported], labels[reported], rows)

    own = [metrics.error_rates(*judged(member)) for member in scores]
    report: JsonObject = {
        'images': len(labels[reported]),
        'fitted_on': len(labels) - len(labels[reported]),
        'members': [
            {**member, **figures, 'weight': weight}
            for member, figures, weight in zip(members, own, weights, strict=True)
        ],
    }
    if len(members) > 1:
        report['mean'] = {name: float(np.mean([figures[name] for figures in own])) for name in own[0]}
        report['ensemble'] = metrics.error_rates(*judged(mixed))
    if per_class:
        report['classes'] = metrics.per_class_errors(*judged(mixed), class_names)
    return report, mixed


def as_text(report: JsonObject) -> str:
    """Formats the report of summarize(), with the added key `views`, as text tables.

    The key `data` names the images if they are not the validation images of the run.
    """
    rows = [(f'{member["checkpoint"]}, step {member["step"]}', member) for member in report['members']]
    together = {'mean of members': 'mean', 'ensemble': 'ensemble'}
    rows += [(label, report[name]) for label, name in together.items() if name in report]
    width = max(len(label) for label, _ in rows)
    views = f'{report["views"]} view{"s" * (report["views"] > 1)}'
    lines = [f'{report["images"]:,} {report.get("data", "validation images")}, {views}']
    if report['fitted_on']:
        lines[0] += f': every second one; the weights were fitted on the other {report["fitted_on"]:,}'
    lines += ['', f'{"":<{width}}{"loss":>10}{"top-1 error":>14}{"top-5 error":>14}{"weight":>10}']
    for label, figures in rows:
        weight = f'{figures["weight"]:>10.4f}' if 'weight' in figures else ''
        lines.append(f'{label:<{width}}{figures["loss"]:>10.4f}{_percents(figures)}{weight}')
    return '\n'.join(lines + _class_lines(report.get('classes', [])))


def _percents(figures: JsonObject) -> str:
    errors = (figures['top1_error'], figures['top5_error'])
    return ''.join(f'{"" if error is None else f"{error:.2%}":>14}' for error in errors)


def _class_lines(classes: list[JsonObject]) -> list[str]:
    """Formats the rows of metrics.per_class_errors() as lines of a table; returns [] if there are no rows."""
    if not classes:
        return []
    width = max(len('class'), *(len(row['name']) for row in classes))
    header = f'{"class":<{width}}{"images":>8}{"top-1 error":>14}{"top-5 error":>14}  most often confused with'
    lines = ['', header]
    for row in classes:
        instead = f'  {row["instead"]} ({row["instead_images"]})' if row['instead'] else ''
        lines.append(f'{row["name"]:<{width}}{row["images"]:>8,}{_percents(row)}{instead}')
    return lines


def ensemble_weights(given: list[str] | None, fit: bool, members: int) -> list[float] | None:
    """Returns the weights of the members, normalized so that they sum to 1, or None if the weights are to be fitted.

    `given` and `fit` are the values of --weights and --fit_weights.

    Raises ConfigError: the flags are invalid.
    """
    if fit:
        if given is not None or members == 1:
            what = 'name at least two checkpoints' if given is None else 'leave it out, or --weights'
            raise ConfigError(f'--fit_weights: {what}')
        return None
    if given is None:
        return [1 / members] * members
    text = f'--weights={",".join(given)}'
    try:
        values = [float(value) for value in given]
    except ValueError:
        raise ConfigError(f'{text}: not numbers; write for example --weights=0.5,0.3,0.2') from None
    if len(values) != members:
        raise ConfigError(f'{text}: {len(values)} weights for {members} checkpoints; give one weight per checkpoint')
    total = sum(values)
    if min(values) < 0 or not 0 < total < math.inf:
        raise ConfigError(f'{text}: weights must be at least 0, and one of them above 0')
    return [value / total for value in values]
