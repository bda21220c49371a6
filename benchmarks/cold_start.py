"""How long it takes from `kvq train` to the first step, on each installed backend, and what the time is spent on.

    python benchmarks/cold_start.py --config fashion_mnist_mini --rounds 5

Each start is a process of its own; backends take turns, and figures are medians over rounds. Nothing compiled is kept between
them. The first round is left out: it reads files that later ones find in memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

PHASES = {
    "interpreter": "Python starts, and `kvq` is imported without Keras",
    "keras": "Keras and the backend are imported",
    "kvq": "Grain, and what else training needs, is imported",
    "model": "images are opened, the model is built, the run folder is begun",
    "codebook": "the codebook is placed",
    "first step": "the step is compiled, where the backend does that, and run",
}
PROGRAM = """
import json, os, sys, time
marks = [("interpreter", time.time())]
import kvq
from kvq_cli.main import app
marks.append(("interpreter", time.time()))
import keras
marks.append(("keras", time.time()))
from kvq.training import train
from kvq.progress import Progress
marks.append(("kvq", time.time()))

class First(Progress):
    def start(self, total, first):
        marks.append(("model", time.time()))

    def step(self, step):
        if step == 0:
            marks.append(("codebook", time.time()))
            return
        marks.append(("first step", time.time()))
        spent, before = {}, float(sys.argv[1])
        for name, at in marks:
            spent[name] = spent.get(name, 0.0) + at - before
            before = at
        print(json.dumps(spent), flush=True)
        os._exit(0)

train(kvq.load_config(sys.argv[2]), sys.argv[3], data=sys.argv[4] or None, progress=First())
"""


def main() -> None:
    import time

    from kvq import backends

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="fashion_mnist_mini")
    parser.add_argument("--data", default="", help="instead of the configuration's images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backends", nargs="+", default=backends.installed())
    arguments = parser.parse_args()
    starts: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.backends}
    for _ in range(arguments.rounds + 1):
        for name in arguments.backends:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-c", PROGRAM, str(time.time()), arguments.config, f"{folder}/run", arguments.data]
                environment = {**os.environ, "KERAS_BACKEND": name, "TF_CPP_MIN_LOG_LEVEL": "3"}
                done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                sys.exit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
            starts[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(table({name: rounds[1:] for name, rounds in starts.items()}))


def table(starts: dict[str, list[dict[str, float]]]) -> str:
    """Medians in seconds, as Markdown."""
    lines = [f"| seconds | {' | '.join(starts)} |", "|---" * (1 + len(starts)) + "|"]
    for phase, meaning in PHASES.items():
        medians = [statistics.median(one[phase] for one in rounds) for rounds in starts.values()]
        lines.append(f"| {meaning} | {' | '.join(f'{value:.1f}' for value in medians)} |")
    totals = [statistics.median(sum(one.values()) for one in rounds) for rounds in starts.values()]
    return "\n".join([*lines, f"| from start to first step | {' | '.join(f'{value:.1f}' for value in totals)} |"])


if __name__ == "__main__":
    main()
