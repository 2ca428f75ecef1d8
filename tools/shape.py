"""Measure the shape of the code against the limits of docs/design.md: `python -m tools.shape [ROOT]`.

Prints the figures, then a line for each limit that is broken; ends with 1 if there is one. Reads the source and runs
nothing of it.
"""

import ast
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

DAEMON = "wangpd.py"
MAX_DAEMON_LINES, MAX_FILE_LINES, MAX_CLASS_LINES, MAX_FUNCTION_LINES = 900, 400, 250, 40
MAX_SPINE_LINES, MAX_PRODUCT_LINES = 2500, 12_850
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
GPU = "engine.gpu"
WORKER = f"{GPU}.worker"  # the only module of the GPU's side that the daemon may name
OWNED = ("engine.api", "engine.queue", "engine.workers", "engine.files.outputs")  # by the daemon
# Imports point from a higher rank to a lower one, or stay within it. The first prefix that fits counts.
RANKS = {"wangpd": 3, "engine.cli": 2, "engine.api": 1, "": 0}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Source:
    """One file of the product: its lines and its syntax tree."""

    path: Path  # relative to the root
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        """The dotted name."""
        return ".".join(self.path.with_suffix("").parts).removesuffix(".__init__")

    @property
    def line_count(self) -> int:
        return len(self.text.splitlines())

    @property
    def on_gpu(self) -> bool:
        """It belongs to the worker process."""
        return f"{self.module}.".startswith(f"{GPU}.")

    def imported(self) -> set[str]:
        """What it imports anywhere, under `if TYPE_CHECKING` too; `from a import b` gives `a` and `a.b`."""
        names: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
        return names


def sources(root: Path) -> list[Source]:
    """The product's files: wangpd.py and everything in engine/."""
    paths = [root / DAEMON, *sorted((root / "engine").rglob("*.py"))]
    return [Source(path.relative_to(root), text := path.read_text("utf-8"), ast.parse(text)) for path in paths]


def figures(files: list[Source]) -> dict[str, int]:
    """The sizes that the limits are about."""
    by_path = {str(source.path): source.line_count for source in files}
    return {
        "product lines": sum(by_path.values()),
        "spine lines": sum(by_path.get(path, 0) for path in SPINE),
        "wangpd.py lines": by_path[DAEMON],
        "files": len(files),
    }


# ------------------------------------------------------------------------------------------------------------- sizes


def long_files(files: list[Source]) -> Iterator[str]:
    for source in files:
        most = MAX_DAEMON_LINES if str(source.path) == DAEMON else MAX_FILE_LINES
        if source.line_count > most:
            yield f"{source.path}: {source.line_count} lines, at most {most}"


def long_blocks(kinds: tuple[type[ast.AST], ...], most: int, files: list[Source]) -> Iterator[str]:
    """Classes or functions with more than `most` lines from `class` or `def` to the end."""
    for source in files:
        for node in ast.walk(source.tree):
            if isinstance(node, kinds) and (lines := node.end_lineno - node.lineno + 1) > most:
                yield f"{source.path}: {node.name} has {lines} lines, at most {most}"


def large_sum(figure: str, most: int, files: list[Source]) -> Iterator[str]:
    if (lines := figures(files)[figure]) > most:
        yield f"{lines} {figure}, at most {most}"


def missing_spine(files: list[Source]) -> Iterator[str]:
    yield from (f"the spine lacks {path}" for path in sorted(set(SPINE) - {str(source.path) for source in files}))


# ------------------------------------------------------------------------------------------------------------- names


def repeated_files(files: list[Source]) -> Iterator[str]:
    yield from repeated("file name", [(source.path.stem, source) for source in files])


def repeated_classes(files: list[Source]) -> Iterator[str]:
    """Names of top-level classes."""
    classes = [(node.name, source) for source in files for node in source.tree.body if isinstance(node, ast.ClassDef)]
    yield from repeated("class", classes)


