"""Class probabilities for image files, as text, as records and as a figure."""

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from alexnet_jax.inference.images import ImageInput
from alexnet_jax.inference.trained_model import TrainedModel
from alexnet_jax.metrics import top_k
from alexnet_jax.runtime.console import ProgressBar, log, log_error

MAX_FIGURE_IMAGES, BARS = 24, 5  # pictures in the figure, and the maximum number of classes per picture


def predict_pictures(
    network: TrainedModel, pictures: Iterable[ImageInput], views: int, batch_size: int
) -> Iterator[tuple[ImageInput, np.ndarray | None]]:
    """Yields each picture, in order, with its probabilities (classes,) float32, or with None if it is unreadable."""
    from alexnet_jax.training.eval_step import make_predict_step

    step, pictures = make_predict_step(network.config, network.mesh, views), iter(pictures)
    while batch := list(itertools.islice(pictures, batch_size)):
        pixels = [picture.pixels for picture in batch if not picture.problem]
        scores = network.predict_batches(step, pixels, batch_size)
        for picture in batch:
            yield picture, None if picture.problem else np.exp(next(scores))


def as_text(told: dict[str, Any]) -> str:
    """Formats the predictions of one picture, from as_record(), as text."""
    label = '' if told['label'] is None else f' (true label: {told["label"]})'
    lines = [f'  {row["probability"]:>7.2%}  {row["class"]}' for row in told['top']]
    return '\n'.join([f'{told["file"]}{label}', *lines])


def as_record(
    picture: ImageInput, probabilities: np.ndarray | None, class_names: list[str], top: int
) -> dict[str, Any]:
    """Returns the --json record of one picture: file, label, and the `top` classes with probabilities or an error."""
    if probabilities is None:
        return {'file': picture.name, 'label': picture.label, 'error': picture.problem}
    rows = [{'class': name, 'probability': value} for name, value in top_k(probabilities, class_names, top)]
    return {'file': picture.name, 'label': picture.label, 'top': rows}


def classify(network: TrainedModel, pictures: Iterable[ImageInput], count: int, given: Any) -> int:
    """Prints the predictions of the `count` pictures, draws the first ones, and returns the number of unreadable ones.

    Raises OSError: the figure cannot be written.
    """
    progress = ProgressBar('predict', count, 'pictures')
    drawn: list[tuple[ImageInput, dict[str, Any]]] = []
    unread = 0
    for picture, probabilities in predict_pictures(network, pictures, int(given.views), network.batch_size(count)):
        told = as_record(picture, probabilities, network.class_names, given.top)
        progress.update()
        if probabilities is None:
            unread += 1
            log_error(f'{picture.name}: {picture.problem}')
        elif len(drawn) < MAX_FIGURE_IMAGES:
            drawn.append((picture, told))
        if given.json or probabilities is not None:
            print(json.dumps(told) if given.json else as_text(told), flush=True)
    progress.close()
    if given.figure and drawn:
        from alexnet_jax.plots import predictions, style

        shown = [
            predictions.Prediction(
                image=picture.pixels,
                name=os.path.basename(picture.name),
                label=picture.label,
                top=[(row['class'], row['probability']) for row in told['top'][:BARS]],
            )
            for picture, told in drawn
        ]
        style.save(predictions.draw(shown), given.figure)
        log(f'{given.figure}: {len(drawn)} of {count - unread} pictures')
    if unread:
        log_error(f'{unread} of {count} images could not be read')
    return unread
