"""The tree keeps its shape: imports go one way, rooms are cheap to import, files and functions stay short."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = {
    "errors", "terminal", "config", "settings", "selections", "signals", "progress", "files", "flat_yaml", "ranks",
    "precision", "distribution", "plan_inputs", "labels", "home",
}  # fmt: skip
# What each room may import; whoever imports a room sees what that room sees only through it.
ALLOWED = {
    "errors": set(),
    "config": {"errors", "selections", "settings"},
    "settings": set(),
    "selections": set(),
    "plan_inputs": set(),
    "labels": {"errors"},
    "progress": {"ranks"},
    "files": {"errors"},
    "terminal": {"ranks"},
    "signals": set(),
    "flat_yaml": {"errors"},
    "ranks": {"errors"},
    "heartbeat": {"ranks"},
    "precision": {"kernels", "ranks"},
    "distribution": {"errors", "heartbeat", "precision", "ranks"},
    "home": {"ranks", "terminal"},
    "kernels": set(),
    "pretrained": LEAVES | {"kernels"},  # where the cache is
    "text": LEAVES | {"pretrained"},
    "corpus": LEAVES | {"pretrained", "text"},
    "speedups": {"kernels"},
    "model": LEAVES | {"pretrained", "text", "kernels", "speedups"},
    "evaluation": LEAVES | {"pretrained", "text", "corpus", "model"},
    "training": LEAVES | {"pretrained", "text", "corpus", "speedups", "model", "evaluation"},
    "report": LEAVES | {"evaluation.breakdown", "evaluation.significance"},
    "experiments": LEAVES | {"pretrained", "text", "corpus", "model", "training", "evaluation", "report"},
    "quickstart": LEAVES | {"pretrained", "text", "corpus", "model", "training", "evaluation", "report", "experiments"},
    "doctor": LEAVES | {"kernels"},
    "arguments": {"config", "errors", "files", "flat_yaml", "settings"},
    "show": {"config", "labels", "report"},
    "cli": {"arguments", "distribution", "config", "errors", "files", "home", "ranks", "show", "signals", "terminal"},
    "__main__": {"cli", "errors", "ranks"},
    "api": {"config", "corpus", "errors"},
    "__init__": {"api", "model"},
}


def sources() -> dict[str, Path]:
    """Every module of the package by its name below `planlm`."""
    paths = {path.relative_to(ROOT / "planlm"): path for path in (ROOT / "planlm").rglob("*.py")}
    paths |= {Path("kernels") / path.relative_to(ROOT / "kernels"): path for path in (ROOT / "kernels").rglob("*.py")}
    return {".".join(name.with_suffix("").parts): path for name, path in sorted(paths.items())}


MODULES = sources()


def imported(module: str, tree: ast.AST) -> Iterator[str]:
    """Absolute names of the modules that a module imports anywhere, also inside functions."""
    package = ["planlm", *module.split(".")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{name.name}" for name in node.names)


def of_planlm(name: str) -> str | None:
    """The module below planlm that `name` is, or lies in."""
    if not name.startswith("planlm."):
        return None
    inside = name.removeprefix("planlm.")
    while inside and inside not in MODULES and f"{inside}.__init__" not in MODULES:
        inside = inside.rpartition(".")[0]
    return inside or None


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    room = module.split(".")[0]
    tree = ast.parse(MODULES[module].read_text())
    for name in imported(module, tree):
        inside = of_planlm(name)
        if inside is None or inside.split(".")[0] == room:
            continue
        allowed = inside in ALLOWED[room] or inside.split(".")[0] in ALLOWED[room]
        narrow = any(entry.startswith(f"{inside}.") for entry in ALLOWED[room])  # `from planlm.room import module`
        assert allowed or narrow, f"{module} imports planlm.{inside}, which {room} may not"


def test_the_architecture_page_says_the_same() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = dict(re.findall(r"^\| `planlm/(\w+)/` \| .* \| (.*) \|$", page, re.MULTILINE))
    assert set(table) == {path.parent.name for path in (ROOT / "planlm").glob("*/__init__.py")}
    for room, cell in table.items():
        named = set(re.findall(r"\w+", cell)) & {*table, "kernels"}
        others = {name.partition(".")[0] for name in ALLOWED[room] - LEAVES}
        assert cell == "all above" or named == others, room
    leaves = page.partition("\nLeaves of the package")[2].partition(". ")[0]
    assert set(re.findall(r"`(\w+)`", leaves)) - {"kernels", "speedups"} == LEAVES


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("kernels")])
def test_kernels_stand_alone(module: str) -> None:
    names = {name.split(".")[0] for name in imported(module, ast.parse(MODULES[module].read_text()))}
    assert names - sys.stdlib_module_names <= {"torch", "triton", "ninja", "planlm"}


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("speedups.")])
def test_speedups_stay_in_their_room(module: str) -> None:
    """Elsewhere no class is changed, no part of an LM replaced, no hook set on one, and malloc is left alone."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Attribute):
            assert node.attr != "__class__" or isinstance(node.ctx, ast.Load)
            assert node.attr not in ("mallopt", "set_submodule", "add_module", "register_module")
            if re.fullmatch(r"register_\w*hook", node.attr):
                assert module == "text.encoder", f"{module}: {node.attr}; the sentence encoder alone is no LM"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            assert ast.unparse(node.args[0]).endswith("config"), f"{module}: {ast.unparse(node)}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not re.search("GLIBC_TUNABLES|MALLOC_|THP_MEM_ALLOC", node.value), module
    names = {name.split(".")[0] for name in imported(module, ast.parse(MODULES[module].read_text()))}
    assert "ctypes" not in names or module == "corpus.mapped", f"{module}: ctypes, where files' pages need it"


