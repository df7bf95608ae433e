"""Prune without training: ``pst prune``, the quick way to a sparse model and the baseline of every slower one.

    magnitude   the smallest |W| go
    wanda       the smallest |W| times the norm of their input go (Sun et al. 2023, arXiv 2306.11695)
    alps        Wanda's masks are refined, and what stays is fitted to what goes (Meng et al. 2024, arXiv 2406.07831)
    compensate  what stays is fitted under the masks of the others, too, by least squares (see pst/compensation.py)

The inputs are those of the dense model on some rows of text, for all layers at once: a layer does not see what pruning
did to those before it. How much a layer's outputs change on these rows is written down for each weight,

    output_error = || X W' ' - X W' || / || X W' ||          W' the pruned weight, X the inputs, Frobenius norms

which needs no more than H = X'X: the square of the numerator is the trace of (W' - W) H (W' - W)'.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pst.calibration import input_moments, refine_
from pst.compensation import compensate, input_scale
from pst.data import DataSpec, text_columns_of
from pst.distributed import Processes
from pst.documents import read_text
from pst.errors import ConfigError, DataError, ModelError
from pst.files import atomic_folder, refuse_existing, resolve_model, write_json
from pst.loading import first_line, load_config, load_tokenizer, require_vocabulary, settle_max_length
from pst.masked_weight import MaskedMagnitude, MaskedWeight
from pst.materialize import masked_weights
from pst.patterns import Pattern, parse_pattern
from pst.patterns.structured import Structured
from pst.plan import GLOBAL_PLAN, MIXED, read_plan
from pst.progress import note
from pst.quiet import quiet_transformers
from pst.result import sparsity_of, versions
from pst.revision import git_revision
from pst.sparsify import merge_, set_sparsity_, sparsify_
from pst.structured.calibration import compensate_unit, scale_units_
from pst.structured.storage import from_pretrained
from pst.tables import read_splits

METHODS = ("magnitude", "wanda", "alps")
BATCH = 8
"""Rows of calibration text that go through the model at a time."""


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What became of a model."""

    model: Path
    pattern: str
    method: str
    sparsity: float
    """Zeros over all entries of the pruned weights."""
    errors: dict[str, float]
    """output_error of each matrix, by the name of its weight; empty without calibration text."""


class _Once:
    """A method of pst/methods that trains nothing."""

    trains_original = False

    def masked_weight(self, weight: Tensor, *, axis: int, generator: torch.Generator | None = None) -> MaskedWeight:
        return MaskedMagnitude(weight, axis=axis)

    def select_trainable_(self, model: nn.Module) -> None:
        model.requires_grad_(False)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return []


