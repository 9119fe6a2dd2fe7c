"""From a template, a configuration and a site to a folder that a job runs from. Imports no torch.

OUT/code/lhcp           copy of the package (and of benchmarks): what every job of this folder runs
OUT/jobs/001            one submission:
    job.sbatch          the script, with everything of this job and site in it
    config.yaml         the configuration with presets, --set and paths written out; config-I.yaml in an array
    elements.txt        names of the elements of an array, by index
    logs                of the scheduler
OUT/jobs/jobs.jsonl     one object a job: see lhcp.launch.jobs

Where a run is trained OUT is its run folder; the runs of a grid are folders in OUT.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from lhcp import config_file
from lhcp.checkpoint.folder import published
from lhcp.checks import check_files, holds_run
from lhcp.config import ConfigError, RunConfig
from lhcp.config_file import CONFIG_FILE
from lhcp.launch import grid, script
from lhcp.launch.jobs import JOBS_FOLDER, numbers, submitted
from lhcp.launch.script import Options, Script
from lhcp.launch.site import Site, check_option, shell_quote
from lhcp.launch.snapshot import BENCHMARKS, CODE_FOLDER, copy_code

SCRIPT_FILE = "job.sbatch"
MARGIN_S = 30
"""Seconds that a job must have at least to train in."""
_ALTERNATIVES = ({"requeue", "no-requeue"}, {"mem", "mem-per-cpu", "mem-per-gpu"}, {"exclusive", "oversubscribe"})
"""Options of which one takes the place of another."""
DEFAULT_TEMPLATE = "train_98k"
NO_TORCH = (
    "jobs would run the Python that submits, which has no torch; name the one that trains in the site file, as python: "
    "/path/of/venv/bin/python"
)
# Of the lines themselves, not of what a file that they source does in passing.
_SETUP_FAILS = (
    """trap '[ ${#BASH_SOURCE[@]} -gt 1 ] || { echo "error: setup of the site file failed: $BASH_COMMAND" >&2; """
    """exit 1; }' ERR"""
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What somebody asks for."""

    template: str | None = None
    """Name of a template, or file. None: that of the run's last submission where it goes on, else of a run of one node.
    """
    config: Path | None = None
    """A run's configuration or a grid, as the template needs."""
    overrides: Sequence[str] = ()
    out: Path | None = None
    """Where results go; None: the configuration's output_dir."""
    options: Mapping[str, str | None] = field(default_factory=dict)
    """Options of sbatch instead of the template's and the site's. Where a run goes on without another template, those
    of its last submission are kept under these."""
    site: Site = field(default_factory=Site)
    resume: bool = False
    """Whether there may be a run in `out` already, to go on with."""
    allowed: Sequence[str] = ()
    """Keys that may differ from that run's; see --allow-change of `lhcp train`."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A checked job, before anything is written."""

    out: Path
    folder: Path
    template: str
    """Name, or absolute path."""
    trains: bool
    asked: Options
    """Options of sbatch that are neither the template's nor the site's."""
    options: Options
    text: str
    """Of the script."""
    files: Mapping[str, str]
    """Texts of further files of the job's folder, by name."""
    elements: int | None
    """Of a job array; None: it is none."""
    lacks_torch: bool
    """Whether the job would run with a Python that cannot train."""

    @property
    def name(self) -> str:
        """Of the job."""
        return self.options["job-name"] or ""

    @property
    def script(self) -> Path:
        """Where the script is, once it is written."""
        return self.folder / SCRIPT_FILE

    def write(self) -> None:
        """Write the job's folder, and the copy of the code where there is none yet.

        Raises:
            OSError: it cannot be written, or another submission took the same number.
        """
        self.folder.mkdir(parents=True)
        try:
            copy_code(self.out / CODE_FOLDER)
            for name, text in self.files.items():
                (self.folder / name).write_text(text, encoding="utf-8")
            self.script.write_text(self.text, encoding="utf-8")
            self.script.chmod(0o755)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Take back what `write` wrote, since it was not submitted."""
        shutil.rmtree(self.folder)
        if not (self.out / CONFIG_FILE).exists() and numbers(self.out) == []:
            shutil.rmtree(self.out / CODE_FOLDER, ignore_errors=True)
        with suppress(OSError):  # they hold something else
            self.folder.parent.rmdir()
            self.out.rmdir()


def prepare(request: Request) -> Prepared:
    """Check a request as far as this machine can tell, and say what would be submitted; writes nothing.

    Raises:
        ConfigError: a wrong value, with what is valid.
    """
    chosen, asked = _continued(request)
    template = script.read(chosen)
    if "-m benchmarks." in template.body and not BENCHMARKS.is_dir():
        raise ConfigError(f"template {template.name} runs benchmarks, which only a checkout of lhcp has")
    options = _options(template, request.site, asked)
    configs = _configs(template, request)
    if not template.trains:
        configs = {name: _for_measuring(config, options) for name, config in configs.items()}
    ended = [config for config in configs.values() if template.trains and is_finished(config)]
    for name, config in configs.items():
        if config in ended and len(ended) < len(configs):
            continue  # an arm that its job finds finished
        try:
            _check(template, _resolve(config, options), options, request)
        except ConfigError as error:
            where = f"{name}: " if len(configs) > 1 else ""
            raise ConfigError(f"{where}{error}") from None
    out = _out(template, request, configs)
    folder = out / JOBS_FOLDER / f"{_next_number(out, request.resume):03d}"
    files = {}
    if template.needs == "grid":
        options["array"] = f"0-{len(configs) - 1}{options.get('array') or ''}"
        files["elements.txt"] = "".join(f"{name}\n" for name in configs)
        files |= {f"config-{i}.yaml": config_file.dump(config) for i, config in enumerate(configs.values())}
    elif configs:
        files["config.yaml"] = config_file.dump(next(iter(configs.values())))
    gpus = _count(options, "gpus-per-node")
    options = _placed(options, request.site, gpus, folder)
    paths = [out]
    if template.trains:
        paths += dict.fromkeys(path for config in configs.values() for path in _inputs(config))
    return Prepared(
        out=out,
        folder=folder,
        template=str(Path(chosen).absolute()) if chosen.endswith(".sbatch") else chosen,
        trains=template.trains,
        asked=asked,
        options=options,
        text=template.render(options, _prelude(out, folder, gpus, request, paths)),
        files=files,
        elements=len(configs) if template.needs == "grid" else None,
        lacks_torch=request.site.uses_this_python and find_spec("torch") is None,
    )


def _continued(request: Request) -> tuple[str, Options]:
    """Template and options of what is asked for; those of the last submission where a run goes on."""
    for name in request.options:
        try:
            check_option(name)
        except ValueError as error:
            raise ConfigError(f"--sbatch: {error}") from None
    if request.template is not None:
        return request.template, dict(request.options)
    if request.resume and request.config is not None:
        out = request.out or config_file.load(request.config, request.overrides).output_dir
        if before := submitted(out.absolute()):
            return before[-1].template, _over(before[-1].options, request.options)
    return DEFAULT_TEMPLATE, dict(request.options)


def _options(template: Script, site: Site, asked: Options) -> Options:
    """The template's options under the site's and the user's."""
    return _over(_over(template.options, site.options()), asked)


