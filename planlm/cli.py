"""The command line: `planlm COMMAND ...`. Parses, runs, prints, and turns errors into one line and an exit status.

0: done. 1: the machine failed, or the command was interrupted. 2: wrong usage or input. Results go to stdout;
progress, warnings and errors go to stderr. A command's code, and with it torch, is imported when the command runs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from planlm import __version__, arguments, config, show
from planlm.errors import InputError, MachineError, causes, machine_failure
from planlm.files import to_json
from planlm.home import ensure_home
from planlm.ranks import local_rank, rank, world_size
from planlm.signals import ending, handling, in_main_thread, terminate
from planlm.terminal import encodable, open_streams, silence_libraries, visible


@dataclasses.dataclass(frozen=True)
class Command:
    """What the command line knows of a command.

    Attributes:
        config: its settings; the docstring is its one-line description.
        run: "module:function" that takes the settings and returns the result.
        show: makes text of the result.
        example: shown at the end of its help.
        data: what `--json` prints of the result.
        distributed: several processes can share it, under torchrun.
    """

    config: type[config.CommandConfig]
    run: str
    show: Callable[[Any, Any], str]
    example: str
    data: Callable[[Any], Any] = lambda result: result
    distributed: bool = False


COMMANDS = {
    "quickstart": Command(
        config.QuickstartConfig,
        "planlm.quickstart.run:quickstart",
        show.quickstart,
        "planlm quickstart",
    ),
    "prepare": Command(
        config.PrepareConfig,
        "planlm.corpus.prepare:prepare",
        show.corpus,
        "planlm prepare articles.jsonl.gz --out corpus --actions 256",
        data=lambda corpus: {"corpus": corpus.path, **dataclasses.asdict(corpus.manifest)},
        distributed=True,
    ),
    "actions": Command(
        config.ActionsConfig,
        "planlm.corpus.actions:describe_actions",
        show.actions,
        "planlm actions corpus --action 7",
        data=lambda descriptions: {"actions": descriptions},
    ),
    "pretrain-planner": Command(
        config.PlannerConfig,
        "planlm.training.pretrain_planner:pretrain_planner",
        show.planner,
        "planlm pretrain-planner --corpus corpus --out planner",
        distributed=True,
    ),
    "train": Command(
        config.TrainConfig,
        "planlm.training.train:train",
        show.training,
        "planlm train --corpus corpus --planner planner --selection soft --out run",
        distributed=True,
    ),
    "plan-budget": Command(
        config.PlanBudgetConfig,
        "planlm.training.budget:plan_budget",
        show.budget,
        "planlm plan-budget --corpus corpus --planner planner --lm-mode full --window 1024 --batch-size 16",
    ),
    "evaluate": Command(
        config.EvaluateConfig,
        "planlm.evaluation.evaluate:evaluate",
        show.evaluation,
        "planlm evaluate run --corpus corpus --plans none,fixed,hard,soft,oracle",
        distributed=True,
    ),
    "evaluate-generation": Command(
        config.EvaluateGenerationConfig,
        "planlm.evaluation.generation:evaluate_generation",
        show.generation_evaluation,
        "planlm evaluate-generation run --corpus corpus --plans none,soft",
    ),
    "generate": Command(
        config.GenerateConfig,
        "planlm.model.generation:generate",
        show.generation,
        'planlm generate run --prompt "The harbour was built in 1905." --show-plan',
    ),
    "audit": Command(
        config.AuditConfig,
        "planlm.evaluation.audit:audit",
        show.audit,
        "planlm audit audit.jsonl --corpus corpus",
    ),
    "audit-probe": Command(
        config.AuditProbeConfig,
        "planlm.evaluation.probe:audit_probe",
        show.audit_probe,
        "planlm audit-probe run --probe examples/probe.json",
    ),
    "report": Command(
        config.ReportConfig,
        "planlm.report.page:write_report",
        show.report,
        "planlm report run other-run --out report.html",
        data=lambda page: {"report": page},
    ),
    "experiment": Command(
        config.ExperimentConfig,
        "planlm.experiments.run:experiment",
        show.experiment,
        "planlm experiment experiments/small.yaml",
        distributed=True,
    ),
    "doctor": Command(config.DoctorConfig, "planlm.doctor:doctor", show.doctor, "planlm doctor"),
}


_USERS_FILE_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; default: the process's.

    Returns:
        The exit status.
    """
    if argv is None:
        open_streams()
    words = sys.argv[1:] if argv is None else argv
    try:
        with handling(terminate, *ending()):
            return _run(words)
    except InputError as error:
        return _fail(2, str(error))
    except KeyboardInterrupt as interrupt:
        if in_main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not tear the last line
        if rank() > 0:  # ended with the others, of which one says why
            return 1
        # torchrun ends who is left, at times while it unwinds because another process is lost
        return _fail(1, _lost_another(interrupt, _options(words)) or str(interrupt) or "interrupted")
    except Exception as error:
        options = _options(words)
        if lost := _lost_another(error, options):
            # Who ended has the reason to tell and is given the time; torchrun ends this one then.
            time.sleep(5)
            return _fail(1, lost)
        failure = machine_failure(error, options)
        if failure is None and isinstance(error, _USERS_FILE_ERRORS) and error.filename is not None:
            return _fail(2, f"{error.filename}: {error.strerror}")
        if failure is None:
            print("planlm: this is a bug in PlanLM; please report it with the lines below", file=sys.stderr)
            raise
        return _fail(1, failure)


