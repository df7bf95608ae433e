"""The formats of ``pst export``: an ONNX artifact, and what is made of it for other servers."""

import difflib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.manifest import FILE_NAME, Manifest
from export.targets.tensorrt import find_runtime, parse_profile, plan_of
from export.targets.triton import check_name, write_config
from pst.errors import ConfigError, PSTError
from pst.files import atomic_folder, refuse_existing

FORMATS = ("onnx", "tensorrt", "triton", "triton-tensorrt")
"""An artifact; one with a plan in its cache; a model folder for Triton, with the ONNX file, or with a plan."""

_DECIDED = {
    "task": "auto", "opset": 17, "precision": "fp32", "residual": "fp32", "linear_form": "auto", "activations": "uint8",
    "storage": "dense", "data": None, "external_data": False, "atol": None, "rtol": None,
}  # fmt: skip
"""What an artifact cannot be asked for any more, with the values that ask for nothing."""


def check_format(
    format: str,  # noqa: A002 - the option's name
    output: Path,
    *,
    overwrite: bool,
    reads: Sequence[Path | str | None],
    profile: str | None = None,
    compute_capability: str = "",
) -> None:
    """Raise what no model could be exported with, before any work is done: ConfigError, EngineError, RunError.

    *reads*: what must not be overwritten, the model among it.
    """
    if format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, n=1)
        raise ConfigError(
            f"Unknown format {format!r}; "
            + (f"did you mean {near[0]}?" if near else f"use --format {', '.join(FORMATS)}.")
        )
    if profile is not None and format == "onnx":
        raise ConfigError(f"--profile is for a plan or Triton; add --format {', '.join(FORMATS[1:])}, or leave it out.")
    if compute_capability and not format.endswith("tensorrt"):
        raise ConfigError("--compute-capability is for a plan; add --format tensorrt or triton-tensorrt.")
    parse_profile(profile, max_length=sys.maxsize)  # the model's own length is known later
    if format.startswith("triton"):
        check_name(output.resolve().name)
    if format.endswith("tensorrt"):
        find_runtime()
    refuse_existing(output, overwrite=overwrite, reads=reads)


def export_as(
    format: str,  # noqa: A002
    source: Path,
    output: Path,
    *,
    profile: str | None = None,
    compute_capability: str = "",
    overwrite: bool = False,
    **options: Any,
) -> Manifest:
    """Write *source*, a run or model folder, to *output* in one of FORMATS; the manifest of its artifact.

    profile: three shapes, as parse_profile reads them, which a plan is built for and Triton's batches follow.
    compute_capability: see plan_of. *options* are those of export.pipeline.export. A *source* that is an artifact
    already is copied as it is.
    Raises what check_format, export.pipeline.export, parse_profile and plan_of raise. What fails after the artifact was
    written leaves it, for format tensorrt.
    """
    check_format(
        format, output, overwrite=overwrite, reads=[source], profile=profile, compute_capability=compute_capability
    )
    if not format.startswith("triton"):
        manifest = _artifact(source, output, overwrite=overwrite, options=options)
        if format == "tensorrt":
            try:
                shapes = parse_profile(profile, max_length=manifest.max_length)
                plan_of(output, profiles=[shapes], target=compute_capability)
            except PSTError as error:
                raise type(error)(f"{error} The ONNX artifact is whole, in {output}.") from error
        return manifest
    with atomic_folder(output, overwrite=overwrite) as folder:
        version = folder / "1"
        manifest = _artifact(source, version, overwrite=False, options=options)
        shapes = parse_profile(profile, max_length=manifest.max_length)
        ending = "plan" if format == "triton-tensorrt" else "onnx"
        if ending == "plan":
            shutil.copyfile(plan_of(version, profiles=[shapes], target=compute_capability).path, version / "model.plan")
        write_config(folder, output.resolve().name, manifest, profile=shapes, ending=ending)
    return manifest


def _artifact(source: Path, output: Path, *, overwrite: bool, options: dict[str, Any]) -> Manifest:
    if (source / FILE_NAME).is_file():
        decided = [name for name, usual in _DECIDED.items() if options.get(name, usual) != usual]
        if decided:
            raise ConfigError(
                f"{source} is an artifact, of which --{decided[0].replace('_', '-')} is decided; leave it out, or "
                "export the model's folder again."
            )
        manifest = Manifest.load(source)
        with atomic_folder(output, overwrite=overwrite) as folder:
            for name in (*manifest.files, FILE_NAME):
                shutil.copyfile(source / name, folder / name)
        return manifest
    from export.pipeline import export  # loads torch

    return export(source, output, overwrite=overwrite, **options)
