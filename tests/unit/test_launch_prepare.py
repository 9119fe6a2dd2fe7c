"""Checking a request: every wrong value has its message before anything is written; what is right is written whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from golden.update import write_inputs
from job_records import job_record
from lhcp import config_file
from lhcp.checkpoint.folder import step_folder
from lhcp.config import ConfigError
from lhcp.launch import jobs
from lhcp.launch.prepare import Prepared, Request, prepare
from lhcp.launch.site import Site, load_site
from lhcp.launch.submit import again, by_sbatch

TEMPLATES = "latency, preflight, recoverability, sweep, train_1m, train_98k"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture
def folder(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with data, run.yaml and grid.yaml."""
    (tmp_path / "data").symlink_to(inputs / "data")
    run = yaml.safe_load((inputs / "run.yaml").read_text())
    run |= {"output_dir": "run", "data": {"path": "data"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    write_grid(tmp_path, arms={"dense": {"seed": 1}, "lighthouse": {}})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_grid(folder: Path, **grid: Any) -> None:
    (folder / "grid.yaml").write_text(yaml.safe_dump({"config": "run.yaml"} | grid, sort_keys=False))


def request(template: str = "train_98k", config: str | None = "run.yaml", **changes: Any) -> Request:
    return Request(template=template, config=Path(config) if config else None, **changes)


def refusal(**changes: Any) -> str:
    """The message of a request that is refused, with nothing written."""
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(ConfigError) as error:
        prepare(request(**changes))
    assert sorted(Path.cwd().rglob("*")) == before
    return str(error.value)


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (
            ["parallel.cp=2"],
            {"gpus-per-node": "3"},
            "1 node(s) with 3 GPU(s) each: parallel.dp unset x parallel.cp 2 does not match 3 process(es); start a "
            "multiple of 2, or set parallel.cp to a divisor of 3",
        ),
        (
            ["parallel.cp=2", "parallel.dp=4"],
            {"nodes": "2"},
            "2 node(s) with 8 GPU(s) each: parallel.dp 4 x parallel.cp 2 does not match 16 process(es); start 8, or "
            "set parallel.dp to 8, or to null to follow from the processes",
        ),
        (
            ["optim.lrr=1"],
            {},
            "optim.lrr: unknown key; did you mean 'lr'? valid in optim: lr, warmup_steps, betas, eps, weight_decay, "
            "grad_clip, max_skipped_steps",
        ),
        (
            ["parallel.cp=8", "attention.topk=24", "attention.num_strata=8"],
            {},
            "1 node(s) with 8 GPU(s) each: num_strata 8 is not legal: it does not divide evenly over the 16 chunks of "
            "the context-parallel layout (a chunk is a whole number of strata); none is valid here: topk must be a "
            "multiple of 32",
        ),
        (
            ["attention.topk=81"],
            {},
            "1 node(s) with 8 GPU(s) each: topk 81 exceeds the 80 coarsest entries of seq_len 720 (num_levels 3, "
            "pooling_factor 3); it must be at most that, or seq_len at least 729",
        ),
        ([], {"nodes": "0"}, "nodes: given '0', must be a whole number of at least 1"),
        ([], {"nodes": "two"}, "nodes: given 'two', must be a whole number of at least 1"),
        ([], {"nodes": "1-4"}, "nodes: given '1-4', must be a whole number of at least 1"),
        ([], {"nodes": None}, "nodes: given None, must be a whole number of at least 1"),
        ([], {"gpus-per-node": "0"}, "gpus-per-node: given '0', must be a whole number of at least 1"),
        (
            [],
            {"signal": "USR1@600"},
            "signal=USR1@600 comes too late: a run may take checkpoint.stop_timeout_s = 600 s to save; shorten that, "
            "or send it earlier: --sbatch signal=USR1@630",
        ),
        (
            ["checkpoint.stop_timeout_s=700"],
            {},
            "signal=USR1@660 comes too late: a run may take checkpoint.stop_timeout_s = 700 s to save; shorten that, "
            "or send it earlier: --sbatch signal=USR1@730",
        ),
        ([], {"signal": "USR1"}, "signal: given 'USR1', must be USR1@SECONDS before the time limit"),
        ([], {"signal": "@700"}, "signal: given '@700', must be USR1@SECONDS before the time limit"),
        ([], {"signal": "USR1@soon"}, "signal: given 'USR1@soon', must be USR1@SECONDS before the time limit"),
        ([], {"signal": None}, "signal: given None, must be USR1@SECONDS before the time limit"),
        # Then the trainer would be killed, or would not be told at all.
        ([], {"signal": "KILL@700"}, "signal: given 'KILL@700', must be USR1@SECONDS before the time limit"),
        ([], {"signal": "B:USR1@700"}, "signal: given 'B:USR1@700', must be USR1@SECONDS before the time limit"),
        (
            [],
            {"time": "11:29"},
            "time=11:29 leaves less than 30 s before the job is told to stop, 660 s ahead of its end (signal=USR1@660)"
            "; ask for more time, or shorten checkpoint.stop_timeout_s and then the signal: --sbatch "
            "signal=USR1@SECONDS",
        ),
        (
            [],
            {"time": "tomorrow"},
            "time 'tomorrow' is no time limit; valid: minutes, hours:minutes:seconds, days-hours",
        ),
        ([], {"output": "x"}, "--sbatch: output cannot be set: the launcher does"),
        ([], {"array": "0-3"}, "--sbatch: array cannot be set: the launcher does"),
        (
            [],
            {"N": "2"},
            "--sbatch: given 'N', must be the long name of an option of sbatch, such as cpus-per-task",
        ),
        ([], {"job-name": "a\nb"}, "'a\\nb' has a line break, which no job script can hold"),
    ],
)
def test_wrong_values(folder: Path, overrides: list[str], options: dict[str, str | None], message: str) -> None:
    assert refusal(overrides=overrides, options=options) == message


