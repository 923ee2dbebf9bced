"""Quantized weights, according to a model's configuration: their bytes, and that they are not trained."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from hfac.cli.parameters import Model


class Scheme(NamedTuple):
    """How a quantization method stores a matrix.

    Attributes:
        title: its name, for people.
        bits: of an element, without scales.
        extra: bits of scales and zero points for each group.
        group: elements that share these; None if a whole row does.
        linear, experts: whether it quantizes linear layers, and experts that are stacked in one parameter.
    """

    title: str
    bits: float
    extra: float = 0
    group: int | None = 1 << 62
    linear: bool = True
    experts: bool = True

    def bytes_per_element(self, shape: tuple[int, ...]) -> float:
        return (self.bits + self.extra / (self.group or max(shape[-1], 1))) / 8


def settings(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization settings of a configuration, of the whole or of its language model."""
    for holder in (values, values.get("text_config"), values.get("llm_config")):
        if isinstance(holder, dict):
            for key in ("quantization_config", "compression_config"):
                if isinstance(holder.get(key), dict) and holder[key]:
                    return holder[key]
    return None


def applied(model: Model, module: nn.Module, said: Mapping[str, Any] | None) -> Model:
    """The model with the weights that the settings ``said`` quantize at their size, and frozen."""
    if said is None:
        return model
    method = _method(said)
    if said.get("dequantize"):
        sentence = f"quantization_config ({method}) says dequantize: weights are counted in the type of --dtype."
        return replace(model, assumed=(*model.assumed, sentence))
    try:
        scheme = _SCHEMES[method](said)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError):
        scheme = None
    if scheme is None:
        sentence = (
            f"quantization_config ({method or 'without a quant_method'}) is not accounted for: all weights are counted "
            "in the type of --dtype and trained. They take fewer bytes where they are quantized, and are then frozen."
        )
        return replace(model, assumed=(*model.assumed, sentence))
    concerned = _weights(module, scheme, said, method)
    parameters = [
        replace(p, itemsize=scheme.bytes_per_element(p.shape), trainable=False) if p.name in concerned else p
        for p in model.parameters
    ]
    mine = [p for p in parameters if p.name in concerned]
    numel, size = sum(p.numel for p in mine), sum(p.numel * (p.itemsize or 0) for p in mine)
    bits = 8 * size / numel if numel else scheme.bits
    sentence = (
        f"As quantization_config says ({scheme.title}), {len(mine):,} weights of {numel:,} elements take "
        f"{bits:.3g} bits each, scales included, and are frozen, since quantized weights are not trained; all others "
        f"are trained. For adapters give MODULE:CALLABLE; to train every weight take quantization_config out."
    )
    return replace(model, parameters=tuple(parameters), assumed=(*model.assumed, sentence))


def _method(said: Mapping[str, Any]) -> str:
    if said.get("load_in_4bit") or said.get("_load_in_4bit"):
        return "bitsandbytes_4bit"
    if said.get("load_in_8bit") or said.get("_load_in_8bit"):
        return "bitsandbytes_8bit"
    return str(said.get("quant_method") or "").lower()


