"""Parameters that FSDP2 offloads to the CPU are stepped there, over the part of the process group that is for CPUs.

The policy that pins memory wants a GPU (tests/backends/test_gpu.py); here its result is made by hand, or nothing is
pinned."""

from pathlib import Path

from sharded import on_ranks
from sharded_steps import OPTIONS
from test_sharded import agree

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


def test_offloaded_steps_equal_whole_tensors():
    cases = [(name, options, case) for name in OPTIONS for options in ("all", "limit") for case in ("even", "uneven")]
    (found,) = on_ranks(4, ("sharded_offload:compare_all", cases))
    agree(found, 1e-12)


def test_a_process_group_without_a_backend_for_cpus_is_refused():
    (message,) = on_ranks(4, ("sharded_offload:without_a_backend",))
    assert "has its shards on cpu" in message and 'init_process_group("cpu:gloo,cuda:nccl")' in message


def test_memory_of_offloaded_state_is_as_the_page_says():
    """4 ranks, 12 blocks, float32."""
    (found,) = on_ranks(4, ("sharded_offload:memory",))
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| offloaded, ")]
    assert len(rows) == len(found)
    for row, (name, numbers) in zip(rows, found.items(), strict=True):
        said, state, transient = [cell.strip() for cell in row.removeprefix("| offloaded, ").strip("|").split("|")]
        assert said == name and state == f"{numbers[0]:.3f}", (row, numbers)
        assert abs(float(transient) - numbers[1]) <= 0.3 * numbers[1], (
            row,
            numbers,
        )  # threads differ
