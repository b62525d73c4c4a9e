"""The tables of accelerators in docs/scaling.md: python -m docs.audit_targets [--compilers=FOLDER] [--only=REGEX]

Every row is an audit of a training step that the compiler of the accelerator compiled (`alexnet audit --target`);
nothing is executed. The cases are all presets in all layouts that they have, in float32 and bfloat16, on TARGETS. Each
case is audited in a process of its own and appended to docs/logs/targets.jsonl as one line. Cases that the file already
has without an error are skipped, so that the command can be interrupted and repeated; remove lines of the file to audit
their cases again. All cases take several hours on two cores.

--only selects cases by their name, such as 'h100:8/paper/towers/float32'. --table audits nothing and prints the tables,
in Markdown, of what the file has.
"""

import argparse
import contextlib
import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from alexnet_jax.audit import targets
from alexnet_jax.audit.step_audit import audit, audit_config
from alexnet_jax.config import Config, ConfigError, preset_config
from alexnet_jax.config_checks import check_mesh
from alexnet_jax.presets import PRESETS

LOG = Path(__file__).with_name('logs') / 'targets.jsonl'
TARGETS = ('h100:8', 'h100:64', 'v5e:2x4', 'v6e:2x4', 'v5p:2x2x2', 'v5e:16x16')
MODEL = {'data': 1, 'towers': 2, 'hybrid': 4}  # devices along `model`
DTYPES = ('float32', 'bfloat16')
IMAGES = 128  # per device
TIMEOUT = 3600  # seconds of one audit


def case_config(target: targets.Target, preset: str, layout: str, dtype: str) -> Config:
    """Returns the configuration of a case. Raises ConfigError: the preset does not have the layout."""
    settings = preset_config(preset)
    settings.mesh.layout = layout
    settings.model.dtype = dtype
    mesh = f'data:{target.devices // MODEL[layout]},model:{MODEL[layout]}'
    config = audit_config(settings, mesh, IMAGES, target)
    check_mesh(config, config.mesh.data, config.mesh.model)
    return config


def case_names(only: str) -> list[str]:
    """Returns 'TARGET/PRESET/LAYOUT/DTYPE' of all cases that exist and match the pattern."""
    names = []
    for target, *rest in itertools.product(TARGETS, PRESETS, MODEL, DTYPES):
        name = '/'.join([target, *rest])
        if re.search(only, name):
            with contextlib.suppress(ConfigError):
                case_config(targets.parse_target(target), *rest)
                names.append(name)
    return names


def audit_case(name: str, compilers: str | None) -> dict[str, Any]:
    """Returns the report of a case, without the tables of layers and collectives."""
    text, *rest = name.split('/')
    target = targets.parse_target(text)
    compiler = targets.find_compiler(target, compilers)
    targets.set_environment(target, compiler)
    config = case_config(target, *rest)
    import jax

    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', target.devices)
    report: dict[str, Any] = dict(audit(config, target, compiler))
    found = report.pop('collectives')
    del report['layers'], report['target']['overlap']
    report['collectives'] = len({(each.start, each.done) for each in found})
    return {'case': name, **report}


def finished() -> dict[str, dict[str, Any]]:
    """Returns the lines of LOG by the name of the case."""
    lines = LOG.read_text().splitlines() if LOG.exists() else []
    return {line['case']: line for line in map(json.loads, lines)}


def run_cases(names: list[str], compilers: str | None) -> None:
    """Audits the cases that LOG does not have, one after another, and appends each to it."""
    done = finished()
    left = [name for name in names if 'error' in done.get(name, {'error': ''})]
    print(f'{len(names)} cases, {len(names) - len(left)} of them in {LOG}', flush=True)
    seconds = 0.0
    for number, name in enumerate(left):
        started = time.monotonic()
        command = [sys.executable, '-m', 'docs.audit_targets', f'--case={name}']
        command += [f'--compilers={compilers}'] if compilers else []
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
            output = '' if run.returncode else run.stdout
            reason = run.stderr.strip().rpartition('\n')[2] or f'exit code {run.returncode}'
        except subprocess.TimeoutExpired:
            output, reason = '', f'no result after {TIMEOUT} s'
        line = output.strip().rpartition('\n')[2] or json.dumps({'case': name, 'error': reason})
        with LOG.open('a') as file:
            file.write(line + '\n')
        took = time.monotonic() - started
        seconds += took
        left_minutes = seconds / (number + 1) * (len(left) - number - 1) / 60
        problem = f', {json.loads(line)["error"]}' if 'error' in json.loads(line) else ''
        print(f'{number + 1} of {len(left)}: {name} in {took:.0f} s{problem}; {left_minutes:.0f} min left', flush=True)


