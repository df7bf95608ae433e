"""Keep libraries that print while they work from writing over what a person reads."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

# Of the exporter, each known and harmless here: (regular expression on the start of the message, category).
_WARNINGS = (
    (r"# The axis name: \w+ will not be used", UserWarning),
    (r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning),
)
_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Silence the ONNX exporter: banners on stdout, its loggers below errors, and the warnings listed above."""
    loggers = [logging.getLogger(name) for name in (*_LOGGERS, "torch.onnx._internal.exporter")]
    levels = [logger.level for logger in loggers]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        for message, category in _WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
