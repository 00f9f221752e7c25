"""The paper's comparisons: a function for each lists its contenders. Numbers are the paper's, on ImageNet 256x256."""

from collections.abc import Mapping
from typing import Any

from .study import Contender, Scale, Study

# A laptop's heads are as small as its backbone; elsewhere heads have their usual sizes. The U-Net's is the recipe's
LAPTOP_HEADS: dict[str, dict[str, int]] = {
    "coordinate_mlp": {"head_width": 32},
    "attention": {"head_width": 32, "head_depth": 2},
}


def head(name: str, scale: Scale, **model: Any) -> dict[str, Any]:
    """Keys of the model section for a head after the last block, or as `model` says: the U-Net of the recipe's size,
    any other of the scale's."""
    size: dict[str, Any] = {} if name == "unet" else {"head_width": None, "head_depth": None}
    if scale == "laptop":
        size |= LAPTOP_HEADS.get(name, {})
    return {"head": name, "placement": None, **size, **model}


def table_2(
    parameters: str,
    fid: float,
    sfid: float,
    inception: float,
    precision: float,
    recall: float,
    hours: int,
    latency: float,
) -> Mapping[str, str]:
    """A row of Table 2, as the paper prints it; the latency is of a whole image."""
    return {
        "Params": parameters,
        "FID": f"{fid:.2f}",
        "sFID": f"{sfid:.2f}",
        "IS": f"{inception:.1f}",
        "Precision": f"{precision:.2f}",
        "Recall": f"{recall:.2f}",
        "Training": f"{hours}×8 GPU h",
        "Latency": f"{latency:.2f} s an image",
    }


def unet(scale: Scale, name: str = "unet", label: str = "Convolutional U-Net") -> Contender:
    return Contender(name, label, head("unet", scale), table_2("631M", 2.16, 4.79, 276.8, 0.82, 0.61, 92, 0.92))


def dit(scale: Scale) -> Contender:
    return Contender("dit", "DiT-only", head("linear", scale), table_2("629M", 5.28, 6.56, 243.8, 0.74, 0.55, 84, 0.88))


def heads(scale: Scale) -> tuple[Contender, ...]:
    return (
        unet(scale),
        Contender(
            "coordinate-mlp",
            "Coordinate-based MLP",
            head("coordinate_mlp", scale),
            table_2("700M", 2.20, 4.49, 284.6, 0.80, 0.58, 123, 0.95),
        ),
        Contender(
            "attention",
            "Intra-patch attention",
            head("attention", scale),
            table_2("630M", 2.98, 5.16, 275.0, 0.80, 0.56, 96, 0.94),
        ),
        dit(scale),
        Contender("mlp", "Standard MLP", head("mlp", scale), table_2("630M", 6.92, 7.27, 210.9, 0.79, 0.41, 93, 0.91)),
    )


def scaling(scale: Scale) -> tuple[Contender, ...]:
    """The smaller scales grow by the paper's factors: depth 26 to 32, width 1152 to 1280 and 1536."""
    deeper, wider, widest = {
        "laptop": ({"depth": 5}, {"hidden_size": 312}, {"hidden_size": 384}),
        "gpu": ({"depth": 15}, {"hidden_size": 432}, {"hidden_size": 504}),
        "paper": ({"depth": 32}, {"hidden_size": 1280}, {"hidden_size": 1536}),
    }[scale]
    return (
        dit(scale),
        Contender(
            "dit-deeper",
            f"DiT-only, {deeper['depth']} layers",
            head("linear", scale, **deeper),
            table_2("772M", 4.91, 6.44, 251.7, 0.74, 0.56, 103, 1.05),
        ),
        Contender(
            "dit-wider",
            f"DiT-only, {wider['hidden_size']} wide",
            head("linear", scale, **wider),
            table_2("776M", 4.28, 6.26, 249.6, 0.77, 0.56, 103, 1.06),
        ),
        Contender(
            "dit-widest",
            f"DiT-only, {widest['hidden_size']} wide",
            head("linear", scale, **widest),
            table_2("1.1B", 2.83, 5.16, 285.6, 0.80, 0.57, 149, 1.49),
        ),
        unet(scale, label="With the U-Net head"),
    )


