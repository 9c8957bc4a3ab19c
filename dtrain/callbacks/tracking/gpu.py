"""What the training's GPU is doing, where there is one."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)

_MEGA = 1024**2


class GpuGauge:
    """Reads the memory and the utilisation of a CUDA device; of another one, nothing.

    Utilisation needs NVIDIA's own library (`pip install nvidia-ml-py`); without it there is none.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._utilisation = self._is_cuda

    def read(self) -> dict[str, float]:
        """Returns MiB in use and at most since the epoch began, percent of the last moments in which a kernel ran."""
        if not self._is_cuda:
            return {}
        values = {
            "gpu/memory_mib": torch.cuda.memory_allocated(self._device) / _MEGA,
            "gpu/memory_peak_mib": torch.cuda.max_memory_allocated(self._device) / _MEGA,
        }
        if self._utilisation:
            try:
                values["gpu/utilisation_percent"] = float(torch.cuda.utilization(self._device))
            except Exception as error:  # noqa: BLE001 - a driver that does not tell; the rest is told
                self._utilisation = False
                logger.info("the GPU's utilisation is not known: %s", error)
        return values
