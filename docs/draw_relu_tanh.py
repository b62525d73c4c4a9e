"""The figure docs/relu_tanh.png and its table, after figure 1 of the paper: python docs/draw_relu_tanh.py PATH

PATH: the folder of a finished sweep of configs/relu_tanh.py, or docs/logs/relu_tanh.jsonl, the logs of such a sweep.
"""

import json
import os
import statistics
import sys
from typing import Any

import matplotlib.pyplot as plt

STYLES = {'relu': ('#0072B2', '-'), 'tanh': ('#D55E00', '--')}  # colors of Okabe and Ito
IMAGES, BATCH_SIZE, WINDOW = 60_000, 128, 47


def load_runs(path: str) -> list[dict[str, Any]]:
    """Returns variant, result and metrics of each run of the sweep in folder `path`, or of the JSONL file `path`."""
    if os.path.isfile(path):
        with open(path) as file:
            return [json.loads(line) for line in file]
    with open(os.path.join(path, 'sweep.json')) as file:
        runs = json.load(file)['runs']
    for run in runs:
        with open(os.path.join(path, run['directory'], 'metrics.jsonl')) as file:
            run['metrics'] = [json.loads(line) for line in file]
        with open(os.path.join(path, run['directory'], 'result.json')) as file:
            run['result'] = json.load(file)
    return runs


def learning_curve(run: dict[str, Any]) -> dict[str, Any]:
    """Returns the epochs and training errors (0 to 1) of `run` per WINDOW steps, and the epochs to the target error.

    A checkpoint ends a window of the log early; the parts of one window are averaged.
    """
    target_step = run['result']['target_step']
    epochs, errors, before, wrong = [], [], 0, 0.0
    for line in (line for line in run['metrics'] if line['split'] == 'train'):
        wrong += line['top1_error'] * (line['step'] - before)
        before = line['step']
        if before % WINDOW == 0:
            epochs.append(before * BATCH_SIZE / IMAGES)
            errors.append(wrong / WINDOW)
            wrong = 0.0
    return {
        'epochs': epochs,
        'errors': errors,
        'epochs_to_target': target_step and target_step * BATCH_SIZE / IMAGES,
    }


def print_table(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Prints the epochs to the target error in Markdown, and the ratio of the means."""
    print('| | epochs to the target error, by seed | mean +- standard deviation |\n| --- | --- | --: |')
    means = {}
    for name, each in runs.items():
        epochs = [run['epochs_to_target'] for run in each]
        if None in epochs:
            raise SystemExit(f'{name}: a run did not reach the target error: {epochs}')
        means[name] = statistics.mean(epochs)
        shown = ', '.join(f'{value:.1f}' for value in epochs)
        print(f'| {name} | {shown} | {means[name]:.2f} +- {statistics.stdev(epochs):.2f} |')
    print(f'\nratio of the means: {means["tanh"] / means["relu"]:.1f}')


def draw(runs: dict[str, list[dict[str, Any]]], target_error: float, file: str) -> None:
    """Draws the training error of each run by epoch, and a line at `target_error`."""
    figure, axis = plt.subplots(figsize=(6.5, 4.2), layout='constrained')
    for name, (color, line) in STYLES.items():
        for i, run in enumerate(runs[name]):
            label = {'relu': 'ReLU', 'tanh': 'tanh'}[name] + f', {len(runs[name])} seeds' if i == 0 else None
            errors = [100 * error for error in run['errors']]
            axis.plot(run['epochs'], errors, line, color=color, linewidth=1.2, alpha=0.8, label=label)
    axis.axhline(100 * target_error, color='black', linewidth=0.8, linestyle=':')
    axis.annotate(f'target error, {target_error:.0%}', (0.03, 100 * target_error - 0.5), ha='left', va='top')
    axis.set(xlabel='epochs', ylabel='training error, %', ylim=(0, 40), xlim=(0, None))
    axis.set_title('Four layers on Fashion-MNIST, after figure 1 of the paper', fontsize=11)
    axis.grid(alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(file, dpi=110)


if __name__ == '__main__':
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in STYLES}
    for run in load_runs(sys.argv[1]):
        found[run['variant']].append(learning_curve(run))
    print_table(found)
    draw(found, 0.1, os.path.join(os.path.dirname(os.path.abspath(__file__)), 'relu_tanh.png'))
