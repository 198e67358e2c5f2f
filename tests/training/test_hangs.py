"""How long processes wait for each other."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_group

from chatbind_cli.training.hangs import PATIENCE, noticed_soon


def test_training_waits_for_minutes_and_what_surrounds_it_for_hours() -> None:
    with noticed_soon():  # one process waits for nobody
        assert not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=PATIENCE)
    try:
        options = _get_default_group()._get_backend(torch.device("cpu")).options
        assert options._timeout == timedelta(hours=6)
        with noticed_soon():
            assert options._timeout == timedelta(minutes=30)
        assert options._timeout == timedelta(hours=6)
    finally:
        dist.destroy_process_group()
