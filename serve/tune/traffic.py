"""How often each shape is asked for: a file with one ``SHAPE,COUNT`` a line, such as ``1x32,900``."""

import csv
import math
from pathlib import Path

from pst.errors import ConfigError
from serve.bench.workload import Shape, parse_shapes

HEADER = ["shape", "count"]
_REMEDY = "write one shape and how often it comes a line, such as 1x32,900."


def read_traffic(file: Path) -> dict[Shape, float]:
    """Counts by shape; a first line ``shape,count`` is left out. Raises ConfigError for whatever else it may hold."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as text; {_REMEDY}") from error
    found: dict[Shape, float] = {}
    for number, row in enumerate(csv.reader(lines), start=1):
        cells = [cell.strip() for cell in row]
        if not any(cells) or (number == 1 and [cell.lower() for cell in cells] == HEADER):
            continue
        if len(cells) != len(HEADER):
            raise ConfigError(f"Line {number} of {file} has {len(cells)} cells; {_REMEDY}")
        if "," in cells[0]:
            raise ConfigError(f"Line {number} of {file}: {cells[0]!r} is not one shape; {_REMEDY}")
        (shape,) = parse_shapes(cells[0])
        try:
            count = float(cells[1])
        except ValueError:
            count = math.nan
        if not 0 < count < math.inf:
            raise ConfigError(f"Line {number} of {file} has the count {cells[1]!r}, no number above 0; {_REMEDY}")
        found[shape] = found.get(shape, 0.0) + count
    if not found:
        raise ConfigError(f"{file} holds no shape; {_REMEDY}")
    return found
