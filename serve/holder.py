"""Who opened an engine closes it: what a classifier and a language model have in common."""

from pathlib import Path

from serve.closing import Closing
from serve.engines import ANY_SHAPE, Engine, Shapes, open_engine


class EngineHolder(Closing):
    """Runs an engine that it opened and closes, or one that is open already, which close then leaves alone."""

    def __init__(self, path: Path, *, engine: str | Engine, threads: int = 0, shapes: Shapes = ANY_SHAPE) -> None:
        """*engine*: a name, for open_engine with *path*, *threads* and *shapes*; or one that is open."""
        self.opened_here = isinstance(engine, str)
        self.engine: Engine = (
            open_engine(path, engine=engine, threads=threads, shapes=shapes) if isinstance(engine, str) else engine
        )

    def close(self) -> None:
        """Free the engine, if it was opened here; safe to call twice."""
        if self.opened_here:
            self.engine.close()