def _over(below: Mapping[str, str | None], above: Mapping[str, str | None]) -> Options:
    replaced = {name for group in _ALTERNATIVES if not group.isdisjoint(above) for name in group}
    return {name: value for name, value in below.items() if name in above or name not in replaced} | dict(above)


def _for_measuring(config: RunConfig, options: Options) -> RunConfig:
    """A benchmark times one layer on one sequence: what a run needs besides does not matter."""
    processes = _count(options, "nodes") * _count(options, "gpus-per-node")
    cp = 1 if processes == 1 else config.parallel.cp
    values = {
        "parallel": config.parallel.model_copy(update={"dp": None, "cp": cp}),
        "global_batch_size": max(1, processes // cp),
        "micro_batch_size": 1,
        "eval": config.eval.model_copy(update={"sequences": 0}),
    }
    return config.model_copy(update=values)


def _placed(options: Options, site: Site, gpus: int, folder: Path) -> Options:
    """With the job's folder in them, and the GPUs of each node as the site asks for them."""
    option, value = site.gpu_option(gpus)
    if others := options.get(option) if option != "gpus-per-node" else None:
        if option == "gres" and re.search(r"(^|,)(gres/)?gpu\b", others):
            raise ConfigError(f"gres={others}: GPUs are asked for by --gpus-per-node, and by `gpus` of the site file")
        value = f"{value},{others}"  # --gres=gpu:8,nvme:1
    log = folder / ("slurm-%A_%a.out" if "array" in options else "slurm-%j.out")
    placed: Options = {"job-name": folder.parents[1].name}
    for name, given in options.items():
        if name == "gpus-per-node":
            placed[option] = value
        elif name != option:
            placed[name] = given
    return placed | {"output": str(log), "chdir": str(folder)}


def _count(options: Options, name: str) -> int:
    value = options.get(name)
    if value is None or not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"{name}: given {value!r}, must be a whole number of at least 1")
    return int(value)


