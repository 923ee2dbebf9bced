"""Which GPUs the CUDA kernels serve, decided without one, and what a step says of errors of CUDA."""

import emulated
import pytest
import torch
from test_cuda_emulated import steps

from hfac import backends
from hfac.backends import cpu, cuda, triton

BUILT = ["sm_80", "sm_90", "compute_90"]


class Extension:
    """Stands for hfac._C with CUDA: these devices, and how often it was asked for them."""

    def __init__(self, *why_nots):
        self.devices = [
            {"name": f"GPU {k}", "capability": (8, 0), "usable": why_not is None, "why_not": why_not}
            for k, why_not in enumerate(why_nots)
        ]
        self.asked = 0

    def cuda_info(self):
        self.asked += 1
        return {"compiled": True, "architectures": BUILT, "devices": self.devices, "why_not": None}


@pytest.mark.skipif(cpu._C is None, reason="hfac._C is not built")
@pytest.mark.parametrize(
    ("architectures", "capability", "served"),
    [
        (BUILT, (8, 0), True),
        (BUILT, (8, 9), True),  # machine code of an earlier minor version
        (BUILT, (9, 0), True),
        (BUILT, (10, 0), True),  # PTX
        (BUILT, (12, 1), True),
        (BUILT, (7, 5), False),
        (["sm_90", "compute_90"], (8, 0), False),  # an A100 with a build for an H100
        (["sm_86"], (8, 0), False),
        (["sm_90"], (10, 0), False),
        (["sm_90a", "compute_90a"], (9, 0), True),
        (["sm_90a", "compute_90a"], (10, 0), False),
        (["sm_100f", "compute_100f"], (10, 3), True),
        (["sm_100f", "compute_100f"], (12, 0), False),
        (["sm_100", "compute_100"], (9, 0), False),
        ([], (9, 0), False),
    ],
    ids=str,
)
def test_the_compiled_list_is_held_against_the_capability(architectures, capability, served):
    major, minor = capability
    versions = {"driver_version": 13000, "runtime_version": 13000}
    said = cpu._C.cuda_no_code_for(architectures=architectures, major=major, minor=minor, **versions)
    assert (said == "") == served
    if not served:
        assert f"compute capability {major}.{minor}" in said and ", ".join(architectures) in said
        assert f"HFAC_CUDA_ARCHS={major}{minor}" in said


@pytest.mark.skipif(cpu._C is None, reason="hfac._C is not built")
def test_ptx_needs_a_driver_as_new_as_the_compiler():
    versions = {"driver_version": 12040, "runtime_version": 13000}
    assert cpu._C.cuda_no_code_for(architectures=BUILT, major=9, minor=0, **versions) == ""
    said = cpu._C.cuda_no_code_for(architectures=BUILT, major=10, minor=0, **versions)
    assert "CUDA 12.4" in said and "CUDA 13.0" in said and "HFAC_CUDA_ARCHS=100" in said


@pytest.mark.skipif(cpu._C is None, reason="hfac._C is not built")
def test_the_extension_names_what_it_was_compiled_for():
    info = cpu._C.cuda_info()
    assert bool(info["architectures"]) == info["compiled"]
    assert all({"name", "capability", "usable", "why_not"} == set(device) for device in info["devices"])


@pytest.mark.parametrize("with_triton", [True, False])
def test_auto_goes_on_where_nothing_was_compiled_for_a_gpu(with_triton, monkeypatch):
    monkeypatch.setattr(cpu, "_C", Extension(None, "it is old"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton, "_driver", lambda: None if with_triton else "no driver")
    good, old = torch.device("cuda:0"), torch.device("cuda:1")
    assert backends.available(good)[0] == "cuda"
    assert backends.available(old)[0] == ("triton" if with_triton else "reference")
    with pytest.raises(RuntimeError, match="the CUDA kernels cannot run on cuda:1, a GPU 1: it is old"):
        backends.resolve("cuda", old)


def test_devices_are_asked_for_once(monkeypatch):
    extension = Extension(None, "it is old")
    monkeypatch.setattr(cpu, "_C", extension)
    for _ in range(3):
        assert cuda.why_not(torch.device("cuda:0")) is None
        assert cuda.why_not(torch.device("cuda")) is None  # there is no current device here: the first
        assert cuda.why_not(torch.device("cuda:1")) is not None
    assert extension.asked == 2
    assert "there is no CUDA device cuda:2; there are 2" in cuda.why_not(torch.device("cuda:2"))


@pytest.fixture
def inject(emulated_backend):
    yield emulated.native.inject_error
    emulated.native.inject_error(code=0, text="")


@pytest.mark.skipif(emulated.native is None, reason=emulated.WHY_NOT)
@pytest.mark.parametrize("blocking", [None, "0", "1"])
@pytest.mark.parametrize(("code", "ran"), [(700, True), (719, True), (98, False)])
@pytest.mark.parametrize(("launches", "kernel"), [(0, "the step"), (1, "smmf_tiles"), (2, "smmf_fold")])
def test_an_error_is_not_called_that_of_the_next_kernel(launches, kernel, code, ran, blocking, inject, monkeypatch):
    """One from before a launch was never that kernel's. One that a launch reports is its own where it says so at once;
    of something that ran it is an earlier one's, unless launches wait for their kernels."""
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    if blocking is not None:
        monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", blocking)
    inject(code=code, text="it broke", launches=launches)
    with pytest.raises(RuntimeError) as raised:
        steps("SMMF", [(300, 264)], count=1)  # several tiles, which takes a fold
    if launches == 0 or (ran and blocking != "1"):
        assert str(raised.value) == (
            f"an earlier CUDA operation had failed before {kernel} was launched: it broke; set CUDA_LAUNCH_BLOCKING=1 "
            "to find it"
        )
    else:
        assert str(raised.value) == f"{kernel}: it broke"
    steps("SMMF", [(24, 16)], count=1)
