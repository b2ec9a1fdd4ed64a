"""What `benchmarks.gpu` measures on a CUDA device: rates, losses, blocks and whole training steps.

Each stage is a function that returns a JSON object, and has a process of its own. What fails in one case of a stage is
written down there, and the next case is measured.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import json
import platform
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import block as blocks
from benchmarks import harness, predict, step
from benchmarks.block import SHAPES, Block, Provider
from benchmarks.correctness import check
from benchmarks.devices import known_device
from benchmarks.estimates import estimates
from planlm.kernels import cross_entropy_, environment
from planlm.precision import matrix_product_rate
from planlm.training.flops import lm_flops

Result = dict[str, Any]
"""A JSON object."""

STEPS = {"gpt2": (1024, 16), "smollm2": (1024, 16), "olmo-1b": (2048, 4)}
"""W and B of each LM's step."""

DOCUMENTS = 4
"""Side by side in each sequence of a step: packed, as a corpus is."""

# transformers' own first: PlanLM's models replace parts in the classes of their LMs, for the whole process.
STEP_PROVIDERS: dict[str, Callable[[step.Case], step.Step]] = {
    "trainer plain": step.trainer_plain,
    "eager joint": step.eager_joint,
    "planlm plain": step.planlm_plain,
    "planlm joint": step.planlm_joint,
    "planlm plain graph": step.graph_plain,
    "planlm joint graph": step.graph_joint,
    "planlm joint compiled": step.compiled_joint,
}

BLOCK_PROVIDERS: dict[str, Provider] = {
    "strong eager": blocks.strong_eager,
    "compiled": blocks.strong_eager,
    "composed": predict.PROVIDERS["composed"],
    "streamed": predict.PROVIDERS["streamed"],
    "planlm": blocks.planlm,
}

LOSS_ROWS, LOSS_WIDTHS = 4096, (50257, 50304)
"""Rows of logits whose loss is measured, and GPT-2's vocabulary as it is and brought to a multiple of 64."""

ROUNDS, STEPS_EACH = 5, 4
"""Rounds of steps that are timed, with one wait at the end of each."""

MOST_KERNELS = 40
"""Of a step that are listed, the longest first."""


def cuda() -> torch.device:
    """The current device."""
    return torch.device("cuda", torch.cuda.current_device())


def guarded(measure: Callable[[], Result]) -> Result:
    """What it returns, or the error that it ends with, under the key "error"."""
    try:
        return measure()
    except Exception as error:
        harness.note(traceback.format_exc().strip())
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:2000]}"}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def machine() -> Result:
    """What the device is, what drives it, and the rates that large products and copies reach on it."""
    device = cuda()
    properties = torch.cuda.get_device_properties(device)
    products = {name: matrix_product_rate(dtype, device) for name, dtype in harness.DTYPES.items()}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    products["tf32"] = matrix_product_rate(torch.float32, device)
    torch.set_float32_matmul_precision(before)
    return {
        **harness.provenance(device),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(device)),
        "processors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "products": products,
        "copies": blocks.measure_rates(torch.bfloat16, device).bytes,
    }


# Kernels


def kernels_of(run: Callable[[], object], most: int | None = None) -> list[Result]:
    """Name, launches and seconds of what a call runs on the device, the longest first."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
        events = [event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA]
    found = [
        {"name": event.key[:120], "launches": event.count, "seconds": event.self_device_time_total / 1e6}
        for event in events
        if event.self_device_time_total > 0
    ]
    return sorted(found, key=lambda row: -row["seconds"])[:most]


def graph_of(run: Callable[[], object]) -> Callable[[], object]:
    """What replays a CUDA graph of a call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> object:
        graph.replay()
        return kept  # what it writes lives as long as it

    return replay


# Losses


def losses(budget: harness.Budget) -> Result:
    """The cross-entropy of bf16 logits and its gradient, each way, with the bytes that it moves at least."""
    return {str(width): guarded(functools.partial(_loss, width, budget)) for width in LOSS_WIDTHS}


def _loss(width: int, budget: harness.Budget) -> Result:
    device = cuda()
    logits = torch.randn(LOSS_ROWS, width, device=device).bfloat16()
    target = torch.randint(width, (LOSS_ROWS,), device=device)

    def eager() -> Tensor:
        leaf = logits.detach().requires_grad_()
        F.cross_entropy(leaf.float(), target).backward()
        assert leaf.grad is not None
        return leaf.grad

    runs: dict[str, Callable[[], object]] = {
        "eager": eager,
        "planlm": lambda: cross_entropy_(logits, target),  # in place: the values do not matter to the time
        "copy": logits.clone,
    }
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.ops.cross_entropy import cross_entropy_forward

        runs["liger"] = lambda: cross_entropy_forward(
            logits, target, None, -100, 0.0, 0.0, "mean", None, return_z_loss=False
        )
    want = eager().float() * LOSS_ROWS
    got = cross_entropy_(logits.clone(), target)[0].float()
    found: Result = {"error of gradient": float((got - want).abs().max()), "least_bytes": 6 * logits.numel()}
    times: dict[str, Any] = {}
    for name, run in runs.items():
        times |= {name: guarded(lambda run=run: harness.spread(harness.interleaved({"": run}, device, budget)[""]))}
    return found | {"times": times}