def test_rooms_are_cheap_to_import() -> None:
    # The model's room registers it with transformers, and kernels are torch functions: those two are asked for.
    rooms = sorted({name.split(".")[0] for name in MODULES if name.endswith(".__init__")} - {"model", "kernels"})
    code = (
        "import sys, planlm\n"
        + "".join(f"import planlm.{room}\n" for room in rooms)
        + "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from planlm.cli import main; main(['--help'])\n"
        "names = {name.split('.')[0] for name in sys.modules}\n"
        "own = {name for name in names - sys.stdlib_module_names if not name.startswith(('_', 'sitecustomize'))}\n"
        "assert own <= {'planlm', 'wrapt'}, own"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_kernels_do_not_pass_for_the_package_that_transformers_knows() -> None:
    code = (
        "import sys; sys.path.insert(0, '')\n"
        "from transformers.utils import is_kernels_available\n"
        "import planlm.kernels\n"
        "assert not is_kernels_available()\n"
        "assert not hasattr(sys.modules.get('kernels'), 'plan_projection')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_auto_classes_know_the_model_in_either_order() -> None:
    check = "from transformers import AutoConfig; AutoConfig.for_model('planlm')"
    for first, second in (
        ("import planlm", "import transformers"),
        ("from transformers import AutoModel", "import planlm"),
    ):
        code = f"{first}\n{second}\nfrom transformers import AutoModelForCausalLM\n{check}"
        subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ["pretrained.weights", "pretrained.tokenizer", "text.encoder", "text.alignment"])
def test_modules_below_the_model_can_be_imported_first(module: str) -> None:
    """transformers' registry, when it is imported, imports the model's room, which imports these."""
    subprocess.run([sys.executable, "-c", f"import planlm.{module}"], check=True, cwd=ROOT)


def test_what_several_rooms_ask_of_the_machine_is_read_in_one_place() -> None:
    readers = {"RANK": "ranks", "WORLD_SIZE": "ranks", "LOCAL_RANK": "ranks", "PLANLM_CACHE": "kernels.environment"}
    for module, path in MODULES.items():
        text = path.read_text()
        for variable in re.findall(r"(?:environ(?:\.get\(|\[)|getenv\()\s*[\"'](\w+)", text):
            assert readers.get(variable, module) == module, f"{module} reads {variable}"
        assert module == "precision" or "/proc/cpuinfo" not in text, f"{module} looks at the processor itself"


def test_packages_are_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"planlm." + name.removesuffix(".__init__") for name in MODULES if name.endswith(".__init__")}
    assert listed == found | {"planlm", "planlm.csrc"}


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short_and_documented(module: str) -> None:
    text = MODULES[module].read_text()
    assert text.count("\n") <= 500, f"{module}: more than 500 lines"
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{module}: no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert length <= 60, f"{module}.{node.name}: {length} lines"
            count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
            compiled = any(ast.unparse(decorator).endswith("jit") for decorator in node.decorator_list)  # by Triton
            public = module.startswith("kernels.") and node.name in ("plan_projection", "plan_projection_from_hidden")
            assert count <= 10 or compiled or public, f"{module}.{node.name}: {count} parameters"
    for name, node in public_definitions(tree):
        assert ast.get_docstring(node), f"{module}.{name}: no docstring"


