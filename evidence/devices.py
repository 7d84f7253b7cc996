"""What trainings run on here: every GPU, or the processor."""

import torch


def all_devices() -> list[str]:
    """As torch calls them."""
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]


def device_name() -> str:
    """For a result to say, such as `NVIDIA H200`."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
