"""The process group of Ray Train's workers, whose room is given back where it cannot be formed."""

from __future__ import annotations

from typing import Any

from ray.exceptions import RayActorError
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class TorchGroup(_TorchBackend):
    """Torch's process group. Where a worker dies while it is formed, Ray Train (2.60) leaves the other workers and the
    room of all of them as they are, and the next start would wait for that room forever."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:  # type: ignore[override]
        try:
            super().on_start(worker_group, backend_config)
        except RayActorError:
            worker_group.get_worker_group_state().placement_group_handle.shutdown()
            raise


class TorchGroupConfig(TorchConfig):
    """`TorchConfig` with `TorchGroup`."""

    @property
    def backend_cls(self) -> type[TorchGroup]:
        return TorchGroup