def test_just_enough_time(folder: Path) -> None:
    """A second less of either is refused above."""
    options = {"time": "11:30", "signal": "USR1@660"}
    assert prepare(request(options=options)).options.items() >= options.items()
    options = {"time": "10:31", "signal": "USR1@601"}
    assert prepare(request(options=options)).options.items() >= options.items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "train"}, f"no job template train; valid: {TEMPLATES}, or a file that ends with .sbatch"),
        ({"template": "a.sbatch"}, f"no job template a.sbatch; valid: {TEMPLATES}, or a file that ends with .sbatch"),
        ({"config": None}, "template train_98k needs a run's configuration (a YAML file)"),
        ({"config": "no.yaml"}, "no.yaml: no such file"),
        ({"template": "sweep", "config": None}, "template sweep needs a grid (a YAML file)"),
        ({"template": "preflight"}, "template preflight takes no configuration; leave run.yaml out"),
        ({"template": "preflight", "config": None}, "template preflight: say where results go with --out"),
        ({"template": "latency"}, "template latency: say where results go with --out"),
        ({"template": "sweep"}, "run.yaml is one run's configuration, and template sweep takes a grid; see --template"),
        (
            {"config": "grid.yaml"},
            "grid.yaml is a grid, and template train_98k takes one run's configuration; see --template",
        ),
        (
            {"template": "sweep", "config": "grid.yaml"},
            "template sweep writes many results; say where with --out",
        ),
    ],
)
def test_what_a_template_needs(folder: Path, changes: dict[str, Any], message: str) -> None:
    assert refusal(**changes) == message


