"""Submitting jobs from Python, by submitit or by sbatch; also `lhcp submit` and `lhcp launch sbatch`. Imports no torch.

    from lhcp.launch import submit

    first = submit.job(Path("run.yaml"), options={"nodes": "4"})[0]     # a submitit Job: state, stdout(), result(), ...
    submit.job(Path("tail.yaml"), after=first.job_id, resume=True)      # goes on when that one has ended
    submit.job(Path("grid.yaml"), template="recoverability", out=Path("runs/grid"))     # an array

Either way the job is the script in its folder (see lhcp.launch.prepare), which also requeues itself; submitit submits,
follows, and gives the result, and its own reaction to signals is not needed.
"""

from __future__ import annotations

import hashlib
import logging
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lhcp import config_file
from lhcp.config import ConfigError
from lhcp.config_file import CONFIG_FILE
from lhcp.launch import jobs
from lhcp.launch.jobs import Job
from lhcp.launch.prepare import NO_TORCH, SCRIPT_FILE, Prepared, Request, prepare, refuse_finished
from lhcp.launch.script import Options
from lhcp.launch.site import Site, load_site
from lhcp.launch.snapshot import CODE_FOLDER
from lhcp.launch.verdict import forgive
from lhcp.stop import EXIT_STOPPED

if TYPE_CHECKING:
    import submitit


