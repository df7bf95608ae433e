"""Which weights a TensorRT layer computes with, and what is said of their zeros: names as TensorRT writes them."""

from pathlib import Path

import pytest

from export import manifest
from export.manifest import WeightInfo
from pst.errors import ArtifactError
from serve.engines import LayerTime, Verdict
from serve.engines._onnx_nodes import Node, computing_nodes, read_nodes
from serve.engines._tensorrt_layers import LayerMap
from serve.engines._tensorrt_profile import judge

NODES = (
    Node(name="node_embedding", operator="Gather", inputs=("words", "ids"), outputs=("x",)),
    Node(name="node_MatMul_84", operator="Conv", inputs=("x", "query"), outputs=("q",)),
    Node(name="node_MatMul_92", operator="Conv", inputs=("x", "key"), outputs=("k",)),
    Node(name="node_MatMul_100", operator="Conv", inputs=("x", "value"), outputs=("v",)),
    Node(name="node_scores", operator="MatMul", inputs=("q", "k"), outputs=("s",)),
    Node(name="node_softmax", operator="Softmax", inputs=("s",), outputs=("p",)),
    Node(name="node_turn", operator="Transpose", inputs=("dense",), outputs=("dense_t",)),
    Node(name="node_MatMul_146", operator="MatMul", inputs=("p", "dense_t"), outputs=("d",)),
    Node(name="node_add_3", operator="Add", inputs=("d", "bias"), outputs=("e",)),
    Node(name="node_Gemm_306", operator="Gemm", inputs=("e", "pooler"), outputs=("y",)),
)
WEIGHTS = ("query", "key", "value", "dense", "pooler")


def placed(*layers: str, **metadata: str) -> dict[str, tuple[str, ...]]:
    return LayerMap(NODES, WEIGHTS).weights_of(layers, metadata=metadata, kinds={})


def test_the_file_is_read_as_onnx_reads_it(bert_artifact: Path, gpt2_artifact: Path, tmp_path: Path) -> None:
    import onnx

    for artifact in (bert_artifact, gpt2_artifact):
        file = artifact / "model.onnx"
        nodes = read_nodes(file)
        graph = onnx.load(str(file)).graph
        assert [(node.name, node.operator, node.inputs, node.outputs) for node in nodes] == [
            (node.name, node.op_type, tuple(node.input), tuple(node.output)) for node in graph.node
        ]
        weights = manifest.load(artifact).weights
        found = computing_nodes(nodes, [weight.initializer for weight in weights])
        assert all(len(places) == 1 for places in found.values())
        assert [nodes[places[0]].operator for places in found.values()] == [weight.form for weight in weights]
    (tmp_path / "short.onnx").write_bytes(file.read_bytes()[:-5])
    (tmp_path / "empty.onnx").write_bytes(b"")
    for name in ("short", "empty"):
        with pytest.raises(ArtifactError, match="is not a whole ONNX model; export it again"):
            read_nodes(tmp_path / f"{name}.onnx")


def test_single_fused_and_parallel_nodes() -> None:
    assert placed(
        "node_MatMul_84 || node_MatMul_92 || node_MatMul_100", "node_MatMul_146 + node_add_3", "node_Gemm_306",
        "Reformatting CopyNode for Input Tensor 0 to node_Gemm_306", "PWN(node_softmax)",
    ) == {
        "node_MatMul_84 || node_MatMul_92 || node_MatMul_100": ("query", "key", "value"),
        "node_MatMul_146 + node_add_3": ("dense",),
        "node_Gemm_306": ("pooler",),
        "Reformatting CopyNode for Input Tensor 0 to node_Gemm_306": (),
        "PWN(node_softmax)": (),
    }  # fmt: skip
    assert placed("node_MatMul_84 [profile 2]") == {"node_MatMul_84 [profile 2]": ("query",)}


@pytest.mark.parametrize(
    "region",
    [
        "{ForeignNode[words...node_Gemm_306]}",  # begins at a weight
        "{ForeignNode[node_embedding...node_add_3 + node_Gemm_306]} [profile 1]",
        "{ForeignNode[(Unnamed Layer* 3274) [Shuffle]...node_Gemm_306]}",  # a layer that the parser added
    ],
)
def test_a_whole_model_is_one_region(region: str) -> None:
    moved = f"Reformatting CopyNode for Input Tensor 1 to {region}"
    assert placed(region, moved) == {region: WEIGHTS, moved: ()}


def test_a_region_between_convolutions_leaves_them_out() -> None:
    attention = "{ForeignNode[node_embedding...node_add_3]}"
    assert placed("node_MatMul_84", "node_MatMul_92", attention) == {
        "node_MatMul_84": ("query",),
        "node_MatMul_92": ("key",),
        attention: ("value", "dense"),
    }


