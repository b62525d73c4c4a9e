"""Figures of networks and of the metrics of runs: reads the data and passes them to the modules of plots/."""

import os
from collections.abc import Iterable

from matplotlib.figure import Figure

from alexnet_jax.config import Config, ConfigError, preset_config, resolve
from alexnet_jax.plots import curves, network
from alexnet_jax.sweep.results import ReportError, read_sweep


def plot_preset(name: str) -> Figure:
    """Draws the network of the preset `name`."""
    return plot_network(resolve(preset_config(name)), name)


def plot_network(config: Config, title: str) -> Figure:
    """Draws the network of a resolved configuration."""
    return network.draw(config.model, config.data.crop_size, config.data.channels, title)


def find_runs(names: Iterable[str]) -> dict[str, str]:
    """Returns the folders of runs, keyed by their paths relative to the common parent.

    Args:
      names: folders of runs or sweeps; the folder of a sweep is replaced by those of its runs that have metrics.

    Raises ConfigError: a sweep cannot be read, or none of its runs has started.
    """
    folders = []
    for folder in map(os.path.abspath, map(os.path.expanduser, names)):
        if not os.path.exists(os.path.join(folder, 'sweep.json')):
            folders.append(folder)
            continue
        try:
            sweep = read_sweep(folder)
        except ReportError as error:
            raise ConfigError(str(error)) from None
        runs = [os.path.join(folder, run['directory']) for run in sweep['runs']]
        started = [
            run for run in runs if os.path.exists(os.path.join(run, 'metrics.jsonl')) and curves.read_metrics(run)
        ]
        if not started:
            raise ConfigError(f'{folder}: no run of this sweep has started; wait for one')
        folders += started
    parent = os.path.commonpath([os.path.dirname(folder) for folder in folders])
    return {os.path.relpath(folder, parent): folder for folder in folders}


def plot_curves(runs: dict[str, str]) -> Figure:
    """Draws the metrics of the run folders in `runs`, keyed by name. Raises ConfigError: a run has no metrics."""
    metrics = {name: curves.read_metrics(folder) for name, folder in runs.items()}
    for name, lines in metrics.items():
        if not lines:
            raise ConfigError(f'{runs[name]}: its metrics.jsonl is still empty; wait for a line, or omit this run')
    return curves.draw(metrics)
