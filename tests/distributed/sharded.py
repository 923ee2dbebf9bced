"""What tests of sharded training run on every rank: processes on this machine that talk over gloo.

A test names functions of modules here; every rank calls them, and what rank 0 returns comes back to the test. Starting
ranks costs seconds, so one start makes many calls. They are forked as `processes` says.
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


def on_ranks(world: int, *calls: tuple[Any, ...]) -> list[Any]:
    """Makes ``calls``, ("module:function", *arguments) each, on ``world`` ranks; returns what rank 0 returned.

    Raises:
        torch.multiprocessing.ProcessRaisedException, ProcessExitedException: a rank raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (world, folder, calls), nprocs=world, start_method="forkserver")
        return pickle.loads((Path(folder) / "results").read_bytes())


def _rank(rank: int, world: int, folder: str, calls: tuple[tuple[Any, ...], ...]) -> None:
    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # full_tensor() in two gathers
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        results = []
        for function, *args in calls:
            module, name = function.split(":")
            results.append(getattr(importlib.import_module(module), name)(*args))
        if rank == 0:
            (Path(folder) / "results").write_bytes(pickle.dumps(results))
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the others notice at once that the connection is gone
    if torch.__version__ < "2.7":  # whose gloo may wait for ever here: its thread for the GIL, and this one for it
        os._exit(0)
    dist.destroy_process_group()
