"""Hangs of every kind, all at the same time, end in 77 within the set time; who is to blame is named."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flight_recorder import entries
from forked_runs import ForkedRun, only_on, run_to_end
from lhcp import config_file
from lhcp.checkpoint.folder import published
from lhcp.checkpoint.manifest import Manifest
from lhcp.checkpoint.saver import Saver
from lhcp.config import EvalMode
from lhcp.distributed.env import ProcessEnv
from lhcp.distributed.exchange.ring import RingExchange
from lhcp.metrics import METRICS_FILE, read_metrics
from lhcp.parallelize import Mesh
from lhcp.roll_call import RollCall, Sign, verdict
from lhcp.stop import EXIT_HUNG
from lhcp.trainer import Trainer
from lhcp.watchdog import Watchdog, collective_timeout, watch
from ranks import run_ranks
from runs import make_config, write_data
from waiting import until

# torch looks up the name of every address that it connects to: 5 seconds each where no name server answers.
os.environ["RES_OPTIONS"] = "timeout:1 attempts:1"
STEPS = 20
TIMEOUT_S = 8.0
HANGS_IN = 4
"""The step, from 1. There is a checkpoint after the second one."""

# What the launcher starts in place of lhcp.train: `python -m lhcp.agent ... FILE FAULT CONFIG`.
SCRIPT = """
import signal, sys
import torch.utils.tensorboard
signal.signal(signal.SIGALRM, signal.SIG_IGN)  # as some starters leave it
sys.path[:0] = {paths!r}
import test_hang
from lhcp import train
test_hang.at_ring(getattr(test_hang, sys.argv[1]), test_hang.last_rank())
sys.exit(train.main(sys.argv[2:]))
"""


def stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def asleep() -> None:
    time.sleep(600)


def without_python() -> None:
    ctypes.PyDLL(None).sleep(600)  # unlike CDLL it holds the GIL


def last_rank() -> int:
    return int(os.environ["WORLD_SIZE"]) - 1


def at_ring(fault: Callable[[], None], rank: int) -> None:
    """`fault` on this rank, in mid-step: before it gives its keys and values to the next."""
    train_step, attend = Trainer.train_step, RingExchange.forward
    step = 0

    def noted(self: Trainer) -> object:
        nonlocal step
        step = self.done + 1
        if step == HANGS_IN and self.mesh.context_parallel.size == 1 and rank == 0:
            fault()
        return train_step(self)

    def faulty(self: RingExchange, *tensors: object) -> object:
        if step == HANGS_IN and int(os.environ["RANK"]) == rank:
            fault()
        return attend(self, *tensors)

    Trainer.train_step, RingExchange.forward = noted, faulty


def never_comes(rank: int) -> None:
    time.sleep(600)


def without_store(run_dir: Path, rank: int) -> None:
    """Nor can one of the files be written."""
    RollCall._connect = lambda self: time.sleep(600)
    at_ring(asleep, 1)
    if rank == 0:
        (run_dir / "logs" / "hang-rank-00000.txt").mkdir(parents=True)


def late(rank: int) -> None:
    """Rank 1 begins the step in which it hangs later than the other: by its own clock it would also end later."""
    collect = Saver.collect

    def after_step(self: Saver, block: bool = False) -> object:
        nonlocal step
        step += 1
        if step == HANGS_IN - 1:
            time.sleep(0.5 * TIMEOUT_S)
        return collect(self, block)

    step = 0
    if rank == 1:
        Saver.collect = after_step
    at_ring(asleep, 1)


def slow(rank: int) -> None:
    """Each phase around the checkpoint after step 10 takes less than the timeout, and two of them together more."""
    held_out, start, train_step = Trainer.held_out, Saver.start, Trainer.train_step

    def slow_evaluation(self: Trainer, mode: EvalMode) -> float:
        time.sleep(0.52 * TIMEOUT_S * (self.done == 10))
        return held_out(self, mode)

    def slow_save(self: Saver, tensors: dict[str, Tensor], manifest: Manifest) -> None:
        time.sleep(0.52 * TIMEOUT_S * (manifest.step == 10))
        start(self, tensors, manifest)

    def slow_step(self: Trainer) -> tuple[float, float]:
        time.sleep(0.52 * TIMEOUT_S * (self.done in (9, 10)))
        return train_step(self)

    Trainer.held_out, Saver.start, Trainer.train_step = slow_evaluation, slow_save, slow_step


@dataclass
class Ended:
    """What is left of a run."""

    codes: list[int]
    output: str
    run_dir: Path

    def log(self, name: str) -> str:
        return (self.run_dir / "logs" / name).read_text()


def write_config(data: Path, run_dir: Path, world: int = 2, **changes: object) -> str:
    values = {"checkpoint": {"every": 2}, "eval": {}, "hang_timeout_s": TIMEOUT_S, **changes}
    path = run_dir.with_suffix(".yaml")
    config_file.save(make_config(data, 1, world, output_dir=run_dir, **values), path)
    return str(path)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """All runs, by the name of what was wrong."""
    data = write_data(tmp_path_factory.mktemp("data"))
    folder = data.parent
    script = folder / "script.py"
    script.write_text(SCRIPT.format(paths=[str(Path(__file__).parent), str(Path(__file__).parents[1])]))
    launched = {
        name: launch(script, fault, write_config(data, folder / name, world), world)
        for name, fault, world in [("launched", "asleep", 2), ("launched alone", "without_python", 1)]
    }
    # Their start-up, imports of torch, would take the cores away from the others.
    until(lambda: all((folder / name / METRICS_FILE).exists() for name in launched), 60, lambda: "nothing launched")
    evaluated = {"eval": {"sequences": 2, "every": 10, "modes": ["dense", "no_attention"]}, "checkpoint": {"every": 10}}
    faults: dict[str, Callable[[int], None]] = {
        "slow": slow,
        "stopped": lambda _: at_ring(stopped, 1),
        "asleep": late,
        "without Python": lambda _: at_ring(without_python, 1),
        "absent": only_on(1, never_comes),
        "without store": partial(without_store, folder / "without store"),
    }
    runs: dict[str, ForkedRun] = {}
    found = {}
    try:
        for name, before in faults.items():
            config = write_config(data, folder / name, **(evaluated if name == "slow" else {}))
            runs[name] = ForkedRun(2, [config], folder / f"{name}.txt", before)
            if name != "absent":  # each has the cores while it starts: all at once take longer than the timeout
                until((folder / name / METRICS_FILE).exists, 60, lambda: "a run has not begun")
        # By its own timers, which `wait` would not let it come to.
        until(lambda: not runs["without Python"].alive(), 60, lambda: "a rank without Python goes on")
        for name, run in runs.items():
            found[name] = Ended(run.wait(), (folder / f"{name}.txt").read_text(), folder / name)
        for name, process in launched.items():
            _, errors = process.communicate(timeout=180)
            found[name] = Ended([process.returncode], errors, folder / name)
    finally:
        for run in runs.values():
            run.send(signal.SIGKILL)
        for process in launched.values():
            process.send_signal(signal.SIGINT)
    return found


def launch(script: Path, fault: str, config: str, world: int) -> subprocess.Popen[str]:
    arguments = ["--standalone", f"--nproc-per-node={world}", str(script), fault, config]
    return subprocess.Popen(
        [sys.executable, "-m", "lhcp.agent", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def errors(output: str) -> list[str]:
    """Lines of `output` but for those of steps."""
    lines = output.splitlines()
    return lines[next((i for i, line in enumerate(lines) if line.startswith("error: ")), len(lines)) :]


CLOCK = r"\d\d:\d\d:\d\d"
# The last sign is from up to a tick before, in which a fast machine does all steps since the save after the second.
SILENT = (
    rf"gives no sign of life since {CLOCK}, when it was in (step [1-{HANGS_IN}]|the save after step 2); "
    f"the furthest is in step {HANGS_IN}"
)


def message(run_dir: Path, what: str) -> str:
    return (
        rf"error: no progress for {TIMEOUT_S:g} s: {what}\n"
        rf"       the stacks of all ranks are in {re.escape(str(run_dir))}/logs/hang-rank-\*\.txt.*\n"
        r"       go on by --resume last; if nothing hangs, but this takes longer, raise hang_timeout_s"
    )


def test_a_stopped_rank_is_named_and_the_others_say_where_they_wait(ended: dict[str, Ended]) -> None:
    run = ended["stopped"]
    assert run.codes == [EXIT_HUNG, -signal.SIGKILL]
    what = f"rank 1 on host .* {SILENT}"
    assert re.fullmatch(message(run.run_dir, what), "\n".join(errors(run.output)))
    text = run.log("hang-rank-00000.txt")
    assert f"in step {HANGS_IN} since " in text
    assert re.search(what, text)
    assert "ring.py" in text
    assert "link.py" in text
    assert re.search(r"in wait$|in post$", text, re.MULTILINE)
    waited = (run.run_dir / "logs" / "hang-rank-00000.txt").stat().st_mtime - os.path.getmtime(
        run.run_dir / METRICS_FILE
    )
    assert TIMEOUT_S - 1 < waited < 3 * TIMEOUT_S


def test_a_sleeping_rank_is_seen_in_its_stack(ended: dict[str, Ended]) -> None:
    run = ended["asleep"]
    assert run.codes == [EXIT_HUNG, EXIT_HUNG]
    what = f"all 2 ranks are alive and in step {HANGS_IN}, since {CLOCK}"
    assert re.fullmatch(message(run.run_dir, what), "\n".join(errors(run.output)))
    # On a slow machine the other has not come to the ring: it waits for the sleeper in the sum before.
    for rank, function in enumerate(["(wait|all_reduce)", "asleep"]):
        text = run.log(f"hang-rank-{rank:05d}.txt")
        thread = re.search(r"main thread, the last below: (0x\w+)", text)[1]
        main = text.split(f"Thread {thread} (most recent call first):\n")[1].split("\n\n")[0]
        assert re.search(f"in {function}\n", main)
        assert re.search(what, text)
    first, second = (datetime.fromisoformat(run.log(f"hang-rank-0000{rank}.txt").split(": ")[0]) for rank in (0, 1))
    assert abs(second - first) <= timedelta(seconds=0.25 * TIMEOUT_S), "each went by its own clock"


def test_the_last_collectives_are_kept(ended: dict[str, Ended]) -> None:
    """Of gloo here."""
    run = ended["asleep"]
    for rank in (0, 1):
        noted = entries(run.run_dir / "logs" / f"gloo_trace_rank_{rank}")
        assert any("all_reduce" in entry["profiling_name"] for entry in noted)


def test_a_rank_without_python_leaves_its_stack_in_its_log(ended: dict[str, Ended]) -> None:
    run = ended["without Python"]
    assert run.codes[0] == EXIT_HUNG
    assert run.codes[1] < 0
    what = f"rank 1 on host .* {SILENT}"
    assert re.fullmatch(message(run.run_dir, what), "\n".join(errors(run.output)))
    assert "in without_python\n" in run.log("rank-00001.log")


def test_a_rank_that_never_comes_is_named(ended: dict[str, Ended]) -> None:
    run = ended["absent"]
    assert run.codes == [EXIT_HUNG, -signal.SIGKILL]
    what = "rank 1 has not come forward at all; the furthest is at the start, waiting for all ranks"
    assert re.fullmatch(message(run.run_dir, what), "\n".join(errors(run.output)))
    text = run.log("hang-rank-00000.txt")
    assert "at the start, waiting for all ranks since" in text
    assert "in init_process_group\n" in text


def test_neither_store_nor_folder_keeps_a_run_from_ending(ended: dict[str, Ended]) -> None:
    run = ended["without store"]
    assert run.codes[0] == EXIT_HUNG
    assert f"rank 0 on host {os.uname().nodename} is in step {HANGS_IN} since" in run.output
    assert "nothing is known of the others, since the job's store does not answer" in run.output
    assert "hang-rank-00000.txt could not be written ([Errno 21] Is a directory" in run.output
    assert "ring.py" in run.output
    assert "in asleep\n" in run.log("hang-rank-00001.txt")


def test_long_phases_are_no_hang(ended: dict[str, Ended]) -> None:
    run = ended["slow"]
    assert run.codes == [0, 0]
    assert "error" not in run.output
    assert [path.name for path in (run.run_dir / "logs").iterdir() if "hang" in path.name] == []


def test_the_launcher_adds_nothing(ended: dict[str, Ended]) -> None:
    run = ended["launched"]
    assert run.codes == [EXIT_HUNG]
    what = f"all 2 ranks are alive and in step {HANGS_IN}, since {CLOCK}"
    assert re.fullmatch(message(run.run_dir, what) + "\n", run.output)


def test_the_launcher_speaks_for_a_rank_without_python(ended: dict[str, Ended]) -> None:
    run = ended["launched alone"]
    assert run.codes == [EXIT_HUNG]
    assert run.output == (
        "error: no progress: rank 0 could not run Python for hang_timeout_s\n"
        "       its stacks are at the end of its log in logs/ of the run folder\n"
        "       go on by --resume last; if nothing hangs, raise hang_timeout_s\n"
    )
    assert "in without_python\n" in run.log("rank-00000.log")


def test_a_run_goes_on_after_a_hang(ended: dict[str, Ended], tmp_path: Path) -> None:
    run_dir = ended["stopped"].run_dir
    assert published(run_dir) == [2]
    assert run_to_end(2, [str(run_dir.with_suffix(".yaml")), "--resume", "last"], tmp_path / "out.txt") == [0, 0]
    losses, others = ([record["loss"] for record in read_metrics(run)] for run in (run_dir, ended["slow"].run_dir))
    assert len(losses) == STEPS
    assert losses == others


def test_a_rank_that_goes_on_too_late_ends_like_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connections break when others end; the error that it would report is none."""
    monkeypatch.setattr(Watchdog, "_find", lambda self: time.sleep(3) or "")
    pid = os.fork()
    if pid == 0:
        try:
            with watch(tmp_path, ProcessEnv(0, 0, 1), 0.5):
                time.sleep(1.5)
                raise RuntimeError("connection closed by peer")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == EXIT_HUNG


