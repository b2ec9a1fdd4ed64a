"""Every command of README as a user types it, on real text: `python -m tests.acceptance`, or `make acceptance`.

README's own lines are run, read from it, with only sizes added and two tiny LMs put in place of its LM, which has its
turn at the end; then what README's table and docs promise besides: other modes, `--resume`, `--json`, plans of one's
own, several processes, other numbers of threads. Threads are the machine's default unless a line says otherwise. Text,
encoder and README's LM come from packages that `make install` brings. Each command gets a line with its seconds; the
first that fails, or gives a wrong result, is shown with its output and ends the run with status 1. Of `quickstart`,
which takes longer than all of this, only the help is called.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from planlm.cli import COMMANDS
from planlm.experiments.leads import leads
from tests.test_readme import PYTHON, README, ROOT, blocks, smaller

PLANLM = str(Path(sys.executable).with_name("planlm"))
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "planlm")
ARTICLES, SHORTEST = 100, 700
"""How many articles, of at least so many characters: enough sentences for README's 256 actions."""

SIZES = {
    "pretrain-planner": "--epochs 1",
    "train": "--steps 12 --window 64 --batch-size 8 --lr 0.1 --checkpoint-every 5 --log-every 1",
    "evaluate-generation": "--prompt-sentences 1 --max-new-tokens 24",
    "generate": "--max-new-tokens 40",
}
"""What is added to README's lines for the tiny LMs; with that --lr the plan is loud after a few steps."""
SMALLEST = {
    "pretrain-planner": "--steps 2",
    "train": "--steps 2 --window 32 --batch-size 4 --log-every 1",
    "evaluate": "--max-documents 2 --window 128",
    "evaluate-generation": "--prompts 2 --prompt-sentences 1 --max-new-tokens 12",
    "generate": "--max-new-tokens 12",
}
"""And for README's own LM."""

ALL_PLANS = ("none", "fixed", "uniform", "hard", "soft", "oracle")
GENERATE = ("generate", "full", "--prompt", "The harbour was built in 1905.", "--max-new-tokens", "40")
SLIDING = ("evaluate", "full", "--corpus", "corpus", "--window", "64", "--stride", "32", "--plans", "none,soft")


class Failure(Exception):
    """A command failed, or its result is wrong."""


def expect(condition: object, message: str) -> None:
    """Fail unless `condition` holds."""
    if not condition:
        raise Failure(message)


class Shell:
    """Runs commands in a folder and says how long each took."""

    output = ""
    """Of the last command of all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self.environment["HF_HUB_OFFLINE"] = "1"

    def __call__(self, *command: object, threads: int | None = None, shown: str | None = None) -> str:
        """Standard output of a command: planlm's, or any if it begins with a path.

        Raises:
            Failure: it ended with another status than 0, or in a traceback.
        """
        words = [*([] if str(command[0]).startswith("/") else [PLANLM]), *map(str, command)]
        environment = self.environment | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
        begin = time.monotonic()
        done = subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True)
        Shell.output = done.stdout + done.stderr
        good = not done.returncode and "Traceback" not in done.stderr
        line = shown or shlex.join(words).replace(PLANLM, "planlm").replace(shlex.join(TORCHRUN), "torchrun planlm")
        line = line if threads is None else f"OMP_NUM_THREADS={threads} {line}"
        print(f"{'ok  ' if good else 'FAIL'} {time.monotonic() - begin:6.1f} s  {line}", flush=True)
        expect(good, f"exit status {done.returncode}, or a traceback")
        return done.stdout

    def json(self, *command: object, threads: int | None = None) -> Any:
        """The object that a command prints with `--json`, which is all that it prints on standard output."""
        return json.loads(self(*command, "--json", threads=threads))


def readme_commands() -> list[list[str]]:
    """The words of README's lines that begin with `planlm` and have arguments."""
    lines = [line for block in blocks("sh", README) for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("planlm ")]


