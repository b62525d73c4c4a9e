"""Training throughput: images per second, and the time spent waiting for input."""

import dataclasses


@dataclasses.dataclass
class Timing:
    """Seconds of training, the seconds of them spent waiting for input, and the number of images processed."""

    seconds: float = 0.0
    input_wait_secs: float = 0.0
    images: int = 0

    @property
    def images_per_second(self) -> float:
        """Throughput, or 0 if nothing was timed."""
        return self.images / self.seconds if self.images else 0.0

    @property
    def input_wait(self) -> float:
        """The fraction of the time spent waiting for input, 0 to 1."""
        return self.input_wait_secs / self.seconds if self.seconds else 0.0


class Throughput:
    """The timing of this process in total, and of the interval since the last log line.

    Evaluation and the first step of the process, which includes compilation, are not counted.
    """

    def __init__(self):
        self.total, self.interval = Timing(), Timing()

    def add(self, seconds: float, input_wait_secs: float = 0.0, images: int = 0) -> None:
        """Adds `seconds` of training, `input_wait_secs` of them spent waiting, in which `images` were processed."""
        for timing in (self.total, self.interval):
            timing.seconds += seconds
            timing.input_wait_secs += input_wait_secs
            timing.images += images

    def end_interval(self) -> Timing:
        """Returns the timing of the interval, and starts the next interval."""
        ended, self.interval = self.interval, Timing()
        return ended
