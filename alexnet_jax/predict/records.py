"""The predictions for an image as a record, as text and as a figure. This module does not import jax."""

import os
from collections.abc import Sequence
from typing import NotRequired, TypedDict

import numpy as np
from jaxtyping import Float32

from alexnet_jax.inference.images import ImageInput
from alexnet_jax.inference.pictures import ClassProbability
from alexnet_jax.metrics import top_k

MAX_FIGURE_IMAGES, BARS = 24, 5  # images in the figure, and the maximum number of classes per image


class PredictionRecord(TypedDict):
    """The --json record of an image: file, true label, and either the most probable classes or an error."""

    file: str
    label: str | None
    top: NotRequired[list[ClassProbability]]
    error: NotRequired[str]


def as_record(
    image: ImageInput, probabilities: Float32[np.ndarray, ' classes'] | None, class_names: Sequence[str], top: int
) -> PredictionRecord:
    """Returns the record of `image`, with the `top` most probable classes or, if `probabilities` is None, an error."""
    if probabilities is None:
        return {'file': image.name, 'label': image.label, 'error': image.problem}
    rows: list[ClassProbability] = [
        {'class': name, 'probability': value} for name, value in top_k(probabilities, class_names, top)
    ]
    return {'file': image.name, 'label': image.label, 'top': rows}


def as_text(record: PredictionRecord) -> str:
    """Formats the record of a readable image as text."""
    label = '' if record['label'] is None else f' (true label: {record["label"]})'
    lines = [f'  {row["probability"]:>7.2%}  {row["class"]}' for row in record['top']]
    return '\n'.join([f'{record["file"]}{label}', *lines])


def save_figure(predicted: Sequence[tuple[ImageInput, PredictionRecord]], path: str) -> None:
    """Draws readable images with their most probable classes. Raises OSError: the figure cannot be written."""
    from alexnet_jax.plots import predictions, style  # import matplotlib

    shown = [
        predictions.Prediction(
            image=image.pixels,
            name=os.path.basename(image.name),
            label=image.label,
            top=[(row['class'], row['probability']) for row in record['top'][:BARS]],
        )
        for image, record in predicted
    ]
    style.save(predictions.draw(shown), path)
