"""The model of time: what is counted, what machine code says, and what both give on a device."""

from __future__ import annotations

import json
import math
from collections import Counter as Tally
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config

pytest.importorskip("triton", reason="PlanLM's launches are those of its Triton backend")

import benchmarks.estimates
from benchmarks import block as blocks
from benchmarks import lm_steps, predict, programs
from benchmarks.block import SHAPES, Shape, setup
from benchmarks.devices import DEVICES, known_device
from benchmarks.estimates import GAP, RAMP, Cache, estimate, estimates, product_seconds
from benchmarks.lm_steps import Model, count_step
from benchmarks.machine_code import Code, Cost, analysed
from benchmarks.operators import Counter, Kernel, Part, Pretended, Product, counted
from benchmarks.predict import count
from benchmarks.programs import Panel, Role, makespan, rereads, roles_of
from planlm.kernels import Documents, varlen_attention

META = torch.device("meta")
H100 = DEVICES["h100"]


def names_and_bytes(counter: Counter) -> list[tuple[str, int]]:
    """Of each kernel."""
    return [(kernel.name, kernel.bytes) for kernel in counter.kernels]


# What is counted


def test_each_operator_reads_its_inputs_and_writes_its_outputs_once() -> None:
    x, y = torch.empty(4, 8, device=META), torch.empty(8, 16, device=META)
    with counted() as counter:
        product = x.view(4, 8) @ y
        product.add_(1.0)
        product.softmax(dim=1)
        product.new_zeros(3)
    expected = [("mm", 4 * (32 + 128 + 64)), ("add_", 4 * 128), ("_softmax", 4 * 128), ("fill", 4 * 3)]
    assert names_and_bytes(counter) == expected
    assert counter.kernels[0].product == Product(1, 4, 16, 8, torch.float32)


def test_padding_is_a_fill_and_a_copy_and_its_backward_a_copy() -> None:
    x = torch.empty(2, 4, device=META)
    with counted() as counter:
        padded = F.pad(x, (0, 0, 1, 0))
        F.pad(padded, (0, 0, -1, 0))
    assert [kernel.bytes for kernel in counter.kernels] == [4 * 12, 4 * 16, 4 * 16]


def test_a_gather_reads_what_it_picks_and_an_expanded_tensor_is_read_once() -> None:
    with counted() as counter:
        torch.empty(1000, 8, device=META)[torch.empty(3, dtype=torch.int64, device=META)]
        torch.empty(1, 8, device=META).expand(100, 8).sum()
    assert names_and_bytes(counter) == [("index", 2 * 4 * 24 + 8 * 3), ("sum", 4 * (8 + 1))]


def test_a_softmax_multiplies_before_its_backward() -> None:
    x = torch.empty(4, 8, device=META, requires_grad=True)
    with counted() as counter:
        x.softmax(dim=1).backward(torch.empty(4, 8, device=META))
    assert [kernel.name for kernel in counter.kernels][-2:] == ["_softmax_backward_data: mul", "_softmax_backward_data"]


def test_planlm_launches_a_kernel_a_layer_each_way() -> None:
    shape = Shape("wide", num_sentences=192, num_actions=1024, size=64, num_layers=3, width=128, num_tokens=4096)
    kernels = count(blocks.planlm, setup(shape, torch.bfloat16, META))
    launches = Tally(kernel.name for kernel in kernels if kernel.launch is not None)
    assert launches["add_plan_fwd"] == launches["add_plan_bwd"] == 3
    addition = next(kernel for kernel in kernels if kernel.name == "add_plan_fwd")
    assert addition.bytes == 2 * (2 * 4096 * 128 + 192 * 128) + 8 * 4096


def test_autocast_lowers_products_once_a_weight_and_raises_norms() -> None:
    layer, x = nn.Linear(8, 8, device=META), torch.empty(2, 8, device=META)
    with counted() as counter, Pretended(counter):
        product = layer(layer(x))
        normal = F.layer_norm(product, (8,))
        assert torch.is_autocast_enabled("meta") and torch.get_autocast_dtype("meta") == torch.bfloat16
        with torch.autocast("meta", enabled=False):
            assert not torch.is_autocast_enabled("meta") and F.linear(x, layer.weight).dtype == torch.float32
    assert product.dtype == torch.bfloat16 and normal.dtype == torch.float32
    copies = [kernel for kernel in counter.kernels if kernel.name == "copy"]
    assert len(copies) == 4  # weight, bias, input, and the norm's input


