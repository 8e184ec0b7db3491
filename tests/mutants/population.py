"""The mutants there are, and a sample of them: Cosmic Ray's operators on Python, a small table on csrc/cpu.

What is drawn is a place, each as likely as any other, and then one of the changes that a kind of operator
makes there: eleven ways to replace one `+` weigh as much as the one way to remove one `not`.
"""

from __future__ import annotations

import ast
import difflib
import fnmatch
import functools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cosmic_ray.plugins
import yaml
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from parso.tree import NodeOrLeaf

PYTHON, NATIVE = ("dgs_kernels/**/*.py", "python/dgsnet/**/*.py"), ("csrc/cpu/*",)

# The nodes that the many operators of a kind look at; asking each of them about all nodes takes a minute.
LOOKED_AT = {
    "ReplaceBinaryOperator": ("operator",),
    "ReplaceComparisonOperator": ("comparison",),
    "ReplaceUnaryOperator": ("factor", "not_test"),
}

# One change of a line of C++ by each row: what is sought and what may stand there instead. clang-format puts
# spaces around binary operators, and around none of a template or a pointer.
NATIVE_OPERATORS = {
    "relation": (
        r"(?<= )(<=|>=|==|!=|<|>)(?= )",
        {
            "<": ["<=", ">"],
            "<=": ["<", ">"],
            ">": [">=", "<"],
            ">=": [">", "<"],
            "==": ["!="],
            "!=": ["=="],
        },
    ),
    "arithmetic": (
        r"(?<= )([-+*/%]=?)(?= )",
        {
            "+": ["-"],
            "-": ["+"],
            "*": ["/"],
            "/": ["*"],
            "%": ["/"],
            "+=": ["-=", "="],
            "-=": ["+="],
            "*=": ["/="],
            "/=": ["*="],
        },
    ),
    "logic": (
        r"(?<= )(&&|\|\|)(?= )|\b(true|false)\b",
        {"&&": ["||"], "||": ["&&"], "true": ["false"], "false": ["true"]},
    ),
    "bits": (r"(?<= )(<<|>>|&|\|)(?= )", {"<<": [">>"], ">>": ["<<"], "&": ["|"], "|": ["&"]}),
    "extreme": (r"\bstd::(min|max)\b", {"min": ["max"], "max": ["min"]}),
    # The condition is negated.
    "condition": (r"\bif \(([^()]*(?:\([^()]*\)[^()]*)*)\)", None),
    # The number becomes one more, or one less.
    "number": (r"(?<![\w.])(\d+)(?![\w.'])", None),
    # The fraction becomes one more, or one less.
    "fraction": (r"(?<![\w.])(\d+\.\d*)(?=f?\b|f?[^\w.])", None),
}


@dataclass(frozen=True, order=True)
class Place:
    """Where one operator can change a file, in `ways` of its own."""

    file: str
    line: int
    column: int
    operator: str
    ways: tuple[tuple[str | int, ...], ...]


@dataclass(frozen=True)
class Mutant:
    """One changed file: `before` and `after` are the lines that differ, without their margins."""

    file: str
    line: int
    operator: str
    text: str
    before: str
    after: str

    @property
    def room(self) -> str:
        return str(Path(self.file).parent)


def draw(root: Path, files: str, seed: int) -> tuple[Iterator[Mutant], Iterator[Mutant], float]:
    """Mutants of Python and of C++ without end, and the share of C++ in the lines of the files asked for."""
    python = [file for pattern in PYTHON for file in matching(root, pattern, files)]
    native = [file for pattern in NATIVE for file in matching(root, pattern, files)]
    lines = {file: (root / file).read_text(encoding="utf-8").count("\n") for file in [*python, *native]}
    share = sum(lines[file] for file in native) / max(1, sum(lines.values()))
    drawn = []
    for chosen, places in ((python, python_places), (native, native_places)):
        found = sorted(place for file in chosen for place in places(root, file))
        generator = random.Random(seed)
        generator.shuffle(found)
        drawn.append(_mutants(root, found, generator))
    return *drawn, share


def matching(root: Path, pattern: str, words: str) -> list[str]:
    """Files that match one of the words, each a part of the path or a pattern; all, if there is no word."""
    found = sorted(str(path.relative_to(root)) for path in root.glob(pattern) if path.is_file())
    return [
        file
        for file in found
        if not words or any(word in file or fnmatch.fnmatch(file, word) for word in words.split())
    ]


def _mutants(root: Path, places: Sequence[Place], generator: random.Random) -> Iterator[Mutant]:
    for place in places:
        if mutant := mutate(root, place, generator.choice(place.ways)):
            yield mutant


def mutate(root: Path, place: Place, way: tuple) -> Mutant | None:
    """The file with one change; None where that is no program, or the same one."""
    source = (root / place.file).read_text(encoding="utf-8")
    if place.file.endswith(".py"):
        name, occurrence = way
        text = mutate_code(source, python_operators()[name], occurrence)
        if text is None or _same_program(source, text):
            return None
        operator = name.rpartition("/")[2]
    else:
        begin, end, new = way
        lines = source.splitlines(keepends=True)
        row = lines[place.line - 1]
        lines[place.line - 1] = row[:begin] + new + row[end:]
        text, operator = "".join(lines), f"{place.operator} {row[begin:end]} -> {new}"
    before, after = difference(source, text)
    return Mutant(place.file, place.line, operator, text, before, after)


