"""`lhcp submit`, `lhcp cancel`, `lhcp logs` and `lhcp launch`. Imports no torch."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from lhcp import config_file
from lhcp.checks import check_files
from lhcp.config import ConfigError
from lhcp.launch import jobs, script, submit, torchrun
from lhcp.launch.jobs import Job
from lhcp.launch.prepare import NO_TORCH, Prepared, Request, prepare
from lhcp.launch.site import load_site
from lhcp.launch.snapshot import CODE_FOLDER, code_digest

app = typer.Typer(help="Start runs by other means than `lhcp submit`.", no_args_is_help=True)

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key of the configuration, such as optim.lr=1e-3."),
]
SitePath = Annotated[
    Path | None,
    typer.Option("--site", help="Site file; else $LHCP_SITE, else ~/.config/lhcp/cluster.yaml.", dir_okay=False),
]
Out = Annotated[Path | None, typer.Option(help="Folder for the results, if not the configuration's output_dir.")]
Nodes = Annotated[int | None, typer.Option(help="Nodes, if not as many as the template says.")]
Gpus = Annotated[int | None, typer.Option("--gpus-per-node", help="GPUs of each node: a process each.")]
Time = Annotated[str | None, typer.Option(help="Time limit, such as 12:00:00.")]
SbatchOptions = Annotated[
    list[str] | None,
    typer.Option("--sbatch", metavar="NAME[=VALUE]", help="Any other option of sbatch, such as cpus-per-task=16."),
]
After = Annotated[
    str | None,
    typer.Option(metavar="JOB", help="Start when this job has succeeded; one of the same run: when it has ended."),
]
Chain = Annotated[
    int, typer.Option(min=1, help="Submit so many jobs; each goes on where the one before met its time limit.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in output_dir, if there is one already.")]
AllowChange = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY", help="Go on although this key, part of what the model computes, has changed."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and show the script; write nothing.")]
Follow = Annotated[
    bool, typer.Option("--follow", "-f", help="Print the log as it grows, until the job has ended; ends with its code.")
]


def submit_command(
    config: Annotated[Path, typer.Argument(help="The run's YAML file; or a folder, to submit its last job again.")],
    template: Annotated[
        str | None,
        typer.Option(
            help="Job template: a name of `lhcp launch templates`, or a file. If left out: train_98k, one node; with "
            "--resume that of the run's last job, with the options that it was submitted with."
        ),
    ] = None,
    overrides: Overrides = None,
    site: SitePath = None,
    out: Out = None,
    nodes: Nodes = None,
    gpus_per_node: Gpus = None,
    time: Time = None,
    sbatch: SbatchOptions = None,
    after: After = None,
    chain: Chain = 1,
    resume: Resume = False,
    allow_change: AllowChange = None,
    dry_run: DryRun = False,
    follow: Follow = False,
) -> None:
    """Submit a run to Slurm; it comes back by itself after preemption, the time limit and failures."""
    if config.is_dir():
        if template or overrides or site or out or nodes or gpus_per_node or time or sbatch or allow_change:
            raise ConfigError(
                f"{config} is submitted again as it was; to change something: "
                f"lhcp submit {jobs.newest_folder(config.absolute()) / 'config.yaml'} --resume, with the changes"
            )
        if dry_run:
            text = submit.script_again(config.absolute())
            _show(text, config.absolute(), after)
            return
        done = submit.again(config, after, chain)
    else:
        shape = {"nodes": nodes, "gpus-per-node": gpus_per_node, "time": time}
        prepared = prepare(_request(template, config, overrides, site, out, shape, sbatch, resume, allow_change))
        if dry_run:
            _show_prepared(prepared, after)
            return
        submit.by_submitit(prepared, after, chain)
        done = jobs.submitted(prepared.out)[-chain:]
    _tell(done, follow)


@app.command("sbatch")
def sbatch_command(
    template: Annotated[str, typer.Argument(help="A name of `lhcp launch templates`, or a file.")],
    config: Annotated[
        Path | None, typer.Argument(help="What the template needs: a configuration, a grid, nothing.")
    ] = None,
    overrides: Overrides = None,
    site: SitePath = None,
    out: Out = None,
    nodes: Nodes = None,
    gpus_per_node: Gpus = None,
    time: Time = None,
    sbatch: SbatchOptions = None,
    after: After = None,
    chain: Chain = 1,
    resume: Resume = False,
    allow_change: AllowChange = None,
    dry_run: DryRun = False,
    follow: Follow = False,
) -> None:
    """Submit a job template with plain sbatch."""
    shape = {"nodes": nodes, "gpus-per-node": gpus_per_node, "time": time}
    prepared = prepare(_request(template, config, overrides, site, out, shape, sbatch, resume, allow_change))
    if dry_run:
        _show_prepared(prepared, after)
        return
    _tell(submit.by_sbatch(prepared, after, chain), follow)


@app.command("templates")
def templates_command() -> None:
    """List the job templates."""
    for name in script.names():
        print(f"{name:16}{script.read(name).summary}")


@app.command("torchrun")
def torchrun_command(
    config: Annotated[Path, typer.Argument(help="The run's YAML file, at the same path on every machine.")],
    head: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the machines meet: one of them, a free port.")],
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")],
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=1, help="Processes on each, one a GPU.")],
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(metavar="WHICH", help="As of `lhcp train`.")] = None,
    execute: Annotated[bool, typer.Option("--execute", help="Run it here instead of printing it.")] = False,
) -> None:
    """Print the command that trains on several machines without Slurm; to be run on each of them."""
    host, _, port = head.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ConfigError(f"--head: given {head!r}, must be HOST:PORT with a port from 1 to 65535")
    run = config_file.load(config, overrides or ()).resolve(nodes * gpus_per_node)
    check_files(run, resume)
    command = torchrun.on_each_node(config, overrides or (), nodes, gpus_per_node, head, resume)
    if execute:
        raise typer.Exit(torchrun.run_forwarding(command, torchrun.environment(gpus_per_node)))
    print(shlex.join(command))


def cancel_command(
    out: Annotated[Path, typer.Argument(help="A run folder, or another that jobs write to.")],
    now: Annotated[bool, typer.Option("--now", help="Without a save.")] = False,
) -> None:
    """End the jobs of a run for good; those that train save first."""
    for job in jobs.cancel(out.absolute(), now):
        saves = " (it saves, and ends after this step)" if job.state == "RUNNING" and not now else ""
        print(f"job {job.job_id} is told to end{saves}")


def logs_command(
    out: Annotated[Path, typer.Argument(help="A run folder, or another that jobs write to.")],
    element: Annotated[int, typer.Option(min=0, help="Of a job array, which one.")] = 0,
    follow: Follow = False,
) -> None:
    """Print the log of the last job of a run."""
    jobs.newest_folder(out.absolute())  # or there is no job
    newest_first = jobs.submitted(out.absolute())[::-1]
    job = next((job for job in newest_first if job.log.exists()), newest_first[0])
    if element >= (job.elements or 1):
        raise ConfigError(f"--element {element}: job {job.job_id} has {job.elements or 1}, numbered from 0")
    _print_log(job, job.log_of(element), follow)


def _show_prepared(prepared: Prepared, after: str | None) -> None:
    if prepared.lacks_torch:
        print(f"note: this could not be submitted here: {NO_TORCH}", file=sys.stderr)
    _show(prepared.text, prepared.out, after)


def _show(text: str, out: Path, after: str | None) -> None:
    """Of a script, when all that can be checked here is in order."""
    if jobs.slurm_answers():
        submit.refuse_beside(out, after)
    print(text, end="")


def _request(
    template: str | None,
    config: Path | None,
    overrides: list[str] | None,
    site: Path | None,
    out: Path | None,
    shape: Mapping[str, object],
    sbatch: list[str] | None,
    resume: bool,
    allow_change: list[str] | None,
) -> Request:
    options: script.Options = {name: str(value) for name, value in shape.items() if value is not None}
    for option in sbatch or ():
        name, equals, value = option.removeprefix("--").partition("=")
        options[name] = value if equals else None
    return Request(
        template=template, config=config, overrides=overrides or (), out=out, options=options,
        site=load_site(site), resume=resume, allowed=allow_change or (),
    )  # fmt: skip


def _tell(done: list[Job], follow: bool) -> None:
    code = done[0].folder.parents[1] / CODE_FOLDER
    if code_digest(code / "lhcp") != code_digest():
        print(f"note: it runs the code that it began with, {code}, which is not today's")
    for job in done:
        elements = f", an array of {job.elements}" if job.elements else ""
        print(f"submitted job {job.job_id} ({job.name}{elements}) by template {job.template}")
    print(f"  log     {done[0].log}")
    print(f"  script  {done[0].folder / 'job.sbatch'}")
    if follow:
        _print_log(done[0], done[0].log, follow=True)


def _print_log(job: Job, log: Path, follow: bool) -> None:
    for text in jobs.follow(job, log) if follow else jobs.log_so_far(job, log):
        print(text, end="", flush=True)
    if follow:
        ends = jobs.ends(job)
        for end in ends:
            if end.element is not None and end.state != "COMPLETED":
                told = f"element {end.element} of {job.elements} {end.in_words}; its log: {job.log_of(end.element)}"
                print(told, file=sys.stderr)
        raise typer.Exit(max(end.code for end in ends))