def follow_readme(folder: Path, sizes: dict[str, str], lm: Path | None) -> Shell:
    """Run README's lines in a folder of their own and check what each leaves there; `lm` in place of its LM."""
    folder.mkdir()
    (folder / "articles.jsonl.gz").write_bytes(gzip.compress(articles().encode()))
    shell = Shell(folder)
    for name, *words in readme_commands():
        if lm is not None and name == "train":
            words[words.index("--lm") + 1] = str(lm)
        if lm is not None and name == "prepare":
            words += ["--tokenizer", str(lm)]
        shell(name, *words, *shlex.split(sizes.get(name, "")))
        CHECKS[name](folder)
    examples = [
        shell(sys.executable, "-c", smaller(code, lm and str(lm)), shown=f"Python: {code[:60]!r}")
        for code in blocks("python", PYTHON)
    ]
    expect(any("The harbour was built in 1905." in printed for printed in examples), "no example prints the prompt")
    expect(read(folder / "python" / "run" / "evaluation.json")["test"]["rows"], "the example has not evaluated")
    expect((folder / "own-model" / "model.safetensors").is_file(), "the loop of one's own left no model")
    return shell


def articles() -> str:
    """Articles as JSON lines."""
    rows = [json.dumps({"id": title, "text": text}) for title, text in leads().items() if len(text) >= SHORTEST]
    return "\n".join(rows[:ARTICLES])


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_corpus(folder: Path) -> None:
    splits = read(folder / "corpus" / "corpus.json")["splits"]
    found = sum(split["documents"] for split in splits.values())
    expect(found == ARTICLES and all(split["documents"] for split in splits.values()), f"documents: {splits}")


def check_planner(folder: Path) -> None:
    metrics = read(folder / "planner" / "planner_metrics.json")
    expect(all(math.isfinite(value) for value in metrics.values() if isinstance(value, float)), f"metrics: {metrics}")


def check_run(folder: Path, run: str = "run") -> None:
    losses = read_losses(folder / run)
    expect(losses and all(loss is not None and 0 < loss < 20 for loss in losses), f"losses: {losses}")
    expect((folder / run / "model" / "model.safetensors").is_file(), f"{run}: no model")


def check_rows(result: dict[str, Any], plans: Sequence[str]) -> None:
    rows = {row["plan"]: row for row in result["rows"]}
    expect(list(rows) == list(plans), f"rows {list(rows)}, asked {plans}")
    expect(result["documents"] > 0 and result["tokens"] > 0, "nothing was scored")
    expect(all(1 < row["perplexity"] < 1e6 for row in rows.values()), f"perplexities: {result['rows']}")
    planned = {row["perplexity"] for plan, row in rows.items() if plan != "none"}
    expect(rows["none"]["perplexity"] not in planned, "the plan makes no difference")


def check_evaluation(folder: Path) -> None:
    words = next(words for words in readme_commands() if words[0] == "evaluate")
    check_rows(read(folder / "run" / "evaluation.json")["test"], words[words.index("--plans") + 1].split(","))


def check_generation_metrics(folder: Path) -> None:
    result = read(folder / "run" / "generation_evaluation.json")["test"]
    rows = {row["plan"]: row["metrics"] for row in result["rows"]}
    expect(list(rows) == ["none", "soft"] and result["prompts"] > 1, f"rows: {result['rows']}")
    expect(all(0 <= row["rouge2"] <= 1 < row["latent_perplexity"] for row in rows.values()), f"metrics: {rows}")
    kept = [folder / "run" / "generation_evaluation" / f"{plan}.jsonl" for plan in rows]
    expect(all(len(path.read_text().splitlines()) == 1 + result["prompts"] for path in kept), "texts are missing")


