"""Makes corpus.jsonl, the text that the embedded `tiny` base is pretrained on.

    python pipeline/tiny/make_corpus.py        # rewrites pipeline/tiny/corpus.jsonl

Reads the running Python's standard library and turns it into question and answer: what a function's docstring says,
what a short function looks like, what a pydoc topic explains. The result is committed, because the library's text
changes with Python's patch version and the base must not. Licence: LICENSE beside this file (PSF).
"""

import ast
import json
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "turtledemo", "ensurepip", "pydoc_data"}
MAX_CHARS = 2_400_000
SHARE_OF_CODE = 0.3


def modules() -> Iterator[tuple[str, str]]:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).parts
        if SKIPPED.isdisjoint(parts) and not parts[0].startswith("config-"):
            yield ".".join(parts).removesuffix(".py").removesuffix(".__init__"), path.read_text("utf-8", "ignore")


def topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics as pydoc_topics

    for name, text in sorted(pydoc_topics.items()):
        for paragraph_group in textwrap.dedent(text).split("\n\n\n"):
            if 200 < len(paragraph_group) < 3000:
                yield f"Explain {name} in Python.", paragraph_group.strip()


def docstrings_and_code(module: str, source: str) -> Iterator[tuple[bool, str, str]]:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring and 100 < len(docstring) < 2000:
            yield False, f"What does `{node.name}` in `{module}` do?", docstring
        code = ast.get_source_segment(source, node)
        if code and isinstance(node, ast.FunctionDef) and 150 < len(code) < 900:
            code = textwrap.dedent(" " * node.col_offset + code)
            yield True, f"Show `{node.name}` from `{module}`.", f"```python\n{code}\n```"


def main() -> None:
    prose = list(topics())
    code: list[tuple[str, str]] = []
    for module, source in modules():
        for is_code, instruction, response in docstrings_and_code(module, source):
            (code if is_code else prose).append((instruction, response))
    rng = random.Random(0)
    rng.shuffle(prose)
    rng.shuffle(code)
    rows: list[tuple[str, str]] = []
    for kind, budget in ((prose, MAX_CHARS * (1 - SHARE_OF_CODE)), (code, MAX_CHARS * SHARE_OF_CODE)):
        for row in kind:
            if budget <= 0:
                break
            rows.append(row)
            budget -= len(row[0]) + len(row[1])
    rng.shuffle(rows)
    with (HERE / "corpus.jsonl").open("w", encoding="utf-8", newline="\n") as out:
        for instruction, response in rows:
            out.write(json.dumps({"instruction": instruction, "response": response}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