def _configs(template: Script, request: Request) -> dict[str, RunConfig]:
    """The configuration of each element by name, paths absolute; one named "config" where there is no grid."""
    if template.needs == "nothing":
        if request.config is not None:
            raise ConfigError(f"template {template.name} takes no configuration; leave {request.config} out")
        return {}
    if request.config is None:
        wanted = "a grid" if template.needs == "grid" else "a run's configuration"
        raise ConfigError(f"template {template.name} needs {wanted} (a YAML file)")
    is_grid = grid.is_grid(request.config)
    if is_grid != (template.needs == "grid"):
        kind, takes = ("a grid", "one run's configuration") if is_grid else ("one run's configuration", "a grid")
        raise ConfigError(f"{request.config} is {kind}, and template {template.name} takes {takes}; see --template")
    if template.needs == "config":
        out = [] if request.out is None else [_output_dir(request.out)]
        return {"config": _absolute(config_file.load(request.config, [*request.overrides, *out]))}
    if request.out is None:
        raise ConfigError(f"template {template.name} writes many results; say where with --out")
    base, elements = grid.load(request.config)
    configs = {}
    for element in elements:
        overrides = [*request.overrides, *element.overrides, _output_dir(request.out / element.name)]
        try:
            configs[element.name] = _absolute(config_file.load(base, overrides))
        except ConfigError as error:
            raise ConfigError(f"{element.name}: {error}") from None
    return configs


def _output_dir(path: Path) -> str:
    return f"output_dir={json.dumps(str(path))}"


def _absolute(config: RunConfig) -> RunConfig:
    """A job does not run where it was submitted."""
    model = config.model
    if model.init_from is not None:
        model = model.model_copy(update={"init_from": model.init_from.absolute()})
    data = config.data.model_copy(update={"path": config.data.path.absolute()})
    return config.model_copy(update={"model": model, "data": data, "output_dir": config.output_dir.absolute()})


def _inputs(config: RunConfig) -> list[Path]:
    return [config.data.path, *([config.model.init_from] if config.model.init_from else [])]


def _out(template: Script, request: Request, configs: Mapping[str, RunConfig]) -> Path:
    if request.out is not None:
        out = request.out.absolute()
    elif template.trains and template.needs == "config":
        out = configs["config"].output_dir
    else:
        raise ConfigError(f"template {template.name}: say where results go with --out")
    if wrong := [character for character in "%:\\\n" if character in str(out)]:
        raise ConfigError(
            f"{str(out)!r}: a folder that jobs write to cannot have {wrong[0]!r} in its name; choose another"
        )
    return out


