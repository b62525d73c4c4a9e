"""Classifies input images with a trained model, and prints the predictions."""

import itertools
import json
from collections.abc import Iterable, Iterator

import numpy as np
from absl import flags
from jaxtyping import Float32

from alexnet_jax.inference.images import ImageInput
from alexnet_jax.inference.trained_model import TrainedModel
from alexnet_jax.predict.records import MAX_FIGURE_IMAGES, PredictionRecord, as_record, as_text, save_figure
from alexnet_jax.runtime.console import ProgressBar, log, log_error
from alexnet_jax.training.eval_step import make_predict_step


def predict_images(
    model: TrainedModel, images: Iterable[ImageInput], views: int, batch_size: int
) -> Iterator[tuple[ImageInput, Float32[np.ndarray, ' classes'] | None]]:
    """Yields each image, in order, with the probabilities of its classes, or with None if the image is unreadable."""
    predict_step, images = make_predict_step(model.config, model.mesh, views), iter(images)
    while batch := list(itertools.islice(images, batch_size)):
        pixels = [image.pixels for image in batch if not image.problem]
        scores = model.predict_batches(predict_step, pixels, batch_size)
        for image in batch:
            yield image, None if image.problem else np.exp(next(scores))


def classify(model: TrainedModel, images: Iterable[ImageInput], count: int, given: flags.FlagValues) -> int:
    """Prints the predictions for the `count` images, and returns the number of unreadable images.

    If the flag --figure is set, the function draws the first images.

    Raises OSError: the figure cannot be written.
    """
    progress = ProgressBar('predict', count, 'images')
    drawn: list[tuple[ImageInput, PredictionRecord]] = []
    unreadable = 0
    for image, probabilities in predict_images(model, images, int(given.views), model.batch_size(count)):
        record = as_record(image, probabilities, model.class_names, given.top)
        progress.update()
        if probabilities is None:
            unreadable += 1
            log_error(f'{image.name}: {image.problem}')
        elif len(drawn) < MAX_FIGURE_IMAGES:
            drawn.append((image, record))
        if given.json or probabilities is not None:
            print(json.dumps(record) if given.json else as_text(record), flush=True)
    progress.close()
    if given.figure and drawn:
        save_figure(drawn, given.figure)
        log(f'{given.figure}: {len(drawn)} of {count - unreadable} images')
    if unreadable:
        log_error(f'{unreadable} of {count} images could not be read')
    return unreadable
