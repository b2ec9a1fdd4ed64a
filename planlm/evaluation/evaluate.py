"""`planlm evaluate`: perplexity under each plan, planner metrics, and intervals of the differences."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planlm.config import EvaluateConfig, EvaluateGenerationConfig
from planlm.corpus.store import PreparedCorpus
from planlm.distribution import on_rank_zero, rank
from planlm.errors import InputError
from planlm.evaluation.breakdown import SplitScores, by_length, by_position
from planlm.evaluation.forgetting import Forgetting
from planlm.evaluation.perplexity import MAX_WINDOW, SAMPLED, Sampling, score_documents
from planlm.evaluation.planner_metrics import followed, planner_metrics, window_predictions
from planlm.evaluation.significance import DocumentScores, compare_rows
from planlm.files import beside_result, read_json, write_json
from planlm.model.configuration import WITHOUT_PLAN, PlanLMConfig
from planlm.model.loading import load_model
from planlm.model.modeling import PlanLMForCausalLM
from planlm.model.planner import codebook_fingerprint
from planlm.precision import device
from planlm.pretrained.tokenizer import tokenizer_fingerprint
from planlm.selections import SELECTIONS, Selection

if TYPE_CHECKING:
    import datasets

RESULTS = "evaluation.json"

_LARGEST_NLL = 700.0
"""Nats per token; float64 ends at a perplexity of exp(709)."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a run on a split of a prepared corpus; under torchrun the processes share the windows.

    In a run directory the result is also written to `evaluation.json`, under the split's name (other splits' results
    stay), together with every document's scores, from which `planlm report` compares runs with paired intervals.

    Args:
        config: a run directory or model folder, the corpus, and how to evaluate.

    Returns:
        `run`, `split`, `window`, `stride`, `temperature` of the plans, `tokens`, `documents`, `versus`, `rows` (see
        `compare_rows`), `by_position` and `by_length` (see those), `cost` (see `_cost`), `planner` (see
        `planner_metrics`; None for an LM without one) and `example` (see `followed`), ready for JSON; with
        `--forgetting` also `forgetting` (see `Forgetting.measure`).

    Raises:
        InputError: anything wrong with the arguments, the model, the corpus, or their fit.
    """
    plans = parse_plans(config)
    run = Path(config.run)
    corpus = PreparedCorpus.load(config.corpus)
    dataset = corpus.split(config.split)
    if config.max_documents is not None:
        dataset = dataset.select(range(min(config.max_documents, len(dataset))))
    # Read before the work starts, so that a damaged file costs no evaluation.
    earlier = read_json(run / RESULTS) if (run / RESULTS).exists() else {}
    model, is_planned = load_evaluated(run, plans, corpus)
    check_fit(model, config, corpus)
    model.config.plan_temperature = config.temperature or model.config.plan_temperature
    window, stride = _window_and_stride(config, model)
    forgetting = None if config.forgetting is None else Forgetting(config, corpus, model)
    versus = config.versus
    if versus not in plans:
        versus = plans[0]
        if rank() == 0:
            print(f"evaluate: {config.versus} is not among the plans; differences refer to {versus}", file=sys.stderr)

    scores = score_documents(
        model,
        dataset,
        selections=plans,
        window=window,
        stride=stride,
        batch_size=config.batch_size,
        precision=config.precision,
        sampling=Sampling(config.num_plans or Sampling.num_plans, config.seed),
    )
    _check_scores(scores, config)
    lost = {} if forgetting is None else {"forgetting": forgetting.measure(dataset, window, stride, scores.get("none"))}

    def finish() -> dict[str, Any]:
        how = {"resamples": config.bootstrap, "seed": config.seed}
        rows = compare_rows(dict(scores), versus, **how)
        result = {
            "run": str(run),
            "split": config.split,
            "window": window,
            "stride": stride,
            "temperature": model.config.plan_temperature,
            "tokens": rows[0]["tokens"],
            "documents": rows[0]["documents"],
            "versus": versus,
            "rows": rows,
            "by_position": by_position(scores, versus, **how),
            "by_length": by_length(scores, versus, **how),
            "cost": _cost(model, scores),
            "planner": _planner_metrics(model, corpus, dataset, window, config.batch_size) if is_planned else None,
            **_example(model, dataset),
            **lost,
        }
        if (run / "model").is_dir():
            results = earlier | {config.split: result | {"scores": _kept(scores)}}
            with beside_result(run / RESULTS):
                write_json(run / RESULTS, results, within=run)
        return result

    return on_rank_zero(finish) or {}


def _planner_metrics(
    model: PlanLMForCausalLM, corpus: PreparedCorpus, dataset: datasets.Dataset, window: int, batch_size: int
) -> dict[str, Any]:
    """See `planner_metrics`; a planner that reads the LM's states is measured window by window."""
    assert model.planner is not None
    predicted = None if model.planner_input is None else window_predictions(model, dataset, window, batch_size)
    return planner_metrics(model.planner, dataset, corpus.action_counts, predicted=predicted)


def _example(model: PlanLMForCausalLM, dataset: datasets.Dataset) -> dict[str, Any]:
    """See `followed`; nothing without a planner, or with one that reads the LM's states."""
    if model.planner is None or model.planner_input is not None:
        return {}
    return {"example": followed(model.planner, dataset, model.config.plan_temperature)}