def test_kernels_of_a_region_by_name_and_by_metadata() -> None:
    assert placed("node_MatMul_146_myl0_5", "__myl_MulAddCast_myl0_3") == {
        "node_MatMul_146_myl0_5": ("dense",),
        "__myl_MulAddCast_myl0_3": (),
    }
    told = "[ONNX Layer: node_MatMul_84]\x1e[ONNX Layer: node_scores]"
    assert placed("gemm_1", gemm_1=told) == {"gemm_1": ("query",)}


def test_copies_around_a_layer_have_its_metadata_and_not_its_weights() -> None:
    """As TensorRT 8.6.1 lists a model of convolutions on an H100."""
    turn, qkv = (
        "shuffle_between_layer_norm_image_and_node_MatMul_84",
        "node_MatMul_84 || node_MatMul_92 || node_MatMul_100",
    )
    twice, product = (
        "a copy",
        "node_MatMul_146 + PWN(PWN(bias + (Unnamed Layer* 95) [Shuffle], node_softmax), node_gelu)",
    )
    told = "[ONNX Layer: node_MatMul_84]"
    found = LayerMap(NODES, WEIGHTS).weights_of(
        [turn, qkv, twice, product],
        metadata={
            turn: told,
            qkv: told,
            twice: "[ONNX Layer: node_MatMul_146]",
            product: "[ONNX Layer: node_MatMul_146]",
        },
        kinds={turn: "NoOp", qkv: "CaskGemmConvolution", twice: "NoOp", product: "CaskGemmConvolution"},
    )
    assert found == {turn: (), qkv: ("query", "key", "value"), twice: (), product: ("dense",)}


def weight(form: str, *, size: int = 768) -> WeightInfo:
    shape = (size, size, 1, 1) if form == "Conv" else (size, size)
    return WeightInfo(name="w", initializer="w", shape=shape, axis=1, density=0.5, form=form, pattern="2:4")


def told(
    form: str = "Conv", *, pattern: str = "2:4", precision: str = "fp16", kernel: str = "",
    eligible: bool | None = False, chosen: bool = False, others: int = 0, size: int = 768, asked: bool = True,
) -> Verdict:  # fmt: skip
    place = LayerTime(node="n", operator="x", time_ms=1.0, weights=("w", *map(str, range(others))), kernel=kernel)
    return judge(
        weight(form, size=size), pattern=pattern, place=place, eligible=eligible, chosen=chosen, precision=precision,
        version="TensorRT 8.6.1", asked=asked,
    )  # fmt: skip


def test_why_zeros_are_multiplied() -> None:
    assert (
        "sparse kernels for 2:4 alone, and multiplies zeros of pattern unstructured" in told(pattern="unstructured").why
    )
    assert told(pattern="unstructured").advice.startswith("train with --pattern 2:4, or remove whole heads")
    assert told(precision="fp32").why == "the graph is fp32, and TensorRT 8.6.1's sparse kernels are for fp16 and int8"
    assert told(precision="fp32").advice == "export with --precision fp16"
    assert told("MatMul").why == (
        "TensorRT 8.6.1 counts no MatMul of this kind as eligible for sparse kernels, which take convolutions"
    )
    assert told("Gemm").advice.startswith("export with --linear-form conv and compare the whole model's time")
    assert told().why == "TensorRT 8.6.1 does not count this convolution of 768 x 768 as eligible, and does not say why"
    assert told(eligible=True).why == (
        "eligible, but TensorRT 8.6.1 measured a dense kernel to be faster at this shape; 768 x 768 is small"
    )
    assert told(eligible=True, size=4096).why.endswith("faster at this shape")
    half = told(eligible=True, size=4096, precision="bf16")
    assert half.why.endswith("faster at this shape, in bf16")
    assert half.advice.startswith("export with --precision fp16; or larger batches")
    assert (
        told(eligible=None).why == "TensorRT 8.6.1 does not say which layers are eligible, and no sparse kernel is seen"
    )
    assert told(asked=False, eligible=None).why.startswith("the plan was built without sparse kernels")
    assert told("MatMul", others=71).why.endswith("; fused with 71 others, so that its time cannot be told apart")


def test_sparse_kernels_are_known_by_the_log_and_by_their_names() -> None:
    sparse = "sm80_xmma_sparse_conv_f16f16_f16f16_f16_tn_n_tilesize128x128x64"
    dense = "sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc"
    by_name = told(kernel=sparse, eligible=True)
    assert (by_name.eligible, by_name.chosen, by_name.why) == (True, True, f"a sparse kernel ran: {sparse}")
    by_log = told(eligible=True, chosen=True)
    assert (by_log.eligible, by_log.chosen, by_log.why) == (True, True, "a sparse kernel ran")
    # The log is that of all profiles: a dense kernel's name is this one's.
    assert told(kernel=dense, eligible=True, chosen=True).chosen is False
    assert told(kernel=sparse, eligible=True, others=2).chosen is True  # one kernel of three weights
