"""Parameters that FSDP2 offloads to the CPU are stepped there, over the part of the process group that is for CPUs.

The policy itself wants a GPU (tests/backends/test_gpu.py); here its result is made by hand."""

from sharded import on_ranks
from sharded_steps import OPTIONS
from test_sharded import agree


def test_offloaded_steps_equal_whole_tensors():
    cases = [(name, options, case) for name in OPTIONS for options in ("all", "limit") for case in ("even", "uneven")]
    (found,) = on_ranks(4, ("sharded_offload:compare_all", cases))
    agree(found, 1e-12)


def test_a_process_group_without_a_backend_for_cpus_is_refused():
    (message,) = on_ranks(4, ("sharded_offload:without_a_backend",))
    assert "has its shards on cpu" in message and 'init_process_group("cpu:gloo,cuda:nccl")' in message
