"""Submitting jobs from Python, by submitit or by sbatch; also `lhcp submit` and `lhcp launch sbatch`. Imports no torch.

    from lhcp.launch import submit

    first = submit.job(Path("run.yaml"), options={"nodes": "4"})[0]     # a submitit Job: state, stdout(), result(), ...
    submit.job(Path("tail.yaml"), after=first.job_id, resume=True)      # goes on when that one has succeeded
    submit.job(Path("grid.yaml"), template="recoverability", out=Path("runs/grid"))     # an array

Either way the job is the script in its folder (see lhcp.launch.prepare), which also requeues itself; submitit submits,
follows, and gives the result, and its own reaction to signals is not needed.
"""

from __future__ import annotations

import hashlib
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lhcp.config import ConfigError
from lhcp.launch import jobs
from lhcp.launch.jobs import Job
from lhcp.launch.prepare import SCRIPT_FILE, Prepared, Request, prepare
from lhcp.launch.site import Site, load_site
from lhcp.launch.snapshot import CODE_FOLDER
from lhcp.launch.verdict import forgive
from lhcp.stop import EXIT_STOPPED

if TYPE_CHECKING:
    import submitit


def job(
    config: Path | None,
    *,
    template: str = "train_98k",
    out: Path | None = None,
    overrides: Sequence[str] = (),
    options: Mapping[str, str | None] | None = None,
    site: Site | None = None,
    resume: bool = False,
    after: str | None = None,
    chain: int = 1,
) -> list[submitit.Job[int]]:
    """Submit by submitit; see `lhcp.launch.prepare.Request` for what is asked for, and `by_submitit`.

    Args:
        config, template, out, overrides, options, resume: see `Request`.
        site: None: the site file that is found, see `lhcp.launch.site.load_site`.
        after, chain: see `by_submitit`.

    Raises:
        ConfigError: a wrong value, before anything is written or submitted; or Slurm refuses.
    """
    request = Request(
        template=template,
        config=config,
        overrides=overrides,
        out=out,
        options=options or {},
        site=load_site() if site is None else site,
        resume=resume,
    )
    return by_submitit(prepare(request), after, chain)


def by_sbatch(prepared: Prepared, after: str | None = None, chain: int = 1) -> list[Job]:
    """Write the job's folder and submit its script.

    Args:
        prepared: the job.
        after: number of a job that must succeed before.
        chain: so many jobs, one after the other, each of which goes on where the one before ended.

    Raises:
        ConfigError: Slurm refuses.
    """
    _refuse_beside(prepared.out, after)
    prepared.write()
    try:
        return _sbatch(prepared.out, prepared.folder, prepared.name, prepared.elements, after, chain)
    except ConfigError:
        if prepared.folder not in [job.folder for job in jobs.submitted(prepared.out)]:
            prepared.discard()
        raise


def again(out: Path, after: str | None = None, chain: int = 1) -> list[Job]:
    """Submit once more what was submitted last for an output folder, from that folder alone.

    Raises:
        ConfigError: nothing was, or the folder was moved since; or Slurm refuses.
    """
    out = out.absolute()
    folder = jobs.newest_folder(out)
    text = (folder / SCRIPT_FILE).read_text(encoding="utf-8")
    if shlex.quote(str(folder)) not in text:
        raise ConfigError(
            f"{out} was moved since it was submitted; submit it anew with {folder / 'config.yaml'} --resume --set "
            f"output_dir={out}"
        )
    _refuse_beside(out, after)
    last = jobs.submitted(out)[-1]
    return _sbatch(out, folder, last.name, last.elements, after, chain)


def _sbatch(out: Path, folder: Path, name: str, elements: int | None, after: str | None, chain: int) -> list[Job]:
    flags = [f"--{key}={value}" for key, value in _order(out, name, after, chain).items()]
    done: list[Job] = []
    for _ in range(chain):
        number = jobs.submit_script(folder / SCRIPT_FILE, flags)
        if not done:
            forgive(out)
        log = folder / (f"slurm-{number}_0.out" if elements else f"slurm-{number}.out")
        done.append(_remember(out, folder, number, name, log, elements))
    return done


