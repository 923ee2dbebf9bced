"""Faults to plant: one line of the package made wrong, and the tests that must notice. `planted.py` plants them.

A fault is found by its text wherever in the area it stands, so that code can move without a change here. When the text
is gone or no longer unique, test_planted.py fails: rewrite the fault, of the same kind, for the code that is there now.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    """Replaces ``old``, which occurs once in the folder ``area``, by ``new``. ``tests``: arguments of pytest."""

    kind: str
    area: str
    old: str
    new: str
    tests: str


PARITY = "tests/backends/test_parity.py"
EMULATED = "tests/backends/test_cuda_emulated.py"
CLIPPED = "tests/backends/test_clipped_steps.py"
CHANGES = "tests/backends/test_changes.py"
SHARDED = "tests/distributed/test_sharded.py"

FAULTS = [
    # What is computed.
    Fault(
        "a schedule begins one step late",
        "hfac",
        "return beta * growth_rate ** (step.before if isinstance(step, Steps) else step - 1.0)",
        "return beta * growth_rate ** (step.now if isinstance(step, Steps) else step)",
        "tests/optim/test_vectors.py",
    ),
    Fault(
        "the second moment lacks eps",
        "hfac",
        "return b2 * old.view(-1) + (1 - b2) * (G * G + eps)",
        "return b2 * old.view(-1) + (1 - b2) * (G * G)",
        f"{PARITY} -k HFac",
    ),
    Fault(
        "codes of 8 bits never come to rest",
        "hfac",
        "(q == old) & (magnitude < X_old.abs())",
        "(q == old) & (magnitude < 0)",
        "tests/optim/test_int8.py -k 'towards or idle'",
    ),
    Fault(
        "codes of 8 bits keep the unit of the step before",
        "csrc",
        "if (kCodes) at.col_sum[j] = root(old) / root(s[j]);",
        "if (kCodes) at.col_sum[j] = T(1);",
        "tests/optim/test_int8.py -k definition",
    ),
    Fault(
        "codes of 8 bits never come to rest on a GPU",
        "csrc",
        "if (code[k] == old && magnitude(x[k]) < magnitude(held))",
        "if (code[k] == old && magnitude(x[k]) < T(0))",
        "tests/optim/test_int8.py -k 'definition and emulated'",
    ),
    Fault(
        "a vector's division lacks eps",
        "csrc",
        "quotient[r] = first[r] / (root_second[r] + splat.eps);",
        "quotient[r] = first[r] / root_second[r];",
        f"{PARITY} -k SMMF",
    ),
    Fault(
        "a sum runs past the end of its row",
        "csrc",
        "for (int r = 0; r < R; ++r) add(r, load_part<T>(g[r] + j, left));",
        "for (int r = 0; r < R; ++r) add(r, load(g[r] + j));",
        f"{PARITY} -k HFac",
    ),
    Fault(
        "a copy to shared memory is used before it has arrived",
        "csrc",
        "wait_for_copies<kStages - 2>();",
        ";",
        f"{EMULATED} -k 'several_tiles and HFac'",
    ),
    Fault(
        "one lane of a vector is wrong",
        "csrc",
        "x[k] = float_of(k % 2 ? pair & 0xffff0000u : pair << 16);",
        "x[k] = float_of(k % 2 ? pair & 0xff000000u : pair << 16);",
        EMULATED,
    ),
    Fault(
        "the last elements of a row are left out",
        "csrc",
        "for (int64_t l = 0; l < count; ++l) to[l] = from[l];",
        "for (int64_t l = 0; l + 1 < count; ++l) to[l] = from[l];",
        PARITY,
    ),
    Fault(
        "the last sign of a byte is lost",
        "csrc",
        "const unsigned fresh = get_bits(bits, from, some) << shift;",
        "const unsigned fresh = (get_bits(bits, from, some) << shift) & 0x7fu;",
        f"{PARITY} tests/backends/test_parts.py -k SMMF",
    ),
    Fault(
        "the gradient is not negated when maximizing",
        "csrc",
        "negate(a.options.maximize) {}",
        "negate(false) {}",
        EMULATED,
    ),
    Fault(
        "coupled weight decay is left out",
        "csrc",
        "return kCoupled ? g + weight_decay * w : g;",
        "return g;",
        f"{PARITY} -k SMMF",
    ),
    Fault(
        "coupled and decoupled weight decay are mixed up",
        "hfac",
        'coupled = not group.get("decoupled_weight_decay", True)',
        'coupled = group.get("decoupled_weight_decay", True)',
        "tests/optim/test_convert.py",
    ),
    Fault(
        "a square is not the most nearly square",
        "hfac",
        "while m > 1 and numel % m:",
        "while m > 2 and numel % m:",
        "tests/optim/test_properties.py",
    ),
    Fault(
        "a tile is forgotten",
        "csrc",
        "for (int64_t p = 0; p < n; ++p) plan_.tiles.push_back({i, static_cast<int32_t>(p)});",
        "for (int64_t p = n > 2 ? 1 : 0; p < n; ++p) plan_.tiles.push_back({i, static_cast<int32_t>(p)});",
        EMULATED,
    ),
    Fault(
        "a workspace is too small",
        "csrc",
        "plan_.workspace_bytes = std::max(plan_.workspace_bytes, static_cast<size_t>(at));",
        "plan_.workspace_bytes = std::max(plan_.workspace_bytes, static_cast<size_t>(at - 4));",
        EMULATED,
    ),
    # Rounding and storage.
    Fault(
        "random bits are biased",
        "hfac",
        "return word >> 16 * (index & 1) & 0xFFFF",
        "return word >> 16 * (index & 1) & 0x7FFF",
        "tests/backends/test_rounding.py -k 'unbiased or known or counter'",
    ),
    Fault(
        "slices of a stack are rounded with the same bits",
        "hfac",
        "firsts = [first + i * stride for first in firsts for i in range(size)]",
        "firsts = [first for first in firsts for i in range(size)]",
        "tests/optim/test_batch_dims.py -k rounded",
    ),
    Fault(
        "rounding to the nearest cuts off instead",
        "csrc",
        "return BFloat16{static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};",
        "return BFloat16{static_cast<uint16_t>(u >> 16)};",
        EMULATED,
    ),
    Fault(
        "the lower piece of a master weight loses a bit",
        "csrc",
        "low = static_cast<int16_t>(rest);",
        "low = static_cast<int16_t>(rest & 0xfffeu);",
        "tests/backends/test_stored_steps.py -k 'cpu'",
    ),
    Fault(
        "states have the parameter's type",
        "hfac",
        "return torch.float64 if param_dtype == torch.float64 else torch.float32",
        "return param_dtype",
        "tests/optim/test_state.py -k keys_shapes",
    ),
    # Clipping, skipping, scaling.
    Fault(
        "gradients are clipped by the largest norm",
        "hfac",
        "return torch.linalg.vector_norm(_in_one(stacks))",
        "return torch.linalg.vector_norm(_in_one(stacks), torch.inf)",
        "tests/optim/test_clipping.py -k as_clip_grad_norm",
    ),
    Fault(
        "an update is clipped by its root mean square without the root",
        "hfac",
        "rms = ((U * U).mean() if mean_square is None else mean_square).sqrt()",
        "rms = (U * U).mean() if mean_square is None else mean_square",
        f"{PARITY} -k HFac",
    ),
    Fault(
        "gradients of several types are taken for one",
        "hfac",
        "kinds.setdefault((grad.device, grad.dtype), []).append(i)",
        "kinds.setdefault((grad.device, grads[0].dtype), []).append(i)",
        "tests/optim/test_clipping.py",
    ),
    Fault(
        "statistics of unclipped gradients serve the clipped step",
        "hfac",
        "if sums is not None and coefficient.item() == 1:",
        "if sums is not None:",
        CLIPPED,
    ),
    Fault(
        "a gradient that is not finite has part in the norm",
        "hfac",
        "stacks[-1] = torch.nan_to_num(stacks[-1], nan=0.0, posinf=0.0)",
        "stacks[-1] = torch.nan_to_num(stacks[-1], nan=0.0)",
        "tests/optim/test_clipping.py -k skip",
    ),
    Fault(
        "a refused parameter is written",
        "csrc",
        "return a.nonfinite && a.nonfinite[it.index];",
        "return a.nonfinite && a.nonfinite[it.index] > 1;",
        f"{CLIPPED} tests/backends/test_stored_steps.py -k refused",
    ),
    Fault(
        "a skipped step is counted as one",
        "hfac",
        "return some, some * (up == self._counts)",
        "return some, 0 * some",
        "tests/optim/test_batch_dims.py",
    ),
    # What a warm step sees.
    Fault(
        "a repeated launch has the last step's numbers",
        "hfac",
        "{**last[1], **_on_host(numbers), ",
        "{**_on_host(numbers), **last[1], ",
        f"{CHANGES} -k repeats",
    ),
    Fault(
        "gradients that have moved are taken for those that lay there",
        "hfac",
        "if found == ops.ALIKE:",
        "if found == ops.SAME:",
        f"{CHANGES} -k nothing",
    ),
    Fault(
        "a repeated launch is not clipped",
        "hfac",
        "return self._again(seen, numbers, nonfinite, moved, divisor)",
        "return self._again(seen, numbers, nonfinite, moved)",
        f"{CHANGES} -k clipped",
    ),
    Fault(
        "a step has the numbers that another group's has brought",
        "triton_kernels",
        "if all(map(is_, told, known)):",
        "if all(map(is_, told[1:], known[1:])):",
        "tests/backends/test_triton_launches.py -k share",
    ),
    Fault(
        "found_inf is not looked at",
        "csrc",
        "HFAC_DEVICE bool skipped(const Arguments& a) { return a.found_inf && *a.found_inf != 0.0f; }",
        "HFAC_DEVICE bool skipped(const Arguments& a) { return a.found_inf && *a.found_inf > 1.0f; }",
        f"{CLIPPED} -k found_inf",
    ),
    Fault(
        "the scale of gradients is multiplied by",
        "triton_kernels",
        "g = tl.where(mask, divide(g, scale), 0.0)",
        "g = tl.where(mask, g * scale, 0.0)",
        "tests/backends/test_triton.py -k 'interpreter and steps'",
    ),
    # State and checkpoints.
    Fault(
        "a field of a checkpoint is dropped",
        "hfac",
        'for key, dtype in (("step", torch.float32), ("skipped", torch.int32)):',
        'for key, dtype in (("step", torch.float32),):',
        "tests/optim/test_state.py -k checkpoint",
    ),
    Fault(
        "an option of how to step is taken from a checkpoint",
        "hfac",
        'EXECUTION = ("capturable", "backend", "amp_scaling", "watch")',
        'EXECUTION = ("capturable", "amp_scaling", "watch")',
        "tests/optim/test_state.py -k execution",
    ),
    Fault(
        "a step is counted twice",
        "hfac",
        "        self.steps(who).advance()",
        "        [self.steps(who).advance() for _ in range(2)]",
        f"{SHARDED} -k every_placement",
    ),
    Fault(
        "a cache does not notice that it is stale",
        "hfac",
        "if _cached_options(self.group, self._algorithm) != self._options:",
        "if self._options is None:",
        "tests/optim/test_release.py -k follows_every_change",
    ),
    Fault(
        "a counter is made on the default device",
        "hfac",
        "return torch.full((), float(value), dtype=dtype, device=device)",
        "return torch.full((), float(value), dtype=dtype)",
        "tests/optim/test_ambient.py",
    ),
    Fault(
        "a converted state reads the wrong moment",
        "hfac",
        'V = tensor(where, entry, "momentum_v", shape)',
        'V = tensor(where, entry, "momentum_m", shape)',
        "tests/optim/test_convert.py",
    ),
    # Memory, threads, graphs.
    Fault(
        "a gradient that negates is read as it lies",
        "hfac",
        "return [tensor.resolve_neg() for tensor in without_zerotensors(tensors)]",
        "return without_zerotensors(tensors)",
        "tests/optim/test_memory.py",
    ),
    Fault(
        "a parameter whose elements share memory is taken",
        "hfac",
        "if type(param) in memory.PLAIN and memory.overlaps_itself(param):",
        "if type(param) in memory.PLAIN and not param.stride():",
        "tests/optim/test_memory.py -k share_memory",
    ),
    Fault(
        "parameters that share memory are stepped at once",
        "hfac",
        "others.update((earlier.owner, span.owner))",
        "others.update(())",
        "tests/optim/test_memory.py -k share",
    ),
    Fault(
        "threads do not wait for the phase before",
        "csrc",
        "    await(p, task.phase);\n",
        "",
        "tests/backends/test_native.py tests/backends/test_parts.py -k threads",
    ),
    Fault(
        "the last block reads sums before they are there",
        "csrc",
        "last = atomicAdd(counter, 1) == static_cast<int>(blocks) - 1;",
        "last = atomicAdd(counter, 1) == 0;",
        EMULATED,
    ),
    Fault(
        "memory that a graph reads is freed",
        "hfac",
        "captured += [self.staged.source, self.table, workspace, self.counters, *memory.values(), *kept]",
        "captured += [self.staged.source, *kept]",
        "tests/backends/test_captures.py",
    ),
    Fault(
        "a gradient is kept after its step",
        "hfac",
        "            self._passed[param] = norm\n        param.grad = None\n",
        "            self._passed[param] = norm\n",
        "tests/optim/test_release.py",
    ),
    Fault(
        "rows without gradient are counted without the last",
        "csrc",
        "for (int64_t k = 0; k < rows; ++k) watched.zero_rows +=",
        "for (int64_t k = 0; k + 1 < rows; ++k) watched.zero_rows +=",
        "tests/backends/test_watched_steps.py -k 'numbers_are_those'",
    ),
    # Sharded parameters.
    Fault(
        "a collective is forgotten",
        "hfac",
        "dist.all_reduce(numbers, group=",
        "bool(",
        f"{SHARDED} -k every_wrapper",
    ),
    Fault(
        "the host waits in a sharded step",
        "hfac",
        "totals.copy_(self.row_pieces.sums(self.new_rows))",
        "totals.copy_(self.row_pieces.sums(self.new_rows)).tolist()",
        "tests/distributed/test_host.py",
    ),
    Fault(
        "copies of a part are all added up",
        "hfac",
        "sums if contributes else torch.zeros_like(sums)",
        "sums if contributes else sums",
        f"{SHARDED} -k every_placement",
    ),
    Fault(
        "a rank takes another rank's piece of a state",
        "hfac",
        "found[placement.dim] = _piece(whole, placement, count, coordinate[mesh_dim])",
        "found[placement.dim] = _piece(whole, placement, count, count - 1 - coordinate[mesh_dim])",
        f"tests/distributed/test_sharded_checkpoints.py {SHARDED} -k 'checkpoints or every_placement'",
    ),
    Fault(
        "a pipeline's stages do not add up their norms",
        "hfac",
        "                else:\n                    sums[then] += total",
        "                else:\n                    sums[then] += 0 * total",
        "tests/distributed/test_pipeline.py",
    ),
    Fault(
        "a fused weight is cut along its first dimension, whichever is asked for",
        "hfac",
        "return [t.movedim(d, batch_dims) for t in found] if dim else found",
        "return found",
        "tests/optim/test_views.py",
    ),
    Fault(
        "signs in bytes change sides when they become bits",
        "hfac",
        "packed.copy_(pack_signs(rows))",
        "packed.copy_(pack_signs(~rows))",
        "tests/optim/test_signs.py",
    ),
    Fault(
        "a module that is stepped in the backward pass forgets the factor of its learning rate",
        "hfac",
        'lr = schedules.as_scalar("lr", found.scalars["lr"]) * lr_scale',
        'lr = schedules.as_scalar("lr", found.scalars["lr"])',
        "tests/distributed/test_sharded_release.py",
    ),
    # Refusals and structure.
    Fault(
        "sparse gradients are not refused",
        "hfac",
        "if tensor.layout != torch.strided:",
        "if tensor.layout == torch.jagged:",
        "tests/optim/test_bad_inputs.py",
    ),
    Fault(
        "a Partial DTensor is not refused",
        "hfac",
        "if any(placement.is_partial() for placement in param.placements):",
        "if any(placement.is_partial() for placement in param.placements[2:]):",
        f"{SHARDED} -k cannot_be_sharded",
    ),
    Fault(
        "an import runs upward",
        "hfac",
        '    if not hasattr(value, "__float__"):',
        '    from . import functional  # noqa: F401\n\n    if not hasattr(value, "__float__"):',
        "tests/tools/test_layering.py",
    ),
    Fault(
        "a stack's slices decay like vectors of the whole",
        "hfac",
        "undecayed = key in named or param.ndim - batch <= 1 or",
        "undecayed = key in named or param.ndim <= 1 or",
        "tests/optim/test_groups.py",
    ),
    # Commands and benchmarks.
    Fault(
        "planned bytes of gradients are wrong",
        "hfac",
        "return self.dtype.itemsize * self.elements(rank)",
        "return 4 * self.elements(rank)",
        "tests/tools/test_plan.py -k 'bytes or document'",
    ),
    Fault(
        "bad input ends with status 0",
        "hfac",
        "raise SystemExit(2) from error",
        "raise SystemExit(0) from error",
        "tests/tools/test_compare.py tests/tools/test_command_line.py -k 'bad_input or folder'",
    ),
    Fault(
        "a check of a backend accepts everything",
        "hfac",
        "found.setdefault(op, Difference(op, shapes[i], step, what))",
        "found.update({})",
        "tests/tools/test_parity_check.py",
    ),
    Fault(
        "a ratio of times is upside down",
        "bench",
        "median = quantiles(rival).median / quantiles(ours).median",
        "median = quantiles(ours).median / quantiles(rival).median",
        "tests/tools/test_bench.py -k known_samples",
    ),
    Fault(
        "the report counts no failed test",
        "bench",
        'for way in ("PASSED", "FAILED", "ERROR")',
        'for way in ("PASSED", "ERROR")',
        "tests/tools/test_gpu_report.py -k cut_off",
    ),
]
