"""The run folder: held by one process, with the code, and a line for each start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lhcp import config_file, run_folder
from lhcp.checkpoint.folder import FOLDER, published, step_folder
from lhcp.config import ConfigError
from lhcp.launch.snapshot import code_digest, copy_code
from lhcp.lock import holder, locked
from lhcp.metrics import JsonLines
from runs import make_config, write_data

HOLD = """
import sys
from pathlib import Path
from lhcp.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_holds_a_run_folder_until_it_ends_or_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match=f"is in use by process {other.pid} on .*; wait for it to end"),
            locked(tmp_path / "run"),
        ):
            pass
        assert holder(tmp_path / "run").startswith(f"process {other.pid} on ")
        other.kill()
    assert holder(tmp_path / "run") is None
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_each_start_is_recorded_and_clears_the_way(tmp_path: Path) -> None:
    config = make_config(write_data(tmp_path), 1, 2)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    assert run_folder.begin(run_dir, config, 0, torch.device("cpu")) == []
    for name in ("step-00000005", "step-00000010", ".step-00000015.tmp"):
        (run_dir / FOLDER / name).mkdir(parents=True)
    changed = config.model_copy(update={"seed": 5})
    aside = run_folder.begin(run_dir, changed, 5, torch.device("cpu"))
    assert [path.name for path in aside] == ["set-aside-1-step-00000010"]
    assert published(run_dir) == [5]
    assert not step_folder(run_dir, 15).with_name(".step-00000015.tmp").exists()
    assert config_file.load(run_dir / "config.yaml") == changed

    starts = [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 5]
    for start in starts:
        assert (start["dp"], start["cp"], start["torch"]) == (1, 2, torch.__version__)
        assert start["code"] == code_digest()


def test_the_copy_of_the_code_runs(tmp_path: Path) -> None:
    copy_code(tmp_path / "code")
    again = "from lhcp.launch.snapshot import code_digest; import lhcp.train; print(lhcp.__file__, code_digest())"
    path = os.pathsep.join([str(tmp_path / "code"), os.environ.get("PYTHONPATH", "")])
    out = subprocess.run(
        [sys.executable, "-c", again], env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path,
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert out == [str(tmp_path / "code" / "lhcp" / "__init__.py"), code_digest()]
    assert (tmp_path / "code/lhcp/kernels/lighthouse/reference.py").is_file()
    assert (tmp_path / "code/lhcp/launch/configs/demo.yaml").is_file()
    assert not any(path.is_symlink() for path in (tmp_path / "code").rglob("*"))


def test_the_first_copy_of_the_code_stays(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    copy_code(tmp_path / "code")
    assert list((tmp_path / "code").iterdir()) == []


class Refusing:
    """A file on a disk with room for `room` bytes."""

    def __init__(self, room: int) -> None:
        self.room, self.content = room, b""

    def write(self, data: bytes) -> int:
        if self.room == 0:
            raise OSError(28, "No space left on device")
        taken = data[: self.room]
        self.room -= len(taken)
        self.content += taken
        return len(taken)

    def close(self) -> None:
        pass


def test_lines_that_a_full_disk_refuses_wait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where room ends within a line, the rest of it follows."""
    lines = JsonLines(tmp_path / "x.jsonl")
    disk = lines._file = Refusing(room=14)
    for number in range(5):
        lines.append({"number": number})
        if number == 3:
            assert disk.content.count(b"\n") == 1
            disk.room = 10_000
    lines.close()
    assert [json.loads(line)["number"] for line in disk.content.splitlines()] == [0, 1, 2, 3, 4]
    err = capsys.readouterr().err
    assert err.count("No space left on device; lines are kept in memory") == 1
    assert "could not be written" not in err


def test_lines_that_never_find_room_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = JsonLines(tmp_path / "x.jsonl")
    lines._file = Refusing(room=0)
    for number in range(3):
        lines.append({"number": number})
    lines.close()
    assert "3 lines could not be written" in capsys.readouterr().err