def parse_plans(config: EvaluateConfig) -> list[str]:
    """The plans asked for, in order and each once.

    Raises:
        InputError: names every contradiction between the settings.
    """
    plans = list(dict.fromkeys(plan.strip() for plan in config.plans.split(",") if plan.strip()))
    problems = []
    if not plans or set(plans) - {*SELECTIONS, SAMPLED}:
        problems.append(f"--plans {config.plans}: expected some of {', '.join([*SELECTIONS, SAMPLED])}")
    if config.num_plans is not None and SAMPLED not in plans:
        problems.append(f"--num-plans {config.num_plans}: is for the row {SAMPLED}; add it to --plans")
    default = EvaluateConfig.__dataclass_fields__["versus"].default
    if config.versus not in plans and config.versus != default:
        problems.append(f"--versus {config.versus}: not among --plans {config.plans}")
    if config.forgetting is None and (config.base_lm or config.forgetting_split):
        problems.append(f"--{'base-lm' if config.base_lm else 'forgetting-split'}: is for --forgetting CORPUS")
    if problems:
        raise InputError("; ".join(problems))
    return plans


def load_evaluated(run: Path, plans: list[str], corpus: PreparedCorpus) -> tuple[PlanLMForCausalLM, bool]:
    """The model of a run directory or model folder, on the device, and whether it has a planner of its own.

    A plain LM's folder serves for the plan `none`, so that an LM can be measured before any training.

    Raises:
        InputError: there is no model, or one that lacks what a plan needs.
    """
    described = run / "config.json"
    if plans == ["none"] and described.is_file() and read_json(described).get("model_type") != PlanLMConfig.model_type:
        return PlanLMForCausalLM.from_lm(str(run), corpus.codebook).to(device()), False  # type: ignore[arg-type]
    model = load_model(str(run))
    has_planner, reads_lm = model.planner is not None, model.planner_input is not None
    problem = plans_problem(plans, str(run), has_planner=has_planner, top_k=model.config.plan_top_k, reads_lm=reads_lm)
    if problem:
        raise InputError(f"--plans {','.join(plans)}: {problem}")
    return model, has_planner


def plans_problem(plans: list[str], run: str, *, has_planner: bool, top_k: int | None, reads_lm: bool) -> str | None:
    """Why a model, called `run`, that was trained in this way has not all these plans; None where it has."""
    if not has_planner and set(plans) - set(WITHOUT_PLAN):
        return f"{run} has no plan (conditioning bottleneck); set --plans none,fixed"
    for plan in plans:
        facts = SELECTIONS.get(plan, Selection())
        if facts.needs_top_k and top_k is None:
            return f"{run} was not trained with --top-k; leave {plan} out"
        if facts.needs_others and reads_lm:
            return f"the planner of {run} reads the LM's states; leave {plan} out"
    return None


def check_fit(
    model: PlanLMForCausalLM, config: EvaluateConfig | EvaluateGenerationConfig, corpus: PreparedCorpus
) -> None:
    """Refuse a corpus whose tokens or actions are not the model's."""
    manifest = corpus.manifest
    if tokenizer_fingerprint(model.tokenizer) != manifest.tokenizer_fingerprint:
        raise InputError(
            f"{config.corpus}: prepared with the tokenizer of {manifest.tokenizer}, which is not that of {config.run}; "
            f"prepare the corpus again with --tokenizer set to the run's model folder"
        )
    if model.config.codebook_fingerprint != codebook_fingerprint(corpus.codebook):
        raise InputError(
            f"{config.run}: trained on other actions than those of {config.corpus}; evaluate on the corpus that the "
            "model was trained on"
        )


def _window_and_stride(config: EvaluateConfig, model: PlanLMForCausalLM) -> tuple[int, int]:
    context = model.lm.config.max_position_embeddings
    window = config.window or min(MAX_WINDOW, context)
    if window > context:
        raise InputError(f"--window {window}: the LM's context is {context} tokens; set at most that")
    stride = config.stride or window
    if stride > window:
        raise InputError(f"--stride {stride}: larger than the window of {window}, which would leave tokens out")
    return window, stride


def _cost(model: PlanLMForCausalLM, scores: dict[str, SplitScores]) -> dict[str, Any]:
    """What planning costs beside what it gains.

    Returns:
        `parameters` of `lm`, `planner`, `codebook` and `adapter` (whatever else the plan enters the LM through); the
        `selection` that was trained with; `seconds_per_1000_tokens` that a process took under each plan, in this pass.
    """
    sizes = Counter(lm=0, planner=0, codebook=0, adapter=0)
    for name, parameter in model.named_parameters():
        part = "planner" if name.startswith("planner") else "lm" if name.startswith("lm.") else "adapter"
        sizes["codebook" if "codebook" in name else part] += parameter.numel()
    seconds = {plan: score.seconds for plan, score in scores.items()}
    return {"parameters": dict(sizes), "selection": model.config.selection, "seconds_per_1000_tokens": seconds}


def _kept(scores: dict[str, SplitScores]) -> dict[str, Any]:
    """Every document's scores for evaluation.json, those by sentence to the ten thousandth of a nat."""
    some = next(iter(scores.values()))
    return {
        "tokens": some.tokens.tolist(),
        "nll": {plan: score.nll_sum.tolist() for plan, score in scores.items()},
        "position_tokens": some.position_tokens.tolist(),
        "position_nll": {plan: score.position_nll.round(4).tolist() for plan, score in scores.items()},
    }


def _check_scores(scores: Mapping[str, DocumentScores], config: EvaluateConfig) -> None:
    """Refuse scores that make no table."""
    for plan, score in scores.items():
        if score.tokens.sum() == 0:
            raise InputError(f"{config.corpus}: no document of the {config.split} split has a token to score")
        if not score.nll < _LARGEST_NLL:
            raise InputError(f"{config.run}: training diverged, NLL is {score.nll} under plan {plan}; lower its rates")
