"""Peak numbers of devices, from their makers' data sheets; of the CPU at hand, measured."""

import time
from dataclasses import dataclass

import psutil
import torch

from vkvtrain.config import nearest


@dataclass(frozen=True)
class Device:
    """Peak numbers of a device."""

    name: str
    flops: float
    """Dense bfloat16 matrix products, FLOP/s."""
    bandwidth: float
    """Memory, bytes/s."""
    memory: float
    """Bytes."""
    source: str
    overhead: float = 1.5 * 2**30
    """Bytes that context, libraries and fragmentation are assumed to take."""


DEVICES = {
    device.name: device
    for device in (
        Device("b200", 2.25e15, 7.7e12, 180e9, "NVIDIA HGX B200 data sheet, of one GPU, without sparsity"),
        Device("h100", 989e12, 3.35e12, 80e9, "NVIDIA H100 SXM5 data sheet, without sparsity"),
        Device("h200", 989e12, 4.8e12, 141e9, "NVIDIA H200 SXM data sheet, without sparsity"),
        Device("a100", 312e12, 2.039e12, 80e9, "NVIDIA A100 80GB SXM4 data sheet, without sparsity"),
        Device("a100-40gb", 312e12, 1.555e12, 40e9, "NVIDIA A100 40GB SXM4 data sheet, without sparsity"),
        Device("l40s", 362e12, 864e9, 48e9, "NVIDIA L40S data sheet, without sparsity"),
        Device("rtx4090", 165.2e12, 1.008e12, 24e9, "NVIDIA Ada architecture white paper, FP32 accumulation"),
        Device("rtx5090", 209.5e12, 1.792e12, 32e9, "NVIDIA Blackwell RTX white paper, FP32 accumulation"),
        Device("mi300x", 1307.4e12, 5.3e12, 192e9, "AMD Instinct MI300X data sheet, without sparsity"),
    )
}


def find_device(name: str) -> Device:
    """A device by name; `cpu` is measured here, in about two seconds.

    Raises:
        ValueError: an unknown name.
    """
    if name == "cpu":
        return measured_cpu()
    if name not in DEVICES:
        raise ValueError(f"--device: there are no numbers for {name!r}{nearest(name, [*DEVICES, 'cpu'])}")
    return DEVICES[name]


def measured_cpu(size: int = 1024, copied: int = 2**26) -> Device:
    """This machine's CPU as torch uses it: float32 matrix products, and copies (read and written bytes)."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    flops = 2 * size**3 / _fastest(lambda: a @ b)
    source = torch.zeros(copied // 4)
    target = torch.empty_like(source)
    bandwidth = 2 * copied / _fastest(lambda: target.copy_(source))
    threads = torch.get_num_threads()
    memory = float(psutil.virtual_memory().total)
    return Device("cpu", flops, bandwidth, memory, f"measured here in float32 on {threads} threads", overhead=0.0)


def _fastest(call: object, repeats: int = 7) -> float:
    assert callable(call)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)
