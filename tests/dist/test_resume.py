"""Stopping anywhere and going on: at the same layout bit by bit, at another up to rounding."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from forked_runs import ForkedRun, run_to_end
from lhcp import config_file
from lhcp.checkpoint import storage
from lhcp.checkpoint.folder import published, step_folder
from lhcp.checkpoint.manifest import Checkpoint
from lhcp.checkpoint.saver import Saver
from lhcp.config import RunConfig
from lhcp.metrics import HELD_OUT, read_events, read_metrics
from lhcp.parallelize import full, on_any_rank
from ranks import run_ranks
from runs import largest_error, make_config, make_trainer, write_data
from saved import published_tensors

STEPS, SWITCH = 20, 10
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=[(1, 2), (2, 1)], ids=["cp2", "dp2"])
def whole(request: pytest.FixtureRequest, data: Path) -> RunConfig:
    """A run that was never stopped, with a checkpoint after every step."""
    dp, cp = request.param
    run_dir = data.parent / f"whole-{dp}-{cp}"
    config = make_config(data, dp, cp, output_dir=run_dir, checkpoint={"every": 1, "keep": STEPS}, eval={})
    config_file.save(config, run_dir.with_suffix(".yaml"))
    assert run_to_end(2, [str(run_dir.with_suffix(".yaml"))], run_dir.with_suffix(".txt")) == [0, 0]
    assert published(run_dir) == list(range(1, STEPS + 1))
    return config


def go_on(config: RunConfig, ways: list[tuple[Path, int]], rank: int) -> list[tuple[State, list[float]]]:
    """From each of these checkpoints up to a step: the state there and the losses on the way."""
    outcomes = []
    for folder, last in ways:
        trainer, losses = make_trainer(config, Checkpoint.open(folder)), []
        while trainer.done < last:
            losses.append(trainer.train_step()[0])
        assert trainer.optimizer_steps == last
        outcomes.append(({name: full(x.detach()).clone() for name, x in trainer.state().items()}, losses))
    return outcomes


def test_from_any_step_at_the_same_layout_bit_by_bit(whole: RunConfig) -> None:
    """From every step to the next, and from some to the end."""
    losses = [record["loss"] for record in read_metrics(whole.output_dir)]
    ways = [(step, step + 1) for step in range(1, STEPS - 1)]
    ways += [(step, STEPS) for step in (1, SWITCH - 1, SWITCH, SWITCH + 1, STEPS - 1)]
    resumed = [(step_folder(whole.output_dir, step), last) for step, last in ways]
    for outcomes in run_ranks(2, partial(go_on, whole, resumed), timeout=240):
        for (step, last), (state, after) in zip(ways, outcomes, strict=True):
            expected = published_tensors(whole.output_dir, last)
            assert after == losses[step:last]
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[name], expected[name]) for name in expected), f"{step} to {last}"


@pytest.mark.parametrize(("dp", "cp"), [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)])
def test_at_another_layout_up_to_rounding(whole: RunConfig, data: Path, dp: int, cp: int) -> None:
    """From the Lighthouse stage and from the switch; float64."""
    config = make_config(data, dp, cp, eval={})
    final = published_tensors(whole.output_dir, STEPS)
    losses = [record["loss"] for record in read_metrics(whole.output_dir)]
    steps = (5, SWITCH)
    ways = [(step_folder(whole.output_dir, step), STEPS) for step in steps]
    for outcomes in run_ranks(dp * cp, partial(go_on, config, ways), timeout=240):
        for step, (state, after) in zip(steps, outcomes, strict=True):
            np.testing.assert_allclose(after, losses[step:], rtol=1e-9)
            assert largest_error(state, final) <= 1e-9


def test_a_rank_loads_its_shard_alone(whole: RunConfig, data: Path) -> None:
    """What is loaded at once is what the checkpoint holds: before any step the states are equal bit by bit."""

    def loaded(rank: int) -> State:
        trainer = make_trainer(make_config(data, 1, 4, eval={}), Checkpoint.open(step_folder(whole.output_dir, 7)))
        assert trainer.done == trainer.optimizer_steps == 7
        assert {float(state["step"]) for state in trainer.optimizer.state.values()} == {7.0}
        return {name: full(x.detach()).clone() for name, x in trainer.state().items()}

    saved = published_tensors(whole.output_dir, 7)
    for state in run_ranks(4, loaded):
        assert state.keys() == saved.keys()
        assert all(torch.equal(state[name], saved[name]) for name in saved)


def test_the_stage_switch_keeps_the_optimizer_and_the_data_order(whole: RunConfig) -> None:
    """The first dense step, by hand: its gradient, on the batch that a single-stage run would see, goes into the
    moments that the Lighthouse stage left."""
    before, after = (published_tensors(whole.output_dir, step) for step in (SWITCH, SWITCH + 1))

    def gradients(rank: int) -> tuple[State, list[np.ndarray]]:
        trainer = make_trainer(whole, Checkpoint.open(step_folder(whole.output_dir, SWITCH)))
        assert set(trainer.attention("dense")) == {trainer.mesh.context_parallel.attend}
        trainer.gradients(SWITCH, trainer.attention("dense"))
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), whole.optim.grad_clip)
        batches = [tokens for tokens, _ in trainer.loader.micro_batches(SWITCH)]
        return {name: full(p.grad) for name, p in trainer.model.named_parameters()}, batches

    def single_stage(rank: int) -> list[np.ndarray]:
        stages = [{"mode": "dense", "steps": STEPS}]
        config = RunConfig.model_validate(whole.model_dump() | {"stages": stages})
        return [tokens for tokens, _ in make_trainer(config).loader.micro_batches(SWITCH)]

    for (grads, batches), others in zip(run_ranks(2, gradients), run_ranks(2, single_stage), strict=True):
        np.testing.assert_array_equal(batches, others)
        for name, grad in grads.items():
            mean, square = (f"optimizer.{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq"))
            assert before[mean].any()
            torch.testing.assert_close(after[mean], 0.9 * before[mean] + 0.1 * grad, rtol=1e-9, atol=1e-15)
            torch.testing.assert_close(after[square], 0.95 * before[square] + 0.05 * grad**2, rtol=1e-9, atol=1e-20)


def test_random_numbers_of_a_step_do_not_depend_on_where_the_run_began(whole: RunConfig) -> None:
    def drawn(rank: int) -> list[list[float]]:
        draws = []
        for step in (None, 2, 3):
            folder = None if step is None else Checkpoint.open(step_folder(whole.output_dir, step))
            trainer = make_trainer(whole, folder)
            while trainer.done < 4:
                trainer.train_step()
            draws.append(torch.rand(3).tolist())
        return draws

    one, other = run_ranks(2, drawn)
    assert one[0] == one[1] == one[2]
    assert other[0] == other[1] == other[2]
    assert one[0] != other[0]


def test_training_goes_on_while_a_checkpoint_is_written(data: Path, tmp_path: Path) -> None:
    """With storage that takes half a second: steps are done between a save and its publication, and what is
    published is the state at the start."""
    config = make_config(data, 1, 2, global_batch_size=1, output_dir=tmp_path)

    def steps_meanwhile(rank: int) -> tuple[int, State]:
        slow_storage(rank)
        trainer, saver = make_trainer(config), Saver(tmp_path, 1, torch.device("cpu"))
        trainer.train_step()
        state = {name: full(x.detach()).clone() for name, x in trainer.state().items()}
        started = time.perf_counter()
        saver.start(trainer.state(), trainer.manifest())
        steps = 0
        while not on_any_rank(bool(published(tmp_path)), torch.device("cpu")) and trainer.done < config.total_steps:
            trainer.train_step()
            steps += 1
        time.sleep(1)
        saved = saver.collect(block=True)
        assert saved is not None
        assert saved.error is None
        assert 0.5 <= saved.seconds < time.perf_counter() - started - 0.3, "until it is published, not until collected"
        return steps, state

    for steps, state in run_ranks(2, steps_meanwhile):
        assert steps >= 3, "training waited for the storage"
        saved = published_tensors(tmp_path, 1)
        assert all(torch.equal(saved[name], state[name]) for name in state)


def test_deterministic_runs_are_bit_identical(data: Path, tmp_path: Path) -> None:
    states = []
    for name in ("one", "two"):
        config = make_config(data, 1, 2, dtype="float32", deterministic=True, output_dir=tmp_path / name)
        config_file.save(config, tmp_path / f"{name}.yaml")
        assert run_to_end(2, [str(tmp_path / f"{name}.yaml")], tmp_path / "out.txt") == [0, 0]
        states.append(published_tensors(tmp_path / name, STEPS))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_no_checkpoint_is_a_pickle(whole: RunConfig) -> None:
    """Every file is JSON, a checksum, or safetensors: none begins like a pickle or a zip of them."""
    files = list(step_folder(whole.output_dir, STEPS).iterdir())
    assert {path.suffix for path in files} == {".json", ".sha256", ".safetensors"}
    assert all(path.read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"PK") for path in files)


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(data: Path, tmp_path: Path) -> None:
    config = make_config(data, 1, 1, output_dir=tmp_path / "run", eval={"sequences": 1, "every": 15})
    config_file.save(config, tmp_path / "run.yaml")
    arguments = [str(tmp_path / "run.yaml"), "--resume", "last"]
    assert run_to_end(1, arguments, tmp_path / "out.txt") == [0]
    evaluations = [event for event in read_events(tmp_path / "run") if event["event"] == HELD_OUT]
    assert [event["step"] for event in evaluations] == [14, 19]
    (tmp_path / "run" / "events.jsonl").unlink()
    assert run_to_end(1, arguments, tmp_path / "out.txt") == [0]
    assert [event for event in read_events(tmp_path / "run") if event["event"] == HELD_OUT] == evaluations[1:]


def slow_storage(rank: int) -> None:
    original = storage.save_file

    def slow(*args: object) -> None:
        time.sleep(0.5)
        original(*args)

    storage.save_file = slow


def test_a_save_that_has_begun_is_finished_when_training_diverges(data: Path, tmp_path: Path) -> None:
    config = make_config(
        data, 1, 2, output_dir=tmp_path / "run", eval={}, checkpoint={"every": 1},
        optim={"lr": 1e200, "warmup_steps": 0, "max_skipped_steps": 0},
    )  # fmt: skip
    config_file.save(config, tmp_path / "run.yaml")
    output = tmp_path / "out.txt"
    assert ForkedRun(2, [str(tmp_path / "run.yaml")], output, slow_storage).wait() == [1, 1]
    assert published(tmp_path / "run") == [1]
    Checkpoint.open(step_folder(tmp_path / "run", 1)).verify()
    assert "Traceback" not in output.read_text()


def test_skipped_steps_are_counted_on(data: Path, tmp_path: Path) -> None:
    config = make_config(data, 1, 1, output_dir=tmp_path)

    def counts(rank: int) -> list[tuple[int, int, int]]:
        trainer = make_trainer(config)
        trainer.train_step()
        honest = trainer.gradients
        trainer.gradients = lambda step, attention: honest(step, attention) * torch.nan
        for _ in range(2):
            trainer.train_step()
        saver = Saver(tmp_path, 1, torch.device("cpu"))
        saver.start(trainer.state(), trainer.manifest())
        saver.collect(block=True)
        resumed = make_trainer(config, Checkpoint.open(step_folder(tmp_path, 3)))
        return [(each.done, each.optimizer_steps, each.skipped_in_a_row) for each in (trainer, resumed)]

    assert run_ranks(1, counts) == [[(3, 1, 2)] * 2]
