"""Every refusal: a ValueError that names the argument, what it got and what it needs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from planlm.kernels import add_plan, plan_projection, plan_projection_from_hidden

from .cases import SELECTIONS, hidden_inputs, projection_inputs

SPARSE = torch.eye(5, 7).to_sparse()
LABELS = torch.tensor([0, 6, 3, -1, 1])

COMMON = [
    ("codebook", {"codebook": torch.ones(7)}, r"codebook: got shape \[7\], needs \[K, A\]"),
    ("codebook rows", {"codebook": torch.ones(6, 3)}, r"codebook: got shape \[6, 3\], needs \[7, 3\]"),
    ("codebook dtype", {"codebook": torch.ones(7, 3, dtype=torch.int32)}, "codebook: got torch.int32, needs float16"),
    ("codebook device", {"codebook": torch.ones(7, 3, device="meta")}, "codebook: got device meta, needs cpu"),
    ("weight", {"weight": torch.ones(4)}, r"weight: got shape \[4\], needs \[D, A\]"),
    ("weight columns", {"weight": torch.ones(4, 2)}, r"weight: got shape \[4, 2\], needs \[4, 3\]"),
    ("weight complex", {"weight": torch.ones(4, 3, dtype=torch.cfloat)}, "weight: got torch.complex64"),
    ("bias", {"bias": torch.ones(5)}, r"bias: got shape \[5\], needs \[4\]"),
    ("bias dims", {"bias": torch.ones(4, 1)}, r"bias: got shape \[4, 1\], needs \[D\]"),
    ("bias type", {"bias": 0.0}, r"bias: got float, needs a tensor, \[D\]"),
    ("temperature zero", {"temperature": 0.0}, "temperature: got 0.0, needs a finite number above 0"),
    ("temperature negative", {"temperature": -1.0}, "temperature: got -1.0"),
    ("temperature nan", {"temperature": math.nan}, "temperature: got nan"),
    ("temperature infinite", {"temperature": math.inf}, "temperature: got inf"),
    ("temperature tensor", {"temperature": torch.ones(())}, "temperature: got tensor"),
    ("selection", {"selection": "softmax"}, "selection: got 'softmax', needs one of soft, gumbel, top-k, hard"),
    ("selection none", {"selection": "none"}, "selection: got 'none', needs one of"),
    ("selection None", {"selection": None}, "selection: got None, needs one of"),
    ("top_k missing", {"selection": "top-k"}, r"top_k: got None, needs a whole number from 1 to 7 \(K\)"),
    ("top_k zero", {"selection": "top-k", "top_k": 0}, "top_k: got 0, needs"),
    ("top_k large", {"selection": "top-k", "top_k": 8}, "top_k: got 8, needs"),
    ("top_k fraction", {"selection": "top-k", "top_k": 2.0}, "top_k: got 2.0, needs a whole number"),
    ("top_k unused", {"top_k": 3}, "top_k: got 3 with selection 'soft', needs None, or selection 'top-k'"),
    ("noise unused", {"noise": torch.ones(5, 7)}, "noise: got a tensor with selection 'soft', needs None"),
    ("noise shape", {"selection": "gumbel", "noise": torch.ones(7)}, r"noise: got shape \[7\], needs \[S, K\]"),
    ("noise rows", {"selection": "gumbel", "noise": torch.ones(1, 7)}, r"noise: got shape \[1, 7\], needs \[5, 7\]"),
    ("noise dtype", {"selection": "gumbel", "noise": torch.ones(5, 7).long()}, "noise: got torch.int64"),
    ("oracle missing", {"selection": "oracle"}, "oracle: got None with selection 'oracle', needs the oracle actions"),
    ("oracle missing for a weight", {"oracle_weight": 0.5}, "oracle: got None with an oracle_weight"),
    ("oracle missing for weights", {"oracle_weight": torch.zeros(5)}, "oracle: got None with an oracle_weight"),
    ("oracle dtype", {"oracle": LABELS.int()}, "oracle: got torch.int32, needs torch.int64"),
    ("oracle shape", {"oracle": LABELS[:4]}, r"oracle: got shape \[4\], needs \[5\]"),
    ("oracle range", {"oracle": LABELS + 1}, r"oracle: got action 7, needs actions below 7 \(K\)"),
    (
        "oracle absent",
        {"selection": "oracle", "oracle": LABELS},
        r"oracle: got -1 \(no action\), needs an action in every row",
    ),
    ("oracle list", {"oracle": [0, 6, 3, -1, 1]}, r"oracle: got list, needs a tensor, \[S\]"),
    (
        "oracle_weight low",
        {"oracle": LABELS, "oracle_weight": -0.1},
        "oracle_weight: got -0.1, needs a number from 0 to 1",
    ),
    ("oracle_weight high", {"oracle": LABELS, "oracle_weight": 2}, "oracle_weight: got 2, needs a number from 0 to 1"),
    ("oracle_weight nan", {"oracle": LABELS, "oracle_weight": math.nan}, "oracle_weight: got nan"),
    ("oracle_weight None", {"oracle": LABELS, "oracle_weight": None}, "oracle_weight: got None"),
    (
        "oracle weights high",
        {"oracle": LABELS, "oracle_weight": torch.tensor([0, 0, 1, 1.5, 0])},
        "oracle_weight: got 1.5 in row 3, needs weights from 0 to 1",
    ),
    (
        "oracle weights nan",
        {"oracle": LABELS, "oracle_weight": torch.tensor([0, math.nan, 1, 1, 0])},
        "oracle_weight: got nan in row 1",
    ),
    (
        "oracle weights shape",
        {"oracle": LABELS, "oracle_weight": torch.ones(())},
        r"oracle_weight: got shape \[\], needs \[S\]",
    ),
    (
        "oracle weights length",
        {"oracle": LABELS, "oracle_weight": torch.ones(4)},
        r"oracle_weight: got shape \[4\], needs \[5\]",
    ),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in COMMON], ids=[case[0] for case in COMMON])
@pytest.mark.parametrize("function", [plan_projection, plan_projection_from_hidden])
def test_both_projections(function, change: dict, message: str) -> None:
    inputs = projection_inputs() if function is plan_projection else hidden_inputs()
    with pytest.raises(ValueError, match=message):
        function(**{**inputs, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.ones(7)}, r"logits: got shape \[7\], needs \[S, K\]"),
        ({"logits": torch.ones(2, 5, 7)}, r"logits: got shape \[2, 5, 7\], needs \[S, K\]"),
        ({"logits": torch.ones(5, 0)}, r"logits: got no action \(K = 0\), needs at least one"),
        ({"logits": torch.ones(5, 8)}, r"codebook: got shape \[7, 3\], needs \[8, 3\]"),
        ({"logits": torch.ones(5, 7).long()}, "logits: got torch.int64, needs float16, bfloat16, float32 or float64"),
        ({"logits": SPARSE}, "logits: got layout torch.sparse_coo, needs a dense tensor"),
        ({"logits": None}, r"logits: got NoneType, needs a tensor, \[S, K\]"),
    ],
)
def test_plan_projection(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_projection(**{**projection_inputs(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.ones(6)}, r"hidden: got shape \[6\], needs \[S, P\]"),
        ({"hidden": torch.ones(5, 5)}, r"head: got shape \[7, 6\], needs \[7, 5\]"),
        ({"head": torch.ones(0, 6)}, r"head: got no action \(K = 0\), needs at least one"),
        ({"head": torch.ones(6)}, r"head: got shape \[6\], needs \[K, P\]"),
        ({"head_bias": torch.ones(6)}, r"head_bias: got shape \[6\], needs \[7\]"),
        ({"head_bias": torch.ones(7, device="meta")}, "head_bias: got device meta, needs cpu"),
    ],
)
def test_plan_projection_from_hidden(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_projection_from_hidden(**{**hidden_inputs(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3)}, r"x: got shape \[3\], needs \[T, D\]"),
        ({"x": torch.ones(1, 4, 3)}, r"x: got shape \[1, 4, 3\], needs \[T, D\]"),
        ({"plan": torch.ones(2, 4)}, r"plan: got shape \[2, 4\], needs \[2, 3\]"),
        ({"plan": torch.ones(2, 3, device="meta")}, "plan: got device meta, needs cpu"),
        ({"gate": torch.ones(1)}, r"gate: got shape \[1\], needs \[3\]"),
        ({"gate": 0.5}, "gate: got float, needs a tensor"),
        ({"segment_ids": torch.zeros(3, dtype=torch.int64)}, r"segment_ids: got shape \[3\], needs \[4\]"),
        ({"segment_ids": torch.zeros(4)}, "segment_ids: got torch.float32, needs torch.int64"),
        (
            {"segment_ids": torch.tensor([0, 1, 1, 2])},
            r"segment_ids: got ids from 0 to 2, needs -1 .* or a row of plan, below 2",
        ),
        ({"segment_ids": torch.tensor([-2, 0, 1, 1])}, "segment_ids: got ids from -2 to 1"),
        ({"segment_ids": torch.tensor([0, 1, 0, 1])}, "segment_ids: got 1 before 0, needs ids that never fall"),
        ({"segment_ids": torch.tensor([1, -1, -1, 0])}, "segment_ids: got 1 before 0, needs ids that never fall"),
        ({"plan": torch.ones(0, 3)}, r"segment_ids: got ids from -1 to 1, needs .* below 0"),
    ],
)
def test_add_plan(change: dict, message: str) -> None:
    inputs = {"x": torch.ones(4, 3), "plan": torch.ones(2, 3), "segment_ids": torch.tensor([0, -1, 1, 1])}
    add_plan(**inputs)
    with pytest.raises(ValueError, match=message):
        add_plan(**{**inputs, **change})


def test_dtensor_is_refused_with_the_reason() -> None:
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("this torch has no distributed package")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = DTensor.from_local(torch.ones(7, 3), init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="codebook: got a DTensor, needs a plain tensor: these operations do not"):
            plan_projection(**{**projection_inputs(), "codebook": sharded})
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_values_are_read_on_cpu_only(selection: str) -> None:
    """On another device a check of values would make the host wait; the meta device has none to read at all."""
    inputs = {name: value.to("meta") for name, value in projection_inputs().items()}
    options = {"top_k": 3} if selection == "top-k" else {}
    oracle, weights = torch.zeros(5, dtype=torch.int64, device="meta"), torch.ones(5, device="meta")
    result = plan_projection(**inputs, selection=selection, oracle=oracle, oracle_weight=weights, **options)
    assert [tuple(value.shape) for value in result] == [(5, 4), (5,), (5,)]
    ids = torch.zeros(6, dtype=torch.int64, device="meta")
    assert add_plan(torch.ones(6, 4, device="meta"), result.projected, ids).shape == (6, 4)


def test_numbers_of_numpy_are_numbers() -> None:
    inputs = torch.randn(3, 4), torch.randn(4, 5), torch.randn(6, 5), None
    oracle = torch.tensor([0, 1, 2])
    plain = plan_projection(*inputs, temperature=1.5, selection="top-k", top_k=2, oracle=oracle, oracle_weight=0.5)
    theirs = plan_projection(
        *inputs, temperature=np.float32(1.5), selection="top-k", top_k=np.int64(2), oracle=oracle,
        oracle_weight=np.float64(0.5),
    )  # fmt: skip
    assert torch.equal(plain.projected, theirs.projected)
