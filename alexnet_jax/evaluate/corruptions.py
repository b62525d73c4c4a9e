"""ImageNet-C (Hendrycks and Dietterich 2019): the sets of corrupted images, and the errors relative to AlexNet.

This module does not import jax.
"""

import os
from collections.abc import Mapping

import numpy as np

from alexnet_jax.config import ConfigError
from alexnet_jax.runtime.files import JsonObject

SEVERITIES = (1, 2, 3, 4, 5)
# Top-1 errors of torchvision's AlexNet, means over the severities: the raw values behind table 1 of the paper, as in
# the repository hendrycks/robustness (https://github.com/hendrycks/robustness/issues/10 has each severity).
ALEXNET_ERRORS = {
    'gaussian_noise': 0.886428,
    'shot_noise': 0.894468,
    'impulse_noise': 0.922640,
    'defocus_blur': 0.819880,
    'glass_blur': 0.826268,
    'motion_blur': 0.785948,
    'zoom_blur': 0.798360,
    'snow': 0.866816,
    'frost': 0.826572,
    'fog': 0.819324,
    'brightness': 0.564592,
    'contrast': 0.853204,
    'elastic_transform': 0.646056,
    'pixelate': 0.717840,
    'jpeg_compression': 0.606500,
}
ALEXNET_CLEAN_ERROR = 0.435  # of the same network on the validation images, table 1 of the paper
EXTRA = ('gaussian_blur', 'saturate', 'spatter', 'speckle_noise')  # for tuning; they are not in the mCE

Set = tuple[str, int]  # (corruption, severity)


def find_sets(place: str, data_dir: str) -> dict[Set, str]:
    """Returns the source of each set of corrupted images.

    Args:
      place: a folder with CORRUPTION/SEVERITY/CLASS/..., in which folders such as blur/ may group the corruptions; or
        'tfds:imagenet2012_corrupted', whose configurations in `data_dir` are CORRUPTION_SEVERITY.
      data_dir: folder of the TFDS data sets.

    Raises ConfigError: there is no set.
    """
    names = [(corruption, severity) for corruption in (*ALEXNET_ERRORS, *EXTRA) for severity in SEVERITIES]
    if place.startswith('tfds:'):
        root = os.path.join(data_dir, *place.removeprefix('tfds:').split(':'))
        found = {
            (name, level): f'{place}:{name}_{level}' for name, level in names if os.path.isdir(f'{root}/{name}_{level}')
        }
    else:
        root = os.path.abspath(os.path.expanduser(place))
        if not os.path.isdir(root):
            raise ConfigError(f'--corruptions: {root} is not a folder; it must contain CORRUPTION/SEVERITY/CLASS')
        places = [root, *(os.path.join(root, name) for name in sorted(os.listdir(root)))]
        found = {}
        for name, level in names:
            folders = [path for place in places if _has_folders(path := os.path.join(place, name, str(level)))]
            if folders:
                found[name, level] = f'folder:{folders[0]}'
    if not found:
        raise ConfigError(
            f'--corruptions: {root} has none of the sets such as {os.path.join("fog", "3")}; it must contain'
            f' CORRUPTION/SEVERITY/CLASS, with the corruptions {", ".join(ALEXNET_ERRORS)}'
        )
    return found


def _has_folders(path: str) -> bool:
    return os.path.isdir(path) and any(os.path.isdir(os.path.join(path, name)) for name in os.listdir(path))


def summarize_corruptions(errors: Mapping[Set, float], clean_error: float | None) -> JsonObject:
    """Returns the errors of each corruption, and their means relative to AlexNet.

    CE is the sum of the top-1 errors over the severities divided by that of AlexNet, relative CE the same after the
    subtraction of the clean errors; mCE and relative mCE are their means over the 15 corruptions (section 4.1 of the
    paper). They are fractions of 1 here. A mean is None if a set is missing, or the clean error is unknown.

    Args:
      errors: top-1 error of each set.
      clean_error: top-1 error on the images without corruption, or None.
    """
    rows: list[JsonObject] = []
    missing: list[str] = []
    for name in (*ALEXNET_ERRORS, *EXTRA):
        found = [errors.get((name, severity)) for severity in SEVERITIES]
        known = [error for error in found if error is not None]
        if name in ALEXNET_ERRORS:
            missing += [
                f'{name}/{severity}' for severity, error in zip(SEVERITIES, found, strict=True) if error is None
            ]
        elif not known:
            continue
        mean = float(np.mean(known)) if len(known) == len(SEVERITIES) else None
        published = ALEXNET_ERRORS.get(name)
        ce = relative = None
        if mean is not None and published is not None:
            ce = mean / published
            if clean_error is not None:
                relative = (mean - clean_error) / (published - ALEXNET_CLEAN_ERROR)
        rows.append({'corruption': name, 'top1_errors': found, 'top1_error': mean, 'ce': ce, 'relative_ce': relative})
    means = {}
    for key in ('ce', 'relative_ce'):
        values = [row[key] for row in rows if row['corruption'] in ALEXNET_ERRORS]
        means[key] = None if None in values else float(np.mean(values))
    return {
        'clean_error': clean_error,
        'corruptions': rows,
        'mce': means['ce'],
        'relative_mce': means['relative_ce'],
        'missing': missing,
    }


def corruptions_as_text(report: JsonObject) -> str:
    """Formats the result of summarize_corruptions() as a text table."""
    width = max(len(row['corruption']) for row in report['corruptions'])
    lines = [
        f'{"top-1 error by severity":<{width}}'
        + ''.join(f'{level:>9}' for level in SEVERITIES)
        + f'{"mean":>9}{"CE":>9}{"relative":>10}'
    ]
    lines[0] = ' ' * width + lines[0][len('top-1 error by severity') :] if width < 23 else lines[0]
    for row in report['corruptions']:
        cells = [_percent(value, 9) for value in (*row['top1_errors'], row['top1_error'], row['ce'])]
        lines.append(f'{row["corruption"]:<{width}}{"".join(cells)}{_percent(row["relative_ce"], 10)}')
    return '\n'.join([*lines, '', *mean_lines(report)])


def mean_lines(report: JsonObject) -> list[str]:
    """Returns lines with the mCE and the relative mCE, or with the reason why there is none."""
    missing = report['missing']
    if missing:
        listed = ', '.join(missing[:5]) + (f' and {len(missing) - 5} more' if len(missing) > 5 else '')
        return [f'no mCE: {len(missing)} of the {len(ALEXNET_ERRORS) * len(SEVERITIES)} sets are missing: {listed}']
    lines = [f'mCE {100 * report["mce"]:.2f} % (AlexNet of the paper: 100 %)']
    if report['relative_mce'] is not None:
        lines.append(
            f'relative mCE {100 * report["relative_mce"]:.2f} %, clean error {100 * report["clean_error"]:.2f} %'
        )
    return lines


def _percent(value: float | None, width: int) -> str:
    return f'{"" if value is None else f"{value:.2%}":>{width}}'
