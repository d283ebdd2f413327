"""A real SLURM on this machine alone: munge, a controller, and nodes with a GPU each that is only counted.

`python tests/slurm/cluster.py` starts one and keeps it until Ctrl-C, to try things by hand. It needs root and Debian's
packages slurmctld, slurmd, slurm-client and munge; no systemd and no accounting. All traffic stays on loopback.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMANDS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")

#: Where SLURM's commands look: a job step of the executor drops SLURM_CONF from its environment.
CONFIG = Path("/etc/slurm/slurm.conf")

NODES = ("n1", "n2")

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=20
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,bf_interval=1,defer_batch,batch_sched_delay=0,sched_min_interval=0
DefMemPerCPU=500
GresTypes=gpu
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=15
MinJobAge=300
KillWait=5
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=120 State=UP
"""


def what_is_missing():
    """Why no SLURM can be started here, in words; empty if it can."""
    if os.geteuid() != 0:
        return "a SLURM of its own needs root"
    if missing := [command for command in COMMANDS if not shutil.which(command)]:
        return f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge"
    if CONFIG.exists():
        return f"{CONFIG} is there: this machine belongs to a SLURM already"
    return ""


class Cluster:
    """SLURM's daemons; a context, with what tests do to it."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="n4flow-slurm-"))
        self._daemons = {}

    def __enter__(self):
        host, port = socket.gethostname().partition(".")[0], 17000
        nodes = []
        (self.folder / "state").mkdir()
        for n, name in enumerate(NODES, 1):
            (self.folder / name).mkdir()
            # a device file of its own; with a plain file CUDA_VISIBLE_DEVICES is not set
            (self.folder / name / "nvidia0").symlink_to("/dev/null")
            nodes.append(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + n} "
                "CPUs=2 RealMemory=6000 Gres=gpu:1"
            )
        text = SLURM_CONF.format(host=host, port=port, folder=self.folder, nodes="\n".join(nodes))
        (self.folder / "slurm.conf").write_text(text)
        gres = [f"NodeName={name} Name=gpu File={self.folder}/{name}/nvidia0\n" for name in NODES]
        (self.folder / "gres.conf").write_text("".join(gres))
        CONFIG.parent.mkdir(exist_ok=True)
        CONFIG.unlink(missing_ok=True)  # a link that a run which was killed left behind
        CONFIG.symlink_to(self.folder / "slurm.conf")
        try:
            self.folder.chmod(0o755)
            munge = "munged --foreground --force"
            for option in ("key-file", "socket", "pid-file", "log-file", "seed-file"):
                munge += f" --{option}={self.folder}/munge.{option.removesuffix('-file')}"
            subprocess.run(["mungekey", f"--keyfile={self.folder}/munge.key"], check=True)
            self._start("munged", munge)
            wait_for(lambda: (self.folder / "munge.socket").exists(), 10, "munged does not start")
            self._start("slurmctld", "slurmctld -D -c")
            for name in NODES:
                self.boot(name)
            wait_for(lambda: self.node_states() == dict.fromkeys(NODES, "idle"), 30, "the nodes do not come up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for name in NODES:
            self.power_off(name)
        for name in ("slurmctld", "munged"):
            if name in self._daemons:
                self._daemons[name].terminate()
                self._daemons[name].wait()
        CONFIG.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, name, command):
        environment = os.environ | {"SLURM_CONF": f"{self.folder}/slurm.conf"}  # gres.conf is looked for beside it
        with open(self.folder / f"{name}.out", "w") as out:
            self._daemons[name] = subprocess.Popen(
                command.split(), env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def boot(self, node):
        """Start a node's daemon."""
        self._start(node, f"slurmd -D -N {node} -c")

    def power_off(self, node):
        """End a node's daemon and all that runs on it at once, as a loss of power does."""
        daemon = self._daemons.pop(node, None)
        if daemon:
            # job steps are no children of the daemon: they are found by the node's name that SLURM gives them
            steps = step_daemons(self.folder / f"{node}.log")
            for pid in [daemon.pid, *steps, *processes_with(f"SLURMD_NODENAME={node}")]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            daemon.wait()

    def node_states(self):
        """State of each node, in SLURM's words."""
        lines = self.ask("sinfo", "-h", "-N", "-o", "%N %t").split("\n")
        return dict(line.split() for line in lines if line)

    def jobs(self):
        """Jobs that run or wait or ended lately: id, state, node and the rule's name in the comment."""
        rows = self.ask("squeue", "-h", "-t", "all", "-o", "%i|%T|%N|%k").split("\n")
        return [dict(zip(("id", "state", "node", "comment"), row.split("|"), strict=True)) for row in rows if row]

    @staticmethod
    def ask(*command):
        """What a command of SLURM says."""
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
        return done.stdout.strip()


def processes_with(setting):
    """Processes that have a setting in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if setting.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def step_daemons(log):
    """The processes of a node's slurmstepd, by the node's log, which they hold open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "comm").read_text().strip() == "slurmstepd":
                found += [int(process.name) for entry in (process / "fd").iterdir() if os.readlink(entry) == f"{log}"]
    return found


def wait_for(condition, seconds, problem):
    """Look twice a second until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(problem)
        time.sleep(0.5)


if __name__ == "__main__":
    if problem := what_is_missing():
        sys.exit(problem)
    with Cluster() as cluster:
        ended = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, ended)  # not before: the daemons would inherit it, and not end either
        print(f"SLURM is up, its files are in {cluster.folder}; Ctrl-C ends it", flush=True)
        signal.sigwait(ended)