# A function's name, its parameters, and what may stand between those and its body.
CPP_FUNCTION = re.compile(
    r"(\w+|\])\s*\(([^()]*)\)\s*(?:const|noexcept|override|INLINE_LAMBDA|\s)*(?:->[^(){]*|:\s[^;{}]*)?$"
)


def cpp_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """The name, the number of parameters and of lines of every C++ function, constructor and lambda with a body."""
    code = re.sub(r"//[^\n]*|\"(?:\\.|[^\"\\\n])*\"", "", text).replace("{}", "")
    opened: list[tuple[str, int]] = []
    behind = 0
    for match in re.finditer(r"[;{}]", code):
        if match[0] == "{":
            opened.append((code[behind : match.start()], match.start()))
        elif match[0] == "}":
            header, at = opened.pop()
            found = CPP_FUNCTION.search(header)
            if found is not None and found[1] not in ("if", "for", "while", "switch", "catch"):
                parameters = found[2].count(",") + 1 if found[2].strip() else 0
                yield found[1], parameters, code.count("\n", at, match.end()) + 1
        behind = match.end()


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").iterdir()), ids=lambda path: path.name)
def test_cpp_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 500, "more than 500 lines"
    for name, parameters, length in cpp_functions(text):
        assert length <= 60, f"{name}: {length} lines"
        assert parameters <= 10, f"{name}: {parameters} parameters"


def test_the_search_sees_cpp_functions() -> None:
    body = "x;\n" * 59
    text = f"""
        struct Long {{ explicit Long(int a) : a_(a), b_(f(a)) {{ {body} }} }};
        template <class R> R many(const R* a, int b = 0) const {{ run([&](int64_t i) {{ {body} }}); }}
        auto of(std::vector<int> values) -> int {{ if (values.empty()) {{ return 0; }} }}
    """
    assert list(cpp_functions(text)) == [("Long", 1, 60), ("]", 1, 60), ("many", 2, 60), ("of", 1, 1)]
    seen = {name for path in (ROOT / "csrc").iterdir() for name, *_ in cpp_functions(path.read_text())}
    assert {
        "Planner",
        "each_tile",
        "plan_projection",
        "differentiate_strip",
        "multiply_bf16",
        "packed_attention",
    } <= seen


def public_definitions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Public functions and classes of a module, and the public methods of those classes.

    Left out is what something else documents: overloads, methods of protocols, torch functions' forward and backward.
    """
    for node in tree.body:
        if "overload" in [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]:
            continue
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef) and "Protocol" not in [ast.unparse(base) for base in node.bases]:
                methods = [method for method in node.body if isinstance(method, ast.FunctionDef)]
                public = [method for method in methods if not method.name.startswith("_")]
                yield from (
                    (f"{node.name}.{method.name}", method)
                    for method in public
                    if method.name not in ("forward", "backward")
                )
