"""The Triton kernels on a GPU: gpu_steps.py and gpu_graphs.py. In the interpreter they run in test_triton.py."""

import pytest
from gpu_graphs import *  # noqa: F403
from gpu_steps import *  # noqa: F403
from gpu_steps import DEVICE
from rehearsal import HAS_GPU
from test_parity import ieee_square_roots  # noqa: F401 (a fixture)

from hfac import backends

if not HAS_GPU:
    pytest.skip("there is no GPU here: Triton's kernels run in its interpreter", allow_module_level=True)


@pytest.fixture(autouse=True)
def backend():
    why_not = backends.TABLE["triton"].why_not(DEVICE)
    if why_not is not None:
        pytest.skip(why_not)
    return "triton"
