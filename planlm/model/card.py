"""The model card: `README.md` of a model's folder, as the Hugging Face hub reads it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from planlm.model.configuration import BY_LAYER, PlanLMConfig
from planlm.terminal import visible

CARD = "README.md"

BEGIN = "<!-- planlm: written anew, down to the mark that ends it, whenever the model is saved -->"
END = "<!-- planlm ends -->"

MOST_ACTIONS = 32
"""Labels that a card lists."""

_LOADING = """\
## Use

With the package `planlm` installed, `FOLDER` being this model's name on the hub or its folder:

```python
import planlm
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER")
prompt = model.tokenizer("The harbour was built in 1905.", return_tensors="pt")
print(model.tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))
```

```sh
planlm generate FOLDER --prompt "The harbour was built in 1905." --show-plan
```
"""


def hub_name(name: str) -> str:
    """`name` where it is one of the hub's, else nothing: where a folder is on this machine is not for a card."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return ""
    return "" if Path(name).exists() else name


def write_card(folder: Path, config: PlanLMConfig) -> None:
    """Write the card of the model in `folder`.

    Of one that is there already the part between its two marks is replaced, and the rest stays as it is: the hub's
    fields and what users have written. Without the marks all of it is theirs.

    Args:
        folder: the model's.
        config: the model's, which has all that the card says.
    """
    path = folder / CARD
    text, own = f"{_header(config)}\n# {_title(config)}\n\n{BEGIN}\n{END}\n", _about(config)
    if os.path.lexists(path):
        try:
            text = path.read_bytes().decode() if path.is_file() else ""
        except UnicodeDecodeError:
            return
    parts = re.split(f"({re.escape(BEGIN)}).*?({re.escape(END)})", text, maxsplit=1, flags=re.DOTALL)
    if len(parts) > 1:
        path.write_text("".join([*parts[:2], f"\n\n{own}\n\n", *parts[2:]]), encoding="utf-8", newline="")


def _header(config: PlanLMConfig) -> str:
    """What the hub files the model by."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["planlm"],
        base_model=hub_name(config.base_model) or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _title(config: PlanLMConfig) -> str:
    name = hub_name(config.base_model)
    return f"{name} with a planner" if name else "Planner-conditioned language model"


def _about(config: PlanLMConfig) -> str:
    """The part between the marks."""
    return "\n".join([_introduction(config), _build(config), _LOADING, _actions(config), _training(config)]).strip()


def _introduction(config: PlanLMConfig) -> str:
    if config.conditioning == "bottleneck":
        return "A language model with as many weights added as a plan would have, and no plan: a control of PlanLM.\n"
    return (
        "A planner-conditioned language model (PlanLM). Before each sentence a planner, which reads the sentences so "
        f"far, weighs {config.num_actions:,} actions, kinds of sentences found in text; the language model writes the "
        "sentence conditioned on their weighted mean.\n"
    )


def _build(config: PlanLMConfig) -> str:
    """How the model is built and plans."""
    text = config.get_text_config()
    further = {"gate": config.gate, "a codebook for each layer": config.codebook_per_layer}
    encoder = hub_name(config.encoder)
    if config.encoder and not encoder:
        encoder = "not one of the hub's: see encoder in config.json"
    rows: dict[str, Any] = {
        "language model": hub_name(config.base_model) or text.model_type,
        "conditioning": ", ".join([config.conditioning, *(name for name, is_there in further.items() if is_there)]),
    }
    if config.conditioning in BY_LAYER:
        rows["conditioned layers"] = f"the topmost {config.conditioned_layers} of {text.num_hidden_layers}"
    if config.conditioning == "bottleneck":
        return _table(("", ""), rows)
    rows |= {
        "selection": config.selection + (f", k = {config.plan_top_k}" if config.selection == "top-k" else ""),
        "temperature": config.plan_temperature,
        "actions (K)": config.num_actions,
        "actions planned ahead (horizon)": config.planner_horizon,
        "planner": f"{config.planner_layers} layers, reads {config.planner_input}",
        "sentence encoder": encoder or "none: every text is planned as one sentence",
    }
    return _table(("", ""), rows)


def _actions(config: PlanLMConfig) -> str:
    """The actions that have a label."""
    labels = {str(action): label for action, label in enumerate(config.action_labels or ()) if label}
    if not labels:
        return ""
    shown = dict(list(labels.items())[:MOST_ACTIONS])
    more = config.num_actions - len(shown)
    return f"## Actions\n\n{_table(('action', 'label'), shown)}" + (f"\nand {more:,} more\n" if more else "")


def _training(config: PlanLMConfig) -> str:
    """What a run of `planlm train` says of itself."""
    if not config.trained:
        return ""
    return f"## Training\n\nThe last run of `planlm train`:\n\n{_table(('', ''), config.trained)}"


def _table(head: tuple[str, str], rows: dict[str, Any]) -> str:
    cells = [head, ("---", "---"), *((_cell(name), _cell(value)) for name, value in rows.items())]
    return "".join(f"| {left} | {right} |\n" for left, right in cells)


def _cell(value: Any) -> str:
    """A value as the text of a table's cell: nothing in it is markup, ends the cell or acts on a terminal."""
    text = f"{value:,}" if type(value) is int else f"{value:.4g}" if type(value) is float else str(value)
    text = re.sub(r"([\\`*_\[\]<>|~&$#!])", r"\\\1", visible(" ".join(text.split())))
    return re.sub(r"(?i)(https?|ftp|mailto|xmpp)(?=:)|(?<=www)(?=\.)|(?<=\S)(?=@)", r"\1&#8203;", text)  # no links
