"""cluster/slurm.sh on a real SLURM cluster: two nodes on this machine, in a folder of their own."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PATH = os.environ['PATH'] + ':/usr/sbin'  # where Debian keeps the daemons
NEEDED = ('munged', 'slurmctld', 'slurmd', 'sbatch', 'srun', 'scontrol')
STEPS, SAVE_EVERY = 64, 4  # a preemption takes about ten steps to arrive, more where they are fast

# The nodes are named by addresses, for jax reaches its coordinator by the name of the first node. cred_expire is also
# how long a requeued job waits; it is two minutes where nothing is said.
SLURM_CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/linear
SchedulerParameters=sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
JobRequeue=0
NodeName=127.0.0.1 NodeAddr=127.0.0.1 NodeHostname=localhost Port={ports[1]}
NodeName=127.0.0.2 NodeAddr=127.0.0.1 NodeHostname=localhost Port={ports[2]}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=120
PartitionName=high Nodes=ALL PriorityTier=2
"""


def missing() -> str | None:
    """Why there can be no SLURM cluster here, with what to do."""
    if os.geteuid() != 0:
        return 'a SLURM cluster for tests has to be started by root'
    if absent := [name for name in NEEDED if not shutil.which(name, path=PATH)]:
        return f'no {", ".join(absent)} on this machine: make slurm installs SLURM (Debian, Ubuntu)'
    return None


def wait_until(condition, seconds: float, what: str):
    """The first true value of `condition()`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f'{what}: not within {seconds} s'
        time.sleep(0.1)
    return value


class Cluster:
    """munged, slurmctld and two slurmd; jobs are submitted from `folder`/repository, where their logs appear."""

    def __init__(self, folder: Path):
        self.folder, self.repository, self.daemons = folder, folder / 'repository', []
        self.environment = {
            **os.environ,
            'PATH': PATH,
            'SLURM_CONF': f'{folder}/slurm.conf',
            'JAX_NUM_CPU_DEVICES': '1',
            'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',  # compiled three times, used for few steps
        }
        for name in ('state', '127.0.0.1', '127.0.0.2', 'repository'):
            (folder / name).mkdir()
        for name in ('launch.py', 'alexnet_jax', 'configs', 'cluster'):
            (self.repository / name).symlink_to(ROOT / name)
        (self.repository / '.venv').symlink_to(sys.prefix)
        (folder / 'munge.key').write_bytes(os.urandom(64))
        (folder / 'munge.key').chmod(0o400)
        sockets = [socket.create_server(('127.0.0.1', 0)) for _ in range(3)]
        ports = [free.getsockname()[1] for free in sockets]
        for free in sockets:
            free.close()
        (folder / 'slurm.conf').write_text(SLURM_CONF.format(folder=folder, ports=ports))

    def start(self) -> None:
        files = {'key-file': 'munge.key', 'socket': 'munge.socket', 'pid-file': 'munged.pid', 'seed-file': 'munge.seed'}
        files['log-file'] = 'munged-own.log'
        self.daemon('munged', '--foreground', '--force', *(f'--{flag}={self.folder / files[flag]}' for flag in files))
        wait_until((self.folder / 'munge.socket').exists, 20, 'the socket of munged')
        self.daemon('slurmctld', '-D', '-c')
        for node in ('127.0.0.1', '127.0.0.2'):
            self.daemon('slurmd', '-D', '-N', node)
        wait_until(lambda: self.run('sinfo', '--noheader', '--format=%T %D') == 'idle 2', 30, 'two idle nodes')

    def daemon(self, *command: str) -> None:
        with open(self.folder / f'{len(self.daemons)}-{command[0]}.log', 'w') as log:
            self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def run(self, *command: str) -> str:
        """What it prints, or nothing where it fails."""
        done = subprocess.run(
            command, cwd=self.repository, env=self.environment, capture_output=True, text=True, timeout=60
        )
        return done.stdout.strip() if done.returncode == 0 else ''

    def submit(self, *command: str) -> str:
        """Submit cluster/slurm.sh; the options of sbatch stand before it in `command`. The job's number."""
        job = self.run('sbatch', '--parsable', *command)
        assert job.isdigit(), f'sbatch {command} failed'
        return job

    def state(self, job: str) -> dict[str, str]:
        """What scontrol says of the job: JobState, Restarts, ExitCode."""
        return dict(word.split('=', 1) for word in self.run('scontrol', 'show', 'job', job).split() if '=' in word)

    def ended(self, job: str) -> bool:
        return self.state(job).get('JobState') not in (None, 'PENDING', 'CONFIGURING', 'RUNNING', 'COMPLETING')

    def wait_for_end(self, job: str, seconds: float) -> dict[str, str]:
        wait_until(lambda: self.ended(job), seconds, f'the end of job {job}')
        return self.state(job)

    def log(self, job: str) -> str:
        file = self.repository / f'slurm-{job}.log'
        return file.read_text() if file.exists() else ''

    def processes(self) -> list[int]:
        """Everything that was started here, tasks of jobs too: what has the cluster's folder in its environment."""
        found = []
        for environment in Path('/proc').glob('[0-9]*/environ'):
            try:
                if f'SLURM_CONF={self.folder}/'.encode() in environment.read_bytes():
                    found.append(int(environment.parent.name))
            except OSError:  # it ended meanwhile
                continue
        return found

    def stop(self) -> None:
        """End every process and print the logs, which pytest shows when a test failed."""
        for file in sorted([*self.folder.glob('*.log'), *self.repository.glob('*.log')]):
            print(f'--- {file.name}\n{file.read_text(errors="replace")[-10_000:]}')

        def none_left():
            for process in self.processes():
                os.kill(process, signal.SIGKILL)
            return not self.processes()

        wait_until(none_left, 20, 'the end of all processes of the SLURM cluster')
        for daemon in self.daemons:
            daemon.wait(timeout=20)
        shutil.rmtree(self.folder)


