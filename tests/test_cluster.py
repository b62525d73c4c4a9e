"""The files of cluster/ as far as they can be tested without a cluster; test_slurm.py runs slurm.sh."""

import importlib.resources
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, run_command

CLUSTER = ROOT / 'cluster'
# launch.py reads all flags and the config, and then rejects this one.
REJECTED = '--config.data.crop_size=1000'


def documents(name: str) -> dict[str, dict]:
    """Returns the Kubernetes objects of a file by kind."""
    return {document['kind']: document for document in yaml.safe_load_all((CLUSTER / name).read_text())}


def repository(folder: Path) -> Path:
    """Makes `folder` look like a clone with its .venv."""
    for name in ('launch.py', 'alexnet_jax', 'configs'):
        (folder / name).symlink_to(ROOT / name)
    (folder / '.venv').symlink_to(sys.prefix)
    return folder


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize('script', sorted(path.name for path in CLUSTER.glob('*.sh')))
def test_shell_scripts_parse_and_are_executable(script):
    assert run(['bash', '-n', str(CLUSTER / script)], ROOT).stderr == ''
    assert os.access(CLUSTER / script, os.X_OK)


@pytest.mark.parametrize('name', ['jobset-gpu.yaml', 'jobset-tpu.yaml'])
def test_jobset_command_is_accepted_by_launch(name, tmp_path):
    job = documents(name)['JobSet']['spec']['replicatedJobs'][0]['template']['spec']
    [container] = job['template']['spec']['containers']
    program, *arguments = container['command']
    assert program == 'python'
    assert '--distributed' in arguments
    done = run_command(*arguments, f'--workdir={tmp_path}', REJECTED)
    assert done.returncode == 2
    assert done.stderr.startswith('alexnet_jax: config.data.crop_size: 1000')


@pytest.mark.parametrize('name', ['jobset-gpu.yaml', 'jobset-tpu.yaml'])
def test_jobset_restarts_preempted_pods(name):
    objects = documents(name)
    jobset = objects['JobSet']
    assert jobset['apiVersion'] == 'jobset.x-k8s.io/v1alpha2'
    assert jobset['spec']['failurePolicy']['rules'][0] == {
        'name': 'preempted',
        'action': 'RestartJobSetAndIgnoreMaxRestarts',
        'onJobFailureReasons': ['PodFailurePolicy'],
    }
    [replicated] = jobset['spec']['replicatedJobs']
    job = replicated['template']['spec']
    pod = job['template']['spec']
    [container] = pod['containers']
    exit_code, disruption = job['podFailurePolicy']['rules']
    assert exit_code['onExitCodes'] == {'containerName': container['name'], 'operator': 'In', 'values': [75]}
    assert disruption['onPodConditions'] == [{'type': 'DisruptionTarget', 'status': 'True'}]
    assert exit_code['action'] == disruption['action'] == 'FailJob'
    assert (pod['restartPolicy'], job['backoffLimit']) == ('Never', 0)  # required by podFailurePolicy
    assert pod['terminationGracePeriodSeconds'] >= 60
    # JAX takes the process count from spec.parallelism of its job, and the process id from the completion index.
    assert (replicated['replicas'], job['completionMode']) == (1, 'Indexed')
    assert job['completions'] == job['parallelism'] > 1
    mounts = {mount['name']: mount['mountPath'] for mount in container['volumeMounts']}
    assert mounts.keys() == {volume['name'] for volume in pod['volumes']}
    assert mounts['shared'] == '/shared'
    shared = documents('kubernetes-volume.yaml')
    assert shared['PersistentVolumeClaim']['spec']['accessModes'] == ['ReadWriteMany']
    volume = {
        'name': 'shared',
        'persistentVolumeClaim': {'claimName': shared['PersistentVolumeClaim']['metadata']['name']},
    }
    assert pod['volumes'][0] == shared['Pod']['spec']['volumes'][0] == volume


def test_tpu_topology_matches_pod_count():
    job = documents('jobset-tpu.yaml')['JobSet']['spec']['replicatedJobs'][0]['template']['spec']
    pod = job['template']['spec']
    width, height = map(int, pod['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x'))
    assert width * height == job['completions'] * pod['containers'][0]['resources']['limits']['google.com/tpu']


