"""Program search in its smallest form: candidates are Python source, the evaluator gives each a score, the best one stays.

    python examples/program_search.py [candidates]

A language model would write the candidates; here a number is drawn into a template, and every fourth candidate is broken.
"""

import random
import sys

from llmsched_agents.program_search import ProgramTask, evaluate_program

TEMPLATE = """
from llmsched_env import Decision

def decide(view):
    return Decision.of(run=[1], admit=[max({limit} - view.num_residents, 0)])
"""
TASK = ProgramTask(num_requests=50, seeds=(0, 1), seconds=30.0)


def main(candidates: int = 8) -> None:
    rng = random.Random(0)
    best = evaluate_program(TEMPLATE.format(limit=1), TASK)
    print(f"limit 1: score {best.score:.2f}")
    for i in range(candidates):
        limit = str(rng.randint(2, 64)) if i % 4 != 3 else "no number"
        found = evaluate_program(TEMPLATE.format(limit=limit), TASK)
        print(f"limit {limit}: score {found.score:.2f} {found.error}")
        best = max(best, found, key=lambda evaluation: evaluation.score)
    print(f"best score {best.score:.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
