"""Write school-maths questions as JSON Lines: `python maths_generate.py COUNT MODULE ...` in an environment with
mathematics_dataset, sympy 1.5.1 and NumPy below 1.24. Needs nothing of this repository.

The generators draw from `random` and `numpy.random`, both seeded for each module; with PYTHONHASHSEED=0 the questions
are the same on every machine. They are those of the published set's easy part.
"""

import json
import random
import sys

import numpy
from mathematics_dataset.modules import modules


def main() -> None:
    """COUNT different questions of each module, fewer where the generator repeats itself."""
    count, wanted = int(sys.argv[1]), sys.argv[2:]
    found = {}
    flatten(modules.train(easy), "", found)
    for name in wanted:
        random.seed(name)
        numpy.random.seed(0)
        seen = set()
        for _ in range(4 * count):
            problem = found[name]()
            question = str(problem.question)
            if question not in seen:
                seen.add(question)
                print(json.dumps({"module": name, "question": question, "answer": str(problem.answer)}))
            if len(seen) == count:
                break


def easy(full: tuple) -> tuple:
    """The lowest third of a range of difficulty."""
    return full[0], full[0] + (full[1] - full[0]) / 3


def flatten(tree: dict, prefix: str, found: dict) -> None:
    """Generators by the name that the published data set has for them."""
    for name, entry in tree.items():
        if isinstance(entry, dict):
            flatten(entry, f"{prefix}{name}__", found)
        else:
            found[prefix + name] = entry


main()