def job(
    config: Path | None,
    *,
    template: str | None = None,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    options: Mapping[str, object] | None = None,
    site: Site | None = None,
    resume: bool = False,
    allowed: Sequence[str] = (),
    after: str | None = None,
    chain: int = 1,
) -> list[submitit.Job[int]]:
    """Submit by submitit; see `lhcp.launch.prepare.Request` for what is asked for, and `by_submitit`.

    Args:
        config, template, out, overrides, options, resume, allowed: see `Request`. Options of sbatch are by their long
            names, None for a flag: {"nodes": 2, "gpus-per-node": 8, "time": "12:00:00"}.
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
        options={name: value if value is None else str(value) for name, value in (options or {}).items()},
        site=load_site() if site is None else site,
        resume=resume,
        allowed=allowed,
    )
    return by_submitit(prepare(request), after, chain)


def by_sbatch(prepared: Prepared, after: str | None = None, chain: int = 1) -> list[Job]:
    """Write the job's folder and submit its script.

    Args:
        prepared: the job.
        after: number of a job that must succeed before; if it is of the same folder, that must have ended.
        chain: so many jobs, one after the other, each of which goes on where the one before ended.

    Raises:
        ConfigError: Slurm refuses.
    """
    _refuse(prepared, after)
    prepared.write()
    try:
        return _sbatch(prepared.out, _asked(prepared), after, chain)
    except ConfigError:
        _discard_unless_submitted(prepared)
        raise


def again(out: Path, after: str | None = None, chain: int = 1) -> list[Job]:
    """Submit once more what was submitted last for an output folder, from that folder alone.

    Raises:
        ConfigError: as `script_again` and `refuse_beside`; or Slurm refuses.
    """
    out = out.absolute()
    script_again(out)
    refuse_beside(out, after)
    return _sbatch(out, jobs.submitted(out)[-1], after, chain)


def script_again(out: Path) -> str:
    """What `again` would submit.

    Raises:
        ConfigError: nothing was submitted, the folder was moved since, or its run is finished.
    """
    folder = jobs.newest_folder(out)
    if (folder / CONFIG_FILE).exists():
        refuse_finished(config_file.load(folder / CONFIG_FILE))
    text = (folder / SCRIPT_FILE).read_text(encoding="utf-8")
    if shlex.quote(str(folder)) not in text:
        raise ConfigError(
            f"{out} was moved since it was submitted; submit it anew: lhcp submit {folder / 'config.yaml'} --resume "
            f"--set output_dir={out}"
        )
    return text


def _asked(prepared: Prepared) -> Job:
    """What will be remembered of its jobs, but for what the submission tells: number, log and time."""
    return Job(
        job_id="", name=prepared.name, folder=prepared.folder, log=Path(), submitted="", template=prepared.template,
        options=prepared.asked, trains=prepared.trains, elements=prepared.elements,
    )  # fmt: skip


def _sbatch(out: Path, like: Job, after: str | None, chain: int) -> list[Job]:
    order = _order(out, like, after, chain)
    flags = [f"--{key}={value}" for key, value in order.items()]
    done: list[Job] = []
    for _ in range(chain):
        number = jobs.submit_script(like.folder / SCRIPT_FILE, flags)
        if not done:
            forgive(out)
        log = like.folder / (f"slurm-{number}_0.out" if like.elements else f"slurm-{number}.out")
        done.append(_remember(out, like, number, order["job-name"], log))
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

    if shutil.which("sbatch") is None:
        raise ConfigError(jobs.NO_SLURM)
    _refuse(prepared, after)
    prepared.write()
    # Where the template sends no signal submitit would send USR2, which kills; this one does nothing.
    own: Options = {"signal": "CONT@1"}
    own |= {key: value for key, value in prepared.options.items() if key not in ("output", "array")}
    done: list[submitit.Job[int]] = []
    try:
        like = _asked(prepared)
        order = _order(prepared.out, like, after, chain)
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
        with jobs.own_environment():
            for _ in range(chain):
                links = executor.map_array(run_script, [prepared.script] * (prepared.elements or 1))
                if not done:
                    forgive(prepared.out)
                number = links[0].job_id.partition("_")[0]
                _remember(prepared.out, like, number, order["job-name"], links[0].paths.stdout)
                done += links
    except (RuntimeError, FailedJobError, ConfigError) as error:
        _discard_unless_submitted(prepared)
        raise error if isinstance(error, ConfigError) else ConfigError(f"not submitted: {error}") from None
    return done


def _discard_unless_submitted(prepared: Prepared) -> None:
    if prepared.folder not in [job.folder for job in jobs.submitted(prepared.out)]:
        prepared.discard()


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
        # The script has said why; what submitit and Python would say after that hides it.
        logging.getLogger("submitit").setLevel(logging.CRITICAL)
        sys.excepthook = lambda *_: None
        raise subprocess.CalledProcessError(code, str(path))
    return code


def _order(out: Path, like: Job, after: str | None, chain: int) -> dict[str, str]:
    """Options that put the job of a folder behind others."""
    if chain < 1:
        raise ConfigError(f"chain: given {chain}, must be at least 1")
    own = after in [job.job_id for job in jobs.submitted(out)]
    # One of the same run that was told to end has saved and says that it has not succeeded.
    dependencies = [f"{'afterany' if own else 'afterok'}:{after}"] if after else []
    mark = "-" + hashlib.sha256(str(out).encode()).hexdigest()[:6]
    order = {"job-name": like.name.removesuffix(mark)}
    if chain > 1:
        # Of jobs of one name and user, one runs at a time: the name must be this run's alone.
        order["job-name"] += mark
        dependencies.append("singleton")
    if dependencies:
        if "\n#SBATCH --dependency=" in (like.folder / SCRIPT_FILE).read_text(encoding="utf-8"):
            raise ConfigError("--sbatch dependency: leave it out, or --after and --chain, which set it, too")
        order |= {"dependency": ",".join(dependencies), "kill-on-invalid-dep": "yes"}
    return order


def _refuse(prepared: Prepared, after: str | None) -> None:
    if prepared.lacks_torch:
        raise ConfigError(NO_TORCH)
    refuse_beside(prepared.out, after)


def refuse_beside(out: Path, after: str | None) -> None:
    """Two jobs of one run at a time would only be in each other's way.

    Raises:
        ConfigError: there would be; or Slurm does not answer.
    """
    if after is not None:
        jobs.check_known(after)
    submitted = jobs.submitted(out)
    left = jobs.states(submitted)
    if left and after != submitted[-1].job_id:
        number = submitted[-1].job_id
        raise ConfigError(
            f"job {left[0].job_id} of {out} is {left[0].state.lower()} still; submit this one behind it with --after "
            f"{number}, or end it first: lhcp cancel {out}"
        )


def _remember(out: Path, like: Job, number: str, name: str, log: Path) -> Job:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    submitted = like.model_copy(update={"job_id": number, "name": name, "log": log, "submitted": now})
    try:
        jobs.remember(out, [submitted])
    except OSError as error:  # nobody would know of it
        jobs.end(number)
        raise ConfigError(f"job {number} is taken back, since {out} cannot be written: {error}") from None
    return submitted
