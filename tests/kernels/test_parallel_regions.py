"""What C++ runs in several threads at once names no tensor and calls nothing of torch's but raw products."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"

# Free of tensors and of the caller's modes.
ALLOWED = re.compile(r"at::(parallel_for|BFloat16|native::cpublas::brgemm(_release)?|get_num_threads)\b")
FORBIDDEN = {
    "something of torch": re.compile(r"\b(?:at|c10|torch)::\w+(?:::\w+)*|\bTORCH_(?!INTERNAL_ASSERT)\w+"),
    "a tensor's type": re.compile(r"\b(?:Optional)?Tensor\b"),
    "a tensor's member": re.compile(
        r"(?:\.|->)\s*(?:template\s+)?(?:(?:mutable_|const_)?data_ptr|scalar_type|stride|sizes?(?=\(\w)|numel|narrow|select"
        r"|view|to(?=\(at)|options|index\w*|zero_|fill_|copy_|add\w*_|sum|t(?=\(\))|contiguous|clone|defined)\b"
    ),
}
KEYWORDS = {"if", "for", "while", "switch", "return", "sizeof", "catch", "parallel_for", "static_cast", "alignof"}


@dataclass(frozen=True)
class Part:
    """A stretch of a file's code."""

    file: str
    begin: int
    end: int

    def has(self, other: Part) -> bool:
        return self.file == other.file and self.begin <= other.begin and other.end <= self.end


