"""Forward and backward of a micro-batch as a CUDA graph, one for each shape that batches come in (`--graph`).

On an H200 a joint step of 16,384 tokens took GPT-2-small 40 ms with graphs and 59 ms without, SmolLM2-135M 98 and 195
with transformers' own norms, rotations and activations.

Of a graph the host asks once for what it asks thousands of times otherwise. A graph computes from and to fixed memory:
its inputs are copied to where they were when it was captured, and gradients keep their memory from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from planlm.config import TrainConfig
from planlm.errors import InputError, MachineError
from planlm.plan_inputs import Movable

Run = Callable[[Any, list[Tensor]], Tensor]
"""Computes a batch, with more tensors; what it returns lies on the device."""

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Makes a graph of a computation, which does not run by that; what replays it is returned."""


class Graphs:
    """Computes as `run` does: the first time a shape comes by `run` itself, which compiles and sets libraries up, then
    by a graph of it.

    Args:
        run: must not look at a tensor's values.
        capture: by default of CUDA.
    """

    def __init__(self, run: Run, capture: Capture | None = None) -> None:
        self._run, self._capture = run, capture or _Captures()
        self._known: dict[Hashable, tuple[list[Tensor], Callable[[], Tensor]] | None] = {}

    def __call__(self, batch: Movable, more: list[Tensor], state: Hashable) -> Tensor:
        """What `run` returns; `state` is what else it depends on. The next call overwrites it.

        Raises:
            MachineError: it cannot be captured. CUDA and torch's allocator may be left in the middle of that.
        """
        inputs = [*batch.tensors(), *more]
        key = state, _shape(batch), tuple((one.dtype, one.shape) for one in more)
        if key not in self._known:
            self._known[key] = None
            return self._run(batch, more)
        if self._known[key] is None:
            fixed, others = batch.map(torch.clone), [one.clone() for one in more]
            try:
                graph = self._capture(lambda: self._run(fixed, others))
            except Exception as error:
                cause = error.__context__ or error  # the first error, over which that of the capture's end is raised
                reason = " ".join(str(cause).split())[:300]
                advice = "leave graphs out with --graph never"
                raise MachineError(f"a step cannot be captured as a CUDA graph ({reason}); {advice}") from error
            self._known[key] = [*fixed.tensors(), *others], graph
        kept, replay = self._known[key]  # type: ignore[misc]
        torch._foreach_copy_(kept, inputs)
        return replay()


class _Captures:
    """Captures CUDA graphs, which share their memory: they run one after the other."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: the loader's goes on to take memory and to copy.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            found = run()

        def replay() -> Tensor:
            graph.replay()
            return found

        return replay


def has_graphs(config: TrainConfig, device: torch.device, num_ranks: int) -> bool:
    """Whether a run is to capture CUDA graphs: as `--graph` says, and by default where they can be made.

    Raises:
        InputError: they are asked for where there are none, or with what none can be made of; names all of that.
    """
    if config.graph == "always" and device.type != "cuda":
        raise InputError(f"--graph always: needs CUDA, and this is {device.type}; leave it out")
    if config.graph == "always" and (found := _without(config, num_ranks)):
        raise InputError(f"--graph always: cannot capture a step with {', '.join(found)}; leave one of them out")
    return device.type == "cuda" and would_capture(config, num_ranks)


def would_capture(config: TrainConfig, num_ranks: int) -> bool:
    """Whether a run on so many GPUs is to capture graphs."""
    # Those of several processes have not run on GPUs yet: who asks for them gets them.
    is_asked = config.graph == "always" or (config.graph == "auto" and num_ranks == 1)
    return is_asked and not _without(config, num_ranks)


def _without(config: TrainConfig, num_ranks: int) -> list[str]:
    """Options with which no graph can be made."""
    wrong = {
        "--shard": config.shard and num_ranks > 1,
        "--checkpoint-activations": config.checkpoint_activations,
        "--loss-kernel liger": config.loss_kernel == "liger",
    }
    return [name for name, is_there in wrong.items() if is_there]


def _shape(value: Any) -> Hashable:
    """All that a graph takes for constant in a batch: shapes, and what is no tensor."""
    if isinstance(value, Movable):
        return tuple((name, _shape(inner)) for name, inner in vars(value).items())
    return (value.dtype, value.shape) if isinstance(value, Tensor) else value
