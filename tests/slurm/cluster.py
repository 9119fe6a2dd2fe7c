"""A real Slurm for the tests, on this one machine: a controller, and four nodes with eight pretended GPUs each.

A node is a process in UTS, PID, mount and IPC namespaces of its own, so it has its own host name, /etc/hosts and
/dev/shm, and can lose power. The nodes share the machine's network (two jobs cannot listen on the same port, whatever
their nodes), its file systems (/tmp stands for the shared one) and its processors. Not shown: memory limits, binding to
processors, and accounting (``sacct`` fails).
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from waiting import until

NODES = ("n1", "n2", "n3", "n4")
GPUS = 8
CPUS = 128
MEMORY_MB = 1_000_000

_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "nsenter")
_NAMESPACES = ("--uts", "--mount", "--ipc", "--mount-proc")
_UP = frozenset({"IDLE", "MIXED", "ALLOCATED"})

# The first process of a node. It outlives slurmd's start, since it must reap what the jobs leave behind. slurmd puts
# itself into the background: in a shell's background, jobs would inherit an ignored SIGINT.
_NODE = """
hostname "$1" && mount --bind "$2/hosts" /etc/hosts && mount -t tmpfs -o mode=1777 tmpfs /dev/shm && cd / || exit
if [ -d /etc/slurm ]; then mount --bind "$2" /etc/slurm || exit; fi
slurmd -N "$1" -d "$2/slurmstepd" || exit
sleep infinity & wait
"""
# Without cgroups, Slurm knows the processes of a step by their parents. Those whose parent has died stay known, so that
# they die with the step, because slurmstepd becomes their parent (PR_SET_CHILD_SUBREAPER).
_STEP = """#!{python} -IS
import ctypes, os, sys
ctypes.CDLL(None).prctl(36, 1)
os.execv("{slurmstepd}", sys.argv)
"""
# Removes the folder of a pytest that was killed: its end closes the pipe, and kills the daemons (within the second).
_SWEEPER = 'read -r _; sleep 1; rm -rf "$0"'

# cred_expire: for so long a requeued job waits before it starts again. SlurmdTimeout: so soon a dead node is noticed.
# CgroupPlugin=cgroup/v1 in cgroup.conf: v2, which Slurm would choose, needs systemd.
_SETTINGS = {
    "ClusterName": "lhcp",
    "SlurmUser": "root",
    "SlurmdUser": "root",
    "AuthType": "auth/munge",
    "CredType": "cred/munge",
    "ProctrackType": "proctrack/linuxproc",
    "TaskPlugin": "task/none",
    "JobAcctGatherType": "jobacct_gather/none",
    "AccountingStorageType": "accounting_storage/none",
    "SlurmdParameters": "config_overrides",
    "SelectType": "select/cons_tres",
    "SelectTypeParameters": "CR_Core_Memory",
    "DefMemPerCPU": MEMORY_MB // CPUS,
    "GresTypes": "gpu",
    "MailProg": "/bin/true",
    "SchedulerType": "sched/backfill",
    "SchedulerParameters": "sched_interval=2,sched_min_interval=0,batch_sched_delay=0,bf_interval=2,bf_continue",
    "JobRequeue": 1,
    # Jobs of partition gpu preempt those of main, where they find no room beside them.
    "PreemptType": "preempt/partition_prio",
    "PreemptMode": "REQUEUE",
    "KillWait": 5,
    "MinJobAge": 3600,
    "MessageTimeout": 5,
    "TCPTimeout": 2,
    "SlurmdTimeout": 10,
    "BatchStartTimeout": 20,
    "UnkillableStepTimeout": 10,
    "ReturnToService": 2,
}


def missing() -> str | None:
    """Why no cluster can run here, or None."""
    if os.geteuid() != 0:
        return "the test cluster needs root"
    absent = [program for program in _PROGRAMS if shutil.which(program, path=_PATH) is None]
    if absent:
        return f"no {', '.join(absent)} here (tests/slurm/install.sh installs them)"
    trial = "hostname n1 && mount -t tmpfs tmpfs /dev/shm && mknod /dev/shm/nvidia0 c 1 3"
    result = subprocess.run(
        ["unshare", "--pid", "--fork", *_NAMESPACES, "sh", "-c", trial], capture_output=True, text=True, check=False
    )
    return f"no namespaces, mounts or devices here: {result.stderr.strip()}" if result.returncode else None


class Cluster:
    """The cluster, between ``start`` and ``stop``; all its files are in ``folder``."""

    def __init__(self) -> None:
        self.folder = Path()
        self._settings: dict[str, object] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Cluster:
        """Start it, and wait until all nodes are idle."""
        # A short path: that of a Unix socket has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="lhcp-slurm-", dir="/tmp"))
        try:
            self.folder.chmod(0o755)
            self._spawn("sweeper", "sh", "-c", _SWEEPER, str(self.folder), stdin=subprocess.PIPE)
            self._write_files()
            self._spawn_daemon("munged", "munged", "--foreground", *self._munge_options())
            until(lambda: self._lives("munged") and (self.folder / "munge.socket").exists(), 10, self._report)
            self._spawn_controller()
            for node in NODES:
                self._spawn_node(node)
            until(lambda: all(map(self._lives, NODES)) and self._all_idle(), 60, self._report)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End what ``start`` started, and remove its files; at once, whatever runs there."""
        for name in (*NODES, "slurmctld", "munged"):
            self._kill(name)
        if self.folder != Path():
            shutil.rmtree(self.folder)
            self.folder = Path()
        sweeper = self._processes.pop("sweeper", None)
        if sweeper is not None:
            sweeper.kill()
            sweeper.communicate()

    @property
    def environment(self) -> dict[str, str]:
        """The environment of commands on the login node, which is this machine."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return {**ours, "PATH": _PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *argv: str, **kwargs: object) -> str:
        """Run a command on the login node, and return its stdout. Keywords are those of ``subprocess.run``."""
        result = self._client(*argv, **kwargs)
        assert result.returncode == 0, f"{argv}: {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result.stdout

    def reconfigure(self, **settings: object) -> None:
        """Change settings of slurm.conf. Those not given get the value that they had at the start."""
        if settings != self._settings:
            self._settings = settings
            self._write_conf()
            self.run("scontrol", "reconfigure")

    def crash(self, node: str) -> None:
        """Let a node lose power: all its processes are gone at once. Slurm notices within about 20 s."""
        self._kill(node)

    def power_on(self, node: str) -> None:
        """Start a node that has crashed, and wait until it can be used (it is idle, unless a job starts on it)."""
        assert node not in self._processes, f"{node} is on"

        def shown() -> dict[str, str]:
            return _fields(self.run("scontrol", "-o", "show", "node", node))

        # Slurm tells the two starts of slurmd apart by the second.
        before = shown()["SlurmdStartTime"]
        until(lambda: time.strftime("%Y-%m-%dT%H:%M:%S") != before, 2, self._report)
        self._spawn_node(node)
        until(lambda: shown()["SlurmdStartTime"] != before and shown()["State"] in _UP, 60, self._report)

    @contextlib.contextmanager
    def controller_away(self) -> Iterator[None]:
        """Shut the controller down, and start it again at the end."""
        os.kill(self._init("slurmctld"), signal.SIGTERM)  # it saves what it knows; killed, it forgets new jobs
        self._processes.pop("slurmctld").wait()
        yield
        self._spawn_controller()

    def clear(self) -> None:
        """End all jobs, turn on all nodes, and set the settings back."""
        self.reconfigure()
        for node in NODES:
            if node not in self._processes:
                self.power_on(node)

        def no_jobs() -> bool:
            # Once is not enough: a job that is told to end may requeue itself.
            self.run("scancel", "--user=root")
            return not self.run("squeue", "--noheader")

        until(no_jobs, 60, self._report)
        # A controller that was away has not heard how steps ended, and takes their nodes for broken.
        drained = [node for node, state in self.node_states().items() if "DRAIN" in state]
        if drained:
            self.run("scontrol", "update", f"NodeName={','.join(drained)}", "State=RESUME")
        until(self._all_idle, 60, self._report)

    def execute(self, node: str, *argv: str) -> str:
        """Run a command on a node, outside of any job, and return its stdout."""
        return self.run("nsenter", f"--target={self._init(node)}", "--uts", "--pid", "--mount", "--ipc", *argv)

    def pids(self, node: str, pattern: str) -> list[int]:
        """The processes of a node whose command line (joined by spaces) has a match; as seen from this machine."""
        init = self._init(node)
        namespace = os.readlink(f"/proc/{init}/ns/pid")
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            # A process may end at any moment, or be none of ours.
            with contextlib.suppress(OSError):
                if int(folder.name) != init and os.readlink(folder / "ns/pid") == namespace:
                    line = (folder / "cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
                    if re.search(pattern, line):
                        found.append(int(folder.name))
        return sorted(found)

    def node_states(self) -> dict[str, str]:
        """Every node's state as in ``scontrol show node``."""
        nodes = map(_fields, self.run("scontrol", "-o", "show", "node").splitlines())
        return {node["NodeName"]: node["State"] for node in nodes}

    def job(self, job_id: int | str) -> dict[str, str]:
        """What ``scontrol show job`` says of a job, or of an element (``123_4``) of an array."""
        lines = self.run("scontrol", "-o", "show", "job", str(job_id)).splitlines()
        assert len(lines) == 1, f"{job_id} is not one job:\n" + "\n".join(lines)
        return _fields(lines[0])

    def wait(self, job_id: int | str, states: str | Collection[str], timeout: float = 120) -> dict[str, str]:
        """Wait until a job is in one of the states, and return it. COMPLETING is a state of its own."""
        wanted = {states} if isinstance(states, str) else set(states)
        job: dict[str, str] = {}

        def reached() -> bool:
            job.update(self.job(job_id))
            return job["JobState"] in wanted

        def report() -> str:
            shown = "\n".join(f"  {name}={value}" for name, value in job.items())
            output = Path(job.get("StdOut", "/nowhere"))
            return f"job {job_id} is not {wanted}:\n{shown}\n{_tail(output)}{self._report()}"

        until(reached, timeout, report)
        return job

    def _client(self, *argv: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
        options = {"env": self.environment, "capture_output": True, "text": True, "timeout": 120, **kwargs}
        return subprocess.run(argv, **options)  # type: ignore[call-overload, no-any-return]

    def _spawn(self, name: str, *argv: str, stdin: int = subprocess.DEVNULL) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            # A session of its own: Ctrl-C in the terminal is for pytest alone, which then stops the cluster.
            self._processes[name] = subprocess.Popen(
                argv, env=self.environment, stdin=stdin, stdout=output, stderr=output, start_new_session=True
            )

    def _spawn_daemon(self, name: str, *argv: str) -> None:
        """Start a daemon that ends, with all its processes, when this thread ends, however it does."""
        self._spawn(name, "setpriv", "--pdeathsig=KILL", "unshare", "--pid", "--fork", "--kill-child", *argv)

    def _spawn_node(self, node: str) -> None:
        self._spawn_daemon(node, *_NAMESPACES, "sh", "-c", _NODE, "sh", node, str(self.folder))

    def _spawn_controller(self) -> None:
        self._spawn_daemon("slurmctld", "slurmctld", "-D")
        until(lambda: self._lives("slurmctld") and self._answers(), 20, self._report)

    def _init(self, name: str) -> int:
        pid = self._processes[name].pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def _kill(self, name: str) -> None:
        if name in self._processes:
            # The first process of a PID namespace is gone only after all others. It may not have come up.
            with contextlib.suppress(OSError, IndexError):
                os.kill(self._init(name), signal.SIGKILL)
                self._processes[name].wait()
            self._processes[name].kill()
            self._processes.pop(name).wait()

    def _lives(self, name: str) -> bool:
        assert self._processes[name].poll() is None, f"{name} has ended: {self._report()}"
        return True

    def _answers(self) -> bool:
        return self._client("scontrol", "ping").returncode == 0

    def _all_idle(self) -> bool:
        return set(self.node_states().values()) == {"IDLE"}

    def _report(self) -> str:
        logs = [*sorted(self.folder.glob("*.out")), *self.folder.glob("slurmctld.log")]
        return "\n" + "".join(_tail(log) for log in logs if log.stat().st_size)

    def _munge_options(self) -> list[str]:
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid"}
        files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
        return [f"--{option}={self.folder / file}" for option, file in files.items()]

    def _write_files(self) -> None:
        folder = self.folder
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        (folder / "slurmstepd").write_text(
            _STEP.format(python=sys.executable, slurmstepd=shutil.which("slurmstepd", path=_PATH))
        )
        (folder / "slurmstepd").chmod(0o755)
        # Slurm wants character devices, which it never opens. These are /dev/null.
        for gpu in range(GPUS):
            os.mknod(folder / f"nvidia{gpu}", 0o666 | 0o020000, os.makedev(1, 3))
        gpus = f"Name=gpu Type=b200 File={folder}/nvidia[0-{GPUS - 1}]"
        (folder / "gres.conf").write_text(f"AutoDetect=off\nNodeName={NODES[0]},{','.join(NODES[1:])} {gpus}\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        network = f"127.{random.randrange(1, 255)}.{random.randrange(1, 255)}"
        addresses = {node: f"{network}.{11 + index}" for index, node in enumerate(NODES)}
        hosts = "".join(f"{address} {node}\n" for node, address in addresses.items())
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}{network}.1 {_host_name()}\n")
        control, *ports = _free_ports(1 + len(NODES))
        self._fixed = [
            f"SlurmctldHost={_host_name()}({network}.1)",
            f"SlurmctldPort={control}",
            f"AuthInfo=socket={folder}/munge.socket,cred_expire=5",
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool.%n",
            f"SlurmctldPidFile={folder}/slurmctld.pid",
            f"SlurmdPidFile={folder}/slurmd.%n.pid",
            f"SlurmctldLogFile={folder}/slurmctld.log",
            f"SlurmdLogFile={folder}/slurmd.%n.log",
            # Another one in each cluster: an old slurm-1.out is never taken for a new one.
            f"FirstJobId={random.randrange(1_000, 1_000_000)}",
        ]
        for node, port in zip(NODES, ports, strict=True):
            self._fixed.append(
                f"NodeName={node} NodeHostname={node} NodeAddr={addresses[node]} Port={port} Sockets=2 "
                f"CoresPerSocket={CPUS // 2} ThreadsPerCore=1 RealMemory={MEMORY_MB} Gres=gpu:b200:{GPUS} Feature=b200"
            )
        for partition, rest in (("main", "Default=YES PriorityTier=1 GraceTime=30"), ("gpu", "PriorityTier=2")):
            self._fixed.append(
                f"PartitionName={partition} Nodes=ALL MaxTime=7-00:00:00 DefaultTime=1:00:00 State=UP {rest}"
            )
        self._write_conf()

    def _write_conf(self) -> None:
        settings = [f"{name}={value}" for name, value in {**_SETTINGS, **self._settings}.items()]
        (self.folder / "slurm.conf").write_text("\n".join([*settings, *self._fixed, ""]))


def _fields(line: str) -> dict[str, str]:
    # A value may hold spaces; every name begins with a capital letter.
    return dict(re.findall(r"(?:^|\s)([A-Z][\w:/]*)=(.*?)(?=\s+[A-Z][\w:/]*=|\s*$)", line))


def _tail(path: Path) -> str:
    text = path.read_text(errors="replace") if path.is_file() else "(no such file)\n"
    return f"--- {path}\n" + "".join(text.splitlines(keepends=True)[-20:])


def _host_name() -> str:
    return os.uname().nodename.split(".")[0]


def _free_ports(count: int) -> Iterator[int]:
    """Free ports, below those that the kernel hands out: a node that is off keeps its own."""
    candidates = random.sample(range(10_000, 32_000), k=200)
    for _ in range(count):
        for port in iter(candidates.pop, None):
            with socket.socket() as trial, contextlib.suppress(OSError):
                trial.bind(("", port))
                yield port
                break