def _run(argv: list[str]) -> int:
    """Parse, run and print; the exit status."""
    rank(), local_rank()  # a mistake in what torchrun should say is one before all others
    if not argv:
        _top_parser().print_help(sys.stderr)
        return 2
    try:
        name = _top_parser().parse_args(argv[:1]).command
        command = COMMANDS[name]
        settings = arguments.parse(
            command.config, argv[1:], prog=f"planlm {name}", epilog=f"example:\n  {command.example}"
        )
    except SystemExit:  # --help and --version
        return _print("")
    ensure_home()
    silence_libraries()
    module, function = command.run.split(":")
    with (
        contextlib.redirect_stdout(sys.stderr),
        _processes(name, command.distributed),
    ):  # stdout is the result's alone, whatever a library prints
        result = getattr(importlib.import_module(module), function)(settings)
        if rank() > 0:  # rank 0 has the result
            return 0
        text = to_json(command.data(result)) if settings.json else visible(command.show(result, settings))
    return _print(text + "\n")


def _print(text: str) -> int:
    """Print a result, and what stdout holds already; the exit status."""
    try:
        sys.stdout.write(encodable(text, sys.stdout.encoding or "utf-8"))
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # a stand-in without a number
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains again at exit
        if isinstance(error, BrokenPipeError):  # the reader has gone, as `head` does
            return 1
        return _fail(1, f"standard output: {error.strerror}; the result could not be shown")
    return 0


def _processes(name: str, distributed: bool) -> contextlib.AbstractContextManager[None]:
    """The connection between the processes that torchrun started, if it did."""
    if world_size() == 1:
        return contextlib.nullcontext()
    if not distributed:
        raise InputError(f"planlm {name} runs in one process: start it without torchrun")
    from planlm.distribution import process_group

    return process_group()


def _top_parser() -> argparse.ArgumentParser:
    """Only the command's name, `--help` and `--version`: each command has a parser of its own."""
    width = max(map(len, COMMANDS))
    lines = [
        f"  {name:{width}}  {(command.config.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()
    ]
    examples = [COMMANDS[name].example for name in ("prepare", "pretrain-planner", "train", "evaluate", "generate")]
    parser = arguments.Parser(
        prog="planlm",
        usage="planlm COMMAND [options]",
        description="Planner-conditioned language models, trained end to end.\n\ncommands:\n" + "\n".join(lines),
        epilog="example, from text to a model that plans:\n  "
        + "\n  ".join(examples)
        + "\n\n`planlm COMMAND --help` explains a command's settings, units and defaults.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"planlm {__version__}")
    return parser


def _options(argv: list[str]) -> set[str]:
    """The flags of the command that `argv` begins with."""
    command = COMMANDS.get(argv[0]) if argv else None
    names = [field.name for field in dataclasses.fields(command.config)] if command else []
    return {"--" + name.replace("_", "-") for name in names}


def _lost_another(raised: BaseException, options: set[str]) -> str | None:
    """One line on what has become of another process of the run where that is the error; `options` as below."""
    for error in causes(raised):
        if type(error).__name__ in ("DistBackendError", "DistNetworkError") or "gloo/transport" in str(error):
            lost = "has not answered" if "Timed out" in str(error) else "has ended"
            return f"another process of this run {lost}" + "; --resume goes on" * ("--resume" in options)
        if isinstance(error, MachineError):
            break
    return None


def _fail(status: int, message: str) -> int:
    number = 0
    with contextlib.suppress(InputError):  # which may be what there is to say
        number = rank()
    if number > 0:
        time.sleep(5)  # most often rank 0 has the same to say, upon which torchrun ends this one
        message = f"process {number}: {message}"
    with contextlib.suppress(BrokenPipeError):
        print(f"planlm: error: {visible(' '.join(message.split()))}", file=sys.stderr, flush=True)
    return status
