"""Measures of style of a Python package: a mirror of how dense its code is and in what words it is written, no limit.

    python -m benchmarks.style src/wherefrom

- tokens on a line of code: names, numbers, strings and operators, over the lines that have any; no docstrings
- own-line comments per hundred lines: lines that hold nothing but a comment
- nested comprehensions: comprehensions within another
- participle names: the share of functions whose name begins with a participle or an adjective in place of a verb
- noun-phrase summaries: the share of docstrings of functions, properties aside, that begin with no verb
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

IGNORED = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# Names of functions that are participles without the ending -ed, or stand for one.
PARTICIPLES = frozenset(
    "apart built chosen drawn found given held kept known left lost made seen sent shown swept taken told thawed torn "
    "whole within written alone standing gone".split()
)
# Words ending in -ed that are verbs or nouns.
NOT_PARTICIPLES = frozenset("seed embed feed need speed shed proceed exceed".split())
VERBS = frozenset(
    """accumulate add align apply ask assign attribute average begin break build call capture carry certify change
    check choose clean close collate combine compare complain complete compute concatenate contract convert copy
    count cut decide decode decompose delete derive describe detect differentiate divide do draw drop embed
    encode enter estimate evaluate explain fail fall fetch fill find finish fit flatten forget format gather
    generate get give group guess hash hold import insert invert iterate join judge keep leave let limit list
    load locate look make map mark mask match measure merge mix move multiply name normalise note open order
    orthonormalise pack pad parse pick place plan plot pool predict prepare print project propose put raise rank
    read rebuild recognise record refuse register release remember remove render repeat replace replay report
    represent require rescore resolve restore retrain return reverse rotate round run sample save say scale
    score search see select set shade share show sketch skip solve sort spend split start state stop store
    subtract sum surround sweep take tell time tokenize train translate trim truncate try turn undo unfold
    unpack update use verify visit wait walk warn watch weigh wrap write yield""".split()
)


@dataclass
class Measures:
    """Counts over all files of a package."""

    code_lines: int = 0
    tokens: int = 0
    lines: int = 0
    comments: int = 0
    nested: int = 0
    functions: int = 0
    participles: int = 0
    summaries: int = 0
    noun_phrases: int = 0

    def rows(self) -> list[tuple[str, str]]:
        """Return each measure with its value."""
        return [
            ("tokens on a line of code", f"{self.tokens / self.code_lines:.1f}"),
            ("own-line comments per hundred lines", f"{100 * self.comments / self.lines:.1f}"),
            ("nested comprehensions", f"{self.nested}"),
            ("participle names", f"{self.participles / self.functions:.1%} of {self.functions:,}"),
            ("noun-phrase summaries", f"{self.noun_phrases / self.summaries:.1%} of {self.summaries:,}"),
        ]


def measure(package: Path) -> Measures:
    """Measure all modules under a folder."""
    total = Measures()
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        _count_tokens(total, text, set(_docstring_lines(tree)))
        _count_names(total, tree)
        comprehensions = [node for node in ast.walk(tree) if isinstance(node, COMPREHENSIONS)]
        total.nested += sum(any(isinstance(n, COMPREHENSIONS) for n in _inside(node)) for node in comprehensions)
    return total


def _count_tokens(total: Measures, text: str, docstrings: set[int]) -> None:
    lines = text.splitlines()
    total.lines += len(lines)
    total.comments += sum(line.lstrip().startswith("#") for line in lines)
    on_line: dict[int, int] = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in IGNORED and token.start[0] not in docstrings:
            on_line[token.start[0]] = on_line.get(token.start[0], 0) + 1
    total.code_lines += len(on_line)
    total.tokens += sum(on_line.values())


def _count_names(total: Measures, tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if not isinstance(node, FUNCTIONS) or node.name.startswith("__"):
            continue
        if any("property" in ast.unparse(item) for item in node.decorator_list):
            continue
        total.functions += 1
        first = node.name.strip("_").split("_")[0]
        total.participles += first in PARTICIPLES or (first.endswith("ed") and first not in NOT_PARTICIPLES)
        if summary := ast.get_docstring(node):
            total.summaries += 1
            total.noun_phrases += summary.split()[0].strip("`.,:;").lower() not in VERBS


def _docstring_lines(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) or not node.body:
            continue
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            yield from range(first.lineno, (first.end_lineno or first.lineno) + 1)


def _inside(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield from ast.walk(child)


def main() -> None:
    """Print the measures of the packages that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", type=Path)
    for package in parser.parse_args().packages:
        print(package)
        for name, value in measure(package).rows():
            print(f"  {name:<38}{value}")


if __name__ == "__main__":
    main()
