"""Measure the shape of the code against the limits of docs/design.md: `python -m tools.shape [ROOT]`.

Prints the figures, then a line for each limit that is broken; ends with 1 if there is one. Reads the source and runs
nothing of it.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

DAEMON = "wangpd.py"
MAX_DAEMON_LINES, MAX_FILE_LINES, MAX_CLASS_LINES, MAX_FUNCTION_LINES = 900, 400, 250, 40
MAX_SPINE_LINES, MAX_PRODUCT_LINES = 2500, 10_500
# What one reads in an hour to know the machine.
SPINE = (
    DAEMON,
    "engine/settings.py",
    "engine/job.py",
    "engine/queue/runner.py",
    "engine/workers/local.py",
    "engine/gpu/worker.py",
    "engine/gpu/run/render.py",
)
HEAVY = frozenset({"torch", "numpy", "diffusers", "transformers", "accelerate", "peft", "safetensors"})
# The rank of a package: imports point from a higher one to a lower one, or stay within it.
GPU = "engine.gpu"
WORKER = f"{GPU}.worker"  # what the daemon may name of the GPU's side


@dataclass(frozen=True)
class Source:
    """One file of the product: its dotted name, its lines and its syntax tree."""

    path: Path  # relative to the root
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        return ".".join(self.path.with_suffix("").parts).removesuffix(".__init__")

    @property
    def line_count(self) -> int:
        return len(self.text.splitlines())

    def imported(self, known: frozenset[str]) -> Iterator[str]:
        """The modules of `known` that it imports anywhere, `if TYPE_CHECKING` and functions included."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names if alias.name in known)
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from ([name for name in inner if name in known] or [node.module] * (node.module in known))


def sources(root: Path) -> list[Source]:
    """The product's files: wangpd.py and everything in engine/."""
    paths = [root / DAEMON, *sorted((root / "engine").rglob("*.py"))]
    return [Source(path.relative_to(root), text := path.read_text("utf-8"), ast.parse(text)) for path in paths]


def length(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `class` or `def` to the end."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def too_long(source: Source) -> Iterator[str]:
    """What is above its limit in one file."""
    most = MAX_DAEMON_LINES if str(source.path) == DAEMON else MAX_FILE_LINES
    if source.line_count > most:
        yield f"{source.path}: {source.line_count} lines, at most {most}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ClassDef) and length(node) > MAX_CLASS_LINES:
            yield f"{source.path}: class {node.name} has {length(node)} lines, at most {MAX_CLASS_LINES}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and length(node) > MAX_FUNCTION_LINES:
            yield f"{source.path}: {node.name}() has {length(node)} lines, at most {MAX_FUNCTION_LINES}"


def repeated_names(files: list[Source]) -> Iterator[str]:
    """File names and names of classes that occur twice."""
    stems: dict[str, Path] = {}
    classes: dict[str, Path] = {}
    for source in files:
        stem = source.path.stem
        if stem != "__init__" and (first := stems.setdefault(stem, source.path)) != source.path:
            yield f"file name twice: {first} and {source.path}"
        for node in source.tree.body:
            if isinstance(node, ast.ClassDef) and (first := classes.setdefault(node.name, source.path)) != source.path:
                yield f"class {node.name} twice: {first} and {source.path}"


def shadows(source: Source) -> Iterator[str]:
    """Locals and parameters that hide a function or class of their own module."""
    own = {
        node.name
        for node in source.tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        named = {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
        inside = [node.body] if isinstance(node, ast.Lambda) else node.body
        for part in (each for statement in inside for each in ast.walk(statement)):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                named.add(part.id)
        yield from (f"{source.path}:{node.lineno}: {name} hides {name}() of the module" for name in sorted(named & own))


def circles(files: list[Source]) -> Iterator[str]:
    """Files that import each other in a circle, a line each circle."""
    known = frozenset(source.module for source in files)
    graph = {source.module: sorted(set(source.imported(known)) - {source.module}) for source in files}
    for group in _strongly_connected(graph):
        if len(group) > 1:
            yield "import circle: " + ", ".join(sorted(group))


def _strongly_connected(graph: Mapping[str, list[str]]) -> list[set[str]]:
    """Tarjan's algorithm."""
    numbers: dict[str, int] = {}
    lows: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(name: str) -> None:
        numbers[name] = lows[name] = len(numbers)
        stack.append(name)
        for other in graph[name]:
            if other not in numbers:
                visit(other)
            if other in stack:
                lows[name] = min(lows[name], lows[other])
        if lows[name] == numbers[name]:
            place = stack.index(name)
            found.append(set(stack[place:]))
            del stack[place:]

    for name in graph:
        if name not in numbers:
            visit(name)
    return found


def rank(module: str) -> int:
    """How high a module stands: imports point down."""
    if module == "wangpd":
        return 3
    if module == "engine.cli":
        return 2
    return 1 if module.startswith("engine.api") else 0


def misdirected(source: Source, known: frozenset[str]) -> Iterator[str]:
    """Imports that point up, and those that cross the border to the GPU's side by another door than the worker."""
    on_gpu = source.module.startswith(GPU)
    for other in sorted(set(source.imported(known))):
        if rank(other) > rank(source.module) or (other == "wangpd" and source.module != "wangpd"):
            yield f"{source.path}: imports {other}, which stands above it"
        if not on_gpu and other.startswith(f"{GPU}.") and other != WORKER:
            yield f"{source.path}: imports {other}; only engine/gpu may, others name {WORKER} alone"
    names = {name.partition(".")[0] for name in _all_imported(source)}
    if not on_gpu and (heavy := names & HEAVY):
        yield f"{source.path}: imports {', '.join(sorted(heavy))}, which only engine/gpu may"


def _all_imported(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def figures(files: list[Source]) -> dict[str, int]:
    """The sizes that the limits are about."""
    by_path = {str(source.path): source.line_count for source in files}
    return {
        "product lines": sum(by_path.values()),
        "spine lines": sum(by_path.get(path, 0) for path in SPINE),
        "wangpd.py lines": by_path[DAEMON],
        "files": len(files),
    }


def faults(files: list[Source]) -> list[str]:
    """Every limit that is broken, a line each."""
    known = frozenset(source.module for source in files)
    sizes = figures(files)
    found = [fault for source in files for fault in (*too_long(source), *shadows(source), *misdirected(source, known))]
    found += [*repeated_names(files), *circles(files)]
    missing = sorted(set(SPINE) - {str(source.path) for source in files})
    found += [f"the spine lacks {path}" for path in missing]
    if sizes["spine lines"] > MAX_SPINE_LINES:
        found.append(f"the spine has {sizes['spine lines']} lines, at most {MAX_SPINE_LINES}")
    if sizes["product lines"] > MAX_PRODUCT_LINES:
        found.append(f"the product has {sizes['product lines']} lines, at most {MAX_PRODUCT_LINES}")
    return found


def main(arguments: list[str]) -> int:
    """Print figures and faults; returns the exit code."""
    files = sources(Path(arguments[0]) if arguments else Path())
    for name, value in figures(files).items():
        print(f"{name}: {value}")
    found = faults(files)
    for fault in found:
        print(fault)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
