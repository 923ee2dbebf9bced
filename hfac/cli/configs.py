"""Models from Hugging Face configurations: transformers reads them, chooses the class, and builds the model on the
meta device. Decisions that the file leaves open are recorded in `Model.assumed`."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hfac.cli import quantized
from hfac.cli.errors import UsageError
from hfac.cli.foreign import told
from hfac.cli.parameters import Model, Parameter, of_module

#: auto classes to try, in order, if a configuration names no architecture: those that build the whole model come before
#: those that build a part of it
ENCODER_DECODER = ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq", "AutoModelForTextToWaveform")
COMPOSED = (
    "AutoModelForMultimodalLM",
    "AutoModelForImageTextToText",
    "AutoModelForVision2Seq",
    *ENCODER_DECODER,
    "AutoModelForTextToSpectrogram",
    "AutoModelForVisualQuestionAnswering",
    "AutoModelForObjectDetection",
    "AutoModelForMaskGeneration",
)
ENCODER = ("AutoModelForMaskedLM",)
DECODER = ("AutoModelForCausalLM",)
OTHERS = ("AutoModelForPreTraining", "AutoModelForImageClassification", "AutoModel")
WHOLE = ("AutoModelForPreTraining", "AutoModel", "AutoModelForImageClassification")
#: keys under which configurations say how many layers for multi-token prediction a checkpoint has
_MTP = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules")
_CALLABLE = "MODULE:CALLABLE"


def read(path: Path) -> Model:
    """The model of a config.json, or of the folder that it is in.

    Raises:
        UsageError: there is no such file, it is another library's, or transformers cannot build the model.
    """
    file = _file(path)
    try:
        data = file.read_bytes()
        values = json.loads(data)  # UTF-8, UTF-16 or UTF-32, with a byte order mark or without
    except FileNotFoundError:
        raise UsageError(f"required is a folder with a config.json in it, and {path} has none") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"required is a Hugging Face config.json; {file} cannot be read as JSON ({error})") from error
    _check_kind(file, values)
    try:
        import transformers
    except ModuleNotFoundError as missing:
        raise UsageError(
            f"a config.json is built by transformers, which cannot be imported ({missing}); install it with: "
            f"{sys.executable} -m pip install transformers"
        ) from missing
    except Exception as error:
        raise UsageError(
            f"a config.json is built by transformers, which fails when it is imported ({told(error)}); install it anew "
            f"with: {sys.executable} -m pip install --force-reinstall transformers"
        ) from error
    version = f"transformers {transformers.__version__}"
    kind = values["model_type"]
    if kind not in transformers.CONFIG_MAPPING:
        custom = " The code that comes with such a model is not run here." if "auto_map" in values else ""
        raise UsageError(
            f"{version} does not know the model_type {kind!r} of {file}.{custom} Use another version of it, or a "
            f"Python callable that builds the model: {_CALLABLE}"
        )
    try:
        with _readable(file, data, values) as source:
            config = transformers.AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            built, assumed = _built(transformers, config, values)
    except Exception as error:
        raise UsageError(f"{version} cannot build {file}: {told(error)}") from error
    if built is None:
        raise UsageError(
            f"{version} has none of {', '.join(_auto_classes(config))} for the model_type {kind!r} of {file}; give a "
            f"Python callable that builds the model: {_CALLABLE}"
        )
    if "auto_map" in values:
        assumed.append(f"The code that auto_map names is not run: {type(built).__name__} of transformers is planned.")
    if (file.parent / "adapter_config.json").exists() and file.name == "config.json":
        assumed.append("The adapter in adapter_config.json beside the configuration is not applied.")
    model = of_module(built, type(built).__name__, str(file), assumed)
    model = quantized.applied(model, built, quantized.settings(values))
    model = _with_prediction_layers(model, built, config, values)
    model.check_trainable()
    return model


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in ("config.json", "adapter_config.json", "model_index.json"):
        if (path / name).exists():
            return path / name
    return path / "config.json"


def _check_kind(file: Path, values: object) -> None:
    """Raise `UsageError`, with advice, for configurations that are not for transformers."""
    found = values if isinstance(values, dict) else {}
    if "peft_type" in found:
        base = found.get("base_model_name_or_path") or "the base model"
        raise UsageError(
            f"{file} is a PEFT adapter ({found['peft_type']}) of {base}, not a model. Write a function that builds the "
            "base model and returns peft.get_peft_model(base, peft.PeftConfig.from_pretrained(FOLDER)), and give it as "
            f"{_CALLABLE}"
        )
    if "_class_name" in found:
        name = found["_class_name"]
        made = (
            "is a diffusers pipeline: plan its parts one by one. Write a function that builds the part to be trained"
            if file.name == "model_index.json"
            else f"is a diffusers configuration ({name}). Write a function that returns diffusers.{name}.from_config("
            f"diffusers.{name}.load_config(FOLDER))"
        )
        raise UsageError(f"{file} {made}, and give it as {_CALLABLE}")
    if not isinstance(found.get("model_type"), str):
        raise UsageError(
            f"required is a Hugging Face config.json, which says its 'model_type'; {file} has none. For a model of "
            f"another library give a Python callable that builds it: {_CALLABLE}"
        )


@contextmanager
def _readable(file: Path, data: bytes, values: Mapping[str, Any]) -> Iterator[str]:
    """The file itself, or a copy that transformers can read: it requires a regular file in UTF-8 without a byte order
    mark."""
    try:
        plain = not data.decode("utf-8").startswith("\ufeff") and file.is_file()
    except UnicodeDecodeError:
        plain = False
    if plain:
        yield str(file)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, "config.json")
        with open(copy, "w", encoding="utf-8") as stream:
            json.dump(values, stream)
        yield copy


def _built(transformers: Any, config: Any, values: Mapping[str, Any]) -> tuple[nn.Module | None, list[str]]:
    """The model, of the class that the config names or else of the first auto class that accepts it, and what was
    assumed."""
    given = values.get("architectures") or ()
    names = [given] if isinstance(given, str) else [str(name) for name in given]
    for i, name in enumerate(names):
        named = getattr(transformers, name, None)
        if isinstance(named, type) and issubclass(named, nn.Module):
            assumed = [f"{name} is planned, of the architectures {', '.join(names)}."] if len(names) > 1 else []
            if i:
                assumed = [f"{_lacks(transformers, names[:i])}: {name} is planned."]
            text = config.get_text_config() if hasattr(config, "get_text_config") else config
            wanted = getattr(named, "config_class", None)
            return named(text if wanted is type(text) and wanted is not type(config) else config), assumed
    if hasattr(config, "auto_map"):
        del config.auto_map  # otherwise the auto classes would ask for permission to run it
    for auto_name in _auto_classes(config):
        auto = getattr(transformers, auto_name, None)
        if auto is None:  # in another version
            continue
        try:
            built = auto.from_config(config)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            continue
        why = _lacks(transformers, names) if names else "The configuration names no architecture"
        return built, [f"{why}: {type(built).__name__} is planned, which {auto_name} makes of {config.model_type}."]
    return None, []


def _lacks(transformers: Any, names: list[str]) -> str:
    return f"transformers {transformers.__version__} has no {' or '.join(names)}, which the configuration names"


def _auto_classes(config: Any) -> tuple[str, ...]:
    """Auto classes to try, in order. For encoder-decoder and multimodal models `AutoModelForCausalLM` would build only
    a part of the model, so it comes last."""
    if getattr(config, "is_encoder_decoder", False):
        return (*dict.fromkeys((*ENCODER_DECODER, *COMPOSED, *WHOLE)), *DECODER)
    if getattr(config, "sub_configs", None) or getattr(config, "is_composition", False):
        return (*COMPOSED, *WHOLE, *DECODER, *ENCODER)
    if getattr(config, "is_decoder", False):
        return (*DECODER, *ENCODER, *OTHERS, *COMPOSED)
    return (*ENCODER, *DECODER, *COMPOSED, *OTHERS)


def _with_prediction_layers(model: Model, module: nn.Module, config: Any, values: Mapping[str, Any]) -> Model:
    """Adds the layers for multi-token prediction, which checkpoints contain and transformers does not build. Each has
    the parameters of the last decoder layer, a projection of two hidden states to one, and three norms (DeepSeek-V3's
    report, section 2.2); it shares the model's embedding and head."""
    text = values.get("text_config")
    said = {**values, **(text if isinstance(text, dict) else {})}
    count = next((said[key] for key in _MTP if isinstance(said.get(key), int) and said[key] > 0), 0)
    if any(re.search(r"mtp|nextn|eh_proj", parameter.name) for parameter in model.parameters):
        return model
    if not count:
        ignored = [str(name) for name in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()]
        if not any("mtp" in name for name in ignored):
            return model
        told_ = "Layers for multi-token prediction (mtp), which transformers does not build, are not counted."
        return replace(model, assumed=(*model.assumed, told_))
    layers = _last_layer(model, module, config)
    width = getattr(config.get_text_config(), "hidden_size", None)
    which = f"{count} layer{'s'[: count != 1]} for multi-token prediction, which transformers does not build"
    if not layers or not isinstance(width, int) or "mtp_layers_block_type" in said:
        return replace(model, assumed=(*model.assumed, f"Without {which}: their shapes are not known here."))
    added: list[Parameter] = []
    for i in range(count):
        added += [replace(p, name=f"mtp.{i}.{name}", labels=(f"mtp.{i}.{name}",)) for name, p in layers]
        added.append(Parameter(f"mtp.{i}.eh_proj.weight", (width, 2 * width)))
        added += [Parameter(f"mtp.{i}.{name}.weight", (width,)) for name in ("enorm", "hnorm", "shared_head.norm")]
    numel = sum(parameter.numel for parameter in added)
    sentence = (
        f"With {which}: {numel:,} parameters, as the last decoder layer has them and a projection, beside the "
        "embedding and head of the model."
    )
    return replace(model, parameters=(*model.parameters, *added), assumed=(*model.assumed, sentence))


def _last_layer(model: Model, module: nn.Module, config: Any) -> list[tuple[str, Parameter]]:
    """Parameters of the last decoder layer, with names within it."""
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    for name, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and len(part) == depth and name.rpartition(".")[2] in ("layers", "blocks"):
            prefix = f"{name}.{len(part) - 1}."
            return [(p.name[len(prefix) :], p) for p in model.parameters if p.name.startswith(prefix)]
    return []