@pytest.fixture
def cluster():
    if reason := missing():
        (pytest.fail if os.environ.get('CI') else pytest.skip)(reason)
    cluster = Cluster(
        Path(tempfile.mkdtemp(prefix='slurm-'))
    )  # short, for the path of a socket has 107 letters at most
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def flags(data_dir: str, workdir: Path) -> list[str]:
    """A narrow quickstart: 64 steps of 128 images, saved every four, evaluated at the end."""
    settings = {
        'data.data_dir': data_dir,
        'model.widths': '(16,32,32,32,32,64,64)',
        'train.batch_size': 128,
        'train.steps': STEPS,
        'eval.every': STEPS,
        'eval.views': 1,
        'checkpoint.every': SAVE_EVERY,
    }
    return [f'--workdir={workdir}', *(f'--config.{field}={value}' for field, value in settings.items())]


def stopped_at(workdir: Path) -> int | None:
    """The step at which a run was preempted, once its result says so."""
    file = workdir / 'result.json'
    result = json.loads(file.read_text()) if file.exists() else {}
    return result['step'] if result.get('status') == 'preempted' else None


def test_preempted_job_requeues_and_matches_uninterrupted(cluster, photos_dir):
    preempted, alone = cluster.folder / 'preempted', cluster.folder / 'alone'
    first = cluster.submit('--nodes=2', '--partition=low', 'cluster/slurm.sh', *flags(photos_dir, preempted))

    def saved_after(step):
        """Whether a checkpoint later than `step` is there."""
        assert not cluster.ended(first), 'it ended before it was preempted'
        return any(int(path.name) > step for path in (preempted / 'checkpoints').glob('[0-9]*[0-9]'))

    # By hand.
    wait_until(lambda: saved_after(0), 180, 'the first checkpoint')
    assert cluster.run('scancel', '--signal=TERM', '--verbose', first) == ''
    by_hand = wait_until(lambda: stopped_at(preempted), 60, 'the first preemption')
    wait_until(lambda: saved_after(by_hand), 180, 'a checkpoint after the first preemption')
    # By SLURM: a job of a higher partition needs both nodes, and SIGTERM is sent to the tasks of the first.
    second = cluster.submit('--nodes=2', '--partition=high', 'cluster/slurm.sh', *flags(photos_dir, alone))
    assert cluster.wait_for_end(second, 180)['JobState'] == 'COMPLETED'
    by_slurm = stopped_at(preempted)
    end = cluster.wait_for_end(first, 180)
    assert (end['JobState'], end['Restarts'], end['ExitCode']) == ('COMPLETED', '2', '0:0')

    assert SAVE_EVERY <= by_hand < by_slurm < STEPS
    log = cluster.log(first)
    assert set(re.findall(r'Exited with exit code (\d+)', log)) == {'75'}
    for step in (by_hand, by_slurm):
        assert f'resuming {preempted} at step {step} of {STEPS}' in log
    assert 'mesh data=2, model=1' in log  # the two tasks trained together
    result, expected = (json.loads((folder / 'result.json').read_text()) for folder in (preempted, alone))
    assert (result['status'], result['step']) == ('done', STEPS)
    assert result['state_digest'] == expected['state_digest']
    assert cluster.state(second)['Restarts'] == '0'


def test_array_job_substitutes_task_id_and_keeps_exit_code(cluster):
    job = cluster.submit('--array=3', 'cluster/slurm.sh', '--workdir=runs/seed_%a', '--config.seed=seed_%a')
    end = cluster.wait_for_end(job, 60)
    assert (end['JobState'], end['Restarts'], end['ExitCode']) == ('FAILED', '0', '2:0')
    assert "alexnet_jax: config.seed: 'seed_3' is not int" in cluster.log(job)
