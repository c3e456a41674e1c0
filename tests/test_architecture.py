"""The architecture as a test: who may import whom, and what the start-up path may not load.

Reads the sources with `ast`; nothing is imported but by the one test that starts an
interpreter. It holds on a partial tree: a module that does not exist yet breaks no rule.
An exception is a line in a table here, with its reason.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "headgate"

#: Lowest first. A layer imports those below it; the parts of one layer never import each other.
LAYERS = (
    ("errors",),
    ("checks",),
    ("options",),
    ("config",),
    ("core",),
    ("logs", "eventloop", "signals"),
    ("wire",),
    ("backend_route",),
    ("engine", "router"),
    ("routers", "membership"),
    ("line_membership", "loop_membership"),
    ("instance", "homes"),
    ("calls", "background"),
    ("reservations",),
    ("lanes", "refs"),
    ("reach", "arguments"),
    ("handle", "controller", "proxy", "replica", "params", "status"),
    ("launch",),
    ("launch_ray",),
    ("api",),
    ("engines",),
    ("starting",),
    ("processes", "actors"),
    ("__init__",),
)

#: (importing module, imported part) -> why it may break the order.
ORDER_EXCEPTIONS: dict[tuple[str, str], str] = {
    ("handle", "replica"): "a Starlette Request passed as data is made portable by replica/request.py",
}

#: What core/ may use besides itself, `config` and `errors`. Everything here is pure.
PURE = {
    "__future__", "bisect", "collections", "difflib", "enum", "functools", "hashlib", "heapq", "itertools",
    "math", "msgspec", "numbers", "operator", "re", "string", "struct", "types", "typing", "urllib", "uuid",
}  # fmt: skip

#: Third-party module -> the only files that may import it.
HOMES = {
    "httptools": {"proxy.second_opinion"},
    "uvloop": {"eventloop"},
    "starlette": {"replica.request", "replica.response", "replica.slim", "proxy.asgi"},
    "ray": {"engine.cluster"},
}

#: Too slow for the start-up path: 30 to 130 ms each. Inside a function is fine.
SLOW_TO_IMPORT = ("pydantic", "importlib.metadata", "subprocess", "multiprocessing")

#: What the first line of a user's script must not load.
NOT_WITH_THE_PACKAGE = (*SLOW_TO_IMPORT, "asyncio", "starlette", "httptools", "uvloop", "ray")

#: Modules of core/ without a test file of their own -> why.
CORE_WITHOUT_TESTS = {"state": "declares values and decides nothing"}


class Import(NamedTuple):
    """One import statement's target: a dotted name, and where the statement stands."""

    name: str
    line: int
    at_module_level: bool
    for_types_only: bool

    @property
    def internal(self) -> str | None:
        """The dotted name inside the package, "" for the package itself, None if it is foreign."""
        if self.name == "headgate":
            return ""
        return self.name.removeprefix("headgate.") if self.name.startswith("headgate.") else None

    @property
    def root(self) -> str:
        return self.name.partition(".")[0]


def modules() -> dict[str, Path]:
    """Dotted name inside the package -> file; a package's own name stands for its __init__."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


MODULES = modules()


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def statements(
    node: ast.AST, top: bool = True, types: bool = False
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool, bool]]:
    """Every import below `node` with (runs at module level, is under TYPE_CHECKING)."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, top, types
        elif isinstance(child, ast.If) and is_type_checking(child.test):
            for inner in child.body:
                yield from statements(ast.Module([inner], []), top, True)
            for inner in child.orelse:
                yield from statements(ast.Module([inner], []), top, types)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from statements(child, top and not inside, types)


def imports_of(source: str, module: str = "module") -> list[Import]:
    """All imports of a source text; `from a import b` counts as `a.b` where that is one of our modules."""
    found = []
    for node, top, types in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            origin = absolute(node, module)
            names = sorted({target(origin, alias.name) for alias in node.names})
        found += [Import(name, node.lineno, top, types) for name in names]
    return found


def absolute(node: ast.ImportFrom, module: str) -> str:
    """The full name of what a `from` statement of `module` names, also where it is relative."""
    if not node.level:
        return node.module or ""
    parts = ["headgate", *module.split(".")]
    if MODULES.get(module, Path()).name == "__init__.py" and module != "__init__":
        parts.append("__init__")
    return ".".join([*parts[: -node.level], *([node.module] if node.module else [])])


def target(module: str, name: str) -> str:
    dotted = f"{module}.{name}"
    ours = dotted.removeprefix("headgate.")
    known = ours in MODULES or any(ours in parts for parts in LAYERS)
    return dotted if dotted in SLOW_TO_IMPORT or (ours != dotted and known) else module


def imports(module: str) -> list[Import]:
    return imports_of(MODULES[module].read_text(encoding="utf-8"), module)


def part(module: str) -> str:
    """The part of the architecture that a module belongs to: "core" for "core.routes"."""
    return module.partition(".")[0] or "__init__"


def layer(module: str) -> int:
    return next(index for index, parts in enumerate(LAYERS) if part(module) in parts)