@pytest.mark.parametrize(("masked", "kind", "share"), [(False, "flash", 2), (True, "efficient", 1)])
def test_attention_is_a_kernel_each_way_and_a_mask_hides_what_was_computed(masked: bool, kind: str, share: int) -> None:
    heads = torch.empty(2, 4, 16, 8, device=META, requires_grad=True)
    mask = torch.empty(2, 1, 16, 16, dtype=torch.bool, device=META) if masked else None
    with counted() as counter:
        with Pretended(counter, autocast=False):
            mixed = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask, is_causal=not masked)
        mixed.backward(torch.empty_like(mixed))
    found = {kernel.attention: kernel.flops for kernel in counter.kernels if kernel.attention}
    forward = 4 * 2 * 4 * 16 * 16 * 8 // share
    assert found == {f"{kind} forward": forward, f"{kind} backward": 5 * forward // 2}
    assert mixed.shape == heads.shape and heads.grad is not None and heads.grad.shape == heads.shape


def test_documents_of_any_lengths_take_the_same_flops_as_whole_rows() -> None:
    heads = torch.empty(32, 4, 8, dtype=torch.bfloat16, device=META, requires_grad=True)  # two rows of 16
    documents = Documents(torch.empty(4, dtype=torch.int32, device=META), 16)
    with counted() as counter:
        mixed = varlen_attention(heads[None], heads[None], heads[None], documents, 1.0)
        mixed.backward(torch.empty_like(mixed))
    found = {kernel.attention: kernel.flops for kernel in counter.kernels if kernel.attention}
    forward = 4 * 2 * 4 * 16 * 16 * 8 // 2
    assert found == {"flash forward": forward, "flash backward": 5 * forward // 2}


# What machine code says

CODE = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   IMAD.WIDE R2, R0, 0x4, R8 ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   FADD R9, R4, R9 ;
        /*0040*/                   MUFU.EX2 R10, R9 ;
        /*0050*/                   HMMA.16816.F32.BF16 R12, R16, R20, R12 ;
        /*0060*/              @!P0 BRA 0x20 ;
        /*0070*/                   STG.E desc[UR4][R2.64], R9 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
"""


def test_loops_are_found_and_wait_for_their_loads() -> None:
    straight, (loop,) = analysed(CODE, 4, H100)
    assert straight.slots == 9 and loop.slots == 8  # five instructions, but the special function's unit takes eight
    assert loop.loaded == 32 * 4 * 16
    assert loop.flops == 4 * 2 * 16 * 8 * 16
    assert H100.latency < loop.alone < H100.latency + 60
    assert straight.alone > loop.alone


def test_a_wave_takes_as_long_as_one_program_or_as_what_its_programs_share() -> None:
    waits = Cost(alone=1000.0, slots=100.0)
    assert makespan([132], [waits], 4, H100) == (1000.0, 1.0)
    assert makespan([132 * 4], [waits], 4, H100)[0] == 1000.0  # four together: 400 slots
    assert makespan([132 * 4 + 1], [waits], 4, H100)[0] == 2000.0
    busy = Cost(alone=1000.0, slots=900.0)
    assert makespan([132 * 4], [busy], 4, H100)[0] == 3600.0
    assert makespan([66, 66], [waits, busy], 1, H100)[0] == 1000.0


def test_rows_outer_sweeps_the_codebook_again_and_again() -> None:
    megabyte, sweeps = 1 << 20, 4
    rows = Panel(megabyte / 10, sweeps, lambda p: p // 1024)
    codebook = Panel(100 * megabyte / 1024, 1024, lambda p: p % 1024)
    again = rereads(Role(sweeps * 1024, panels=(rows, codebook)), 132, Cache(50e6))
    assert again == pytest.approx((sweeps - 1) * 100 * megabyte, rel=0.02)
    rows, codebook = Panel(rows.bytes, sweeps, lambda p: p % sweeps), Panel(codebook.bytes, 1024, lambda p: p // sweeps)
    assert rereads(Role(sweeps * 1024, panels=(rows, codebook)), 132, Cache(50e6)) < megabyte


def test_what_was_used_last_lies_in_l2() -> None:
    cache, size = Cache(10 * Cache.CHUNK), Cache.CHUNK
    assert cache.touch([Part(1, 0, 8 * size), Part(2, 0, size // 2)]) == [8 * size, size // 2]
    assert cache.touch([Part(1, 0, 8 * size)]) == [0]
    assert cache.touch([Part(3, 0, 2 * size)]) == [2 * size]  # puts the second out
    assert cache.touch([Part(2, 0, size // 2)]) == [size // 2]


# What both give


@pytest.mark.parametrize("name", DEVICES)
def test_a_copy_runs_at_the_copy_rate_and_a_large_product_at_the_products(name: str) -> None:
    device, size = DEVICES[name], 1 << 30
    copy = estimate(Kernel("copy", (Part(1, 0, size),), (Part(2, 0, size),)), device, Cache(device.l2_bytes))
    assert copy.bound == "dram" and copy.seconds == pytest.approx(2 * size / device.copies + GAP + RAMP)
    for dtype, rate in ((torch.bfloat16, "bf16"), (torch.float32, "float32")):
        seconds = product_seconds(Product(1, 8192, 8192, 8192, dtype), device)
        assert seconds == pytest.approx(2 * 8192**3 / device.products[rate], rel=0.1)


def test_more_work_never_takes_less_time() -> None:
    sizes = (64, 192, 768, 1000, 4096)
    products = [product_seconds(Product(1, 192, n, 768, torch.bfloat16), H100) for n in sizes]
    assert products == sorted(products)
    assert product_seconds(Product(1, 192, 768, 7680, torch.bfloat16), H100) > products[2]

    def strong(num_tokens: int) -> float:
        shape = Shape("some", 192, 1024, 64, 2, 128, num_tokens)
        kernels = count(blocks.strong_eager, setup(shape, torch.bfloat16, META))
        return sum(one.seconds for one in estimates(kernels, H100))

    assert strong(4096) < strong(16384) < strong(65536)


LIKELY = {"gpt2": (8, 12), "large-K": (90, 154), "long": (20, 33)}
"""µs of softmax and mixture on an H100, forward and backward, as estimated by hand for the library's kernels."""


@pytest.mark.parametrize("shape", LIKELY)
def test_the_librarys_mixture_takes_what_was_estimated_by_hand(shape: str) -> None:
    block = setup(SHAPES[shape], torch.bfloat16, META)

    def mixture(logits: Tensor, codebook: Tensor) -> tuple[float, float]:
        with counted() as counter:
            mixed = logits.softmax(dim=1) @ codebook
            before = len(counter.kernels)
            torch.autograd.grad(mixed, (logits, codebook), torch.empty_like(mixed))
        found = [one.seconds * 1e6 for one in estimates(counter.kernels, H100)]
        return sum(found[:before]), sum(found[before:])

    for seconds, likely in zip(mixture(block.logits, block.codebook), LIKELY[shape], strict=True):
        assert 1 / 1.6 < seconds / likely < 1.6


def test_a_mixture_on_few_processors_is_slow_however_few_its_bytes() -> None:
    """A kernel whose actions were not split took an estimated 22 µs on 12 of 132 SMs, where its bytes take 1."""
    kernels = count(predict.PROVIDERS["streamed"], setup(SHAPES["gpt2"], torch.bfloat16, META))
    kernel = next(kernel for kernel in kernels if kernel.name == "mixture_fwd")
    assert kernel.launch is not None
    split = estimate(kernel, H100, Cache(H100.l2_bytes))
    tiles, whole = kernel.launch.grid[:2], {"actions_per_split": SHAPES["gpt2"].num_actions}
    launch = replace(kernel.launch, grid=(*tiles, 1), arguments=kernel.launch.arguments | whole)
    unsplit = estimate(replace(kernel, launch=launch), H100, Cache(H100.l2_bytes))
    assert unsplit.bound == "sm" and unsplit.waves == pytest.approx(12 / 132)
    assert 22 / 1.6 < 1e6 * unsplit.seconds < 22 * 1.6
    assert unsplit.needs["dram"] < 3e-6 and split.seconds < unsplit.seconds / 3


def test_the_table_of_kernels_has_no_others() -> None:
    from benchmarks.compile_report import MODULES

    known = {name.removesuffix("_kernel") for module in MODULES for name in vars(module) if name.endswith("_kernel")}
    assert set(programs.KERNELS) <= known and {kernel for kernel, _ in programs.GATHERED} <= known


# Steps and the command

_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_TINY = GPT2Config(n_layer=3, n_embd=64, n_head=2, vocab_size=200, n_positions=64, **_NO_DROPOUT)
TINY_LM = Model("tiny", _TINY, batch=2, window=64)


def test_a_step_of_every_variant_is_counted() -> None:
    found = {name: count_step(TINY_LM, variant, 90) for name, variant in lm_steps.VARIANTS.items()}
    flops = {name: flops for name, (_, flops) in found.items()}
    assert len(set(flops.values())) == 1
    kinds = {name: {kernel.attention for kernel in kernels} - {""} for name, (kernels, _) in found.items()}
    assert kinds["plain eager"] == {"efficient forward", "efficient backward"}
    assert kinds["planlm joint"] == {"flash forward", "flash backward"}
    products = {name: sum(k.product is not None for k in kernels) for name, (kernels, _) in found.items()}
    assert products["planlm joint"] > products["planlm plain"]
    for name, (kernels, _) in found.items():
        launches = Tally(kernel.name for kernel in kernels)
        assert launches["fused AdamW"] == 1
        assert launches["add_plan_fwd"] == launches["add_plan_bwd"] == (1 if name == "planlm joint" else 0)
        assert ("cross_entropy" in launches) == name.startswith("planlm")
        for kernel in kernels:  # what the table says fits the launch
            if kernel.launch is not None:
                count_of = [role.programs for role in roles_of(kernel.launch)]
                assert sum(count_of) == math.prod(kernel.launch.grid)


def test_the_command_prints_thresholds_and_its_status_follows_them(
    tiny: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SHAPES, "tiny", tiny)
    monkeypatch.setattr(benchmarks.estimates, "code_of", lambda *_: Code(32, 0, 4096, 4, Cost(2000.0, 400.0), ()))
    arguments = ["--devices", "h100", "--shapes", "tiny", "--dtypes", "bf16", "--lms", "none", "--bars", "--parts"]
    monkeypatch.setattr(predict, "BLOCK_LIMIT", 100.0)
    assert predict.main([*arguments, "--json", str(tmp_path / "p.json")]) == 0
    assert capsys.readouterr().out.count("PASS  ") == 1
    monkeypatch.setattr(predict, "BLOCK_LIMIT", 1e-9)
    assert predict.main(arguments) == 1
    assert "FAIL  tiny bf16 on H100 80GB SXM: planlm" in capsys.readouterr().out
    written = json.loads((tmp_path / "p.json").read_text())
    assert [one["provider"] for one in written["predictions"]] == list(predict.PROVIDERS)
    for one in written["predictions"]:
        assert one["seconds"] == pytest.approx(sum(kernel["seconds"] for kernel in one["kernels"]))
        assert {need for kernel in one["kernels"] for need in kernel["needs"]} <= set(written["basis"])


def test_a_device_is_known_by_the_name_that_its_driver_gives() -> None:
    assert known_device("NVIDIA H100 80GB HBM3") is H100
    assert known_device("NVIDIA H200") is DEVICES["h200"]
    assert known_device("NVIDIA GeForce RTX 4090") is DEVICES["rtx4090"]
    assert known_device("NVIDIA T4") is None
