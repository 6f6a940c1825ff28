"""Help texts of options, taken from the docstrings of the functions that the options are passed to."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parent.parent


@cache
def option_help(module: str, function: str) -> dict[str, str]:
    """Argument -> its text under `Args:` in the docstring of a function or a class.

    The source is parsed, not imported: `--help` must not wait for torch.

    Args:
        module: file in the package, such as "post_squeeze".
        function: a function or a class of that file.
    """
    tree = ast.parse((_PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    node = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == function)
    args = (ast.get_docstring(node) or "").partition("Args:\n")[2].partition("\n\n")[0]
    texts: dict[str, str] = {}
    for names, text in re.findall(r"^    ([\w, ]+): (.*(?:\n {8}.*)*)", args, flags=re.MULTILINE):
        for name in names.split(", "):
            line = re.sub(r"\s+", " ", text).replace("`", "").strip()
            texts[name] = line[:1].upper() + line[1:]
    return texts
