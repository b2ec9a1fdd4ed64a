"""What is counted: torch's operators one by one, and PlanLM's launches as its Triton backend logs them."""

from __future__ import annotations

import json
from collections import Counter as Tally
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="PlanLM's launches are logged by its Triton backend")

from benchmarks import traffic
from benchmarks.block import SHAPES, Shape, setup
from benchmarks.traffic import H100, LAUNCH_SECONDS, Counter, Kernel, count, planlm_on_triton, predicted

META = torch.device("meta")


def test_each_operator_reads_its_inputs_and_writes_its_outputs_once() -> None:
    x, y = torch.empty(4, 8, device=META), torch.empty(8, 16, device=META)
    with Counter() as counter:
        product = x.view(4, 8) @ y
        product.add_(1.0)
        product.softmax(dim=1)
        product.new_zeros(3)
    assert counter.kernels == [
        Kernel("mm", 4 * (32 + 128 + 64), flops=2 * 4 * 8 * 16),
        Kernel("add_", 4 * (64 + 64)),
        Kernel("_softmax", 4 * (64 + 64)),
        Kernel("new_zeros", 4 * 3),
    ]


def test_padding_is_a_fill_and_a_copy_and_its_backward_a_copy() -> None:
    x = torch.empty(2, 4, device=META)
    with Counter() as counter:
        padded = F.pad(x, (0, 0, 1, 0))
        F.pad(padded, (0, 0, -1, 0))
    assert [kernel.bytes for kernel in counter.kernels] == [4 * 12, 4 * 16, 4 * 16]


def test_an_expanded_tensor_is_read_once() -> None:
    with Counter() as counter:
        torch.empty(1, 8, device=META).expand(100, 8).sum()
    assert counter.kernels[0].bytes == 4 * (8 + 1)


def test_planlm_launches_a_kernel_a_layer_each_way_and_few_others() -> None:
    shape = Shape("wide", num_sentences=192, num_actions=1024, size=64, num_layers=3, width=128, num_tokens=4096)
    block = setup(shape, torch.bfloat16, META)
    kernels = count(planlm_on_triton, block)
    launches = Tally(kernel.name for kernel in kernels)
    assert launches["add_plan_fwd"] == launches["add_plan_bwd"] == 3
    addition = next(kernel for kernel in kernels if kernel.name == "add_plan_fwd")
    assert addition.bytes == 2 * (2 * 4096 * 128 + 192 * 128) + 8 * 4096
    assert sum(kernel.flops for kernel in kernels) == 3 * 2 * 192 * 64 * (1024 + 384)
    assert all(kernel.tile_reads > 0 for kernel in kernels if kernel.flops and kernel.triton)


def test_a_prediction_is_the_longer_of_the_two_and_a_launch() -> None:
    kernels = [Kernel("a", bytes=3_000_000), Kernel("b", bytes=1, flops=798_000_000)]
    assert predicted(kernels) == pytest.approx(3e6 / H100.bytes + 798e6 / H100.flops + 2 * LAUNCH_SECONDS)


def test_the_command_prints_thresholds_and_its_status_follows_them(
    tiny: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SHAPES, "tiny", tiny)
    arguments = ["--shapes", "tiny", "--dtypes", "bf16", "--json", str(tmp_path / "t.json")]
    monkeypatch.setattr(traffic, "THRESHOLDS", {"strong eager": 100.0})
    monkeypatch.setattr(traffic, "LAUNCHES_THRESHOLD", 100.0)
    assert traffic.main(arguments) == 0
    assert capsys.readouterr().out.count("PASS  ") == 2
    monkeypatch.setattr(traffic, "THRESHOLDS", {"strong eager": 1e-9})
    assert traffic.main(arguments) == 1
    assert "FAIL  tiny bf16: bytes" in capsys.readouterr().out
    counted = json.loads((tmp_path / "t.json").read_text())
    assert [one["provider"] for one in counted] == ["token-level", "strong eager", "planlm"]
    for one in counted:
        assert one["bytes"] == sum(kernel["bytes"] for kernel in one["kernels"])
