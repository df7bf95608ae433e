"""Compile every kernel for the GPUs of the argument (80, 90, ...), without one: prints a line for each."""

import sys
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pst.kernels import low_rank, selection

INTEGERS = "*i64"
TABLES = {"table": INTEGERS, "scalars": "*fp32", "tiles": "*i32"}
SEGMENTS = {"scores": "*fp32", "segments": "*i32", "starts": "*i32", "offsets": INTEGERS, "state": INTEGERS}
RANKS = {"r1": 8, "r2": 32, "R1": 16, "R2": 32}
STORED = {"TRANSPOSED": False, "ALIGNED": True}
TILE = dict(zip(("BN", "BK"), low_rank.TILE, strict=True)) | {"PRECISION": "tf32x3"}


def split(shape: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """What the kernel takes as constants, and what the compiler takes as options."""
    options = {name: value for name, value in shape.items() if name.startswith("num_")}
    return {name: value for name, value in shape.items() if name not in options}, options


def cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Name, kernel, types of its arguments, constants, options."""
    for out in (tl.float32, tl.bfloat16):
        for transposed in (False, True):
            stored = {**STORED, "TRANSPOSED": transposed}
            constants = {"r2": 32, "R2": 32, "OUT": out, **stored, **TILE}
            yield f"masked {out} {transposed}", low_rank._masked_kernel, TABLES | {"outputs": INTEGERS}, constants, {}
            for name, kernel, shape in (
                ("rows", low_rank._rows_kernel, low_rank.ROWS),
                ("columns", low_rank._columns_kernel, low_rank.COLUMNS),
            ):
                sizes, options = split(shape)
                constants = RANKS | stored | sizes | {"G": out, "MAGNITUDE": True, "PRECISION": "tf32"}
                yield (
                    f"{name} {out} {transposed}",
                    kernel,
                    TABLES | dict.fromkeys(("grads", "results"), INTEGERS),
                    constants,
                    options,
                )
    yield "scores", low_rank._scores_kernel, TABLES | {"scores": "*fp32"}, RANKS | STORED | TILE, {}
    counts = {"counts": "*i32"}
    for ties in (False, True):
        for shift in (24, 16, 8, 0):
            digit = {"SHIFT": shift, "TIES": ties}
            span = digit | {"SPAN": selection.SPAN}
            searched = SEGMENTS | counts | {"flags": "*i32", "spans": "i32"}
            yield f"count {shift} {ties}", selection._count_kernel, searched, span, {}
            yield f"choose {shift} {ties}", selection._choose_kernel, counts | {"state": INTEGERS}, digit, {}
    tables = {name: kind for name, kind in SEGMENTS.items() if name != "state"}
    window = {"lows": INTEGERS, "rooms": INTEGERS, "counted": "*i32", "listed": INTEGERS, "flags": "*i32"}
    yield "window", selection._window_kernel, tables | window, {"SPAN": selection.SPAN}, {}
    settled = window | {"state": INTEGERS, "missed": "*i32"}
    yield "settle", selection._settle_kernel, settled, {"CHUNK": selection.CHUNK}, {}
    yield "keep", selection._keep_kernel, SEGMENTS | {"keep": "*i1"}, {"SPAN": selection.SPAN}, {}
    arguments = {"scores": "*fp32", "offsets": INTEGERS, "keep": "*i1", "lost": "*fp32", "bad": "*i32"}
    arguments |= {"segments": "i32", "groups": "i32"}
    for n, m, lost in ((2, 4, False), (2, 4, True), (3, 5, True)):
        padded = 1 << (m - 1).bit_length()
        constants = {"N": n, "M": m, "PADDED": padded, "GROUPS": 4096 // padded**2, "LOST": lost}
        yield f"{n}:{m} {lost}", selection._n_of_m_kernel, arguments, constants, {}


def main(capabilities: list[str]) -> None:
    """Compile, or raise what the compiler does."""
    for capability in capabilities:
        target = GPUTarget("cuda", int(capability), 32)
        for name, kernel, types, constants, options in cases():
            names = kernel.arg_names
            signature = {each: "constexpr" if each in constants else types[each] for each in names}
            source = ASTSource(
                fn=kernel,
                signature=signature,
                constexprs={(names.index(each),): value for each, value in constants.items()},
            )
            compiled = triton.compile(source, target=target, options=options)
            print(f"sm_{capability} {name}: {len(compiled.asm['cubin'])} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