def test_role_grants_what_jax_requests():
    source = importlib.resources.files('jax') / '_src' / 'clusters' / 'k8s_cluster.py'
    asked = set(re.findall(r'_(?:core|batch)_api\.(\w+)\(', source.read_text()))
    # JAX lists services only without a JobSet.
    assert asked == {'list_namespaced_pod', 'read_namespaced_job', 'list_namespaced_service'}
    objects = documents('jobset-gpu.yaml')
    granted = [(rule['resources'], rule['verbs']) for rule in objects['Role']['rules']]
    assert granted == [(['pods'], ['list']), (['jobs'], ['get'])]
    [subject] = objects['RoleBinding']['subjects']
    account = objects['JobSet']['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']
    assert account['serviceAccountName'] == subject['name'] == objects['ServiceAccount']['metadata']['name']
    assert objects['RoleBinding']['roleRef']['name'] == objects['Role']['metadata']['name']


def test_skypilot_task_starts_the_processes(tmp_path):
    task = yaml.safe_load((CLUSTER / 'skypilot.yaml').read_text())
    assert task['resources']['job_recovery']['recover_on_exit_codes'] == [75]
    environment = {
        'SKYPILOT_NODE_IPS': '10.0.0.1\n10.0.0.2',
        'SKYPILOT_NUM_NODES': '2',
        'ARGUMENTS': f'{task["envs"]["ARGUMENTS"]} --workdir={tmp_path}/run {REJECTED}',
    }
    folder = repository(tmp_path)
    assert run(['bash', '-n', '-c', task['setup']], folder).stderr == ''
    taken = run(['bash', '-c', task['run']], folder, SKYPILOT_NODE_RANK='1', **environment)
    assert taken.returncode == 2
    assert taken.stderr.startswith('alexnet_jax: process 1 of 2: config.data.crop_size: 1000')
    beyond = run(['bash', '-c', task['run']], folder, SKYPILOT_NODE_RANK='2', **environment)
    assert re.search('--process_id: 2 .*--num_processes=2', beyond.stderr)


# A fake gcloud reports the states of a slice one after another and runs the command of a worker. A fake Python ends
# with the exit codes one after another.
GCLOUD = """#!/usr/bin/env bash
echo "$4" >> calls
case "$*" in
  *describe*) state=$(head -n1 states); sed -i 1d states
    if [[ $state =~ ^[A-Z_]+$ ]]; then echo "$state"; exit; fi
    echo "ERROR: ${state:-NOT_FOUND: no such resource}" >&2; exit 1 ;;
  *launch.py*) command=${@: -1}; bash -c "${command#--command=}" ;;
esac
"""
PYTHON = """#!/usr/bin/env bash
printf '%s|' "$@" >> ../started; echo >> ../started
code=$(head -n1 ../exit_codes); sed -i 1d ../exit_codes; exit $code
"""


@pytest.mark.parametrize(
    ('states', 'exit_codes', 'code', 'commands'),
    [
        (['WAITING_FOR_RESOURCES', 'no network', 'ACTIVE'], [75, 0], 0, 'ssh ssh delete'),
        (['ACTIVE', 'SUSPENDED', 'SUSPENDED', '', 'ACTIVE'], [1, 0], 0, 'ssh ssh delete create ssh ssh delete'),
        (['ACTIVE', 'ACTIVE'], [2], 1, 'ssh ssh'),
    ],
    ids=['stopped', 'preempted', 'wrong'],
)
def test_tpu_script_restarts_until_done(tmp_path, states, exit_codes, code, commands):
    worker = tmp_path / 'alexnet_jax'
    (worker / '.venv' / 'bin').mkdir(parents=True)
    for path, text in [(tmp_path / 'gcloud', GCLOUD), (worker / '.venv/bin/python', PYTHON)]:
        path.write_text(text)
        path.chmod(0o755)
    (tmp_path / 'states').write_text('\n'.join(states) + '\n')
    (tmp_path / 'exit_codes').write_text('\n'.join(map(str, exit_codes)) + '\n')
    settings = dict.fromkeys(('NAME', 'ZONE', 'TYPE', 'RUNTIME', 'NFS', 'REPOSITORY'), 'x')
    arguments = ['--workdir=/shared/a b', "--config.train.epochs='2'"]
    path = f'{tmp_path}:{os.environ["PATH"]}'
    done = run(
        ['bash', str(CLUSTER / 'tpu-vm.sh'), *arguments], tmp_path, PATH=path, SECONDS_BETWEEN_LOOKS='0', **settings
    )
    assert done.returncode == code, done.stderr
    calls = (tmp_path / 'calls').read_text().split()
    assert [call for call in calls if call != 'describe'] == commands.split()
    started = (tmp_path / 'started').read_text().splitlines()
    assert started == ['|'.join(['launch.py', '--distributed', *arguments, ''])] * len(exit_codes)
