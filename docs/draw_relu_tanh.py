"""The figure docs/relu_tanh.png and its table, after figure 1 of the paper: python docs/draw_relu_tanh.py SWEEP_DIR

SWEEP_DIR: a finished sweep of configs/relu_tanh.py, or docs/logs/relu_tanh.
"""

import json
import os
import statistics
import sys
from typing import Any

import matplotlib.pyplot as plt

STYLES = {'relu': ('#0072B2', '-'), 'tanh': ('#D55E00', '--')}  # colors of Okabe and Ito
IMAGES, BATCH_SIZE, WINDOW = 60_000, 128, 47


def read(folder: str, directory: str) -> dict[str, Any]:
    """Returns epochs and training errors (0 to 1) of a run's windows of WINDOW steps, and the epochs to the goal.

    A checkpoint ends a line of the log early, so a window may have several lines, which are averaged.
    """
    with open(os.path.join(folder, directory, 'metrics.jsonl')) as file:
        lines = [json.loads(line) for line in file]
    with open(os.path.join(folder, directory, 'result.json')) as file:
        target_step = json.load(file)['target_step']
    epochs, errors, before, wrong = [], [], 0, 0.0
    for line in (line for line in lines if line['split'] == 'train'):
        wrong += line['top1_error'] * (line['step'] - before)
        before = line['step']
        if before % WINDOW == 0:
            epochs.append(before * BATCH_SIZE / IMAGES)
            errors.append(wrong / WINDOW)
            wrong = 0.0
    return {
        'epochs': epochs,
        'errors': errors,
        'goal': target_step and target_step * BATCH_SIZE / IMAGES,
    }


def print_table(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Prints the epochs to the goal in Markdown, and the ratio of the means."""
    print('| | epochs to the goal, seed by seed | mean +- standard deviation |\n| --- | --- | --: |')
    means = {}
    for name, each in runs.items():
        goals = [run['goal'] for run in each]
        if None in goals:
            raise SystemExit(f'{name}: a run did not reach the goal: {goals}')
        means[name] = statistics.mean(goals)
        shown = ', '.join(f'{goal:.1f}' for goal in goals)
        print(f'| {name} | {shown} | {means[name]:.2f} +- {statistics.stdev(goals):.2f} |')
    print(f'\nratio of the means: {means["tanh"] / means["relu"]:.1f}')


def draw(runs: dict[str, list[dict[str, Any]]], goal: float, file: str) -> None:
    """Draws one line per run."""
    figure, axis = plt.subplots(figsize=(6.5, 4.2), layout='constrained')
    for name, (color, line) in STYLES.items():
        for i, run in enumerate(runs[name]):
            label = {'relu': 'ReLU', 'tanh': 'tanh'}[name] + f', {len(runs[name])} seeds' if i == 0 else None
            errors = [100 * error for error in run['errors']]
            axis.plot(run['epochs'], errors, line, color=color, linewidth=1.2, alpha=0.8, label=label)
    axis.axhline(100 * goal, color='black', linewidth=0.8, linestyle=':')
    axis.annotate(f'goal, {goal:.0%}', (0.03, 100 * goal - 0.5), ha='left', va='top')
    axis.set(xlabel='epochs', ylabel='training error, %', ylim=(0, 40), xlim=(0, None))
    axis.set_title('Four layers on Fashion-MNIST, after figure 1 of the paper', fontsize=11)
    axis.grid(alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(file, dpi=110)


if __name__ == '__main__':
    folder = sys.argv[1]
    with open(os.path.join(folder, 'sweep.json')) as file:
        sweep = json.load(file)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in STYLES}
    for run in sweep['runs']:
        found[run['variant']].append(read(folder, run['directory']))
    print_table(found)
    draw(found, 0.1, os.path.join(os.path.dirname(os.path.abspath(__file__)), 'relu_tanh.png'))
