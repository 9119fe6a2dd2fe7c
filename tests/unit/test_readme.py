"""The README's Python example runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch


def test_the_python_example_runs() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (example,) = (example for example in examples if "lighthouse_attention" in example)
    names: dict[str, torch.Tensor] = {}
    exec(example, names)
    assert names["out"].shape == (1, 8000, 8, 64)
    assert names["sel"].entries.shape == (1, 2, 2048)