def print_summary() -> None:
    """Prints the efficiencies of `paper` in Markdown: the compiled schedule between the bounds of any schedule."""
    print('\n`paper`:\n\n| target | layout | dtype | nothing overlapped | **compiled schedule** |', end='')
    print(' all gradients overlapped |\n| --- | --- | --- | --: | --: | --: |')
    for line in finished().values():
        target, name, layout, dtype = line['case'].split('/')
        if name == 'paper' and 'error' not in line:
            roof, link = line['target']['roofline'], line['target']['hardware']['link']
            compute, sent = roof['compute_seconds'], roof['communication_seconds']
            exchanged = (line['wire_bytes_per_device'] - line['target']['gradient_collectives']['bytes']) / link
            low, own = compute / (compute + sent), compute / roof['step_seconds']
            high = compute / (exchanged + max(compute, sent - exchanged))
            print(f'| `{target}` | `{layout}` | {dtype} | {low:.0%} | **{own:.0%}** | {high:.0%} |')


def print_tables() -> None:
    """Prints one table in Markdown per target."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in finished().values():
        rows.setdefault(line['case'].split('/')[0], []).append(line)
    for target, lines in rows.items():
        good = [line['target'] for line in lines if 'error' not in line]
        if good:
            first = good[0]
            print(f'\n`{target}`, {first["device_kind"]}, {first["compiler"]} {first["compiler_version"]}:\n')
        print('| preset | layout | dtype | MB sent (/ lower bound) | gradients behind compute | memory, MB', end='')
        print(' | accessed, GB | compute + exposed, ms | images/s at most | efficiency at most |')
        print('| --- | --- | --- | --: | --: | --: | --: | --: | --: | --: |')
        for line in lines:
            print(table_row(line))


def table_row(line: dict[str, Any]) -> str:
    """Returns the row of one case."""
    _, preset, layout, dtype = line['case'].split('/')
    start = f'| `{preset}` | `{layout}` | {dtype} |'
    if 'error' in line:
        return f'{start} {line["error"]} | | | | | | |'
    target, roof = line['target'], line['target']['roofline']
    wire, least = line['wire_bytes_per_device'], line['analytic_minimum_bytes']
    memory = f'{target["memory"]["total"] / 1e6:,.0f}' + ('' if target['memory']['fits'] else ' (does not fit)')
    return (
        f'{start} {wire / 1e6:,.1f} ({wire / least if least else 1:.3f})'
        f' | {target["gradient_bytes_behind_compute"]:.0%} | {memory} | {target["accessed_bytes"]["total"] / 1e9:.2f}'
        f' | {roof["compute_seconds"] * 1e3:.2f} + {roof["exposed_seconds"] * 1e3:.2f}'
        f' | {roof["images_per_second"]:,.0f} | {roof["compute_seconds"] / roof["step_seconds"]:.0%} |'
    )


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--compilers', help='folder of the compilers, from pip install --target=FOLDER')
    parser.add_argument('--only', default='', help='regular expression of the names of cases')
    parser.add_argument('--table', action='store_true', help='print the tables only')
    parser.add_argument('--case', help='audit one case and print its line')
    given = parser.parse_args()
    if given.case:
        print(json.dumps(audit_case(given.case, given.compilers)))
        return
    if not given.table:
        run_cases(case_names(given.only), given.compilers)
    print_summary()
    print_tables()


if __name__ == '__main__':
    try:
        main()
    except ConfigError as error:
        sys.exit(str(error))
