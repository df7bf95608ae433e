"""Everything that decides a training run, in one frozen record: the fields of config.yaml and of ``--set``."""

import importlib
import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from pst.errors import ConfigError
from pst.patterns import Pattern, check_sparsity, parse_pattern, sharing
from pst.patterns.structured import Structured
from pst.plan import GLOBAL_PLAN, MIXED, read_plan
from pst.schedule import CubicSchedule
from pst.settings import field


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of ``pst train``. A field that is None takes the method's default; see ``filled``."""

    model: str = field("", "Hugging Face folder or hub id of the model to start from")
    data: str = field(
        "", "glue/TASK, a hub id, a .jsonl/.csv/.tsv/.parquet file, or a folder with train.* and validation.*"
    )
    text_columns: tuple[str, ...] = field(
        (), "one or two text columns (of language_modeling, one); found by their usual names when not given"
    )
    label_column: str = field("", "label column; found by its usual names when not given")
    validation: str = field("", "file with the validation rows, when --data is a single file")
    validation_fraction: float = field(0.1, "share of a single file that is kept for validation")
    limit: int = field(
        0, "use at most this many training rows; 0 = all; of data_to_text, also so many validation prompts"
    )
    start: Literal["auto", "pretrained", "finetuned"] = field(
        "auto",
        "finetuned: the model knows the task, and pst prunes half of it at lower learning rates; "
        "auto = so is a folder whose config.json names a classifier",
    )
    task: Literal["auto", "classification", "language_modeling", "data_to_text"] = field(
        "auto", "what the model learns; auto = classification (and regression)"
    )
    input_column: str = field("", "data_to_text: column of the prompt; found by its usual names when not given")
    target_column: str = field("", "data_to_text: column of the answer; found by its usual names when not given")

    method: str = field("pst", "what decides which weights stay: a file of pst/methods")
    pattern: str = field("unstructured", "what shape stays: unstructured, N:M such as 2:4, block:RxC, or structured")
    sparsity: float | None = field(
        None, "fraction of each prunable weight that becomes zero, N:M fixes it; of structured, what is removed"
    )
    plan: str = field(
        "", "TOML file that gives each weight a pattern of its own, in place of pattern and sparsity; or its text"
    )
    structured_target: Literal["macs", "parameters"] = field(
        "macs", "structured: what the sparsity is a fraction of, the transformer blocks' multiply-adds or parameters"
    )
    structured_units: Literal["both", "heads", "neurons"] = field(
        "both", "structured: what may be removed, attention heads, feed-forward neurons, or both"
    )
    structured_multiple: int = field(8, "structured: a layer keeps a multiple of so many neurons")
    faithful: bool = field(
        False, "the published PST to the letter: frozen random head, one learning rate, its schedule"
    )
    r1: int | None = field(None, "rank of the learned score A B")
    r2: int | None = field(None, "rank of the weight update U V")
    alpha: Literal["mean", "one"] | None = field(None, "scale of the learned score: mean |W0| of each weight, or 1")
    beta: float = field(1.0, "scale of the weight update U V")
    budget: Literal["local", "global"] | None = field(
        None,
        "local: the sparsity holds in each weight; global: over all of them, where scores compete; "
        "none: the method's own (soft_movement: global)",
    )
    teacher: str | None = field(
        None,
        "what to distil from: folder or hub id of a dense model trained on the same task; start: the very model that "
        "training starts from; off: nothing; none: the method's own (pst: start, for N:M of a finetuned model)",
    )
    distill_weight: float | None = field(None, "share of the teacher's loss in the whole, from 0 to 1")
    distill_temperature: float = field(2.0, "softens both distributions of the teacher's loss")
    distill_hidden: float | None = field(
        None, "weight of the hidden states' loss within the teacher's, where both models are as wide"
    )
    label_smoothing: float = field(0.0, "share of each target's probability that is spread over all classes")

    epochs: float | None = field(None, "passes over the training rows")
    steps: int = field(0, "optimizer steps; overrides epochs when above 0")
    batch_size: int = field(32, "rows a step, over all processes")
    accumulate: int = field(1, "parts that a process splits its rows of a step into, to save memory")
    precision: Literal["fp32", "tf32", "bf16"] = field(
        "fp32", "arithmetic of the matrix products; weights and optimizer stay fp32"
    )
    graphs: Literal["auto", "off"] = field(
        "auto", "auto: on one GPU, steps are recorded as CUDA graphs, batches padded to multiples of 16 tokens"
    )
    max_length: int | None = field(None, "tokens a row, longer ones are cut; None = 128 or the model's own limit")
    lr: float | None = field(None, "learning rate of dense weights, head, LayerNorm and biases")
    lr_update: float | None = field(None, "learning rate of the weight update U, V")
    lr_scores: float | None = field(None, "learning rate of the scores A, B, R, C")
    lr_warmup: float | None = field(
        None, "fraction of the steps in which learning rates rise from 0; then they fall to 0"
    )
    dropout: float | None = field(None, "of every layer that has one, in training; none: the model's own")
    weight_decay: float = field(0.0, "AdamW's decoupled weight decay")
    max_grad_norm: float = field(1.0, "gradients are scaled down to this norm; 0 = never")
    sparsity_initial: float | None = field(None, "sparsity before the ramp")
    sparsity_warmup: float | None = field(None, "fraction of the steps before the cubic ramp begins")
    sparsity_cooldown: float | None = field(None, "fraction of the steps after it ends")

    calibration: int | None = field(
        None,
        "pst, magnitude: training rows from which each stage of the schedule makes up for what it prunes; "
        "0 = it does not",
    )
    mask_every: int = field(1, "steps between two choices of the masks; the published method chooses at every step")

    num_beams: int = field(10, "data_to_text: beams of the search that evaluation decodes with")
    length_penalty: float = field(0.8, "data_to_text: exponent of the length that a beam's score is divided by")
    no_repeat_ngram: int = field(
        4, "data_to_text: token sequences of this length occur once in an answer, whatever the prompt holds; 0 = any"
    )
    max_new_tokens: int = field(96, "data_to_text: most tokens of an answer")

    seed: int | None = field(None, "seed of the head's start, the order of rows and dropout")
    device: str = field("auto", "auto, cpu, or cuda")
    eval_every: int = field(0, "steps between evaluations; 0 = at the end only")
    checkpoint_every: int | None = field(
        None, "steps between checkpoints; 0 = only when interrupted; none = 100, or more where writing takes long"
    )

    def __post_init__(self) -> None:
        """Raise ConfigError or PatternError for a value that no run could use."""
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        at_least = {
            "batch_size": 1,
            "mask_every": 1,
            "structured_multiple": 1,
            "accumulate": 1,
            "num_beams": 1,
            "no_repeat_ngram": 0,
            "max_new_tokens": 1,
            "steps": 0,
            "limit": 0,
            "eval_every": 0,
        }
        at_least |= {"checkpoint_every": 0, "r1": 1, "r2": 1, "max_length": 3, "seed": 0, "calibration": 0}
        for name, lowest in at_least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ConfigError(f"{name} is {value}; it must be at least {lowest}.")
        if self.seed is not None and self.seed >= 2**32:
            raise ConfigError(f"seed is {self.seed}; it must be below {2**32}.")
        non_negative = ("epochs", "lr", "lr_update", "lr_scores", "weight_decay", "max_grad_norm", "distill_hidden")
        for name in non_negative:
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ConfigError(f"{name} is {value:g}; it must be a finite number of at least 0.")
        for name in ("distill_weight", "label_smoothing", "dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value:g}; it is a share, from 0 to 1.")
        if not 0 < self.distill_temperature < float("inf"):
            raise ConfigError(f"distill_temperature is {self.distill_temperature:g}; it must be above 0.")
        if self.lr_warmup is not None and not 0 <= self.lr_warmup <= 1:
            raise ConfigError(f"lr_warmup is {self.lr_warmup:g}; it is a fraction of the steps, from 0 to 1.")
        if not math.isfinite(self.beta):
            raise ConfigError(f"beta is {self.beta:g}; it must be a finite number.")
        if self.device not in ("auto", "cpu") and not self.device.startswith("cuda"):
            raise ConfigError(f"device is {self.device!r}; use auto, cpu, or cuda.")
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction is {self.validation_fraction:g}; it must lie between 0 and 1.")

    def filled(self) -> "TrainConfig":
        """The same with every None replaced by the default of its method, and the sparsity that its pattern fixes.

        Raises ConfigError for an unknown method, a missing model, data or sparsity, a sparsity that contradicts the
        pattern, or a schedule that leads nowhere; PatternError for an unknown pattern.
        """
        from pst.methods import names

        for name, flag in (("model", "--model"), ("data", "--data")):
            if not getattr(self, name):
                raise ConfigError(f"No {name} is given; say which with {flag}.")
        if self.method not in names():
            raise ConfigError(f"Unknown method {self.method!r}; use one of {', '.join(names())}.")
        module = importlib.import_module(f"pst.methods.{self.method}")
        if self.faithful and not hasattr(module, "FAITHFUL"):
            raise ConfigError(f"--faithful is the published PST; it does not go with method {self.method}.")
        defaults: dict[str, Any] = COMMON | (module.FAITHFUL if self.faithful else module.DEFAULTS)
        known = {f.name for f in fields(self)}
        changes = {name: value for name, value in defaults.items() if name in known and getattr(self, name) is None}
        keeps = getattr(module, "KEEPS_ZEROS", False)
        if self.teacher == NO_TEACHER:
            changes["teacher"] = ""
        full = replace(self, **changes)
        full = replace(full, **full._settled_pattern(prunes=self.method != "dense", keeps=keeps))
        if self.faithful or not hasattr(module, "defaults") or full.sparsity is None:
            return full
        own = module.defaults(
            pattern=full.pattern,
            sparsity=full.sparsity,
            finetuned=self.starts_finetuned(),
            alone=self.teacher in (NO_TEACHER, ""),
        )
        return replace(full, **{name: value for name, value in own.items() if getattr(self, name) is None})

    def starts_finetuned(self) -> bool:
        """Whether the model knows the task, by ``start``, or as far as its folder's config.json tells."""
        if self.start != "auto":
            return self.start == "finetuned"
        try:
            said = json.loads((Path(self.model) / "config.json").read_text(encoding="utf-8")).get("architectures")
        except (OSError, ValueError, AttributeError):  # a hub id, or what loading will complain about
            return False
        return names_classifier(said)

    def parsed_pattern(self) -> Pattern:
        """The pattern with its options. Raises PatternError for an unknown one."""
        if self.pattern == "structured":
            target, kinds, multiple = self.structured_target, self.structured_units, self.structured_multiple
            return Structured(target=target, kinds=kinds, multiple=multiple)
        return parse_pattern(self.pattern)

    def _settled_pattern(self, *, prunes: bool, keeps: bool) -> dict[str, Any]:
        if self.plan and (not prunes or keeps):
            why = "keeps the zeros that the model has" if keeps else "prunes nothing"
            raise ConfigError(f"Method {self.method} {why}; leave --plan out.")
        if not prunes:
            return {"pattern": "dense", "sparsity": 0.0}
        if self.plan:
            return self._settled_plan()
        pattern = self.parsed_pattern()
        if keeps and self.sparsity is not None:
            raise ConfigError(
                f"Method {self.method} keeps the zeros that the model has, so its sparsity is the model's; "
                "leave --sparsity out."
            )
        if keeps:
            return {}
        if self.budget == "global" and not isinstance(pattern, Structured):
            sharing(pattern)
        fixed = pattern.sparsity
        if fixed is None and self.sparsity is None:
            raise ConfigError(f"Pattern {self.pattern} needs a sparsity, for example --sparsity 0.9.")
        if fixed is not None and self.sparsity is not None and abs(self.sparsity - fixed) > 1e-6:
            raise ConfigError(
                f"Pattern {self.pattern} has sparsity {fixed:g}, but {self.sparsity:g} was asked for; "
                "leave --sparsity out."
            )
        final = self.sparsity if fixed is None else fixed
        assert final is not None
        self._check_schedule(final)
        return {"sparsity": final}

    def _settled_plan(self) -> dict[str, Any]:
        plan = read_plan(self.plan)
        if self.pattern not in ("unstructured", MIXED) or self.sparsity not in (None, plan.sparsity):
            raise ConfigError("The plan says pattern and sparsity of each weight; leave --pattern and --sparsity out.")
        if self.budget == "global":
            raise ConfigError(GLOBAL_PLAN)
        self._check_schedule(plan.sparsity)
        return {"plan": plan.text, "pattern": MIXED, "sparsity": plan.sparsity}

    def _check_schedule(self, final: float) -> None:
        initial, warmup, cooldown = self.sparsity_initial, self.sparsity_warmup, self.sparsity_cooldown
        assert initial is not None
        assert warmup is not None
        assert cooldown is not None
        CubicSchedule(  # raises for what no run could use; a start above the end is a start at the end
            initial=min(initial, final),
            final=final,
            steps=1,
            warmup=warmup,
            cooldown=cooldown,
        )


def names_classifier(architectures: Any) -> bool:
    """Whether ``architectures`` of a config.json names a model with a head for classification or regression."""
    return any("ForSequenceClassification" in str(name) for name in architectures or [])


NO_TEACHER = "off"
START = "start"
"""The teacher that is the model which training starts from."""
COMMON = {
    "epochs": 3.0,
    "teacher": "",
    "distill_weight": 0.5,
    "distill_hidden": 1.0,
    "lr_warmup": 0.1,
    "seed": 0,
    "r1": 8,
    "r2": 8,
    "alpha": "mean",
    "lr_update": 0.0,
    "lr_scores": 0.0,
    "calibration": 0,
    "sparsity_initial": 0.0,
    "sparsity_warmup": 0.1,
    "sparsity_cooldown": 0.3,
}
"""Defaults for every method; a method's own DEFAULTS win."""
