"""What a run reports at each step: `metrics.jsonl`, `events.jsonl`, TensorBoard, and a line or bar to look at.

Only one rank of a run logs. Nothing already in the run folder is removed: when a resumed run repeats steps,
readers take the later record.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
STARTS_FILE = "starts.jsonl"
"""One object for each time that processes of the run were started: `time`, the `step` it began with, on what."""
HELD_OUT = "held_out"
"""Name of the event that carries a held-out loss, as `loss`."""


@dataclasses.dataclass(frozen=True, slots=True)
class StepMetrics:
    """One optimizer step."""

    step: int
    """From 0."""
    stage: str
    """The mode of the step's stage."""
    loss: float
    """Mean over the step's tokens, nats."""
    grad_norm: float
    """Global, before clipping."""
    lr: float
    tokens: int
    """Trained on so far, this step included; counted once whatever the context-parallel degree."""
    tokens_per_s_per_gpu: float
    mfu: float | None
    """Share of the device's peak FLOP/s, None where the peak is not known."""
    memory_gib: float
    """Peak memory of the device (on a CPU, of the process)."""
    step_s: float
    """Wall time."""


class MetricsLogger:
    """Writes a run's metrics; a context manager.

    Args:
        run_dir: the run folder, created if needed.
        total_steps: optimizer steps of the whole run.
        first_step: the first step that will be logged, above 0 in a resumed run.
    """

    def __init__(self, run_dir: Path, total_steps: int, first_step: int = 0) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._total = total_steps
        self._first = first_step
        self._step = first_step
        self._print_every = max(1, total_steps // 20)
        self._started = time.monotonic()
        self._metrics = JsonLines(run_dir / METRICS_FILE)
        self._events = JsonLines(run_dir / EVENTS_FILE)
        self._board = _Board(run_dir / "tensorboard", first_step)
        self._bar = _Bar(total_steps, first_step) if sys.stdout.isatty() and sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.progress.stop()
        self._board.close()
        self._metrics.close()
        self._events.close()

    def log(self, metrics: StepMetrics) -> None:
        """Record one step; steps come in ascending order."""
        self._step = metrics.step
        record = dataclasses.asdict(metrics)
        self._metrics.append(record)
        self._board.add("train", {name: value for name, value in record.items() if name != "step"}, metrics.step)
        if self._bar:
            self._bar.update(metrics)
        elif self._is_printed(metrics.step):
            print(self._line(metrics), flush=True)

    def event(self, name: str, *, step: int | None = None, **values: float | str) -> None:
        """Record something that not every step has, such as a held-out loss (`HELD_OUT`, with `loss=`).

        Args:
            name: what it is.
            step: the step it belongs to; the last one logged when left out.
            values: what to record; numbers go to TensorBoard too, as `name/key`.
        """
        step = self._step if step is None else step
        self._events.append({"step": step, "event": name, **values})
        self._board.add(name, values, step)
        shown = "  ".join(f"{key} {_short(value)}" for key, value in values.items())
        line = f"{name.replace('_', ' ')} after step {step + 1}: {shown}"
        if self._bar:
            self._bar.progress.console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)

    def _is_printed(self, step: int) -> bool:
        return step == self._first or (step + 1) % self._print_every == 0 or step + 1 == self._total

    def _line(self, metrics: StepMetrics) -> str:
        done = metrics.step + 1
        per_step = (time.monotonic() - self._started) / (done - self._first)
        return (
            f"step {done}/{self._total}  {metrics.stage}  loss {metrics.loss:.4f}  "
            f"grad norm {metrics.grad_norm:.3g}  {metrics.tokens_per_s_per_gpu:,.0f} tokens/s/GPU  "
            f"{_clock(per_step * (self._total - done))} left"
        )


class _Bar:
    """The progress bar on a terminal."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress: Progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s/GPU"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            expand=True,
        )
        self.task: TaskID = self.progress.add_task(
            "starting", total=total_steps, completed=first_step, loss="-", speed="-"
        )

    def update(self, metrics: StepMetrics) -> None:
        self.progress.update(
            self.task,
            completed=metrics.step + 1,
            description=metrics.stage,
            loss=f"{metrics.loss:.4f}",
            speed=f"{metrics.tokens_per_s_per_gpu:,.0f}",
        )


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The steps of a run in ascending order; null in place of a number that was not finite.

    Raises:
        FileNotFoundError: when nothing was logged there.
    """
    return _read_lines(run_dir / METRICS_FILE)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """The events of a run, each with `step` and `event` (its name), in the order they were written.

    Raises:
        FileNotFoundError: when nothing was logged there.
    """
    return _read_lines(run_dir / EVENTS_FILE)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file, less those that a resumed run wrote again and lines torn by a kill."""
    kept: list[dict[str, Any]] = []
    repeated_from: dict[object, float] = {}
    for line in reversed(path.read_text(encoding="utf-8").splitlines()):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        # Events are told apart by their text values too, such as the mode of an evaluation.
        kind = frozenset(kv for kv in record.items() if isinstance(kv[1], str)) if "event" in record else None
        if record["step"] < repeated_from.get(kind, math.inf):
            repeated_from[kind] = record["step"]
            kept.append(record)
    return kept[::-1]


class JsonLines:
    """A file that JSON objects are appended to, one a line, even after a line that a kill left unfinished.

    What a full disk refuses waits in memory and is written when there is room: a run does not end for a metric.
    """

    def __init__(self, path: Path) -> None:
        torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._waiting = b"\n" if torn else b""
        self._refused = False

    def append(self, record: dict[str, Any]) -> None:
        """Write one object; a number that is not finite becomes null, since JSON has none."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._waiting += (json.dumps(finite, allow_nan=False) + "\n").encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._refused:
                warn(f"{self._path}: {error.strerror}; lines are kept in memory until they can be written")
            self._refused = True

    def close(self) -> None:
        """Close the file; lines that it still refuses are lost."""
        if self._waiting:
            warn(f"{self._path}: {self._waiting.count(b'{')} lines could not be written")
        self._file.close()


class _Board:
    """TensorBoard files; they end where they cannot be written."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Points from first_step on, of an earlier process of this run, are hidden.
        self._writer: SummaryWriter | None = SummaryWriter(str(folder), purge_step=first_step or None)

    def add(self, group: str, values: dict[str, Any], step: int) -> None:
        """Numbers, as `group/name`."""
        for name, value in values.items():
            if self._writer and isinstance(value, int | float):
                try:
                    self._writer.add_scalar(f"{group}/{name}", value, step)
                except OSError as error:
                    warn(f"TensorBoard files end at step {step}: {error}")
                    self._writer = None

    def close(self) -> None:
        if self._writer:
            try:
                self._writer.close()
            except OSError as error:
                warn(f"TensorBoard files are incomplete: {error}")


def tell(error: object) -> None:
    """What the user can correct, as one message on stderr, its lines aligned."""
    message = str(error).replace("\n", "\n       ")
    print(f"error: {message}", file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Tell the user and the log of something that does not end the run."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
    logging.warning(message)


def _short(value: float | str) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