def by_submitit(prepared: Prepared, after: str | None = None, chain: int = 1) -> list[submitit.Job[int]]:
    """Write the job's folder and submit it by submitit.

    Returns:
        One job for each element of an array, else for each link of the chain. Results are 0; a job that fails raises
        with its exit code. A job that is requeued has no result yet, and one that is cancelled never has one.

    Raises:
        ConfigError: Slurm refuses, or is not there.
    """
    import submitit
    from submitit.core.utils import FailedJobError

    _refuse_beside(prepared.out, after)
    prepared.write()
    order = _order(prepared.out, prepared.name, after, chain)
    own = {key: value for key, value in prepared.options.items() if key not in ("output", "array")}
    done: list[submitit.Job[int]] = []
    try:
        executor = submitit.SlurmExecutor(prepared.folder)
        executor.update_parameters(
            setup=[f"export PYTHONPATH={shlex.quote(str(prepared.out / CODE_FOLDER))}${{PYTHONPATH:+:$PYTHONPATH}}"],
            additional_parameters={
                key.replace("-", "_"): True if value is None else value for key, value in (own | order).items()
            },
            array_parallelism=int((prepared.options.get("array") or "").partition("%")[2] or 256),
            stderr_to_stdout=True,
            wckey=None,
            use_srun=False,  # the script starts its own steps
        )
        forgive(prepared.out)
        for _ in range(chain):
            done += executor.map_array(run_script, [prepared.script] * (prepared.elements or 1))
    except (RuntimeError, FailedJobError) as error:
        if not done:
            prepared.discard()
        raise ConfigError(f"not submitted: {error}") from None
    for one in done[:: prepared.elements or 1]:
        _remember(
            prepared.out, prepared.folder, one.job_id.partition("_")[0], prepared.name, one.paths.stdout,
            prepared.elements,
        )  # fmt: skip
    return done


def run_script(path: Path) -> int:
    """In the job, as submitit runs it: the job's script.

    Raises:
        subprocess.CalledProcessError: it failed.
        SystemExit: it was requeued or cancelled, so there is no result.
    """
    code = subprocess.run(["bash", str(path)], check=False).returncode
    if code in (EXIT_STOPPED, -signal.SIGTERM, 128 + signal.SIGTERM):
        raise SystemExit(code)
    if code:
        raise subprocess.CalledProcessError(code, str(path))
    return code


def _order(out: Path, name: str, after: str | None, chain: int) -> dict[str, str]:
    """Options that put a job behind others."""
    if chain < 1:
        raise ConfigError(f"chain: given {chain}, must be at least 1")
    dependencies = [f"afterok:{after}"] if after else []
    order = {"job-name": name}
    if chain > 1:
        # Of jobs of one name and user, one runs at a time: the name must be this run's alone.
        order["job-name"] = f"{name}-{hashlib.sha256(str(out).encode()).hexdigest()[:6]}"
        dependencies.append("singleton")
    if dependencies:
        order |= {"dependency": ",".join(dependencies), "kill-on-invalid-dep": "yes"}
    return order


def _refuse_beside(out: Path, after: str | None) -> None:
    """Two jobs of one run at a time would only be in each other's way."""
    left = [] if after else jobs.states(jobs.submitted(out))
    if left:
        number = left[0].job_id.partition("_")[0]
        raise ConfigError(
            f"job {left[0].job_id} of {out} is {left[0].state.lower()} still; submit this one behind it with --after "
            f"{number}, or end it first: lhcp cancel {out}"
        )


def _remember(out: Path, folder: Path, number: str, name: str, log: Path, elements: int | None) -> Job:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    submitted = Job(job_id=number, name=name, folder=folder, log=log, submitted=now, elements=elements)
    jobs.remember(out, [submitted])
    return submitted
