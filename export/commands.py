"""The commands export and inspect. Everything heavy is imported inside them, so that ``--help`` is quick."""

from pathlib import Path
from typing import Annotated

import typer

from pst.command_line import DataOption, DataSets, Output, Overwrite, as_json, data_spec, show

app = typer.Typer()


@app.command(
    short_help="Write a model as ONNX, proven against PyTorch.",
    epilog="Example: pst export runs/reviews --output artifacts/reviews",
)
def export(
    source: Annotated[Path, typer.Argument(help="Run or model folder, or an artifact.")],
    output: Output,
    format: Annotated[  # noqa: A002
        str,
        typer.Option(help="onnx; tensorrt, a plan as well; triton or triton-tensorrt, a model folder of Triton's."),
    ] = "onnx",
    task: Annotated[
        str,
        typer.Option(
            help="What the graph answers: classification, token_classification, question_answering, "
            "feature_extraction, text_generation, or auto for the model's own head."
        ),
    ] = "auto",
    opset: Annotated[int, typer.Option(help="ONNX operator set; 17 is the newest that TensorRT 8.6 reads.")] = 17,
    precision: Annotated[
        str,
        typer.Option(
            help="fp32, or products in fp16, bf16 or int8 (calibrated on --data), with norms, softmax and logits in "
            "fp32."
        ),
    ] = "fp32",
    residual: Annotated[
        str,
        typer.Option(
            help="Sums and LayerNorms of fp16 and bf16: fp32, or half, which GPUs run faster, with statistics in fp32."
        ),
    ] = "fp32",
    linear_form: Annotated[
        str,
        typer.Option(
            help="Operator of the prunable layers: matmul, gemm (transB, bias inside), conv (1x1, the form with sparse "
            "kernels in TensorRT 8.6), or auto for what torch.onnx writes."
        ),
    ] = "auto",
    activations: Annotated[
        str, typer.Option(help="Of int8: uint8 for ONNX Runtime on a CPU, or int8 (symmetric) for TensorRT.")
    ] = "uint8",
    storage: Annotated[
        str,
        typer.Option(help="dense, or sparse: zeros are left out of the file where that makes it smaller, not faster."),
    ] = "dense",
    data: DataOption = None,
    sets: DataSets = None,
    profile: Annotated[
        str | None,
        typer.Option(
            help="Shapes of a plan and of Triton's batches, BATCHxTOKENS: smallest, usual, largest "
            "[1x1,8x128,32 x the model's limit]."
        ),
    ] = None,
    compute_capability: Annotated[
        str, typer.Option(help="GPU that TensorRT-RTX builds a plan for, such as SM86 [the one here, else SM80].")
    ] = "",
    atol: Annotated[
        float | None,
        typer.Option(
            help="Largest absolute difference from PyTorch, per unit of root mean square above 1 "
            "[fp32 1e-4, fp16 0.1, bf16 1, int8 2]."
        ),
    ] = None,
    rtol: Annotated[
        float | None,
        typer.Option(
            help="Largest difference relative to PyTorch, added to --atol [fp32 1e-3, fp16 2e-2, others 5e-2]."
        ),
    ] = None,
    external_data: Annotated[
        bool, typer.Option("--external-data", help="Keep the weights in a file beside model.onnx.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write the ONNX graph of a model, zeros in place, once its pattern and its outputs are proven.

    Outputs are compared with PyTorch on random inputs and on real ones: --data, or the validation rows that the model
    was trained with. Nothing is written when the pattern does not hold or the outputs differ. With --data, the metric
    of the model and of the artifact is measured as well, where the rows have labels. A causal language model becomes
    one graph for the prompt and each next token, with its key/value cache. SOURCE may be an artifact already, for a
    plan or a model folder of Triton's.
    """
    from export.formats import check_format, export_as
    from export.pipeline import check_options
    from export.real_inputs import calibration_texts, real_inputs

    check_format(
        format,
        output,
        overwrite=overwrite,
        reads=[source, data],
        profile=profile,
        compute_capability=compute_capability,
    )
    spec = data_spec(data, sets)
    check_options(
        output,
        task=task,
        opset=opset,
        precision=precision,
        residual=residual,
        linear_form=linear_form,
        activations=activations,
        storage=storage,
        overwrite=overwrite,
        atol=atol,
        rtol=rtol,
        calibrated=spec is not None,
    )
    made = (source / "export.json").is_file()
    manifest = export_as(
        format,
        source,
        output,
        profile=profile,
        compute_capability=compute_capability,
        task=task,
        opset=opset,
        precision=precision,
        residual=residual,
        linear_form=linear_form,
        activations=activations,
        storage=storage,
        examples=None if made else real_inputs(source, spec, task=task),
        calibration=calibration_texts(source, spec) if precision == "int8" and not made else None,
        data=data,
        overwrite=overwrite,
        external_data=external_data,
        atol=atol,
        rtol=rtol,
    )
    share = "removed" if manifest.pattern == "structured" else "zeros"
    show(f"{output}: {manifest.pattern}, {manifest.sparsity['measured']:.1%} {share}, opset {manifest.opset}")
    if manifest.accuracy is not None:
        found = manifest.accuracy
        show(
            f"{found.metric} on {found.rows} rows of {data}: {found.pytorch:.4f} in PyTorch (fp32), "
            f"{found.artifact:.4f} in the artifact ({precision})"
        )


@app.command(short_help="Say where the zeros of any model are.", epilog="Example: pst inspect model.onnx")
def inspect(
    path: Annotated[Path, typer.Argument(help="Model folder, artifact, .safetensors or .onnx file, anyone's.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say where the zeros are: per weight its shape, axis and density, and which patterns hold."""
    from export.inspect import inspect as run

    inspection = run(path)
    show(as_json(inspection.to_json()) if json else inspection.render())
