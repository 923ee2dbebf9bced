"""What tests of sharded training run on every rank: processes on this machine that talk over gloo.

A test names a function of a module here by its qualified name; every rank calls it, and what rank 0 returns comes back
to the test. Starting ranks costs seconds, so one start runs many cases.
"""

import datetime
import importlib
import logging
import os
import pickle
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = datetime.timedelta(seconds=60)


def on_ranks(world: int, function: str, *args: Any) -> Any:
    """Calls ``module:function`` with ``args`` on ``world`` ranks and returns what rank 0 returned.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, folder, function, args), nprocs=world)
        return pickle.loads((Path(folder) / "result").read_bytes())


def _rank(rank: int, world: int, folder: str, function: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # full_tensor() in two gathers
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=TIMEOUT)
    module, name = function.split(":")
    try:
        result = getattr(importlib.import_module(module), name)(*args)
        if rank == 0:
            (Path(folder) / "result").write_bytes(pickle.dumps(result))
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the others notice at once that the connection is gone
    dist.destroy_process_group()
