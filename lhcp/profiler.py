"""Recording steps for a profiler: a trace, the time by kernel, and the GPU's memory, as `ProfileConfig` says."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

import torch
from torch._C._autograd import DeviceType
from torch.cuda import memory
from torch.profiler import ProfilerActivity, profile, record_function

from lhcp.config.run import ProfileConfig
from lhcp.metrics import warn

FOLDER = "profile"
"""In the run folder."""


class StepProfiler:
    """Records the steps that are wanted, as far as they are run; a context manager, whose end writes what there is.

    Of no effect on what is computed. What cannot be written costs a warning.

    Args:
        wanted: which steps, and whether the memory too.
        run_dir: the run folder.
        device: of this rank.
    """

    def __init__(self, wanted: ProfileConfig, run_dir: Path, device: torch.device) -> None:
        self._first, self._last = wanted.range or (1, 0)
        self._memory, self._on_gpu = wanted.memory, device.type == "cuda"
        self._folder = run_dir / FOLDER
        self._profile: profile | None = None
        self._recorded = (0, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """The body is step `number` of the run, counted from 1; `step NUMBER` in the trace."""
        if not self._first <= number <= self._last:
            yield
            return
        if self._profile is None:
            self._profile = self._start()
            self._recorded = (number, number)
        self._recorded = (self._recorded[0], number)
        with record_function(f"step {number}"):
            yield
        if number == self._last:
            self.close()

    def close(self) -> None:
        """Write what has been recorded since the last call, if anything."""
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        recorded.stop()
        try:
            self._write(recorded)
        except OSError as error:
            warn(f"the profile of steps {self._recorded[0]} to {self._recorded[1]} is not written: {error}")
        finally:
            if self._memory:
                memory._record_memory_history(enabled=None)

    def _start(self) -> profile:
        if self._memory:
            memory._record_memory_history(stacks="python")
        gpu = [ProfilerActivity.CUDA] if self._on_gpu else []
        started = profile(activities=[ProfilerActivity.CPU, *gpu], acc_events=True)  # else some versions of torch warn
        started.start()
        return started

    def _write(self, recorded: profile) -> None:
        """All files in a folder of their own first: under its name each is whole."""
        first, last = self._recorded
        span = f"steps-{first}-{last}"
        trace, kernels, snapshot = f"trace-{span}.json.gz", f"kernels-{span}.txt", f"memory-{span}.pickle"
        said = f"{self._folder / trace} opens in https://ui.perfetto.dev, {kernels} has the time by "
        said += "kernel" if self._on_gpu else "CPU op"
        self._folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".partial-", dir=self._folder) as partial:
            folder = Path(partial)
            title = f"steps {first} to {last}, rank 0"
            (folder / kernels).write_text(time_table(recorded, title, self._on_gpu), encoding="utf-8")
            if self._memory:
                memory._dump_snapshot(folder / snapshot)
                said += f", {snapshot} opens in https://pytorch.org/memory_viz"
            _write_trace(recorded, folder / trace)
            for path in list(folder.iterdir()):
                path.replace(self._folder / path.name)
        print(f"profile of steps {first} to {last}: {said}", flush=True)


def _write_trace(recorded: profile, path: Path) -> None:
    """The Chrome trace, compressed. torch would do so in the system's folder for temporary files, however small."""
    plain = path.with_suffix("")
    recorded.export_chrome_trace(str(plain))
    # It returns all the same when it could not write: then there is no file, or only the beginning of one.
    if not plain.exists() or not _end_of(plain).endswith(b"}"):
        raise OSError(f"no whole trace could be written in {path.parents[1]}; is the disk full?")
    with plain.open("rb") as source, gzip.open(path, "wb", compresslevel=5) as target:
        shutil.copyfileobj(source, target, 2**20)
    plain.unlink()


def _end_of(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64))
        return file.read().rstrip()


def time_table(recorded: profile, title: str, on_gpu: bool) -> str:
    """A line for each kernel and copy of the GPU, or for each CPU op; the longest in all first.

    An op's time is without that of the ops it calls, so the lines add up to the whole.
    """
    events = [
        event
        for event in recorded.key_averages()
        if not on_gpu or (event.device_type == DeviceType.CUDA and not event.is_user_annotation)
    ]
    times_us = {id(event): event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events}
    whole_us = sum(times_us.values())
    lines = [f"{title}: {whole_us / 1e3:,.3f} ms {'of kernels and copies' if on_gpu else 'on the CPU, op by op'}", ""]
    lines.append(f"{'ms':>12}  {'share':>6}  {'calls':>8}  {'us a call':>12}  {'kernel' if on_gpu else 'op'}")
    for event in sorted(events, key=lambda event: -times_us[id(event)]):
        us = times_us[id(event)]
        share = us / whole_us if whole_us else 0
        lines.append(f"{us / 1e3:12,.3f}  {share:6.1%}  {event.count:8,}  {us / event.count:12,.1f}  {event.key}")
    return "\n".join(lines) + "\n"
