"""The errors a user can cause, as one small tree. The command line prints the message and exits with 2.

    PSTError
    ├── ConfigError      an option or a configuration file: unknown key, wrong type, value out of range
    ├── DataError        a data file, a column or a label set
    │   └── NoLabelsError    rows without a label column
    ├── ModelError       a model folder, its tokenizer, or what it can do
    ├── PatternError     a sparsity pattern, or a weight that it does not fit
    ├── RunError         an output folder, a checkpoint, a resume
    ├── ArtifactError    an exported artifact: damaged, incomplete, or not what it claims to be
    ├── EngineError      a runtime that is missing or refuses the model
    └── StorageError     the disk: no space, no permission

Every message is one sentence or two: what is wrong, where, and what to do about it.
"""


class PSTError(Exception):
    """Base of all errors whose cause is the user's input or machine, never a defect of this package."""


class ConfigError(PSTError):
    """An option or a configuration file is not usable."""


class DataError(PSTError):
    """A data set, one of its columns, or its labels are not usable."""


class NoLabelsError(DataError):
    """Rows have no column that could be their labels. Whoever needs no labels may go on."""


class ModelError(PSTError):
    """A model folder or its tokenizer is not usable for what was asked."""


class PatternError(PSTError):
    """A sparsity pattern is unknown, or does not fit a weight."""


class RunError(PSTError):
    """An output folder or a checkpoint is in the way, damaged, or from another run."""


class ArtifactError(PSTError):
    """An exported artifact is damaged, incomplete, or does not hold what it claims."""


class EngineError(PSTError):
    """A runtime is not installed, or refuses the model."""


class StorageError(PSTError):
    """The disk has no room or gives no permission."""