def test_missing_data(folder: Path) -> None:
    message = f"no dataset in {folder / 'nowhere'} (the folder does not exist); make one with `lhcp data prepare`"
    assert refusal(overrides=["data.path=nowhere"]) == message


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (
            {"arms": {"a": {}}, "varied": {"seed": [0]}},
            "grid.yaml: varied: unknown key; did you mean 'vary'? valid: config, arms, vary",
        ),
        ({}, "grid.yaml: its arms and vary make one job, which needs no grid; submit the configuration"),
        (
            {"vary": {"seed": [0, 1, 0]}},
            "grid.yaml: two elements are named 'seed=0'; name the arms apart",
        ),
        (
            {"arms": {"a": {}}, "vary": {"parallel.cp": [1, 2], "optim.cp": [1]}, "config": "run.yaml"},
            "a,cp=1,cp=1: optim.cp: unknown key; valid in optim: lr, warmup_steps, betas, eps, weight_decay, "
            "grad_clip, max_skipped_steps",
        ),
        (
            {"arms": {"a/b": {}, "c": {}}},
            "grid.yaml: 'a/b' cannot name a folder; name arms by letters, digits and any of _.,=+-",
        ),
        (
            {"arms": {"..": {}, "c": {}}},
            "grid.yaml: '..' cannot name a folder; name arms by letters, digits and any of _.,=+-",
        ),
        (
            {"vary": {"data.path": ["/a", "/b"]}},
            "grid.yaml: 'path=/a' cannot name a folder; name arms by letters, digits and any of _.,=+-",
        ),
        ({"arms": {"a": {}}, "vary": {"seed": []}}, "grid.yaml: vary.seed: given [], must have at least 1 item(s)"),
        (
            {"arms": {"good": {}, "bad": {"attention.topk": 81}}},
            "bad: 1 node(s) with 8 GPU(s) each: topk 81 exceeds the 80 coarsest entries of seq_len 720 (num_levels 3, "
            "pooling_factor 3); it must be at most that, or seq_len at least 729",
        ),
        (
            {"arms": {"good": {}, "bad": {"optim.lr": -1}}},
            "bad: optim.lr: given -1, must be greater than 0",
        ),
        ({"arms": {"a": {}, "b": {}}, "config": "no.yaml"}, "a: no.yaml: no such file"),
    ],
)
def test_wrong_grids(folder: Path, grid: dict[str, Any], message: str) -> None:
    write_grid(folder, **grid)
    assert refusal(template="recoverability", config="grid.yaml", out=Path("out")) == message


@pytest.mark.parametrize("name", ["jobs", "code"])
def test_an_arm_cannot_be_named_as_the_launcher_names_its_folders(folder: Path, name: str) -> None:
    write_grid(folder, arms={"good": {}, name: {}})
    assert name in refusal(template="recoverability", config="grid.yaml", out=Path("out"))


def test_a_date_in_a_grid(folder: Path) -> None:
    (folder / "grid.yaml").write_text("config: run.yaml\nvary: {seed: [2026-01-01, 1]}\n")
    assert "seed" in refusal(template="recoverability", config="grid.yaml", out=Path("out"))


def write_submitted(prepared: Prepared) -> None:
    """As a submission leaves it."""
    prepared.write()
    jobs.remember(prepared.out, [job_record(prepared.folder)])


def test_what_was_submitted_already(folder: Path) -> None:
    write_submitted(prepare(request()))
    run = folder / "run"
    assert refusal() == (
        f"{run} has been submitted already; `lhcp submit {run}` submits the same once more, --resume this one beside "
        f"it, and another output_dir or --out starts anew"
    )
    again = prepare(request(resume=True))
    assert again.folder == run / "jobs" / "002"
    again.write()
    assert prepare(request(resume=True)).folder == run / "jobs" / "003"
    assert prepare(request(out=Path("other"))).folder == folder / "other" / "jobs" / "001"


def test_a_finished_run(folder: Path) -> None:
    prepared = prepare(request())
    write_submitted(prepared)
    run = config_file.load(folder / "run.yaml")
    step_folder(folder / "run", run.total_steps).mkdir(parents=True)
    message = f"the run in {folder / 'run'} is finished: {run.total_steps} steps; to go on, lengthen a stage"
    assert refusal(resume=True).startswith(message)
    with pytest.raises(ConfigError, match=re.escape(message)):
        again(folder / "run")
    longer = [f"stages.0.steps={run.stages[0].steps + 1}"]
    assert refusal(resume=True, overrides=longer).startswith("no checkpoint in")  # it is an empty folder


def test_what_may_change(folder: Path) -> None:
    text = prepare(request(allowed=["attention.topk", "data"])).text
    assert "LHCP_TRAIN=(--allow-change attention.topk --allow-change data)\n" in text


def test_a_run_that_has_begun(folder: Path) -> None:
    """The flag of `lhcp submit` and `lhcp launch sbatch` is --resume, and takes no value."""
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text("")
    message = refusal()
    assert message.startswith(f"output_dir {folder / 'run'} already holds a run; go on with it by --resume")
    assert "--resume last" not in message