class Sources:
    """The C++ files without comments and strings, and where functions, lambdas and tensors are in them."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.code = {name: _blank(text) for name, text in texts.items()}
        self.structs = [
            part for file in self.code for part in self.blocks(file, r"\b(?:struct|class)\s+\w+[^;{}()]*(?=\{)")
        ]
        self.units = [part for file in self.code for part in self.top_level(file)]

    def text(self, part: Part) -> str:
        return self.code[part.file][part.begin : part.end]

    def line(self, part: Part, at: int) -> str:
        return f"{part.file}:{self.code[part.file].count(chr(10), 0, part.begin + at) + 1}"

    def close(self, file: str, at: int) -> int:
        """Behind the bracket that closes the one at `at`."""
        opening = self.code[file][at]
        closing, depth = {"(": ")", "{": "}"}[opening], 0
        for match in re.compile(f"[{opening}{closing}]").finditer(self.code[file], at):
            depth += 1 if match[0] == opening else -1
            if depth == 0:
                return match.end()
        raise AssertionError(f"{file}: nothing closes {opening} at {at}")

    def blocks(self, file: str, header: str) -> list[Part]:
        """From each match of `header` to the end of the braces behind it."""
        code = self.code[file]
        return [Part(file, m.start(), self.close(file, m.end())) for m in re.finditer(header, code)]

    def top_level(self, file: str) -> list[Part]:
        """Functions and structs with what stands before their braces; namespaces are looked into."""
        code, found, header, at = self.code[file], [], 0, 0
        while at < len(code):
            if code[at] == "{" and not re.search(r"\b(namespace\s*\w*|extern)\s*$", code[header:at]):
                at = self.close(file, at)
                found.append(Part(file, header, at))
                header = at
                continue
            at += 1
            if code[at - 1] in ";{}":
                header = at
        return found

    def lambdas(self, part: Part) -> list[Part]:
        """The bodies of the lambdas that begin in a part."""
        found = []
        for match in re.finditer(r"\[[&=\w\s,:]*\]\s*(?=[({])", self.text(part)):
            at = part.begin + match.end()
            brace = self.code[part.file].index(
                "{", self.close(part.file, at) if self.code[part.file][at] == "(" else at
            )
            found.append(Part(part.file, brace, self.close(part.file, brace)))
        return found

    def definitions(self, name: str, member: bool, caller: Part) -> list[Part]:
        """The bodies of the functions and named lambdas that a call in `caller` may mean: the nearest."""
        unit = next(unit for unit in self.units if unit.has(caller))
        named = rf"\bauto\s+{re.escape(name)}\s*=\s*(?=\[)"
        lambdas = [
            body
            for match in re.finditer(named, self.text(unit))
            for body in self.lambdas(Part(unit.file, unit.begin + match.end(), unit.end))[:1]
        ]
        if lambdas and not member:
            return lambdas
        found = []
        for file, code in self.code.items():
            for match in re.finditer(rf"\b{re.escape(name)}\s*(?=\()", code):
                opening = re.compile(r"\s*(?:const\b|noexcept\b|override\b)*\s*\{").match(
                    code, self.close(file, match.end())
                )
                if opening is None or re.search(r"(?:,|[^:]:)\s*$", code[: match.start()]):  # a call, an initialiser
                    continue
                body = Part(file, match.start(), self.close(file, opening.end() - 1))
                around = [part for part in self.structs if part.has(body)]
                if bool(around) == member or any(part.has(caller) for part in around):
                    found.append(body)
        return [body for body in found if body.file == caller.file] or found

    def enclosing(self, part: Part) -> tuple[str, Part] | None:
        """The function template around a part that takes a body to run: its name, and where its parameters are."""
        for match in re.finditer(r"\b(\w+)\s*(?=\([^()]*\bBody\s+(\w+)\s*\))", self.code[part.file]):
            behind = self.close(part.file, match.end())
            brace = self.code[part.file].index("{", behind)
            if Part(part.file, brace, self.close(part.file, brace)).has(part):
                return match[1], Part(part.file, match.start(), behind)
        return None

    def declared(self, part: Part) -> set[str]:
        """Names that a part declares as tensors and as nothing else."""
        text, tensors = self.text(part), set()
        for match in re.finditer(r"\b(?:Optional)?Tensor\s*&?\s*(\w+)", text):
            tensors.add(match[1])
            if re.search(r"[;{}]\s*(const\s*)?$", text[: match.start()]):  # a statement: more names may follow
                statement = text[match.start(1) :].split(";")[0]
                for inside in (r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)|\{[^{}]*\}", r"\?[^,;]*"):
                    statement = re.sub(inside, "", statement)
                tensors |= set(re.findall(r"(?:^|,)\s*(\w+)", statement))
        kinds = "Matrix|Strip|Head|Heads|Workspace|SumOverRows|int64_t|R|float|double|Half|bool"
        typed = rf"\b(?:{kinds})[\s&*]+(?:const\s+)?(\w+)"
        return tensors - set(re.findall(typed, text)) - {"const", "Tensor"}

    def members(self) -> set[str]:
        """Tensors that are members of a struct, where no struct has another member of that name."""
        inner = [re.sub(r"\{[^{}]*\}", "{}", self.text(part).partition("{")[2]) for part in self.structs]
        inner = [re.sub(r" = [^,;]*", "", text) for text in inner]  # what members begin as
        tensors = {
            name
            for text in inner
            for line in re.findall(r"^\s*Tensor ([\w, ]+);", text, re.M)
            for name in line.split(", ")
        }
        others = {
            name
            for text in inner
            for line in re.findall(r"^\s*(?!Tensor)\w+(?:<\w+>)? ([\w, ]+);", text, re.M)
            for name in line.split(", ")
        }
        return tensors - others


def _blank(text: str) -> str:
    """The text with comments and strings turned into spaces, line for line."""
    keep = lambda match: re.sub(r"[^\n]", " ", match[0])  # noqa: E731
    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', keep, text, flags=re.DOTALL)


def parallel_parts(sources: Sources) -> list[Part]:
    """Everything that runs inside at::parallel_for: the lambdas, the bodies that they run, and what those call."""
    waiting: list[Part] = []
    for file, code in sources.code.items():
        for match in re.finditer(r"\bparallel_for\s*(?=\()", code):
            call = Part(file, match.end(), sources.close(file, match.end()))
            bodies = sources.lambdas(call)
            assert bodies, f"{sources.line(call, 0)}: parallel_for without a lambda: write it in the call"
            waiting += bodies[:1]
            around = sources.enclosing(call)
            if around is not None:  # it runs what it is given: the lambdas of its callers
                waiting += given_to(sources, *around)
    found: list[Part] = []
    while waiting:
        part = waiting.pop()
        if any(other.has(part) for other in found):
            continue
        found.append(part)
        around = sources.enclosing(part)
        if around is not None:
            waiting += given_to(sources, *around)
        for dot, name in set(re.findall(r"(\.|->|::)?\b(\w+)\s*(?:<\w+>)?\s*\(", sources.text(part))):
            if name not in KEYWORDS:
                waiting += sources.definitions(name, bool(dot), part)
    return found


def given_to(sources: Sources, name: str, definition: Part) -> list[Part]:
    """The lambdas that callers of `name` hand to it."""
    found = []
    for file, code in sources.code.items():
        for match in re.finditer(rf"\b{name}\s*(?=\()", code):
            if file != definition.file or match.start() != definition.begin:
                found += sources.lambdas(Part(file, match.end(), sources.close(file, match.end())))[:1]
    return found


def problems(texts: dict[str, str]) -> list[str]:
    """What is not allowed in the parallel parts of these files."""
    sources, found = Sources(texts), set()
    members = sources.members()
    for part in parallel_parts(sources):
        text = ALLOWED.sub(lambda match: " " * len(match[0]), sources.text(part))
        for what, pattern in FORBIDDEN.items():
            found |= {f"{sources.line(part, m.start())}: {what}: {m[0]}" for m in pattern.finditer(text)}
        names = {name for unit in sources.units if unit.has(part) for name in sources.declared(unit)}
        for match in re.finditer(r"(\.|->)?\b([A-Za-z_]\w*)", text):
            if match[2] in (members if match[1] else names):
                found.add(f"{sources.line(part, match.start())}: a tensor: {match[2]}")
    return sorted(found)


def texts() -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(CSRC.iterdir()) if path.suffix in (".cpp", ".h")}


def test_threads_see_memory_only() -> None:
    regions = [part.file for part in parallel_parts(Sources(texts()))]
    assert {
        "add_plan.cpp",
        "attention.cpp",
        "cross_entropy.cpp",
        "gradient.cpp",
        "plan_projection.cpp",
        "planner.h",
        "product.cpp",
        "segment_sum.h",
        "softmax.h",
    } <= set(regions), "the test sees every file that works in parallel"
    assert problems(texts()) == []


@pytest.mark.parametrize("name", ["pack.h", "segment_sum.h", "softmax.h", "vector.h"])
def test_the_vector_loops_know_no_torch(name: str) -> None:
    assert not re.search(r"ATen|torch/|c10|at::|\bTensor\b", _blank((CSRC / name).read_text()))


def test_private_symbols_of_torch_stand_in_one_file() -> None:
    private = re.compile(r"\bnative::|\b_linear_pointwise\b|\b[sd]gemm_\b")
    assert [name for name, text in texts().items() if private.search(text)] == ["product.cpp"]


REGION = """
void inner(const Tensor& logits, int64_t row) {{ {called} }}
template <class Body>
void each(int64_t count, Body body) {{
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {{ for (auto i = begin; i < end; ++i) body(i); }});
}}
void outer(Tensor logits, const Tensor& labels) {{
  const auto named = [&](int64_t row) {{ {named} }};
  {outside}
  at::parallel_for(0, 3, 1, [&, n = 3](int64_t begin, int64_t end) {{ {inside} }});
  each(3, [&](int64_t row) {{ {body} }});
}}
"""
NOTHING = dict.fromkeys(("called", "named", "outside", "inside", "body"), ";")


@pytest.mark.parametrize(
    "line", ["logits[row].zero_();", "f(logits);", "at::empty({3});", "x.narrow(0, 1, 2);", "Tensor x;"]
)
@pytest.mark.parametrize(
    "where",
    [{"inside": ""}, {"body": ""}, {"named": "", "inside": "named(3);"}, {"called": "", "body": "inner(x, 1);"}],
    ids=str,
)
def test_the_search_finds_tensors_wherever_they_are(where: dict[str, str], line: str) -> None:
    parts = NOTHING | {name: text or line for name, text in where.items()}
    assert problems({"a.cpp": REGION.format(**parts)}), parts


def test_the_search_leaves_the_rest_alone() -> None:
    parts = NOTHING | {
        "outside": "logits[0].zero_(); /* in parallel_for(logits) */",
        "inside": "sum[begin] += n; /* Tensor */",
        "body": "data[row] = 0;",
    }
    assert problems({"a.cpp": REGION.format(**parts)}) == []
