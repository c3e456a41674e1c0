"""Print the longest files and functions of src: what sets good code apart is its tail."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCES = Path(__file__).parent.parent / "src"
SHOWN = 5


def functions(path: Path) -> list[tuple[int, str]]:
    """(lines, place) of every function of the file."""
    return [
        (node.end_lineno - node.lineno + 1, f"{path.relative_to(SOURCES)}:{node.lineno} {node.name}")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    ]


def show(title: str, sizes: list[tuple[int, str]]) -> None:
    sizes.sort(reverse=True)
    median = sizes[len(sizes) // 2][0] if sizes else 0
    print(f"longest {title} ({len(sizes)} in all, {sum(size for size, _ in sizes)} lines, median {median}):")
    for size, name in sizes[:SHOWN]:
        print(f"  {size:5}  {name}")


def main() -> None:
    files = sorted(SOURCES.rglob("*.py"))
    lengths = [len(path.read_text(encoding="utf-8").splitlines()) for path in files]
    show("files", [(size, str(path.relative_to(SOURCES))) for size, path in zip(lengths, files, strict=True)])
    show("functions", [each for path in files for each in functions(path)])


if __name__ == "__main__":
    main()