def test_the_watchdog_comes_before_the_limit_of_every_group(tmp_path: Path) -> None:
    config = make_config(write_data(tmp_path), 2, 2)
    limit = collective_timeout(100)

    def limits(rank: int) -> list[float]:
        mesh = Mesh.build(config.parallel, torch.device("cpu"), limit)
        groups = [mesh.context_parallel.group, Saver(tmp_path, 1, torch.device("cpu"), limit)._group]
        options = [group._get_backend(torch.device("cpu")).options for group in groups]
        return [option._timeout.total_seconds() for option in options]

    assert run_ranks(4, limits) == [[160.0] * 2] * 4


SILENT_1 = "rank 1 on host n1 gives no sign of life since 12:00:09, when it was in step 4"
SIGN = Sign(tick=7, time="12:00:09", host="n1", beats=5, doing="in step 4", since="12:00:01")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ([7, 7], [11, 11], "all 2 ranks are alive and in step 4, since 12:00:01"),
        ([7, 7], [11, 7], f"{SILENT_1}; the furthest is in step 4"),
        ([7, 7], [11], "rank 1 has not come forward at all; the furthest is in step 4"),
        ([7], [11, 7], "all 2 ranks are alive and in step 4, since 12:00:01"),  # the second has just come
        ([7], [11], "rank 0 on host n1 is in step 4 since 12:00:01"),
    ],
)  # fmt: skip
def test_who_is_to_blame(before: Sequence[int], after: Sequence[int], said: str) -> None:
    signs = [{rank: replace(SIGN, tick=tick) for rank, tick in enumerate(ticks)} for ticks in (before, after)]
    assert verdict(*signs, 1 if said.startswith("rank 0") else 2) == said


def test_who_is_behind() -> None:
    before = {0: SIGN, 1: SIGN}
    after = {0: replace(SIGN, tick=9, beats=4, doing="in step 3"), 1: replace(SIGN, tick=9)}
    assert verdict(before, after, 2) == (
        "rank 0 on host n1 is alive, but in step 3 since 12:00:01; the furthest is in step 4"
    )


def test_many_are_not_all_named() -> None:
    said = verdict({}, {0: SIGN}, 9)
    assert said.count("has not come forward") == 4
    assert "; and 4 more; " in said
