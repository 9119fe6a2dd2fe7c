"""Guards of the repository's shape: the links, who may import whom, file lengths."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LINKED = ("kernels", "launch", "slurm")
MAX_LINES = 400

# What each part of lhcp may import of lhcp, apart from itself. A part is the name after `lhcp.`.
ALLOWED: dict[str, set[str]] = {
    "kernels": set(),
    "slurm": set(),
    "config": set(),
    "presets": {"config"},
    "flops": {"config"},
    "volume": {"config"},
    "plan": {"config", "flops", "volume"},
    "config_file": {"config", "presets", "checkpoint"},
    "hf": {"config", "checkpoint", "environment", "files", "data"},
    "environment": set(),
    "files": {"config"},
    "checkpoint": {"config", "distributed", "files", "metrics"},
    "stop": set(),
    "lock": {"config", "metrics"},
    "metrics": set(),
    "plot": {"metrics"},
    "progress": {"metrics"},
    "data": {"config", "files"},
    "distributed": {"config"},
    "attention": {"config", "kernels", "distributed"},
    "loss": {"data"},
    "model": {"config", "kernels", "distributed", "attention", "loss"},
    "launch": {"config", "config_file", "checkpoint", "checks", "metrics", "plan", "presets", "progress"}
    | {"lock", "stop"},
}
# Parts not listed above may import anything but these, which are started by name.
ENTRY_POINTS = {"train", "cli"}
# Parts that need nothing installed but these.
THIRD_PARTY: dict[str, set[str]] = {
    "config": {"pydantic", "pydantic_core"},
    "presets": {"pydantic"},
    "flops": set(),
    "volume": set(),
    "plan": {"pydantic"},
    "launch": {"pydantic", "submitit", "typer"},
}

in_checkout = pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="not a git checkout")


def git(*arguments: str) -> list[str]:
    result = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return result.stdout.split("\n")


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of lhcp, by its dotted name; the linked folders where they really are."""
    for folder, prefix in [("lhcp", ()), *((name, ("lhcp",)) for name in LINKED)]:
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            relative = path.relative_to(REPOSITORY)
            if relative.parts[1] in LINKED and folder == "lhcp":
                continue
            parts = (*prefix, *relative.with_suffix("").parts)
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(name: str, path: Path) -> Iterator[str]:
    """Dotted names that a module imports, wherever in the file, relative ones resolved."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from lhcp import x` names the part in x.
            yield from (f"lhcp.{alias.name}" for alias in node.names) if source == "lhcp" else [source]


def part(dotted: str) -> str:
    return [*dotted.split("."), ""][1]


def violations(name: str, path: Path) -> Iterator[str]:
    mine = part(name)
    for imported in imports(name, path):
        top, other = imported.split(".")[0], part(imported)
        if top == "lhcp":
            is_module = other in PARTS and other != mine
            allowed = other in ALLOWED[mine] if mine in ALLOWED else other not in ENTRY_POINTS
            if is_module and (not mine or not allowed):
                yield f"{name} imports {imported}"
        elif mine in THIRD_PARTY and top not in sys.stdlib_module_names | THIRD_PARTY[mine]:
            yield f"{name} imports {imported}"


MODULES = list(modules())
PARTS = {part(name) for name, _ in MODULES} | set(ALLOWED) | ENTRY_POINTS


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_imports_go_one_way(name: str, path: Path) -> None:
    assert list(violations(name, path)) == []


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("lhcp.kernels.lighthouse.pool", "import lhcp.config", True),
        ("lhcp.kernels.lighthouse.pool", "from lhcp.kernels.lighthouse import reference", False),
        ("lhcp.attention.select", "from ..model import llama", True),
        ("lhcp.attention.select", "from . import pyramid", False),
        ("lhcp.attention.select", "def f():\n    from lhcp import train", True),
        ("lhcp.attention.select", "from lhcp import __version__", False),
        ("lhcp.demo", "from lhcp.train import main", True),
        ("lhcp.demo", "from lhcp import data", False),
        ("lhcp.config", "import yaml", True),
        ("lhcp.launch.torchrun", "import torch.distributed", True),
        ("lhcp.launch.torchrun", "import os.path", False),
    ],
)
def test_import_rules_see(tmp_path: Path, name: str, source: str, found: bool) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    assert bool(list(violations(name, path))) == found


@pytest.mark.parametrize(
    "name",
    [
        "lhcp.config",
        "lhcp.config_file",
        "lhcp.cli",
        "lhcp.eval.cli",
        "lhcp.launch.torchrun",
        "lhcp.plan",
        "lhcp.plot",
        "lhcp.status",
    ],
)
def test_imports_no_torch(name: str) -> None:
    code = f"import sys, {name}; assert 'torch' not in sys.modules, 'torch is imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


@pytest.mark.parametrize("name", LINKED)
def test_link(name: str) -> None:
    link = REPOSITORY / "lhcp" / name
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == (REPOSITORY / name).resolve()
    assert link.is_dir()
    assert not (link / "__init__.py").exists(), "it would make the folder a package of its own, outside lhcp"


@in_checkout
@pytest.mark.parametrize("name", LINKED)
def test_link_is_committed(name: str) -> None:
    entry = git("ls-files", "--stage", f"lhcp/{name}")[0]
    mode, blob = entry.split()[:2]
    assert mode == "120000", "not a symbolic link in git"
    assert git("cat-file", "blob", blob) == [f"../{name}"]


@in_checkout
def test_files_are_short() -> None:
    files = {file for file in git("ls-files", "--cached", "--others", "--exclude-standard", "*.py") if file}
    lengths = {
        file: len(path.read_text(encoding="utf-8").splitlines())
        for file in files
        if (path := REPOSITORY / file).is_file()
    }
    assert lengths
    assert {file: lines for file, lines in lengths.items() if lines > MAX_LINES} == {}


@pytest.mark.parametrize("command", ["pytest", "lhcp demo"])
def test_readme_says_how(command: str) -> None:
    assert command in (REPOSITORY / "README.md").read_text(encoding="utf-8")