def check_generation(folder: Path, run: str = "run") -> None:
    result = read(folder / run / "generation.json")
    expect(result["text"] and result["plan"], f"nothing generated: {result}")
    for sentence in result["plan"]:
        expect(sum(action["probability"] for action in sentence["actions"]) <= 1.001, f"probabilities: {sentence}")


def check_report(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    expect("soft" in page and 'src="http' not in page, "the page lacks the run, or loads something")


CHECKS = {
    "prepare": check_corpus,
    "pretrain-planner": check_planner,
    "train": check_run,
    "evaluate": check_evaluation,
    "evaluate-generation": check_generation_metrics,
    "generate": check_generation,
    "report": check_report,
}


def make_lms(folder: Path) -> dict[str, Path]:
    """Folders of a tiny GPT-2 and a tiny Llama, both random; Llama's tokenizer puts a start token before a text."""
    from tokenizers import ByteLevelBPETokenizer, processors
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    end = "<|endoftext|>"
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(list(leads().values())[:2000], 2000, special_tokens=[end], show_progress=False)
    shape = {"vocab_size": 2000, "num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 64}
    shape |= {"max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0}
    gpt2 = GPT2LMHeadModel(GPT2Config(**shape))
    llama = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=128, num_key_value_heads=2))
    for lm in (gpt2, llama):
        if lm is llama:
            bpe.post_processor = processors.TemplateProcessing(single=f"{end} $A", special_tokens=[(end, 0)])
        lm.save_pretrained(folder / lm.config.model_type)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=end, eos_token=end)
        tokenizer.save_pretrained(folder / lm.config.model_type)
    return {name: folder / name for name in ("gpt2", "llama")}


def train(lm: Path, *more: object) -> list[object]:
    """Words of a short training run."""
    return ["train", "--corpus", "corpus", "--planner", "planner", "--lm", lm, *shlex.split(SIZES["train"]), *more]


def check_machine(shell: Shell) -> None:
    """What says something about the machine and the commands."""
    shell("--version")
    shell("doctor")
    for name in COMMANDS:
        expect(f"planlm {name}" in shell(name, "--help"), "no example in the help")


def check_modes(shell: Shell, lm: Path) -> None:
    """Other selections, every mode of the LM; a run that was cut off and resumed."""
    for selection, mode in (("straight-through", "full"), ("hard", "lora"), ("gumbel", "freeze")):
        result = shell.json(*train(lm, "--selection", selection, "--lm-mode", mode, "--out", mode))
        expect(result["step"] == 12, f"steps: {result}")
        check_run(shell.folder, mode)
    shutil.copytree(shell.folder / "full", shell.folder / "resumed")
    shutil.rmtree(shell.folder / "resumed" / "model")
    shutil.rmtree(shell.folder / "resumed" / "checkpoints" / "step-12")
    shell(*train(lm, "--selection", "straight-through", "--lm-mode", "full", "--out", "resumed", "--resume"))
    weights = [(shell.folder / run / "model" / "model.safetensors").read_bytes() for run in ("full", "resumed")]
    expect(weights[0] == weights[1], "the resumed run has other weights than the one that was not cut off")
    shell("report", "run", "full", "lora", "--out", "runs.html")


def check_results(shell: Shell) -> None:
    """Results for programs, padding and overlapping windows, plans of one's own."""
    described = shell.json("actions", "corpus")["actions"]
    expect(len(described) == read(shell.folder / "corpus" / "corpus.json")["num_actions"], "actions are missing")
    check_rows(shell.json("evaluate", "full", "--corpus", "corpus", "--versus", "none"), ALL_PLANS)
    result = shell.json(*GENERATE, "--plan", "3,1", "--audit", "audit.jsonl")
    forced = [sentence["forced"] for sentence in result["plan"][:2]]
    expect(forced and forced == [3, 1][: len(forced)], f"the plan was not followed: {result['plan']}")
    audit = [json.loads(line) for line in (shell.folder / "audit.jsonl").read_text().splitlines()]
    expect([line["action"] for line in audit] == [one["action"] for one in result["plan"]], "the audit is not the plan")
    audited = shell.json("audit", "audit.jsonl", "--corpus", "corpus")
    expect(audited["sentences"] == len(audit) and not audited["damaged"], f"the audit is another's: {audited}")
    probed = shell.json("audit-probe", "full", "--probe", ROOT / "examples" / "probe.json")
    expect(len(probed["pairs"]) == 1 and probed["pairs"][0]["plan"]["within"] > 0, f"the probe sees no names: {probed}")
    unplanned = shell.json(*GENERATE, "--selection", "none")["text"]
    expect(unplanned != result["text"], "with the same seed the text does not depend on the plan")