def placement(scale: Scale) -> tuple[Contender, ...]:
    return (
        dit(scale),
        unet(scale, "post", "Post-hoc refinement"),
        Contender("intermediate", "Intermediate injection", head("unet", scale, placement="intermediate")),
        Contender("hybrid", "Hybrid injection", head("unet", scale, placement="hybrid")),
    )


def head_config(scale: Scale) -> tuple[Contender, ...]:
    """Depth at the usual width, then width at full depth; the two series share one contender."""
    depths, width, widths = {
        "laptop": ((1, 2, 3), 24, (8, 16, 48)),
        "gpu": ((1, 2, 3, 4), 64, (16, 32, 128)),
        "paper": ((1, 2, 3, 4), 64, (16, 32, 128)),
    }[scale]
    sizes = [(depth, width) for depth in depths] + [(depths[-1], other) for other in widths]
    return tuple(
        Contender(f"depth{d}-width{w}", f"depth {d}, width {w}", head("unet", scale, head_depth=d, head_width=w))
        for d, w in sizes
    )


def patch_size(scale: Scale) -> tuple[Contender, ...]:
    return tuple(
        Contender(f"{name}-p{size}", f"{label}, P = {size}", head(kind, scale, patch_size=size))
        for size in {"laptop": (4, 8, 16), "gpu": (8, 16, 32), "paper": (8, 16, 32)}[scale]
        for name, label, kind in (("dip", "DiP", "unet"), ("dit", "DiT-only", "linear"))
    )


def prediction(scale: Scale) -> tuple[Contender, ...]:
    return tuple(
        Contender(f"{name}-{output}", f"{label}, {output}", head(kind, scale, prediction=output))
        for output in ("velocity", "image", "noise")
        for name, label, kind in (("dip", "DiP", "unet"), ("dit", "DiT-only", "linear"))
    )


COMPARISONS = {
    study.name: study
    for study in (
        Study(
            "heads",
            "Patch Detailer Heads",
            "Which local inductive bias helps, and what does it cost?",
            "Table 2, lower half",
            "U-Net (FID 2.16) > coordinate-based MLP (2.20) > intra-patch attention (2.98) > DiT-only (5.28) > "
            "standard MLP (6.92).",
            heads,
        ),
        Study(
            "scaling",
            "Scaling up DiT",
            "Does a larger DiT make up for the missing head?",
            "Table 2, upper half",
            "Depth hardly helps (FID 5.28 to 4.91). Width does (2.83 at 1.1 B parameters), at 1.7 times the cost. The "
            "U-Net head reaches 2.16 with 0.3% more parameters (0.5% by our count).",
            scaling,
        ),
        Study(
            "placement",
            "Placement of the head",
            "Does it matter where the head stands?",
            "Sec. 4.3, Fig. 5",
            "All three placements improve on DiT-only about alike; after the last block is best, and simplest.",
            placement,
        ),
        Study(
            "head-config",
            "Depth and width of the head",
            "How large must the U-Net be?",
            "Fig. 10a",
            "Deeper is better, with diminishing returns; wider does not go on helping.",
            head_config,
        ),
        Study(
            "patch-size",
            "Patch size",
            "What does a larger patch cost in quality, and what does it save?",
            "Fig. 10b",
            "Small patches are better and much dearer; DiP keeps its margin over DiT-only models of smaller patches.",
            patch_size,
            {"paper": {"resolution": 512}},
        ),
        Study(
            "prediction",
            "What the network predicts",
            "Velocity, clean image or noise: what suits which network?",
            "Sec. 3.1 (Eqs. 4 and 5), with the image prediction of JiT (Sec. 2)",
            "It does not compare them. It trains the velocity (Eq. 5), speaks of the noise in Sec. 3.3, and names JiT, "
            "which predicts the image and needs no head.",
            prediction,
        ),
    )
}
