"""Where the runs of a sweep go: processes of this machine, or jobs of a Slurm cluster.

An executor starts a command, and says of it later whether it still runs and how it ended:

    job = executor.start('llama-s1337', ['python', 'train.py', ...], log_path)
    job.ended()          # None while it runs or waits, then True or False: whether it left with exit code 0
    job.stop()           # ask it to save and leave
"""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from user_errors import UserError

PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>
GRACE_SECONDS = 60  # for a run to save and leave when it is asked to stop


def make_executor(config, folder):
    """The executor that a SweepConfig asks for; `folder` takes what it writes."""
    if config.executor == "slurm":
        return SlurmExecutor(config, folder)
    return LocalExecutor(config)


def training_command(config, arguments):
    """The command of a run on one machine: python, or torchrun where it has several processes."""
    if config.processes_per_node == 1:
        return [sys.executable, "train.py", *arguments]
    processes = f"--nproc_per_node={config.processes_per_node}"
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", processes, "train.py", *arguments]


# ---- this machine ----------------------------------------------------------------------------------------------------


class LocalExecutor:
    """Processes here, each with devices of its own."""

    def __init__(self, config):
        self.config = config
        self.devices = visible_devices()
        fits = len(self.devices) // config.processes_per_node if self.devices else 1
        if self.devices and not fits:
            raise UserError(
                f"processes_per_node={config.processes_per_node} is more than the {len(self.devices)} devices here"
            )
        self.capacity = config.at_once or fits
        self.busy = {}  # {slot: job}

    def start(self, name, arguments, log_path):
        """Start train.py with `arguments`; its output goes to the end of log_path."""
        slot = next(
            slot for slot in range(self.capacity) if slot not in self.busy or self.busy[slot].ended() is not None
        )
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if self.devices:  # more runs than devices share them in turn
            n = self.config.processes_per_node
            first = slot * n % (len(self.devices) // n * n)
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices[first : first + n])
        self.busy[slot] = LocalJob(training_command(self.config, arguments), environment, log_path)
        return self.busy[slot]


class LocalJob:
    def __init__(self, command, environment, log_path):
        with open(log_path, "a", encoding="utf-8") as log:
            # A session of its own: Ctrl-C reaches the sweep, which then asks each run once.
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, **own_group()
            )

    def ended(self):
        code = self.process.poll()
        return None if code is None else code == 0

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM if os.name == "posix" else signal.CTRL_BREAK_EVENT)

    def wait(self):
        """Until it has saved and left; killed where that takes longer than GRACE_SECONDS."""
        try:
            self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def own_group():
    """How Popen starts a process that Ctrl-C does not reach, and that on Linux does not outlive the sweep."""
    if os.name != "posix":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    if sys.platform != "linux":
        return {"start_new_session": True}
    libc = ctypes.CDLL(None)
    # After a kill -9 of the sweep the kernel asks the run to save and leave. Left alone it would go on, and the same
    # sweep given again would write into its folder beside it.
    return {"start_new_session": True, "preexec_fn": lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)}


def visible_devices():
    """Names of the CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES wants them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [str(index) for index in range(torch.cuda.device_count())]


# ---- Slurm -----------------------------------------------------------------------------------------------------------

# torchrun on every node of the job, meeting at the first one.
ON_EVERY_NODE = (
    'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1); exec "$@" '
    '--rdzv_backend=c10d --rdzv_endpoint="$head:{port}" --rdzv_id="$SLURM_JOB_ID" train.py {arguments}'
)


class SlurmExecutor:
    """Jobs of a Slurm cluster, through submitit."""

    def __init__(self, config, folder):
        try:
            import submitit
        except ImportError:
            raise UserError("executor='slurm' needs submitit; pip install -r requirements-extra.txt") from None
        self.submitit, self.config = submitit, config
        self.capacity = config.at_once or 1_000_000
        try:
            self.executor = submitit.AutoExecutor(folder=str(Path(folder) / "slurm"), cluster="slurm")
        except RuntimeError:
            raise UserError("executor='slurm' needs Slurm's commands (sbatch, squeue) on this machine") from None
        options = {"timeout_min": config.slurm_minutes, "nodes": config.nodes, "tasks_per_node": 1}
        if config.slurm_partition:
            options["slurm_partition"] = config.slurm_partition
        if visible_devices():
            options["gpus_per_node"] = config.processes_per_node
        self.executor.update_parameters(**options)

    def start(self, name, arguments, log_path):
        self.executor.update_parameters(name=name)
        script = self.command(arguments)
        return SlurmJob(self.executor.submit(self.submitit.helpers.CommandFunction(script, verbose=True)), log_path)

    def command(self, arguments):
        """What each node of the job runs."""
        if self.config.nodes == 1:
            return training_command(self.config, arguments)
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={self.config.nodes}",
                    f"--nproc_per_node={self.config.processes_per_node}"]  # fmt: skip
        script = ON_EVERY_NODE.format(port=29500, arguments=shlex.join(arguments))
        return ["bash", "-c", script, "bash", *torchrun]


class SlurmJob:
    """A submitted job. Its result is a file; where there is none, squeue says whether one can still come.

    submitit's own `done` asks sacct, which many clusters of one machine do without.
    """

    ASK_SECONDS = 15  # between questions to the cluster

    def __init__(self, job, log_path):
        self.job, self.asked = job, time.monotonic()
        with open(log_path, "a", encoding="utf-8") as log:
            log.write(f"Slurm job {job.job_id}: {job.paths.stdout}\n")

    def ended(self):
        if self.job.paths.result_pickle.exists():
            return self.job.exception() is None
        if time.monotonic() - self.asked < self.ASK_SECONDS:
            return None
        self.asked = time.monotonic()
        queued = subprocess.run(["squeue", "-h", "-o", "%T", "-j", self.job.job_id], capture_output=True, text=True)
        return None if queued.stdout.strip() or self.job.paths.result_pickle.exists() else False

    def stop(self):
        self.job.cancel(check=False)

    def wait(self):
        """Slurm ends it by itself."""
