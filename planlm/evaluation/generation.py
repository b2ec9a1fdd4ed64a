"""`planlm evaluate-generation`: what a plan does to continuations of held-out documents.

Sizes: n prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planlm.config import EvaluateGenerationConfig
from planlm.corpus.store import PreparedCorpus
from planlm.errors import InputError
from planlm.evaluation import generation_metrics as measure
from planlm.evaluation.evaluate import check_fit, load_evaluated
from planlm.evaluation.generation_statistics import Continuations, make_rows, values
from planlm.evaluation.generation_steering import STEERED, Steering
from planlm.evaluation.generation_texts import (
    Prompt,
    continue_prompts,
    find_prompts,
    keep_texts,
    texts_folder,
)
from planlm.files import beside_result, read_json, write_json
from planlm.model.loading import model_checksum
from planlm.model.modeling import PlanLMForCausalLM
from planlm.model.tracking import SentenceTracker
from planlm.progress import Progress
from planlm.selections import SELECTIONS
from planlm.text.encoder import SentenceEncoder

RESULTS = "generation_evaluation.json"

Wanted = tuple[str, dict[int, list[int]] | None]
"""What texts are generated with: a selection and, by document, the actions to follow, if any are asked for."""


def evaluate_generation(config: EvaluateGenerationConfig) -> dict[str, Any]:
    """Continue the beginnings of held-out documents under each plan, and measure the continuations.

    In a run directory finished texts are kept in `generation_evaluation/`, from which an interrupted call goes on, and
    the result in `generation_evaluation.json` under the split's name, with every prompt's values.

    Args:
        config: a run directory or model folder, the corpus, what to generate and how.

    Returns:
        The settings, `features` and `clusters` of MAUVE, `rows` (of each plan its `metrics` and, by metric, its
        `differences` to `versus`: `delta`, `ci95`, `verdict`) and `human`, the true continuations' own metrics; with
        `--steer` also `steering`, see `compare_following`. Ready for JSON; a metric that is not defined is null.

    Raises:
        InputError: anything wrong with the arguments, the model, the corpus, or their fit.
    """
    plans = _parse(config)
    measure.check_packages()
    run = Path(config.run)
    corpus = PreparedCorpus.load(config.corpus)
    dataset = corpus.split(config.split)
    earlier = read_json(run / RESULTS) if (run / RESULTS).exists() else {}
    model, is_planned = load_evaluated(run, plans, corpus)
    if config.steer and not is_planned:
        raise InputError(f"--steer: {run} plans nothing; leave it out")
    check_fit(model, config, corpus)
    if config.attempts > 1:
        model.centroids = corpus.codebook  # which models of earlier versions lack; they fit
    prompts = find_prompts(dataset, config, model.lm.config.max_position_embeddings)
    model.encoder = encoder = corpus_encoder(corpus)
    ids = dataset["id"]
    wanted: dict[str, Wanted] = {plan: (plan, None) for plan in plans}
    steering = Steering.draw(model, corpus, prompts, config) if config.steer else None
    if steering is not None:
        wanted |= {steering.selection: (steering.selection, None), STEERED: (steering.selection, steering.asked)}
    texts = _generate(model, prompts, wanted, config, corpus.fingerprint, [ids[prompt.document] for prompt in prompts])
    critic = measure.BigramCritic.fit(
        corpus.split("train").select_columns(["actions"]).with_format("arrow").iter(1000), corpus.manifest.num_actions
    )
    true = [prompt.truth for prompt in prompts]
    codebook = corpus.codebook.numpy()
    scored = {
        name: _score(tokens, true, prompts, (model.tokenizer, encoder, codebook, critic))
        for name, tokens in [*((plan, texts[plan]) for plan in plans), ("", true)]
    }
    human = scored.pop("")
    result = _describe(config, scored, human, encoder.name)
    kept = {plan: {k: v.tolist() for k, v in one.per_prompt.items()} for plan, one in scored.items()}
    if steering is not None:
        tracker = SentenceTracker(model.tokenizer, encoder)
        result["steering"], followed = steering.measure(texts, prompts, tracker, codebook, config)
        kept |= followed
    if (run / "model").is_dir():
        with beside_result(run / RESULTS):
            documents = [prompt.document for prompt in prompts]
            content = earlier | {config.split: result | {"documents": documents, "scores": kept}}
            write_json(run / RESULTS, content, within=run)
    return result


def corpus_encoder(corpus: PreparedCorpus) -> SentenceEncoder:
    """The encoder that embedded a corpus's sentences, in the precision that it had then.

    Raises:
        InputError: it cannot be loaded, or is another one now.
    """
    manifest = corpus.manifest
    encoder = SentenceEncoder(manifest.encoder, precision=manifest.settings.get("precision", "auto"))
    dim = manifest.action_dim
    if encoder.dim != dim:
        raise InputError(f"{encoder.name}: embeds in {encoder.dim} dimensions, the corpus in {dim}; prepare it again")
    return encoder


def _parse(config: EvaluateGenerationConfig) -> list[str]:
    """The plans asked for, `versus` among them, in order and each once."""
    plans = list(dict.fromkeys(plan.strip() for plan in config.plans.split(",") if plan.strip()))
    possible = [name for name, about in SELECTIONS.items() if not (about.needs_oracle or about.needs_others)]
    problems = []
    if not plans or set(plans) - set(possible):
        problems.append(f"--plans {config.plans}: expected some of {', '.join(possible)}")
    if config.versus not in plans:
        problems.append(f"--versus {config.versus}: not among --plans {config.plans}")
    if config.attempts > 1 and (not config.steer or config.temperature == 0):
        needs = "--steer" if not config.steer else "a --temperature above 0, at which they differ"
        problems.append(f"--attempts {config.attempts}: is for {needs}")
    if problems:
        raise InputError("; ".join(problems))
    return plans


def _generate(
    model: PlanLMForCausalLM,
    prompts: list[Prompt],
    wanted: dict[str, Wanted],
    config: EvaluateGenerationConfig,
    corpus: str,
    names: list[str],
) -> dict[str, list[list[int]]]:
    """New tokens of every prompt by name; in a run directory those that are on disk already are not made again.

    Args:
        model: with its encoder.
        prompts: what to continue.
        wanted: by name, what to generate with.
        config: the command's.
        corpus: its fingerprint.
        names: of the prompts' documents.
    """
    run, named = Path(config.run), dict(zip([prompt.document for prompt in prompts], names, strict=True))
    decisive = ("split", "prompt_sentences", "max_new_tokens", "temperature", "top_p", "seed")
    made_with: dict[str, Any] = {name: getattr(config, name) for name in decisive} | {"corpus": corpus}
    total = len(wanted) * len(prompts) * config.max_new_tokens
    with texts_folder(run) as folder, Progress("generate", total=total, unit="tokens") as progress:
        if folder is not None:
            made_with["model"] = model_checksum(config.run)
        kept = {}
        if folder is not None:
            for name in wanted:
                own = {"attempts": config.attempts} if name == STEERED else {}
                kept[name] = keep_texts(folder / f"{name}.jsonl", made_with | own, run)
        done = {name: kept[name].done if kept else {} for name in wanted}
        left = {name: [prompt for prompt in prompts if prompt.document not in done[name]] for name in wanted}
        progress.start_at(total - config.max_new_tokens * sum(map(len, left.values())))
        for name, (selection, asked) in wanted.items():
            for batch in continue_prompts(model, left[name], selection, config, progress.advance, asked):
                if kept:
                    kept[name].add([_line(model.tokenizer, named, prompt, new) for prompt, new in batch])
                done[name] |= {prompt.document: new for prompt, new in batch}
    return {name: [tokens[prompt.document] for prompt in prompts] for name, tokens in done.items()}


def _line(tokenizer: Any, named: dict[int, str], prompt: Prompt, new: list[int]) -> dict[str, Any]:
    """A finished text for its file."""
    begin = _text(tokenizer, prompt.ids)
    about = {"document": prompt.document, "id": named[prompt.document], "prompt": begin}
    return about | {"text": _text(tokenizer, new), "tokens": new}


def _text(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _score(
    tokens: list[list[int]],
    true: list[list[int]],
    prompts: list[Prompt],
    tools: tuple[Any, SentenceEncoder, NDArray[np.float32], measure.BigramCritic],
) -> Continuations:
    """Measure continuations, or the true ones, which are not held against themselves.

    Args:
        tokens: n continuations.
        true: the true ones.
        prompts: what they continue.
        tools: the LM's tokenizer, the corpus's encoder and codebook, and the model of action sequences.
    """
    tokenizer, encoder, codebook, critic = tools
    texts = [_text(tokenizer, own) for own in tokens]
    actions = measure.action_sequences(texts, encoder, codebook)
    found: dict[str, list[float]] = {}
    if tokens is not true:
        references = [_text(tokenizer, own) for own in true]
        found["rouge2"] = measure.rouge2(texts, references)
        true_actions = measure.action_sequences(references, encoder, codebook)
        found["edit_distance"], found["edit_distance_normalised"] = measure.edit_distances(actions, true_actions)
    for n in (1, 2, 3):
        found[f"distinct{n}"] = [measure.distinct(own, n) for own in tokens]
    found["repetition"] = [measure.repetition(own) for own in tokens]
    found["words"] = [float(len(text.split())) for text in texts]
    found["sentences"] = [float(len(own)) for own in actions]
    nll = [critic.nll(prompt.last_action, own) for prompt, own in zip(prompts, actions, strict=True)]
    return Continuations(
        per_prompt={name: np.array(values) for name, values in found.items()},
        latent=(np.array(nll), np.array(found["sentences"])),
        features=encoder.encode(texts),
    )


def _describe(
    config: EvaluateGenerationConfig, measured: dict[str, Continuations], human: Continuations, encoder: str
) -> dict[str, Any]:
    """The result, from what was measured of each plan's texts."""
    shown = ("split", "prompt_sentences", "max_new_tokens", "temperature", "top_p", "seed", "versus", "bootstrap")
    num_prompts = len(human.features)
    return {
        "run": config.run,
        "prompts": num_prompts,
        **{name: getattr(config, name) for name in shown},
        "features": f"{encoder}, of a whole continuation",
        "clusters": measure.num_clusters(num_prompts),
        "rows": make_rows(measured, human, config.versus, resamples=config.bootstrap, seed=config.seed),
        "human": values(human, None, config.seed),
    }