def prune(
    source: Path | str,
    output: Path,
    *,
    pattern: str | None = None,
    sparsity: float | None = None,
    plan: str = "",
    method: str | None = None,
    adjust: bool = False,
    data: DataSpec | None = None,
    rows: int = 128,
    max_length: int | None = None,
    budget: Literal["local", "global"] = "local",
    overwrite: bool = False,
) -> Pruned:
    """Prune the model of *source*, a folder, run or hub id, into the folder *output*, which opens as *source* does.

    pattern: unstructured where None. plan: a TOML file (pst/plan.py), in place of pattern and sparsity.
    method: one of METHODS; None is wanda where *data* is given, else magnitude. adjust: compensate. data: calibration
    text, labels are not looked at; *rows* of it are used, evenly spaced, of at most *max_length* tokens.

    Raises ConfigError for options that contradict each other, PatternError, DataError, ModelError for a model that
    cannot be read or has no prunable weight, RunError where *output* holds something.
    """
    own = read_plan(plan) if plan else None
    if own is not None and (pattern is not None or sparsity is not None):
        raise ConfigError("The plan says pattern and sparsity of each weight; leave --pattern and --sparsity out.")
    if own is not None and budget == "global":
        raise ConfigError(GLOBAL_PLAN)
    chosen = parse_pattern(pattern or "unstructured")
    method = method or ("wanda" if data else "magnitude")
    if method not in METHODS:
        raise ConfigError(f"Unknown method {method!r}; use one of {', '.join(METHODS)}, or train with pst train.")
    if method == "alps" and isinstance(chosen, Structured):
        raise ConfigError(
            "--method alps is for patterns of zeros; remove heads and neurons by wanda with --compensate."
        )
    adjust = adjust or method == "alps"
    if data is None and (adjust or method != "magnitude"):
        what = "--compensate" if method == "magnitude" else f"--method {method}"
        raise ConfigError(f"{what} looks at the inputs of each weight; name some text with --data.")
    if rows < 1:
        raise ConfigError(f"--rows is {rows}; calibration needs at least 1 row of text.")
    final = own.sparsity if own is not None else _final(chosen.sparsity, sparsity, pattern=chosen.spec)
    spec = MIXED if own is not None else chosen.spec
    refuse_existing(output, overwrite=overwrite, reads=[source, plan, data.data if data else None])
    where = str(resolve_model(Path(source))) if Path(source).exists() else str(source)
    config = load_config(where)
    if data is not None and getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{source} has an encoder and a decoder, which need more than text; leave --data out.")
    model, tokenizer = _load(where, config), load_tokenizer(where)
    batches, described = list[dict[str, Tensor]](), None
    if data is not None:
        length = settle_max_length(max_length, config, source=where)
        batches, described = _batches(tokenizer, model, data, rows=rows, max_length=length, source=where)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = sparsify_(model, method=_Once(), pattern=chosen, plan=own)
    for line in own.overview({item.name: item.weight.numel() for item in weights}) if own else ():
        note(line)
    model.to(device).eval()
    errors = prune_(
        model,
        final,
        batches,
        pattern=chosen,
        method=method,
        adjust=adjust,
        budget=budget,
        device=device,
    )
    merge_(model)
    text = own.text if own is not None else ""
    report = sparsity_of(model, method=method, pattern=spec, requested=final, plan=text)
    for row in report["weights"]:
        row |= {"output_error": errors[row["name"]]} if row["name"] in errors else {}
    report |= {"compensated": adjust, "calibration": described, "base_model": str(source)}
    report |= {"plan": text} if text else {}
    report |= {"versions": versions(), "git_revision": git_revision()}
    with quiet_transformers(), atomic_folder(output, overwrite=overwrite) as partial:
        cast(Any, model.cpu()).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_json(partial / "sparsity.json", report)
    measured = report["sparsity"]["measured"]
    return Pruned(model=output, pattern=spec, method=method, sparsity=measured, errors=errors)


@torch.no_grad()
def prune_(
    model: nn.Module,
    sparsity: float,
    batches: list[dict[str, Tensor]],
    *,
    pattern: Pattern,
    method: str,
    adjust: bool,
    budget: Literal["local", "global"],
    device: torch.device,
) -> dict[str, float]:
    """Choose the masks of a model whose weights are MaskedMagnitude, as *method* says; output_error by name."""
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    moments: dict[nn.Module, Tensor] = {}
    if batches:
        note(f"Looking at the inputs of every weight on {sum(len(one['input_ids']) for one in batches)} rows.")
        moments = input_moments(model, batches, device=device, group=Processes())
    parts = [
        (module, cast(MaskedMagnitude, part), piece)
        for module, attached in masked_weights(model)
        for part, piece in attached.matrices(cast(Any, module).parametrizations.weight.original)
    ]
    structured, scaled = isinstance(pattern, Structured), method != "magnitude"
    if scaled and structured:
        scale_units_(model, {part: (piece, moments[module]) for module, part, piece in parts})
    elif scaled:
        for module, part, _ in parts:
            part.Q.copy_(input_scale(moments[module]))
    set_sparsity_(model, sparsity, budget=budget)
    squares: dict[str, list[tuple[float, float]]] = {}
    for module, part, piece in parts if moments else []:
        if part.most == 0:  # a plan keeps it dense
            continue
        H, W = moments[module], part.by_row(piece).clone()
        if adjust:
            try:
                if method == "alps":
                    refine_(part, piece, H)
                part.by_row(piece).copy_((compensate_unit if structured else compensate)(W, H, part.mask))
            except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
                raise ModelError(
                    f"The inputs of {names[id(module)]} cannot be used ({error}); give other text with --data, or "
                    "prune by magnitude."
                ) from error
        D = part.by_row(piece) * part.mask - W
        squares.setdefault(names[id(module)], []).append((_energy(D, H), _energy(W, H)))
    return {
        name: (sum(lost for lost, _ in found) / max(sum(whole for _, whole in found), 1e-30)) ** 0.5
        for name, found in squares.items()
    }