def test_what_slurm_has_refused_was_not_submitted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    jobs_folder = folder / "run" / "jobs"
    for resume in (False, True):
        with pytest.raises(ConfigError) as error:
            by_sbatch(prepare(request(resume=resume)))
        assert str(error.value) == (
            "Slurm's commands are not on PATH; submit on a machine that has them (a login node), or start the run "
            "without Slurm: lhcp launch torchrun"
        )
        assert not jobs_folder.parent.exists()
    write_submitted(prepare(request()))
    with pytest.raises(ConfigError, match=r"^Slurm's commands are not on PATH"):
        by_sbatch(prepare(request(resume=True)))
    assert sorted(path.name for path in jobs_folder.iterdir()) == ["001", "jobs.jsonl"]
    assert (folder / "run" / "code" / "lhcp" / "train.py").exists()


def test_what_goes_on_keeps_template_and_options(folder: Path) -> None:
    options = {"nodes": "2", "time": "3:00:00", "nice": None}
    prepared = prepare(request("train_1m", options=options))
    prepared.write()
    record = job_record(prepared.folder, template=prepared.template, options=prepared.asked)
    jobs.remember(prepared.out, [record])
    config = Path("run/jobs/001/config.yaml")
    again = prepare(Request(config=config, resume=True, options={"time": "4:00:00"}))
    assert again.template == "train_1m"
    assert again.asked == options | {"time": "4:00:00"}
    assert again.options == prepared.options | again.asked | {
        name: again.options[name] for name in ("output", "chdir", "job-name")
    }
    other = prepare(Request(config=config, resume=True, template="train_98k"))
    assert (other.options["nodes"], other.options["time"]) == ("1", "24:00:00")
    anew = prepare(Request(config=config, out=Path("anew")))
    assert (anew.template, anew.options["nodes"]) == ("train_98k", "1")


@pytest.mark.parametrize(
    ("option", "gone"),
    [("no-requeue", "requeue"), ("mem-per-gpu", "mem"), ("mem-per-cpu", "mem"), ("oversubscribe", "exclusive")],
)
def test_an_option_takes_the_place_of_another(folder: Path, option: str, gone: str) -> None:
    for changes in ({"options": {option: None}}, {"site": Site(sbatch={option: None})}):
        options = prepare(request(**changes)).options
        assert option in options
        assert gone not in options
    back = prepare(request(site=Site(sbatch={option: None}), options={gone: "x"})).options
    assert option not in back
    assert back[gone] == "x"


def test_a_benchmark_has_no_batch(folder: Path) -> None:
    overrides = ["parallel.cp=8", "parallel.dp=1", "attention.topk=48", "attention.num_strata=16", "seq_len=1440"]
    prepared = prepare(request("latency", overrides=overrides, out=Path("out")))
    config = config_file.load(save(folder, prepared.files["config.yaml"]))
    assert (config.parallel.dp, config.parallel.cp, config.global_batch_size) == (None, 1, 1)
    write_grid(folder, vary={"parallel.cp": [2, 4]}, arms={"a": {"global_batch_size": 1}})
    prepared = prepare(request("sweep", "grid.yaml", overrides=overrides[2:], out=Path("out")))
    for number, cp in enumerate((2, 4)):
        config = config_file.load(save(folder, prepared.files[f"config-{number}.yaml"]))
        assert config.resolve(8).parallel.dp == 8 // cp


def save(folder: Path, text: str) -> Path:
    (folder / "saved.yaml").write_text(text)
    return folder / "saved.yaml"


def test_a_grid_goes_on_without_its_finished_arms(folder: Path) -> None:
    grid = request("recoverability", "grid.yaml", out=Path("out"), resume=True)
    steps = config_file.load(folder / "run.yaml").total_steps
    step_folder(folder / "out" / "dense", steps).mkdir(parents=True)
    assert prepare(grid).elements == 2
    step_folder(folder / "out" / "lighthouse", steps).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"^dense: the run in .* is finished"):
        prepare(grid)


def test_flags_of_a_site_file(folder: Path) -> None:
    (folder / "site.yaml").write_text("account: 0123\nsbatch: {no-requeue: true, nice: }\nnetwork_interface: ^lo\n")
    site = load_site(folder / "site.yaml")
    assert site.options() == {"account": "0123", "no-requeue": None, "nice": None}
    assert site.exports() == ["export NCCL_SOCKET_IFNAME='^lo'"]