def repeated(kind: str, named: list[tuple[str, Source]]) -> Iterator[str]:
    first: dict[str, Source] = {}
    for name, source in named:
        if name != "__init__" and first.setdefault(name, source) is not source:
            yield f"{kind} {name} twice: {first[name].path} and {source.path}"


def hidden_names(files: list[Source]) -> Iterator[str]:
    """Locals and parameters that hide a function or class of their own module."""
    for source in files:
        own = {node.name for node in source.tree.body if isinstance(node, (*FUNCTIONS, ast.ClassDef))}
        for node in ast.walk(source.tree):
            if isinstance(node, (*FUNCTIONS, ast.Lambda)):
                for name in sorted(bound_in(node) & own):
                    yield f"{source.path}:{node.lineno}: {name} hides {name} of the module"


def bound_in(function: ast.AST) -> set[str]:
    """Its parameters, and the names that are assigned in it."""
    parts = list(ast.walk(function))
    names = {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    return names | {part.arg for part in parts if isinstance(part, ast.arg)}


# ----------------------------------------------------------------------------------------------------------- imports


def circles(files: list[Source]) -> Iterator[str]:
    """The first circle of files that import each other."""
    known = {source.module for source in files}
    try:
        TopologicalSorter({source.module: source.imported() & known for source in files}).prepare()
    except CycleError as error:
        yield "import circle: " + " → ".join(reversed(error.args[1]))


def rank(module: str) -> int:
    return next(place for prefix, place in RANKS.items() if f"{module}.".startswith(f"{prefix}.") or not prefix)


def upward_imports(files: list[Source]) -> Iterator[str]:
    for source in files:
        for other in sorted(source.imported() & {each.module for each in files}):
            if rank(other) > rank(source.module):
                yield f"{source.path}: imports {other}, which stands above it"


def heavy_imports(files: list[Source]) -> Iterator[str]:
    for source in files:
        if not source.on_gpu and (heavy := {name.partition(".")[0] for name in source.imported()} & HEAVY):
            yield f"{source.path}: imports {', '.join(sorted(heavy))}, which only engine/gpu may"


def border_crossings(files: list[Source]) -> Iterator[str]:
    """What the daemon imports of the GPU's side but the worker, and what that side imports of the daemon's own."""
    modules = {each.module for each in files}
    for source in files:
        for other in sorted(source.imported() & modules):
            if not source.on_gpu and other.startswith(f"{GPU}.") and other != WORKER:
                yield f"{source.path}: imports {other}; outside engine/gpu only its worker is named"
            if source.on_gpu and other.startswith(OWNED):
                yield f"{source.path}: imports {other}, which the daemon owns"


Rule = Callable[[list[Source]], Iterator[str]]
RULES: Mapping[str, Rule] = {
    "no file is too long": long_files,
    "no class is too long": partial(long_blocks, (ast.ClassDef,), MAX_CLASS_LINES),
    "no function is too long": partial(long_blocks, FUNCTIONS, MAX_FUNCTION_LINES),
    "the spine is complete": missing_spine,
    "the spine is read in an hour": partial(large_sum, "spine lines", MAX_SPINE_LINES),
    "the product is small": partial(large_sum, "product lines", MAX_PRODUCT_LINES),
    "no file name is used twice": repeated_files,
    "no class name is used twice": repeated_classes,
    "no local hides a name of its module": hidden_names,
    "no import circle": circles,
    "imports point down": upward_imports,
    "only the GPU's side imports torch": heavy_imports,
    "the worker is the only door between daemon and GPU": border_crossings,
}


def main(arguments: list[str]) -> int:
    """Print figures and faults; returns the exit code."""
    files = sources(Path(arguments[0]) if arguments else Path())
    for name, value in figures(files).items():
        print(f"{name}: {value}")
    faults = [fault for rule in RULES.values() for fault in rule(files)]
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
