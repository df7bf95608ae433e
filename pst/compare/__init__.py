"""``pst compare``: methods x patterns x sparsities x seeds, each a run, and what their spread allows to say.

DIR/comparison.json   the options                              DIR/report.json, report.md
DIR/runs/NAME/        the run folder of a cell                 DIR/plot.png, plot.svg
DIR/runs/NAME.log     what a run printed, where several ran at a time

Importing this package needs neither torch nor transformers.
"""

from pst.compare.grid import parse_names, parse_sparsities
from pst.compare.report import Report
from pst.compare.runner import compare

__all__ = ["Report", "compare", "parse_names", "parse_sparsities"]
