"""cluster/slurm.sh on a real SLURM cluster of two nodes on this machine."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers import ROOT, config_flags, environment, free_port, read_result, wait_for

pytestmark = pytest.mark.slow

PATH = os.environ['PATH'] + ':/usr/sbin'  # the daemons of Debian
NEEDED = ('munged', 'slurmctld', 'slurmd', 'sbatch', 'srun', 'scontrol')
STEPS, SAVE_EVERY = 64, 4  # A preemption takes about ten steps or more.

# The nodes are named by addresses, because jax connects to the name of the first node. A requeued job waits for
# cred_expire, whose default is two minutes.
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
    """Returns why SLURM cannot run here and what to do, or None."""
    if os.geteuid() != 0:
        return 'only root can start a SLURM cluster for tests'
    if absent := [name for name in NEEDED if not shutil.which(name, path=PATH)]:
        return f'no {", ".join(absent)} on this machine: make slurm installs SLURM (Debian, Ubuntu)'
    return None


class Cluster:
    """munged, slurmctld and two slurmd; jobs are submitted from `folder`/repository, which gets their logs."""

    def __init__(self, folder: Path):
        self.folder, self.repository, self.daemons = folder, folder / 'repository', []
        # The program is compiled three times and used for few steps.
        variables = {'PATH': PATH, 'SLURM_CONF': f'{folder}/slurm.conf', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
        self.environment = environment(**variables)
        for name in ('state', '127.0.0.1', '127.0.0.2', 'repository'):
            (folder / name).mkdir()
        for name in ('launch.py', 'alexnet_jax', 'configs', 'cluster'):
            (self.repository / name).symlink_to(ROOT / name)
        (self.repository / '.venv').symlink_to(sys.prefix)
        (folder / 'munge.key').write_bytes(os.urandom(64))
        (folder / 'munge.key').chmod(0o400)
        ports = [free_port() for _ in range(3)]
        (folder / 'slurm.conf').write_text(SLURM_CONF.format(folder=folder, ports=ports))

    def start(self) -> None:
        files = {'key-file': 'munge.key', 'socket': 'munge.socket', 'pid-file': 'munged.pid', 'seed-file': 'munge.seed'}
        files['log-file'] = 'munged-own.log'
        self.daemon('munged', '--foreground', '--force', *(f'--{flag}={self.folder / files[flag]}' for flag in files))
        wait_for((self.folder / 'munge.socket').exists, 20)
        self.daemon('slurmctld', '-D', '-c')
        for node in ('127.0.0.1', '127.0.0.2'):
            self.daemon('slurmd', '-D', '-N', node)
        wait_for(lambda: self.run('sinfo', '--noheader', '--format=%T %D') == 'idle 2', 30, every=0.1)

    def daemon(self, *command: str) -> None:
        with open(self.folder / f'{len(self.daemons)}-{command[0]}.log', 'w') as log:
            self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def run(self, *command: str) -> str:
        """Returns the output of a command, or nothing if it fails."""
        done = subprocess.run(
            command, cwd=self.repository, env=self.environment, capture_output=True, text=True, timeout=60
        )
        return done.stdout.strip() if done.returncode == 0 else ''

    def submit(self, *command: str) -> str:
        """Submits cluster/slurm.sh with its arguments, after options of sbatch; returns the job id."""
        job = self.run('sbatch', '--parsable', *command)
        assert job.isdigit(), f'sbatch {command} failed'
        return job

    def state(self, job: str) -> dict[str, str]:
        """Returns what scontrol shows of the job, such as JobState, Restarts and ExitCode."""
        return dict(word.split('=', 1) for word in self.run('scontrol', 'show', 'job', job).split() if '=' in word)

    def ended(self, job: str) -> bool:
        return self.state(job).get('JobState') not in (None, 'PENDING', 'CONFIGURING', 'RUNNING', 'COMPLETING')

    def wait_for_end(self, job: str, seconds: float) -> dict[str, str]:
        wait_for(lambda: self.ended(job), seconds, every=0.1)
        return self.state(job)

    def log(self, job: str) -> str:
        file = self.repository / f'slurm-{job}.log'
        return file.read_text() if file.exists() else ''

    def processes(self) -> list[int]:
        """Returns all processes of the cluster and its jobs: they have its folder in their environment."""
        found = []
        for variables in Path('/proc').glob('[0-9]*/environ'):
            try:
                if f'SLURM_CONF={self.folder}/'.encode() in variables.read_bytes():
                    found.append(int(variables.parent.name))
            except OSError:  # The process has just ended.
                continue
        return found

    def stop(self) -> None:
        """Ends all processes and prints the logs, which pytest shows if a test fails."""
        for file in sorted([*self.folder.glob('*.log'), *self.repository.glob('*.log')]):
            print(f'--- {file.name}\n{file.read_text(errors="replace")[-10_000:]}')

        def none_left():
            for process in self.processes():
                os.kill(process, signal.SIGKILL)
            return not self.processes()

        wait_for(none_left, 20, every=0.1)
        for daemon in self.daemons:
            daemon.wait(timeout=20)
        shutil.rmtree(self.folder)


@pytest.fixture
def cluster():
    if reason := missing():
        (pytest.fail if os.environ.get('CI') else pytest.skip)(reason)
    # A short path, because that of a socket has at most 107 characters.
    cluster = Cluster(Path(tempfile.mkdtemp(prefix='slurm-')))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def flags(data_dir: str, workdir: Path) -> list[str]:
    """Returns the flags of a narrow quickstart: 64 steps of 128 images, with a checkpoint every four steps."""
    settings = {
        'data.data_dir': data_dir,
        'model.widths': '(16,32,32,32,32,64,64)',
        'train.batch_size': 128,
        'train.steps': STEPS,
        'eval.every': STEPS,
        'eval.views': 1,
        'checkpoint.every': SAVE_EVERY,
    }
    return [f'--workdir={workdir}', *config_flags(settings)]


def stopped_at(workdir: Path) -> int | None:
    """Returns the step at which a run was preempted, or None."""
    result = read_result(workdir) if (workdir / 'result.json').exists() else {}
    return result['step'] if result.get('status') == 'preempted' else None


def test_preempted_job_requeues_and_matches_uninterrupted(cluster, photos_dir):
    preempted, alone = cluster.folder / 'preempted', cluster.folder / 'alone'
    first = cluster.submit('--nodes=2', '--partition=low', 'cluster/slurm.sh', *flags(photos_dir, preempted))

    def saved_after(step):
        """Returns whether there is a checkpoint after `step`."""
        assert not cluster.ended(first), 'the job ended before the preemption'
        return any(int(path.name) > step for path in (preempted / 'checkpoints').glob('[0-9]*[0-9]'))

    # First, preempt the job with a signal.
    wait_for(lambda: saved_after(0), 180, every=0.1)
    assert cluster.run('scancel', '--signal=TERM', '--verbose', first) == ''
    by_signal = wait_for(lambda: stopped_at(preempted), 60, every=0.1)
    wait_for(lambda: saved_after(by_signal), 180, every=0.1)
    # Then SLURM sends SIGTERM, because a job of a partition with a higher priority needs both nodes.
    second = cluster.submit('--nodes=2', '--partition=high', 'cluster/slurm.sh', *flags(photos_dir, alone))
    assert cluster.wait_for_end(second, 180)['JobState'] == 'COMPLETED'
    by_slurm = stopped_at(preempted)
    end = cluster.wait_for_end(first, 180)
    assert (end['JobState'], end['Restarts'], end['ExitCode']) == ('COMPLETED', '2', '0:0')

    assert SAVE_EVERY <= by_signal < by_slurm < STEPS
    log = cluster.log(first)
    assert set(re.findall(r'Exited with exit code (\d+)', log)) == {'75'}
    for step in (by_signal, by_slurm):
        assert f'{preempted} at step {step} of {STEPS}' in log
    assert 'data=2, model=1' in log  # Both tasks train together.
    result, expected = read_result(preempted), read_result(alone)
    assert (result['status'], result['step']) == ('done', STEPS)
    assert result['state_digest'] == expected['state_digest']
    assert cluster.state(second)['Restarts'] == '0'


def test_array_job_substitutes_task_id_and_keeps_exit_code(cluster):
    job = cluster.submit('--array=3', 'cluster/slurm.sh', '--workdir=runs/seed_%a', '--config.seed=seed_%a')
    end = cluster.wait_for_end(job, 60)
    assert (end['JobState'], end['Restarts'], end['ExitCode']) == ('FAILED', '0', '2:0')
    assert "alexnet_jax: config.seed: 'seed_3'" in cluster.log(job)
