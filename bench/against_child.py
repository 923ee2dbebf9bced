"""One of the two processes of `bench.against`: steps of the checkout that it is told, when it is asked.

It answers every line of its standard input with one: a task (a JSON object) with why the parity gate is red, or null;
a number with the seconds of one step, the mean of so many of them.
"""

import json
import sys
import time
from pathlib import Path

checkout, threads = sys.argv[1:]
sys.path[0] = checkout
import hfac  # noqa: E402 - of that checkout; what measures it is this one's

sys.path[0] = str(Path(__file__).parent.parent)
import torch  # noqa: E402

from bench.problem import LR, WEIGHT_DECAY, Problem  # noqa: E402
from bench.step_gate import why_red  # noqa: E402

assert Path(hfac.__file__).is_relative_to(checkout), f"{hfac.__file__} is not of {checkout}"
torch.set_num_threads(int(threads))
optimizer = None
for line in sys.stdin:
    question = json.loads(line)
    if isinstance(question, dict):
        optimizer = None  # its memory first
        cls, options, backend = getattr(hfac, question["optimizer"]), question["options"], question["backend"]
        where = getattr(torch, question["dtype"]), torch.device(question["device"])
        answer = why_red(cls.__name__, options, backend, *where)
        params = Problem(list(map(tuple, question["shapes"])), *where).params
        optimizer = cls(params, lr=LR, weight_decay=WEIGHT_DECAY, backend=backend, **options)
        for _ in range(3):
            optimizer.step()
    else:
        assert optimizer is not None
        optimizer.step()  # brings its memory back into the caches after the other process's turn
        synchronize = torch.cuda.synchronize if optimizer.param_groups[0]["params"][0].is_cuda else lambda: None
        synchronize()
        start = time.perf_counter()
        for _ in range(question):
            optimizer.step()
        synchronize()
        answer = (time.perf_counter() - start) / question
    print(json.dumps(answer), flush=True)
