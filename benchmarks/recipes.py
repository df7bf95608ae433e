"""Accuracy of `pst train` over a grid of options, as the tables of LOG.md give it.

    python -m benchmarks.recipes --model runs/quickstart/dense/model --data runs/quickstart/data \\
        --output runs/recipes steps=400 max_length=64 sparsity=0.7,0.8,0.9 r2=8,32 lr_update=1e-4,2e-4 \\
        lr_scores=0 seed=0,1

Each KEY=V1,V2,... spans one axis of the grid; a finished run is not repeated. Prints a line a run, best last, and
writes them to OUTPUT/recipes.json.
"""

import argparse
import itertools
import json
from pathlib import Path

from pst.config import TrainConfig
from pst.files import write_json
from pst.settings import resolve
from pst.train import train


def main() -> None:
    """Run the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("axes", nargs="+", metavar="KEY=V1,V2")
    arguments = parser.parse_args()
    axes = [(key, values.split(",")) for key, _, values in (axis.partition("=") for axis in arguments.axes)]
    results: list[tuple[list[str], dict[str, float], float]] = []
    for point in itertools.product(*(values for _, values in axes)):
        sets = [f"{key}={value}" for (key, _), value in zip(axes, point, strict=True)]
        config = resolve(TrainConfig, sets=sets, flags={"model": arguments.model, "data": arguments.data})
        result = train(config, arguments.output / "_".join(sets).replace("/", "-"), resume=True)
        results.append((sets, result.metrics, round(result.seconds, 1)))
        print(json.dumps(results[-1]), flush=True)
    headline = next(iter(results[0][1]))
    for sets, metrics, _ in sorted(results, key=lambda row: row[1][headline]):
        print(f"{headline} {metrics[headline]:.4f}  {' '.join(sets)}")
    rows = [{"options": sets, "metrics": metrics, "seconds": seconds} for sets, metrics, seconds in results]
    write_json(arguments.output / "recipes.json", rows)


if __name__ == "__main__":
    main()