def _resolve(config: RunConfig, options: Options) -> RunConfig:
    """The configuration for all processes of the job."""
    nodes, gpus = _count(options, "nodes"), _count(options, "gpus-per-node")
    try:
        return config.resolve(nodes * gpus)
    except ConfigError as error:
        raise ConfigError(f"{nodes} node(s) with {gpus} GPU(s) each: {error}") from None


def _check(template: Script, config: RunConfig, options: Options, request: Request) -> None:
    """What can be wrong with a configuration in this job; it is resolved."""
    if not template.trains:
        return
    if holds_run(config.output_dir) and not request.resume:
        raise ConfigError(
            f"output_dir {config.output_dir} already holds a run; go on with it by --resume, or choose another folder"
        )
    refuse_finished(config)
    check_files(config, "last" if request.resume else None, request.allowed)
    given = options.get("signal")
    signal, _, ahead = (given or "").partition("@")
    if signal not in ("USR1", "TERM") or not ahead.isdecimal():
        raise ConfigError(f"signal: given {given!r}, must be USR1@SECONDS before the time limit")
    need = config.checkpoint.stop_timeout_s
    if int(ahead) <= need:
        raise ConfigError(
            f"signal={signal}@{ahead} comes too late: a run may take checkpoint.stop_timeout_s = {need:g} s to save; "
            f"shorten that, or send it earlier: --sbatch signal={signal}@{int(need) + MARGIN_S}"
        )
    limit = script.seconds(options.get("time", "unlimited"))
    if limit is not None and limit < int(ahead) + MARGIN_S:
        raise ConfigError(
            f"time={options['time']} leaves less than {MARGIN_S} s before the job is told to stop, {ahead} s ahead of "
            f"its end (signal={signal}@{ahead}); ask for more time, or shorten checkpoint.stop_timeout_s and then the "
            f"signal: --sbatch signal={signal}@SECONDS"
        )


def is_finished(config: RunConfig) -> bool:
    """Whether a run has nothing left to do."""
    return config.total_steps in published(config.output_dir)


def refuse_finished(config: RunConfig) -> None:
    """Refuse a run that has nothing left to do.

    Raises:
        ConfigError: saying so.
    """
    if is_finished(config):
        raise ConfigError(
            f"the run in {config.output_dir} is finished: {config.total_steps} steps; to go on, lengthen a stage in "
            f"its {CONFIG_FILE} and submit that with --resume"
        )


def _next_number(out: Path, resume: bool) -> int:
    taken = numbers(out)
    if submitted(out) and not resume:
        raise ConfigError(
            f"{out} has been submitted already; `lhcp submit {out}` submits the same once more, --resume this one "
            f"beside it, and another output_dir or --out starts anew"
        )
    return max(taken, default=0) + 1


def _prelude(out: Path, folder: Path, gpus: int, request: Request, paths: Sequence[Path]) -> str:
    """Shell lines: this job's folders, then this site's settings."""
    site = request.site
    srun, python = site.command(list(paths))
    allowed = [word for key in request.allowed for word in ("--allow-change", key)]
    lines = [
        "# This job.",
        f"export LHCP_OUT={shell_quote(str(out))}",
        f"export LHCP_JOB={shell_quote(str(folder))}",
        f"LHCP_GPUS={gpus}  # processes on each node",
        "# This site.",
        *([_SETUP_FAILS, *site.setup, "trap - ERR"] if site.setup else []),
        *site.exports(),
        "# shellcheck disable=SC2034  # used by what is sourced below",
        f"LHCP_SRUN=({_words(srun)}) LHCP_PYTHON=({_words(python)}) LHCP_TRAIN=({_words(allowed)})",
        "# The code of this folder, before any other.",
        f"export PYTHONPATH=$LHCP_OUT/{CODE_FOLDER}${{PYTHONPATH:+:$PYTHONPATH}}",
    ]
    return "\n".join(lines) + "\n"


def _words(words: Sequence[str]) -> str:
    return " ".join(map(shell_quote, words))
