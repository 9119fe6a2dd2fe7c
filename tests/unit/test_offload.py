"""Inputs of layers in host memory: what is still held on the device, when, and that backward reads what forward had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lhcp.attention.layers import layer_attentions
from lhcp.checks import check_host_memory
from lhcp.config import ConfigError, MemoryConfig, RunConfig, StageConfig
from lhcp.distributed import ContextParallel
from lhcp.model.llama import Llama
from lhcp.offload import InputOffload
from lhcp.parallelize import prepare_layers
from runs import make_config


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("offloaded", "held"), [(3, {2}), (2, set()), (1, set())])
def test_inputs_leave_the_device(
    monkeypatch: pytest.MonkeyPatch, compiled: bool, offloaded: int, held: set[int]
) -> None:
    """Of three layers: only the last one's input, if that leaves too, is waited for no earlier than in backward."""
    memory = {"recompute": "selective", "offload_layers": offloaded}
    config = make_config(Path("unused"), 1, 1, memory=memory, compile=compiled)
    monkeypatch.setattr(torch, "compile", lambda function, **_: torch._dynamo.optimize("aot_eager")(function))
    sent: dict[int, StorageWeakRef] = {}
    fetched: list[int] = []
    send, fetch = InputOffload._send, InputOffload._fetch

    def watched_send(self: InputOffload, layer: int, x: Tensor) -> None:
        sent[layer] = StorageWeakRef(x.untyped_storage())
        send(self, layer, x)

    def watched_fetch(self: InputOffload, layer: int) -> None:
        fetched.append(layer)
        assert len(self._returning) <= 1
        fetch(self, layer)

    monkeypatch.setattr(InputOffload, "_send", watched_send)
    monkeypatch.setattr(InputOffload, "_fetch", watched_fetch)
    model = Llama(config.model).double()
    model.init_weights(0)
    prepare_layers(model, config, torch.device("cpu"))
    attention = layer_attentions(3, ContextParallel(), config.attention, [0])
    tokens = torch.randint(0, 257, (1, 360), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        loss = model(tokens, tokens, torch.arange(360), attention)
        assert {layer for layer, storage in sent.items() if not storage.expired()} == held
        loss.backward()
        assert fetched == list(range(min(offloaded, 2)))[::-1]  # each once, the next one needed first
        fetched.clear()
        assert all(storage.expired() for storage in sent.values())


def test_two_forward_passes_do_not_share_their_inputs() -> None:
    """Host memory holds one pass: the backward of an earlier one is an error, never another's gradient."""
    offload = InputOffload(1, torch.device("cpu"))
    layer = offload.around(0, lambda x: x.sin().sum())
    first, second = (torch.randn(3, requires_grad=True) for _ in range(2))
    losses = [layer(first), layer(second)]
    losses[1].backward()
    assert second.grad is not None
    torch.testing.assert_close(second.grad, second.detach().cos())
    with pytest.raises(AssertionError, match="a later forward pass"):
        losses[0].backward()


def test_inputs_of_another_shape_have_other_host_memory() -> None:
    """A smaller batch comes after a larger one, and the larger one again."""
    offload = InputOffload(1, torch.device("cpu"))
    layer = offload.around(0, lambda x: x.sin().sum())
    for size in (5, 3, 5):
        x = torch.randn(size, requires_grad=True)
        layer(x).backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, x.detach().cos())


def test_a_backward_that_was_cut_short_leaves_nothing_to_the_next() -> None:
    """Layer 0's input came back for a backward that ended in layer 1: the next pass has another input."""
    offload = InputOffload(2, torch.device("cpu"))
    first, second = (offload.around(layer, lambda x: x.sin()) for layer in (0, 1))

    def stop(_: Tensor) -> None:
        raise KeyboardInterrupt

    for interrupted in (True, False):
        x = torch.full((3,), 2.0 if interrupted else 0.5, requires_grad=True)
        hidden = first(x)
        assert not offload._returning  # nor its memory
        if interrupted:
            hidden.register_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                second(hidden).sum().backward()
        else:
            second(hidden).sum().backward()
            assert x.grad is not None
            torch.testing.assert_close(x.grad, x.detach().sin().cos() * x.detach().cos())


def test_host_memory_that_is_not_there_is_missed_before_anything_starts() -> None:
    """A layer's input: 10^9 bytes, 4 of an element; what is free is known to within what others take meanwhile."""
    model = make_config(Path("unused"), 1, 1).model.model_copy(update={"dim": 250, "num_layers": 10**6})
    config = make_config(Path("unused"), 1, 1).model_copy(
        update={"seq_len": 10**6, "dtype": "float32", "model": model, "stages": [StageConfig(mode="dense", steps=1)]}
    )
    (free,) = (int(x.split()[1]) * 1024 for x in Path("/proc/meminfo").read_text().splitlines() if "MemAvail" in x)
    enough = free // 2 // 10**9

    def offloading(layers: int) -> RunConfig:
        return config.model_copy(update={"memory": MemoryConfig(recompute="full", offload_layers=layers)})

    check_host_memory(offloading(enough), ranks=1)
    check_host_memory(offloading(0), ranks=10**9)
    with pytest.raises(
        ConfigError, match=rf"memory.offload_layers {6 * enough} takes .* GiB.* 1 rank.*enough for \d+ layer"
    ):
        check_host_memory(offloading(6 * enough), ranks=1)
    with pytest.raises(ConfigError, match=r"for the 3 rank"):
        check_host_memory(offloading(2 * enough), ranks=3)
