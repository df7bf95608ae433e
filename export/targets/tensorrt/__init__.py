"""TensorRT plans of an artifact, built with whichever TensorRT is there, and kept beside the artifact.

    plan = plan_of(Path("artifact"))                                            # any shape, up to 32 rows
    plan = plan_of(Path("artifact"), profiles=[fixed_profile((8, 128))])        # tuned for one shape, takes no other

versions.py is the one module that knows how TensorRT 8.6, 10, 11 and TensorRT-RTX differ; serve/engines/tensorrt.py
runs the plans with it. Needs no torch and no onnx.
"""

from export.targets.tensorrt.plan import FOLDER, Plan, PlanKey, build_plan, plan_of
from export.targets.tensorrt.profiles import Profile, fixed_profile, parse_profile
from export.targets.tensorrt.versions import NO_GPU, RUNTIMES, find_gpu, find_runtime

__all__ = [
    "FOLDER",
    "NO_GPU",
    "RUNTIMES",
    "Plan",
    "PlanKey",
    "Profile",
    "build_plan",
    "find_gpu",
    "find_runtime",
    "fixed_profile",
    "parse_profile",
    "plan_of",
]