def order_faults(module: str, found: list[Import]) -> list[str]:
    faults = []
    for each in found:
        if each.internal is None or part(module) == part(each.internal):
            continue
        allowed = layer(each.internal) < layer(module) or (module, part(each.internal)) in ORDER_EXCEPTIONS
        if not allowed:
            faults.append(f"headgate.{module}:{each.line} imports {each.name}")
    return faults


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Some path around each cycle that a depth-first search meets."""
    done: set[str] = set()
    found = []

    def visit(node: str, path: list[str]) -> None:
        if node in path:
            found.append([*path[path.index(node) :], node])
        elif node not in done:
            for other in sorted(graph.get(node, ())):
                visit(other, [*path, node])
            done.add(node)

    for node in sorted(graph):
        visit(node, [])
    return found


# --- the rules ---


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_its_place_in_the_architecture(module: str) -> None:
    places = [name for parts in LAYERS for name in parts]
    assert part(module) in places, f"{module}: name its layer in LAYERS, or put it into a part that exists"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    faults = order_faults(module, imports(module))
    assert not faults, "\n".join([*faults, "the order is " + " > ".join(map(" | ".join, LAYERS[::-1]))])


def test_there_is_no_import_cycle() -> None:
    graph = {
        module: {each.internal for each in imports(module) if each.internal and not each.for_types_only}
        for module in MODULES
    }
    assert not cycles(graph), "\n".join(" -> ".join(path) for path in cycles(graph))


@pytest.mark.parametrize("module", [name for name in MODULES if part(name) == "core"])
def test_core_is_pure(module: str) -> None:
    found = {
        f"line {each.line}: {each.name}"
        for each in imports(module)
        if each.internal is None and each.root not in PURE and each.name != "collections.abc"
    }
    assert not found, f"{module} imports {found}; pass the clock, the chance or the bytes in instead"


@pytest.mark.parametrize("module", MODULES)
def test_foreign_libraries_stay_in_their_files(module: str) -> None:
    strays = [
        f"headgate.{module}:{each.line} imports {each.name}, which belongs to {sorted(HOMES[each.root])}"
        for each in imports(module)
        if each.root in HOMES and module not in HOMES[each.root] and not each.for_types_only
    ]
    assert not strays, "\n".join(strays)


@pytest.mark.parametrize("module", MODULES)
def test_the_start_up_path_loads_nothing_slow(module: str) -> None:
    slow = [
        f"headgate.{module}:{each.line} imports {each.name}; import it inside the function that needs it"
        for each in imports(module)
        if each.at_module_level
        and not each.for_types_only
        and any(each.name == name or each.name.startswith(name + ".") for name in SLOW_TO_IMPORT)
    ]
    assert not slow, "\n".join(slow)


def test_import_headgate_loads_next_to_nothing() -> None:
    code = f"import sys, headgate; print([n for n in {NOT_WITH_THE_PACKAGE!r} if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert run.stdout.strip() == "[]"


def test_a_start_in_the_user_s_process_brings_no_event_loop() -> None:
    """18 ms and 3 MB, which only handles need."""
    code = "import sys, headgate.engines, headgate.instance, headgate.replica.callable; print('asyncio' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("core.")])
def test_each_core_module_has_its_own_tests(module: str) -> None:
    name = module.removeprefix("core.")
    if name not in CORE_WITHOUT_TESTS:
        assert (ROOT / "tests" / "core" / f"test_{name}.py").exists()


def test_every_exception_is_still_needed() -> None:
    needless = {
        (module, used)
        for module, used in ORDER_EXCEPTIONS
        if module in MODULES and used not in {part(e.internal) for e in imports(module) if e.internal}
    }
    assert not needless


# --- the rules would notice ---


def test_a_sibling_is_noticed() -> None:
    assert order_faults("proxy.server", imports_of("from headgate import router\nimport headgate.handle"))


def test_an_import_from_above_is_noticed_inside_a_function() -> None:
    assert order_faults("core.routes", imports_of("def f():\n    from headgate.wire import link\n"))


def test_an_import_from_below_is_fine() -> None:
    source = "from headgate.core import framing\nimport headgate.errors"
    assert not order_faults("wire.link", imports_of(source))


def test_a_relative_import_is_understood() -> None:
    found = imports_of("from .routes import match\nfrom .. import errors", "core.goals")
    assert [each.name for each in found] == ["headgate.core.routes", "headgate.errors"]


def test_a_cycle_is_noticed() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"]]
    assert cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_where_an_import_stands_is_known() -> None:
    source = """
from typing import TYPE_CHECKING
from importlib import metadata
if TYPE_CHECKING:
    import starlette.requests
else:
    import json
class C:
    import re
    def method(self):
        import subprocess
"""
    found = {each.name: (each.at_module_level, each.for_types_only) for each in imports_of(source)}
    assert found == {
        "typing": (True, False),
        "importlib.metadata": (True, False),
        "starlette.requests": (True, True),
        "json": (True, False),
        "re": (True, False),
        "subprocess": (False, False),
    }


def test_the_tree_in_the_architecture_is_the_tree() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text().partition("## The tree")[2].split("```")[1]
    written: set[str] = set()
    package = ""
    for line in text.strip().splitlines():
        if not line.startswith(" "):
            package = found[0] if (found := re.findall(r"^(\w+)/", line)) else ""
        if package:
            written |= {f"{package}.{name}" for name in re.findall(r"\w+\b(?!/)", line)}
        else:
            written |= set(re.findall(r"(\w+)\.py", line))
    assert written == {name for name, path in MODULES.items() if path.name != "__init__.py"}