# Blocks


def block_cases(shapes: Sequence[str], dtype: str, names: Sequence[str], budget: harness.Budget) -> Result:
    """Every block with a graph and without, kernel by kernel; and what was measured to choose by."""
    cases = {f"{shape} {dtype}": guarded(functools.partial(_block, shape, dtype, names, budget)) for shape in shapes}
    path = environment.cache() / "fastest.json"
    return {"cases": cases, "fastest": json.loads(path.read_text()) if path.is_file() else {}}


def _block(shape: str, dtype: str, names: Sequence[str], budget: harness.Budget) -> Result:
    device = cuda()
    harness.note(f"block {shape} {dtype}")
    block = blocks.setup(SHAPES[shape], harness.DTYPES[dtype], device)
    found = {name: BLOCK_PROVIDERS[name] for name in names}
    if "compiled" in found:
        torch._dynamo.reset()
        found["compiled"] = torch.compile(blocks.strong_eager, fullgraph=True, dynamic=False)
    errors = {name: guarded(functools.partial(_checked, block, name, way)) for name, way in found.items()}
    sound = [name for name in found if errors[name] == {"out of memory": False}]
    runs = {name: functools.partial(blocks.forward_backward, found[name], block) for name in sound}
    rows: dict[str, Result] = {name: {"check": errors[name]} for name in found}
    times = harness.interleaved(runs, device, budget)
    for name, run in runs.items():
        rows[name] |= {"eager": harness.spread(times[name]), "kernels": guarded(lambda run=run: _listed(run))}
    graphs: dict[str, Callable[[], object]] = {}
    for name, run in runs.items():
        captured = guarded(lambda name=name, run=run: graphs.update({name: graph_of(run)}) or {})
        rows[name] |= {"graph": captured}
    for name, spent in harness.interleaved(graphs, device, budget).items():
        rows[name]["graph"] = harness.spread(spent)
    known = known_device(torch.cuda.get_device_name(device))
    if known is not None:
        for name in rows.keys() & predict.PROVIDERS.keys():
            rows[name]["predicted"] = guarded(functools.partial(_predicted, shape, dtype, name))
    return {"providers": rows, "least": vars(blocks.compulsory(SHAPES[shape], harness.DTYPES[dtype]))}


def _checked(block: Block, name: str, provider: Provider) -> Result:
    label = "planlm" if name in ("composed", "streamed", "planlm") else name
    return {"out of memory": bool(check(block, {label: provider}))}


def _listed(run: Callable[[], object]) -> Result:
    return {"list": kernels_of(run, MOST_KERNELS)}


def _predicted(shape: str, dtype: str, name: str) -> Result:
    known = known_device(torch.cuda.get_device_name())
    assert known is not None
    found = estimates(predict._block(shape, dtype, name, known.tables), known)
    parts = [{"name": one.kernel.name, "seconds": one.seconds, "bound": one.bound} for one in found]
    return {"seconds": sum(one.seconds for one in found), "kernels": parts}


# Training steps


def steps(model: str, names: Sequence[str], rounds: int) -> Result:
    """Every way to train one LM: seconds, memory, what the host needs, where it waits, kernel by kernel."""
    window, batch_size = STEPS[model]
    case = step.Case(model, window, batch_size, "bf16", "full", str(cuda()), DOCUMENTS)
    lm = step.make_lm(replace(case, device="meta"))
    found: Result = {"tokens": window * batch_size, "flops": lm_flops(lm, window * batch_size, window, trained=True)}
    for name in names:
        harness.note(f"step of {model}: {name}")
        found[name] = guarded(functools.partial(_step, case, name, rounds))
        harness.note(f"{found[name].get('seconds', found[name])}")
    return found


def _step(case: step.Case, name: str, rounds: int) -> Result:
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    run = STEP_PROVIDERS[name](case)
    first = float(run())  # type: ignore[arg-type]
    for _ in range(3):
        run()
    waits = list(waits_of(run))
    seconds, host = [], []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        host.append(time.perf_counter() - begin)
        for _ in range(STEPS_EACH - 1):
            run()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begin) / STEPS_EACH)
    peak = torch.cuda.max_memory_reserved() - before  # graphs' memory counts whole, in use or not
    last = float(run())  # type: ignore[arg-type]
    return {
        "seconds": harness.spread(seconds),
        "host": harness.spread(host),
        "memory": peak,
        "waits": waits,
        "losses": [first, last],
        "kernels": guarded(functools.partial(_listed, run)),
    }


def waits_of(run: Callable[[], object]) -> Iterator[str]:
    """Where a call has the host wait for the device, as CUDA's debug mode sees it: file and line."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            yield f"{warning.filename}:{warning.lineno}"
