"""What the commands that measure and show take."""

from __future__ import annotations

from dataclasses import dataclass

from planlm.config.base import CommandConfig, option, required
from planlm.settings import BATCH, COUNT, FRACTION_NOT_ZERO, SAMPLING, SEED, TEMPERATURE, TOKENS, count


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(CommandConfig):
    """Perplexity under each plan and planner metrics, with paired intervals over documents."""

    run: str = required("run directory of train, or a model folder", positional=True)
    corpus: str = required("prepared corpus")
    split: str = option("test", "split to evaluate", choices=("train", "validation", "test"))
    plans: str = option(
        "none,fixed,uniform,hard,soft,oracle",
        "comma-separated selections, each one row; also sampled: the LM's probabilities averaged over plans drawn for "
        "each sentence",
    )
    num_plans: int | None = option(None, "plans drawn for the row sampled; default: 8", limit=count(10_000))
    temperature: float | None = option(
        None, "softmax temperature of the plans; default: the one trained with", limit=TEMPERATURE
    )
    window: int | None = option(None, "tokens of context; default: the LM's, at most 1024", limit=TOKENS)
    stride: int | None = option(None, "tokens scored per window; default: the window", limit=TOKENS)
    batch_size: int = option(8, "windows per forward pass", limit=BATCH)
    max_documents: int | None = option(None, "evaluate only the first so many documents", limit=COUNT)
    versus: str = option("fixed", "row that differences and intervals refer to")
    forgetting: str | None = option(
        None,
        "prepared corpus of other text, of the same tokenizer: what the LM has lost there, and on --corpus, with the "
        "plan off; default: not measured",
    )
    forgetting_split: str | None = option(
        None,
        "split of --forgetting; default: as --split, or all documents where it has none of that name",
        choices=("train", "validation", "test", "all"),
    )
    base_lm: str | None = option(
        None, "LM before training, for --forgetting, by hub name or folder; default: that of RUN/config.yaml"
    )
    bootstrap: int = option(2000, "resamples of documents for the 95 % intervals", limit=BATCH)
    precision: str = option(
        "fp32", "arithmetic; auto: bf16 where the processor has it", choices=("auto", "bf16", "fp32")
    )
    seed: int = option(0, "seed of the bootstrap and of the row sampled", limit=SEED)


@dataclass(frozen=True, kw_only=True)
class EvaluateGenerationConfig(CommandConfig):
    """Quality of continuations of held-out documents under each plan, with paired intervals over prompts."""

    run: str = required("run directory of train, or a model folder", positional=True)
    corpus: str = required("prepared corpus")
    split: str = option("test", "split whose documents are continued", choices=("train", "validation", "test"))
    plans: str = option("none,soft", "comma-separated selections, each one row")
    versus: str = option("none", "row that differences and intervals refer to")
    steer: bool = option(
        False,
        "also ask for an action of each sentence, drawn by the corpus's frequencies, and measure how many sentences "
        "carry it, beside texts that were not asked",
    )
    attempts: int = option(
        1, "with --steer: write a sentence so many times, and keep the first that carries its action", limit=BATCH
    )
    prompts: int = option(100, "documents continued: the first ones that are long enough", limit=BATCH)
    prompt_sentences: int = option(3, "sentences of a document that are the prompt", limit=count(10_000))
    max_new_tokens: int = option(128, "tokens of every continuation, and of the true one (the papers')", limit=BATCH)
    temperature: float = option(1.0, "sampling temperature (the papers'); 0: greedy", limit=SAMPLING)
    top_p: float = option(0.95, "nucleus of the sampling distribution", limit=FRACTION_NOT_ZERO)
    batch_size: int = option(32, "texts generated at once", limit=BATCH)
    bootstrap: int = option(2000, "resamples of prompts for the 95 % intervals; MAUVE's takes at most 200", limit=BATCH)
    seed: int = option(0, "seed of the sampling, the bootstrap and MAUVE's k-means", limit=SEED)


@dataclass(frozen=True, kw_only=True)
class AuditConfig(CommandConfig):
    """What models have written, from audit trails: drift from their corpus, certainty, repetition."""

    files: tuple[str, ...] = required("files that generate --audit wrote to", positional=True)
    corpus: str = required("prepared corpus that the models were trained on")
    bootstrap: int = option(
        2000, "resamples of texts for the 95 % intervals, and samples of the corpus that show what chance does",
        limit=BATCH,
    )  # fmt: skip
    seed: int = option(0, "seed of both", limit=SEED)


@dataclass(frozen=True, kw_only=True)
class AuditProbeConfig(CommandConfig):
    """What swapping names in a text changes: the plan of the next sentence, and perplexity."""

    run: str = required("run directory of train, or a model folder", positional=True)
    probe: str = required("JSON file of prompts with {X}, and groups of names for it (examples/probe.json)")
    bootstrap: int = option(
        2000, "resamples of prompts for the 95 % intervals, and random divisions of the names", limit=BATCH
    )
    seed: int = option(0, "seed of both", limit=SEED)


@dataclass(frozen=True, kw_only=True)
class ReportConfig(CommandConfig):
    """One self-contained HTML page from run directories."""

    runs: tuple[str, ...] = required("run directories", positional=True)
    out: str = option("report.html", "page to write")