def check_experiment(shell: Shell, lm: Path) -> None:
    """Rows and seeds from a file to tables; what is finished is not done again."""
    (shell.folder / "tiny.yaml").write_text(
        f"name: tiny\nbackbones: {{lm: {{lm: {lm}}}}}\nseeds: [0, 1]\nplanner: {{steps: 2}}\n"
        "train: {steps: 2, window: 32, batch_size: 4}\nevaluate: {window: 32}\n"
        "rows:\n  fixed: {selection: fixed}\n  joint: {selection: soft, plans: [soft, oracle]}\n"
        "compare: [[joint, fixed]]\n"
    )
    command = ("experiment", "tiny.yaml", "--corpus", "corpus")
    result = shell.json(*command)
    expect(not result["missing"] and result["backbones"]["lm"]["compare"][0]["seeds"] == 2, f"results: {result}")
    shell(*command)
    expect("0 tasks to do" in shell.output, "finished cells are done again")


def check_threads_and_processes(shell: Shell, lm: Path) -> None:
    """The short commands give the same with 1 and 4 threads, and as two processes, as with the default."""

    def same(found: Any, wanted: Any, what: str) -> None:
        near = all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(found, wanted, strict=True))
        expect(near, f"{what}: {found}, with the default number of threads {wanted}")

    def perplexities(result: dict[str, Any]) -> list[float]:
        check_rows(result, ("none", "soft"))
        return [row["perplexity"] for row in result["rows"]]

    scored = perplexities(shell.json(*SLIDING))
    for threads in (1, 4):
        same(perplexities(shell.json(*SLIDING, threads=threads)), scored, "perplexities")
        shell(*GENERATE, "--show-plan", threads=threads)
        check_generation(shell.folder, "full")
    same(perplexities(shell.json(*TORCHRUN, *SLIDING)), scored, "perplexities")
    shell(*TORCHRUN, *train(lm, "--selection", "straight-through", "--lm-mode", "full", "--out", "two"))
    same(read_losses(shell.folder / "two"), read_losses(shell.folder / "full"), "losses")
    shell(*TORCHRUN, "pretrain-planner", "--corpus", "corpus", "--out", "two-planner", "--steps", "5")
    shell(*TORCHRUN, "prepare", "articles.jsonl.gz", "--out", "two-corpus", "--actions", "256", "--tokenizer", lm)
    codebooks = [(shell.folder / name / "codebook.safetensors").read_bytes() for name in ("corpus", "two-corpus")]
    expect(codebooks[0] == codebooks[1], "two processes prepare another codebook than one")


def main() -> int:
    """Run everything; the exit status."""
    begin = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="planlm-acceptance-"))
    try:
        check_machine(Shell(folder))
        for name, lm in make_lms(folder).items():
            shell = follow_readme(folder / f"with-{name}", SIZES, lm)
        check_modes(shell, lm)
        check_results(shell)
        check_experiment(shell, lm)
        check_threads_and_processes(shell, lm)
        follow_readme(folder / "as-written", SMALLEST, None)
    except Failure as failure:
        print(f"{Shell.output}\nacceptance: {failure}; everything is in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    print(f"acceptance: every command did what it has to, in {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