def _weights(module: nn.Module, scheme: Scheme, said: Mapping[str, Any], method: str) -> set[str]:
    """Names of the parameters that are quantized."""
    skipped = _skipped(module, said, method)
    inside = said.get("modules_in_block_to_quantize")  # GPTQ's: lists of names
    only = tuple(name for names in inside for name in ([names] if isinstance(names, str) else names)) if inside else ()
    found = set()
    for name, part in module.named_modules():
        if only and not name.endswith(only) or any(_matches(pattern, name) for pattern in skipped):
            continue
        own = dict(part.named_parameters(recurse=False))
        if scheme.linear and (isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D") and "weight" in own:
            found.add(f"{name}.weight")
        elif scheme.experts and re.search("expert", f"{name} {type(part).__name__}", re.IGNORECASE):
            found |= {f"{name}.{key}" for key, param in own.items() if param.ndim == 3}
    return found


def _skipped(module: nn.Module, said: Mapping[str, Any], method: str) -> list[str]:
    """Patterns of modules that are not quantized: those that are listed, and the head, which no method quantizes by
    default."""
    keys = ("modules_to_not_convert", "llm_int8_skip_modules", "skip_modules", "ignore", "ignored_layers")
    given = [said.get(key) for key in (*keys, "exclude_modules")]
    named = [str(pattern) for patterns in given if isinstance(patterns, list) for pattern in patterns]
    if named and method not in ("gptq", "awq", "auto-round") or said.get("lm_head") is True:
        return named
    output: Any = getattr(module, "get_output_embeddings", None)
    head = None if output is None else output()
    return named + [name for name, part in module.named_modules() if head is not None and part is head]


def _matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches a module or one that contains it: a name, a part of one, a glob, or "re:..."."""
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error:
            return False
    if "*" in pattern:
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
    return f".{pattern}." in f".{name}." or name.endswith(f".{pattern}") or name == pattern


def _grouped(title: str) -> Any:
    """GPTQ's form: a 16-bit scale and a zero point of the weights' bits for each group of an input row."""

    def scheme(said: Mapping[str, Any]) -> Scheme:
        bits = said["bits"] if "bits" in said else said["w_bit"]
        group = int(said.get("group_size", said.get("q_group_size", 128)))
        return Scheme(f"{bits}-bit {title}", bits, 16 + bits, group if group > 0 else None)

    return scheme


def _bitsandbytes_4bit(said: Mapping[str, Any]) -> Scheme:
    """A float32 scale for 64 elements; with double quantization a byte, and float32 for each 256 of them."""
    double = bool(said.get("bnb_4bit_use_double_quant"))
    return Scheme("4-bit bitsandbytes", 4, 8 + 32 / 256 if double else 32, 64, experts=False)


def _fp8(said: Mapping[str, Any]) -> Scheme:
    block = said.get("weight_block_size", (128, 128))
    scale = 8 if said.get("scale_fmt") == "ue8m0" else 32
    return Scheme("fp8", 8, scale, math.prod(block)) if block else Scheme("fp8", 8)


def _compressed_tensors(said: Mapping[str, Any]) -> Scheme | None:
    groups = [group["weights"] for group in said["config_groups"].values() if group.get("weights")]
    if not groups or len({(group["num_bits"], group.get("group_size")) for group in groups}) > 1:
        return None
    bits, size = groups[0]["num_bits"], groups[0].get("group_size")
    scale = 8 if groups[0].get("type") == "float" and bits == 4 else 16
    title = f"{bits}-bit compressed-tensors"
    if groups[0].get("strategy") == "tensor":
        return Scheme(title, bits)
    if groups[0].get("block_structure"):
        return Scheme(title, bits, 16, math.prod(groups[0]["block_structure"]))
    return Scheme(title, bits, scale, size if size and size > 0 else None)


def _torchao(said: Mapping[str, Any]) -> Scheme | None:
    text = str(said["quant_type"])
    found = re.findall(r"(\d)_?weight", text.lower())
    if not found:
        return None
    group = re.search(r"group_size\D{1,4}(\d+)", text)
    bits = int(found[-1])
    return Scheme(f"{bits}-bit torchao", bits, 32 if bits < 8 else 16, int(group[1]) if group else None, experts=False)


def _hqq(said: Mapping[str, Any]) -> Scheme:
    inner = said.get("quant_config", said)
    inner = inner.get("weight_quant_params", inner)
    return Scheme(f"{inner['nbits']}-bit HQQ", inner["nbits"], 32, inner.get("group_size") or None, experts=False)


def _quanto(said: Mapping[str, Any]) -> Scheme:
    bits = int(re.findall(r"\d+", str(said["weights"]))[0])
    return Scheme(f"{bits}-bit quanto", bits, 32 if bits < 8 else 16, 128 if bits < 8 else None, experts=False)


def _modelopt(said: Mapping[str, Any]) -> Scheme | None:
    algorithm = str(said.get("quant_algo", "")).upper()
    return {"FP8": Scheme("fp8", 8), "NVFP4": Scheme("nvfp4", 4, 8, 16)}.get(algorithm)


def _aqlm(said: Mapping[str, Any]) -> Scheme:
    bits = said["num_codebooks"] * said["nbits_per_codebook"] / (said["in_group_size"] * said.get("out_group_size", 1))
    return Scheme(f"{bits:.3g}-bit AQLM", bits, 16, None)


#: quant_method -> how it stores a matrix, or None if the configuration does not say enough
_SCHEMES: dict[str, Any] = {
    "bitsandbytes_4bit": _bitsandbytes_4bit,
    "bitsandbytes_8bit": lambda said: Scheme("8-bit bitsandbytes", 8, 32, None, experts=False),
    "gptq": _grouped("GPTQ"),
    "awq": _grouped("AWQ"),
    "auto-round": _grouped("AutoRound"),
    "fp8": _fp8,
    "fbgemm_fp8": lambda said: Scheme("fp8", 8, 32, None),
    "mxfp4": lambda said: Scheme("mxfp4", 4, 8, 32, linear=False),
    "mxfp8": lambda said: Scheme("mxfp8", 8, 8, 32),
    "nvfp4": lambda said: Scheme("nvfp4", 4, 8, 16),
    "compressed-tensors": _compressed_tensors,
    "torchao": _torchao,
    "hqq": _hqq,
    "quanto": _quanto,
    "modelopt": _modelopt,
    "aqlm": _aqlm,
    "eetq": lambda said: Scheme("8-bit EETQ", 8, 16, None, experts=False),
    "bitnet": lambda said: Scheme("BitNet", 2),
    "higgs": lambda said: Scheme(f"{said['bits']}-bit HIGGS", said["bits"], 16, said["group_size"]),
}
