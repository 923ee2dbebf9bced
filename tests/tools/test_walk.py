"""The walk of the path that a block executes (bench/walk.py), on a kernel whose counts are known by hand."""

import shutil
import struct
from pathlib import Path

import pytest

from bench import cubin
from bench.cubin import Code
from bench.walk import L1_CYCLES, L2_CYCLES, Load, Memory, Wait, Walker

DATA = Path(__file__).parent.parent / "data" / "walk"
#: of constant bank 0 on sm_90 before a kernel's arguments
BASE = 0x210


def arguments(rows: int, lanes: int, vectors: int, scale: int = 0) -> bytes:
    return struct.pack("<QQQiiixxxx", 1 << 40, 1 << 41, scale, rows, lanes, vectors)


def listed() -> Code:
    """The kernel of sample.cu as it was compiled for sm_90 once."""
    text = (DATA / "sample.sass").read_text()
    return Code("_Z6sample9Arguments", 20, 1280, BASE + 40, text)


def walked(code, *given, blocks=1, **more):
    memory = Memory([], operands=1 << 40)
    return Walker(code, memory).block(arguments(*given, **more), threads=64, blocks=blocks)


def test_every_instruction_of_the_executed_path_is_counted():
    """8 threads a row, 6 of which have a vector; 8 rows at a time: 4 turns of the loop.

    In sample.sass: 38 up to the first branch, 18 to the choice of a loop, 4 before it; a turn is 3 up to the lanes
    without a vector, 16 for those that have one (their root's slow end left out), 5 from where they meet; then 21 to
    the quotient's slow end, which is left out, and 7 to the end. MUFU: one for 64 / lanes, a root a turn, quotient and
    its check.
    """
    warps = walked(listed(), 32, 8, 6)
    assert len(warps) == 2
    for warp in warps:
        assert warp.instructions == 38 + 18 + 4 + 4 * (3 + 16 + 5) + 21 + 7
        assert (warp.mufu, warp.shuffles, warp.barriers) == (1 + 4 + 2, 1, 1)
        assert (warp.loaded, warp.wide, warp.stored) == (4 * 24 * 16, 4 * 24 * 16, 32 * 4)
        assert not warp.undecided and not warp.local


def test_an_option_that_is_on_is_walked_through():
    """With a scale there is another loop, of which a turn takes 3 more, and 3 more around it."""
    plain, scaled = walked(listed(), 32, 8, 6), walked(listed(), 32, 8, 6, scale=1 << 42)
    assert [warp.instructions for warp in scaled] == [warp.instructions + 3 * 4 + 3 for warp in plain]
    assert scaled[0].loaded == plain[0].loaded + 4 * 24 * 4


def test_lanes_that_leave_a_loop_wait_for_the_others():
    """Five rows: of the second warp's four rows only the first is there, and its lanes go through the loop alone."""
    first, second = walked(listed(), 5, 8, 6)
    assert first.instructions == second.instructions == 38 + 18 + 4 + 24 + 21 + 7
    assert (first.loaded, second.loaded) == (24 * 16, 6 * 16)
    assert (first.stored, second.stored) == (128, 128)


def test_lanes_wait_where_their_ways_meet():
    """24 lanes go out of line and come back from further on: the other 8 wait at BSYNC, and go on with them."""
    text = """/*0000*/ S2R R0, SR_TID.X ;
        /*0010*/ ISETP.GT.AND P0, PT, R0, 0x7, PT ;
        /*0020*/ BSSY B0, 0x60 ;
        /*0030*/ @P0 BRA 0x90 ;
        /*0040*/ MOV R1, 0x1 ;
        /*0050*/ BSYNC B0 ;
        /*0060*/ BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/ SHFL.BFLY PT, R2, R1, 0x1, 0x1f ;
        /*0080*/ EXIT ;
        /*0090*/ MOV R1, 0x2 ;
        /*00a0*/ BRA 0x50 ;"""
    (warp,) = Walker(Code("apart", 8, 0, BASE, text), Memory([])).block(b"", threads=32, blocks=1)
    assert warp.instructions == 4 + (1 + 1) + (2 + 1) + 3
    assert (warp.barriers, warp.shuffles) == (1, 1)


