"""Predictions of a model for images of other data."""

import contextlib
from collections.abc import Generator

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from alexnet_jax.evaluate.other_data import OtherData, UnreadableExample, read_images
from alexnet_jax.inference.trained_model import TrainedModel
from alexnet_jax.runtime.console import ProgressBar
from alexnet_jax.training.eval_step import PredictStep, make_predict_step


class Predictor:
    """Predicts the classes of other data with one model. The step for a set of ranked classes is compiled once.

    Attributes:
      model: the model.
      columns: for each class in the order of the caller its label in the model.
      views: number of views per image, 1 or 10.
    """

    def __init__(self, model: TrainedModel, columns: Int64[np.ndarray, ' classes'], views: int):
        self.model, self.columns, self.views = model, columns, views
        self._steps: dict[bytes, PredictStep] = {}

    def predict(self, data: OtherData) -> tuple[Float32[np.ndarray, 'n classes'], dict[int, UnreadableExample]]:
        """Returns the log probabilities of the images of `data`, and the unreadable images by position.

        There is one row per image, NaN for an unreadable one, with the classes in the order of the caller. The log
        probability of a class that is not in `data.ranked` is -inf.
        """
        scores = np.full((len(data), len(self.columns)), np.nan, np.float32)
        unreadable: dict[int, UnreadableExample] = {}
        positions: list[int] = []
        what = f'evaluate {self.model.name} on {data.described}, {self.views} view{"s" * (self.views > 1)}'
        progress = ProgressBar(what, len(data), 'images')

        def readable() -> Generator[UInt8[np.ndarray, 's s c']]:
            for position, image in read_images(data, self.model.config.data):
                if isinstance(image, UnreadableExample):
                    unreadable[position] = image
                    progress.update()
                else:
                    positions.append(position)
                    yield image

        with contextlib.closing(progress), contextlib.closing(readable()) as images:
            rows = self.model.predict_batches(self._step(data), images, self.model.batch_size(len(data)))
            for count, row in enumerate(rows):
                scores[positions[count]] = row[self.columns]
                progress.update()
        return scores, unreadable

    def _step(self, data: OtherData) -> PredictStep:
        """Returns the compiled step that ranks the classes in `data.ranked`."""
        ranked = np.zeros(len(self.columns), bool)
        ranked[self.columns] = data.ranked
        key = ranked.tobytes()
        if key not in self._steps:
            model = self.model
            mask = None if ranked.all() else ranked
            self._steps[key] = make_predict_step(model.config, model.mesh, self.views, mask)
        return self._steps[key]