def difference(old: str, new: str) -> tuple[str, str]:
    """The lines that differ, of both texts, without their margins."""
    a, b = old.splitlines(), new.splitlines()
    changes = [
        c for c in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes() if c[0] != "equal"
    ]
    removed = [line.strip() for _, begin, end, _, _ in changes for line in a[begin:end]]
    added = [line.strip() for _, _, _, begin, end in changes for line in b[begin:end]]
    return "\n".join(removed).strip(), "\n".join(added).strip()


def _same_program(old: str, new: str) -> bool:
    try:
        return ast.dump(ast.parse(old)) == ast.dump(ast.parse(new))
    except SyntaxError:
        return True


@functools.cache
def python_operators() -> dict:
    """Cosmic Ray's operators that need no arguments, by name."""
    classes = {name: cosmic_ray.plugins.get_operator(name) for name in cosmic_ray.plugins.operator_names()}
    return {name: kind() for name, kind in sorted(classes.items()) if not kind.arguments()}


def python_places(root: Path, file: str) -> list[Place]:
    """Left out, since no behaviour can show it: types, as Cosmic Ray itself leaves out some of them."""
    nodes = list(ast_nodes(get_ast((root / file).read_text(encoding="utf-8"))))
    ways: dict[tuple, list] = {}
    for name, operator in python_operators().items():
        kind, occurrence = name.rpartition("/")[2].partition("_")[0], 0
        for node in nodes:
            if kind in LOOKED_AT and node.type not in LOOKED_AT[kind]:
                continue
            for (line, column), _ in operator.mutation_positions(node):
                if not in_annotation(node):
                    ways.setdefault((line, column, kind), []).append((name, occurrence))
                occurrence += 1
    return [Place(file, *place, tuple(found)) for place, found in ways.items()]


def in_annotation(node: NodeOrLeaf) -> bool:
    """Whether a node belongs to the type of a parameter, a result or a variable."""
    while node.parent is not None:
        above = node.parent
        if (
            (above.type == "tfpdef" and node is above.children[2])
            or (above.type == "annassign" and node is above.children[1])
            or (above.type in ("funcdef", "lambdef") and node is above.annotation)
        ):
            return True
        node = above
    return False


def native_places(root: Path, file: str) -> list[Place]:
    found = []
    source = (root / file).read_text(encoding="utf-8")
    # This finds comments and strings.
    hidden = re.compile(r'//.*|/\*.*?\*/|"(?:\\.|[^"\\])*"')
    blank = hidden.sub(lambda match: " " * len(match[0]), source)
    for number, row in enumerate(blank.splitlines(), 1):
        if row.lstrip().startswith(("#", "static_assert", "template", "using")):
            continue
        for operator, (pattern, table) in NATIVE_OPERATORS.items():
            for match in re.finditer(pattern, row):
                group = match.lastindex or 0
                old, (begin, end) = match[group], match.span(group)
                if operator == "condition":
                    new = [f"!({old})"]
                elif operator == "number":
                    new = [str(int(old) + 1), str(int(old) - 1)]
                elif operator == "fraction":
                    new = [repr(float(old) + 1), repr(float(old) - 1)]
                else:
                    new = table[old]
                found.append(Place(file, number, begin, operator, tuple((begin, end, text) for text in new)))
    return found


class Equivalents:
    """Mutants that no behaviour can show: a file, a line's text before and after, and the reason."""

    def __init__(self, path: Path) -> None:
        entries = yaml.safe_load(path.read_text(encoding="utf-8")) or []
        for entry in entries:
            if entry.keys() != {"file", "before", "after", "why"} or not entry["why"]:
                raise ValueError(
                    f"{path.name}: an entry has file, before, after and why, not {sorted(entry)}"
                )
        self._entries = {(e["file"], e["before"], e["after"]): e["why"] for e in entries}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, mutant: Mutant) -> bool:
        return (mutant.file, mutant.before, mutant.after) in self._entries

    def unmatched(self, root: Path) -> list[str]:
        """Entries that are no mutant of today's code, each as `file: before -> after`."""
        left = set(self._entries)
        for file in sorted({file for file, _, _ in self._entries}):
            if not (root / file).is_file():
                continue
            lines = (root / file).read_text(encoding="utf-8").splitlines()
            for place in (python_places if file.endswith(".py") else native_places)(root, file):
                # As text first: a mutant takes parsing the whole file.
                near = {line.strip() for line in lines[max(0, place.line - 2) : place.line + 1]}
                wanted = {entry for entry in left if entry[0] == file and entry[1].partition("\n")[0] in near}
                for way in place.ways:
                    if wanted & left and (mutant := mutate(root, place, way)):
                        left.discard((file, mutant.before, mutant.after))
        return [f"{file}: {before} -> {after}" for file, before, after in left]