def test_asynchronous_copies_are_waited_for_by_their_groups():
    """Two groups of copies of 16 bytes a thread, of the first only half the lanes read: the first wait leaves one."""
    text = """/*0000*/ S2R R0, SR_TID.X ;
        /*0010*/ SHF.L.U32 R2, R0, 0x4, RZ ;
        /*0020*/ MOV R3, 0x100 ;
        /*0030*/ ISETP.LT.U32.AND P0, PT, R0, 0x10, PT ;
        /*0040*/ LDGSTS.E.BYPASS.128 [R2], desc[UR4][R2.64], P0 ;
        /*0050*/ LDGDEPBAR ;
        /*0060*/ LDGSTS.E.BYPASS.128 [R2+0x200], desc[UR4][R2.64+0x200] ;
        /*0070*/ LDGDEPBAR ;
        /*0080*/ LDGSTS.E.BYPASS.128 [R2+0x400], desc[UR4][R2.64+0x400], !PT ;
        /*0090*/ DEPBAR.LE SB0, 0x1 ;
        /*00a0*/ LDS.128 R8, [R2] ;
        /*00b0*/ DEPBAR.LE SB0, 0x0 ;
        /*00c0*/ EXIT ;"""
    memory = Memory([], operands=1 << 40)
    (warp,) = Walker(Code("copies", 12, 0, BASE, text), memory).block(b"", threads=32, blocks=1)
    assert warp.instructions == 13 and not warp.undecided
    assert warp.loaded == warp.wide == warp.in_flight == (16 + 32) * 16  # zeros are written without a read
    loads = [event for event in warp.events if isinstance(event, Load)]
    waits = [event for event in warp.events if isinstance(event, Wait)]
    assert [(load.bytes, load.latency) for load in loads] == [(16 * 16, None), (32 * 16, None)]
    assert [wait.token for wait in waits] == [loads[0].token, loads[1].token, -2]
    assert [wait.issued for wait in waits] == [3, 2, 1]  # the load from shared memory has one of them before it
    assert sum(event.issued for event in warp.events) == 13


def test_what_is_under_way_comes_in_sectors():
    """Eight float32 for each lane, in two loads: the first brings all 32 bytes, and the second finds them on their way.
    One number for all lanes is one sector."""
    text = """/*0000*/ S2R R0, SR_TID.X ;
        /*0010*/ SHF.L.U32 R2, R0, 0x5, RZ ;
        /*0020*/ MOV R3, 0x100 ;
        /*0030*/ LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0040*/ LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0050*/ MOV R2, 0x4000 ;
        /*0060*/ LDG.E R12, desc[UR4][R2.64] ;
        /*0070*/ EXIT ;"""
    memory = Memory([], operands=1 << 40)
    (warp,) = Walker(Code("eight", 16, 0, BASE, text), memory).block(b"", threads=32, blocks=1)
    loads = [event for event in warp.events if isinstance(event, Load)]
    assert [(load.bytes, load.latency) for load in loads] == [(32 * 32, None), (32 * 32, L1_CYCLES), (32, None)]
    assert warp.in_flight == 32 * 32 + 32
    assert warp.loaded == 2 * 32 * 16 + 32 * 4  # what threads get, whatever brings it


@pytest.mark.parametrize("lanes", [1, 3, 7, 64])
def test_integer_division_is_exact(lanes):
    """Rows of a thread are threadIdx.x / lanes and then every (64 / lanes)-th: as many loads as there are."""
    rows = 11
    wanted = sum(
        len(range(thread // lanes, rows, 64 // lanes)) for thread in range(64) if thread % lanes < min(lanes, 2)
    )
    assert sum(warp.loaded for warp in walked(listed(), rows, lanes, 2)) == wanted * 16


def test_events_are_loads_waits_and_barriers():
    (warp, _) = walked(listed(), 32, 8, 6)
    loads = [event for event in warp.events if isinstance(event, Load)]
    barriers = [event for event in warp.events if isinstance(event, Wait) and event.token == -1]
    assert [load.bytes for load in loads] == [24 * 16] * 4 and len(barriers) == 1
    assert warp.in_flight == 24 * 16  # no turn begins before the last one's load was used
    assert sum(event.issued for event in warp.events) == warp.instructions
    assert {load.latency for load in loads} == {None}


def test_what_lies_below_the_tensors_comes_from_l2():
    memory = Memory([], operands=1 << 50)
    warp = Walker(listed(), memory).block(arguments(32, 8, 6), threads=64, blocks=1)[0]
    assert [event.latency for event in warp.events if isinstance(event, Load)] == [L2_CYCLES] * 4
    assert warp.loaded == warp.in_flight == 0


def test_known_memory_is_read():
    memory = Memory([(100, b"\1\0\0\0\2\0\0\0")])
    assert (memory.read(100, 4), memory.read(104, 4), memory.read(105, 4), memory.read(96, 4)) == (1, 2, None, None)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
def test_a_fresh_compilation_has_the_same_loads_and_roots(tmp_path, monkeypatch):
    """Whatever nvcc makes of it: a load and a root a turn, and their vectors are those of the source."""
    monkeypatch.setattr(cubin, "CACHE", tmp_path)
    try:
        (code,) = cubin.compiled(DATA / "sample.cu", "90")
    except SystemExit as missing:
        pytest.skip(str(missing))
    assert code.constants == BASE + 40 and code.shared >= 256 and 0 < code.registers <= 64
    warps = walked(code, 32, 8, 6)
    assert {warp.loaded for warp in warps} == {4 * 24 * 16} and {warp.shuffles for warp in warps} == {1}
    assert all(warp.mufu >= 4 + 2 and warp.barriers == 1 and not warp.undecided for warp in warps)
    assert cubin.compiled(DATA / "sample.cu", "90")[0] == code  # from the cache
