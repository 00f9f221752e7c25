"""What the makers' data sheets say of devices."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """flops: dense bf16 matrix throughput, FLOP/s. memory: bytes."""

    flops: float
    memory: float


# NVIDIA's data sheets; the first name found in what CUDA calls a device counts. H100: SXM, A100: of 80 GB
DEVICES = {
    "GH200": Device(990e12, 96e9),
    "H200 NVL": Device(835e12, 141e9),
    "H200": Device(989e12, 141e9),
    "H100 PCIe": Device(756e12, 80e9),
    "H100 NVL": Device(835e12, 94e9),
    "H100": Device(989e12, 80e9),
    "A100": Device(312e12, 80e9),
    "L40S": Device(362e12, 48e9),
    "RTX 4090": Device(165e12, 24e9),
}


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of a CUDA device, or None where we do not know it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((row.flops for key, row in DEVICES.items() if key in name), None)
