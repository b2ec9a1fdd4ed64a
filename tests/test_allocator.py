"""Large blocks: they are taken again, and what a process holds stays near what it uses.

Each test runs in a process of its own, since torch's allocator cannot be put back.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from planlm.kernels import cpp

pytestmark = pytest.mark.skipif(cpp.why_not() is not None or sys.platform != "linux", reason="no C++ operators here")

IMPORTS = """
import torch
from planlm.progress import process_memory
MB = 1 << 20
"""
START = """
from planlm.allocator import keep_memory
assert keep_memory() and keep_memory(), "a second call changes nothing"
def block(megabytes): return torch.zeros(megabytes * MB, dtype=torch.uint8)
"""


def run(script: str, start: str = START) -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS + start + script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_released_block_is_taken_again_for_what_rounds_to_its_size() -> None:
    run(
        """
first = block(100)
at = first.data_ptr()
assert at % (2 * MB) == 0
other = block(100)
assert other.data_ptr() != at
del first
assert block(97).data_ptr() == at
assert block(6).data_ptr() != at, "not cut up"
assert block(100).data_ptr() == at
"""
    )


def test_sizes_that_change_from_step_to_step_do_not_grow_the_process() -> None:
    """Some blocks outlive the step, others change their size: what fragments a heap that gives nothing back."""
    run(
        """
random = torch.Generator().manual_seed(0)
def step():
    held = []
    for at in range(20):
        held.append(block(12))
        held.append(block(int(torch.randint(3, 9, (), generator=random))))
        if at % 3 == 0: del held[torch.randint(len(held), (), generator=random)]
for _ in range(3): step()
before = process_memory("VmRSS")
for _ in range(40): step()
grown = process_memory("VmHWM") - before
assert grown < 60 * MB, f"{grown / MB:.0f} MB"
"""
    )


def test_blocks_of_another_size_make_room() -> None:
    run(
        """
start = process_memory("VmRSS")
for megabytes in (200, 300, 400, 500):
    block(megabytes)
peak = process_memory("VmHWM") - start
assert peak < 700 * MB, f"{peak / MB:.0f} MB for 500 at a time"
"""
    )


def test_pages_move_to_blocks_of_another_size() -> None:
    """Fresh memory would be 50 page faults a block at the least, and zeroed each time; what lives stays untouched."""
    run(
        """
import resource
stays = torch.arange(9 * MB)
def alternate():
    two = block(60), block(60)
    del two
    block(100)
for _ in range(2): alternate()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10): alternate()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
assert faults < 100, faults
assert torch.equal(stays, torch.arange(9 * MB)) and not block(100).any()
"""
    )


def test_results_are_those_of_torch_s_allocator() -> None:
    """Convolutions and products take oneDNN's working memory from the allocator too; storages grow and shrink."""
    run(
        """
import threading
image, kernel = torch.randn(4, 16, 128, 128), torch.randn(16, 16, 3, 3)
exact = torch.nn.functional.conv2d(image.double(), kernel.double())
found = []
def convolve(): found.append(torch.nn.functional.conv2d(image, kernel))
threads = [threading.Thread(target=convolve) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
for result in found: torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-4)
half = torch.randn(1500, 1500).bfloat16()
torch.testing.assert_close((half @ half).double(), half.double() @ half.double(), rtol=1e-2, atol=1.0)
small = torch.empty(0); small.resize_(3 * MB); small.fill_(1.0); assert small.sum() == 3 * MB
small.untyped_storage().resize_(4); assert small.untyped_storage().nbytes() == 4
assert torch.zeros(0).numel() == 0 and torch.frombuffer(bytearray(4 * MB), dtype=torch.uint8).clone().sum() == 0
"""
    )


def test_more_than_there_is_is_torch_s_own_error() -> None:
    run(
        """
try: torch.empty(1 << 50, dtype=torch.uint8)
except RuntimeError as error: assert "memory" in str(error)
else: raise AssertionError
assert block(64).sum() == 0
"""
    )


def test_the_largest_results_lie_in_such_blocks_in_any_process() -> None:
    """They are taken again, and given back when asked for."""
    run(
        """
from planlm.kernels import plan_projection
codebook, weight = torch.randn(8192, 4), torch.randn(4, 4)
logits = torch.randn(1100, 8192, requires_grad=True)
def gradient():
    return torch.autograd.grad(plan_projection(logits, codebook, weight).projected.sum(), logits)[0]
found = gradient()
at, expected = found.data_ptr(), found.clone()
assert at % (2 * MB) == 0
del found
assert gradient().data_ptr() == at
before = process_memory("VmRSS")
torch.ops.planlm.release_blocks()
assert before - process_memory("VmRSS") > 34 * MB
assert torch.equal(gradient(), expected)
with torch.inference_mode():
    assert torch.ops.planlm.gelu(torch.ones(9 * MB)).is_inference()
""",
        start="",
    )


def test_a_child_finds_the_lock_free() -> None:
    """Forked while a thread maps and unmaps blocks, which it does with the lock taken most of the time."""
    run(
        """
import os, signal, threading
stop = threading.Event()
def work():
    while not stop.is_set():
        torch.empty(64 * MB, dtype=torch.uint8)
        torch.ops.planlm.release_blocks()
thread = threading.Thread(target=work, daemon=True)
thread.start()
for _ in range(40):
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        os._exit(0 if torch.empty(64 * MB, dtype=torch.uint8).numel() == 64 * MB else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
thread.join()
"""
    )


def test_what_waits_is_given_up_before_memory_runs_out() -> None:
    run(
        """
import resource
held = [block(100) for _ in range(7)]
del held
used, resident = process_memory("VmData"), process_memory("VmRSS")
resource.setrlimit(resource.RLIMIT_DATA, (used + 64 * MB, resource.RLIM_INFINITY))
small = [torch.empty(MB, dtype=torch.uint8) for _ in range(400)]  # six times what is left
assert resident - process_memory("VmRSS") > 600 * MB
"""
    )