def _energy(W: Tensor, H: Tensor) -> float:
    """|| X W' ||^2 for H = X'X."""
    return max(float(((W @ H) * W).sum(dtype=torch.float64)), 0.0)


def _final(fixed: float | None, asked: float | None, *, pattern: str) -> float:
    """The sparsity to reach. Raises ConfigError where pattern and user do not agree on one."""
    if fixed is None and asked is None:
        raise ConfigError(f"Pattern {pattern} needs a sparsity, for example --sparsity 0.5.")
    if fixed is not None and asked is not None and abs(asked - fixed) > 1e-6:
        raise ConfigError(
            f"Pattern {pattern} has sparsity {fixed:g}, but {asked:g} was asked for; leave --sparsity out."
        )
    return float(fixed if fixed is not None else cast(float, asked))


@quiet_transformers()
def _load(source: str, config: Any) -> nn.Module:
    """The model of *source* with the head that its config.json names. Raises ModelError where it cannot be read."""
    import transformers

    named = [str(name) for name in getattr(config, "architectures", None) or []]
    loader = getattr(transformers, named[0], None) if named else transformers.AutoModel
    if loader is None:
        raise ModelError(
            f"{source} is a {named[0]}, which this version of transformers does not have; update transformers, or "
            "give another model."
        )
    try:
        model, report = from_pretrained(loader.__name__, source, dtype="float32", output_loading_info=True)
    except Exception as error:
        raise ModelError(
            f"The weights of {source} cannot be read, or do not fit its config.json: {first_line(error)} "
            "Get the model again, or give another one."
        ) from error
    if lacking := sorted(report["missing_keys"]):
        raise ModelError(
            f"The weights of {source} lack {len(lacking)} tensors of a {type(model).__name__} ({lacking[0]}, ...), "
            "and nothing here would train them; give a model that is whole."
        )
    found: nn.Module = model
    return found


def _batches(
    tokenizer: Any, model: nn.Module, data: DataSpec, *, rows: int, max_length: int, source: str
) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """Calibration text as the model's inputs, padded on the right, and what to say of it."""
    path = Path(data.data).expanduser()
    table = read_text(path) if path.suffix == ".txt" else read_splits(data.data, data.validation, {"train"})[0]["train"]
    columns = [table.columns[name] for name in text_columns_of(data, table)]
    texts = [row for row in zip(*columns, strict=True) if all(isinstance(text, str) and text.strip() for text in row)]
    if not texts:
        raise DataError(f"{table.where} holds no row with text; choose other rows, or another --data.")
    count = min(rows, len(texts))
    texts = [texts[index * len(texts) // count] for index in range(count)]
    encoded = tokenizer(*(list(column) for column in zip(*texts, strict=True)), truncation=True, max_length=max_length)
    ids = encoded["input_ids"]
    require_vocabulary(model, ids, source=source)
    ids = sorted((row for row in ids if row), key=len)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    batches = []
    for start in range(0, len(ids), BATCH):
        some = ids[start : start + BATCH]
        longest = max(len(row) for row in some)
        input_ids = torch.tensor([row + [pad] * (longest - len(row)) for row in some])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in some])
        batches.append({"input_ids": input_ids, "attention_mask": mask})
    tokens = sum(len(row) for row in ids)
    return batches, {"source": table.where, "rows": len(ids), "tokens": tokens, "max_length": max_length}
