"""`hfac plan` on Hugging Face configurations: which class is planned, what is assumed, and what is quantized."""

import json

import pytest
import torch

from hfac.cli import main, memory, parameters, sources

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
#: parts of configurations that make small models of their classes
TINY = {
    "WhisperConfig": {"d_model": 24, "encoder_layers": 2, "decoder_layers": 1, "vocab_size": 60, "pad_token_id": 0},
    "BartConfig": {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "vocab_size": 60},
    "MBartConfig": {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "vocab_size": 60},
    "T5Config": {"d_model": 16, "d_ff": 24, "num_layers": 2, "vocab_size": 60},
    "Qwen2_5_VLConfig": {},
    "Qwen2VLConfig": {},
    "LlavaConfig": {},
    "Florence2Config": {},
    "CLIPConfig": {},
    "SiglipConfig": {},
    "ViTConfig": {"num_hidden_layers": 1},
    "BertConfig": {"num_hidden_layers": 1},
}
#: configuration -> the class that is all of such a model
WHOLE = {
    "WhisperConfig": "WhisperForConditionalGeneration",
    "BartConfig": "BartForConditionalGeneration",
    "MBartConfig": "MBartForConditionalGeneration",
    "T5Config": "T5ForConditionalGeneration",
    "Qwen2_5_VLConfig": "Qwen2_5_VLForConditionalGeneration",
    "Qwen2VLConfig": "Qwen2VLForConditionalGeneration",
    "LlavaConfig": "LlavaForConditionalGeneration",
    "Florence2Config": "Florence2ForConditionalGeneration",
    "CLIPConfig": "CLIPModel",
    "SiglipConfig": "SiglipModel",
    "ViTConfig": "ViTForImageClassification",
    "BertConfig": "BertForMaskedLM",
}
LLAMA = {**SMALL, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}


def saved(folder, config, **more):
    """A configuration's own file, without the name of an architecture unless it is in ``more``."""
    values = config if isinstance(config, dict) else json.loads(config.to_json_string())
    values = {key: value for key, value in values.items() if key != "architectures"} if config is not values else values
    (folder / "config.json").write_text(json.dumps({**values, **more}))
    return str(folder)


def elements(model):
    return sum(parameter.numel for parameter in model.parameters)


def refusal(capsys, target):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", str(target)])
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize("name", WHOLE)
def test_without_an_architecture_the_whole_model_is_planned_and_the_plan_says_so(name, tmp_path, capsys):
    config = getattr(transformers, name)(**TINY[name])
    found = sources.read(saved(tmp_path, config))
    with torch.device("meta"):
        real = getattr(transformers, WHOLE[name])(config)
    assert found.title == WHOLE[name]
    assert elements(found) == sum(param.numel() for param in real.parameters())
    assert main(["plan", str(tmp_path)]) == 0
    last = " ".join(capsys.readouterr().out.rpartition("\n\n")[2].split())
    assert last.startswith(f"Assumed: The configuration names no architecture: {WHOLE[name]} is planned")


def test_whisper_large_has_its_encoder(tmp_path):
    large = {"d_model": 1280, "encoder_layers": 32, "decoder_layers": 32, "vocab_size": 51865}
    heads = {f"{side}_attention_heads": 20 for side in ("encoder", "decoder")}
    wide = {f"{side}_ffn_dim": 5120 for side in ("encoder", "decoder")}
    model = sources.read(saved(tmp_path, transformers.WhisperConfig(**large, **heads, **wide)))
    assert elements(model) == 1_543_304_960


def test_nothing_is_said_to_be_assumed_where_nothing_is(tmp_path, capsys):
    assert main(["plan", saved(tmp_path, LLAMA)]) == 0
    assert "Assumed" not in capsys.readouterr().out
    assert sources.read(str(tmp_path)).assumed == sources.read("gpt2").assumed == ()


def test_an_architecture_that_transformers_lacks_is_named(tmp_path):
    model = sources.read(saved(tmp_path, {**LLAMA, "architectures": ["LlamaOfTomorrow"]}))
    assert "has no LlamaOfTomorrow" in model.assumed[0] and "LlamaForCausalLM is planned" in model.assumed[0]
    model = sources.read(saved(tmp_path, {**LLAMA, "architectures": ["LlamaOfTomorrow", "LlamaForCausalLM"]}))
    assert "has no LlamaOfTomorrow" in model.assumed[0]
    model = sources.read(saved(tmp_path, {**LLAMA, "auto_map": {"AutoModelForCausalLM": "other.Llama"}}))
    assert "auto_map" in model.assumed[0] and model.title == "LlamaForCausalLM"


#: quantization_config -> bytes that a linear layer of [out, into] takes
GROUPS = {"quant_method": "gptq", "bits": 4, "group_size": 16}
QUANTIZED = {
    "gptq": (GROUPS, lambda out, into: out * into / 2 + out * into // 16 * 20 / 8),
    "gptq-8": ({**GROUPS, "bits": 8, "group_size": -1}, lambda out, into: out * into + out * 3),
    "awq": ({**GROUPS, "quant_method": "awq"}, lambda out, into: out * into / 2 + out * into // 16 * 20 / 8),
    "bnb-4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        lambda out, into: out * into / 2 + out * into / 16,
    ),
    "bnb-8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, lambda out, into: out * into + 4 * out),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [16, 16]}, lambda out, into: out * into * (1 + 4 / 256)),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, lambda out, into: out * into + 4 * out),
    "nvfp4": ({"quant_method": "nvfp4"}, lambda out, into: out * into * 4.5 / 8),
    "compressed-tensors": (
        {
            "quant_method": "compressed-tensors",
            "ignore": ["re:.*lm_head"],
            "config_groups": {"group_0": {"weights": {"num_bits": 8, "strategy": "channel", "type": "int"}}},
        },
        lambda out, into: out * into + 2 * out,
    ),
    "torchao": (
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}},
        lambda out, into: out * into + 2 * out,
    ),
    "hqq": (
        {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 16}}},
        lambda out, into: out * into / 2 + out * into / 4,
    ),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_weights_take_their_bytes_and_are_frozen(name, tmp_path):
    said, size = QUANTIZED[name]
    plain = sources.read(saved(tmp_path, LLAMA))
    model = sources.read(saved(tmp_path, LLAMA, quantization_config=said))
    linear = {p.name: p for p in plain.parameters if p.name.endswith("proj.weight")}
    assert {p.name for p in model.parameters if not p.trainable} == set(linear)
    load = memory.Load(model, torch.bfloat16)
    rest = sum(2 * p.numel for p in plain.parameters if p.name not in linear)
    expected = rest + sum(size(*p.shape) for p in linear.values())
    assert load.weight_bytes() == pytest.approx(expected, rel=1e-3)
    assert load.gradient_bytes() == rest
    assert "are frozen" in model.assumed[0] and f"{len(linear)} weights" in model.assumed[0]


def test_what_is_not_to_be_quantized_is_not(tmp_path):
    said = {**GROUPS, "modules_to_not_convert": ["model.layers.0", "down_proj"]}
    model = sources.read(saved(tmp_path, LLAMA, quantization_config=said))
    frozen = {p.name for p in model.parameters if not p.trainable}
    names = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    )
    assert frozen == {f"model.layers.1.{name}.weight" for name in names}


@pytest.mark.parametrize("said", [{"quant_method": "spqr"}, {"bits": 4}, {"quant_method": "gptq", "group_size": "x"}])
def test_quantization_that_is_not_known_is_said_to_be_left_out(said, tmp_path):
    model = sources.read(saved(tmp_path, LLAMA, quantization_config=said))
    assert "is not accounted for" in model.assumed[0]
    assert all(parameter.trainable for parameter in model.parameters)


def test_experts_of_mxfp4_take_17_bits_for_four_elements(tmp_path):
    config = transformers.GptOssConfig(**SMALL, num_local_experts=4, num_key_value_heads=2, head_dim=8)
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    folder = saved(tmp_path, config, architectures=["GptOssForCausalLM"], quantization_config=said)
    model = sources.read(folder)
    experts = [p for p in model.parameters if not p.trainable]
    assert len(experts) == 4 and all(p.name.endswith(("gate_up_proj", "down_proj")) for p in experts)
    assert {p.itemsize for p in experts} == {4.25 / 8}


DEEPSEEK = {
    **SMALL,
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "num_key_value_heads": 4,
}


def test_layers_for_multi_token_prediction_are_counted(tmp_path):
    without = sources.read(saved(tmp_path, DEEPSEEK, num_nextn_predict_layers=0))
    model = sources.read(saved(tmp_path, DEEPSEEK, num_nextn_predict_layers=1))
    layer = sum(p.numel for p in without.parameters if p.name.startswith("model.layers.1."))
    width = SMALL["hidden_size"]
    assert elements(model) - elements(without) == layer + 2 * width**2 + 3 * width
    assert "1 layer for multi-token prediction" in model.assumed[-1] and without.assumed == ()


def test_deepseek_v3_has_its_684_billion_parameters(tmp_path):
    """671.0 billion of the model, 11.6 of its layer for multi-token prediction; the checkpoint's 684.5 have embedding
    and head of that layer, which are the model's own, once more."""
    config = transformers.DeepseekV3Config(num_nextn_predict_layers=1)
    found = elements(sources.read(saved(tmp_path, config, architectures=["DeepseekV3ForCausalLM"])))
    assert found == 682_636_472_320
    assert (found + 2 * 129280 * 7168) / 1e9 == pytest.approx(684.5, abs=0.05)


@pytest.mark.parametrize("name", ["Mamba2Config", "BambaConfig", "FalconH1Config"])
def test_configurations_with_infinite_numbers_are_read(name, tmp_path):
    config = getattr(transformers, name)()
    config.save_pretrained(tmp_path)
    assert "Infinity" in (tmp_path / "config.json").read_text()
    with torch.device("meta"):
        real = transformers.AutoModelForCausalLM.from_config(config)
    assert elements(sources.read(str(tmp_path))) == sum(param.numel() for param in real.parameters())


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_part_of_a_configuration(encoding, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 1}), encoding=encoding)
    assert sources.read(str(tmp_path)).title == "GPT2LMHeadModel"


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"_class_name": "UNet2DConditionModel"}, "diffusers.UNet2DConditionModel.from_config"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "plan its parts one by one"),
        ("adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "a/b"}, "peft.get_peft_model(base"),
        ("config.json", {"architecture": "resnet50"}, "of another library"),
    ],
)
def test_configurations_of_other_libraries_are_refused_with_what_to_do(file, values, message, tmp_path, capsys):
    (tmp_path / file).write_text(json.dumps(values))
    line = refusal(capsys, tmp_path)
    assert message in line and "MODULE:CALLABLE" in line


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "https://huggingface.co/openai/whisper-large"])
def test_an_id_of_the_hub_is_refused_with_what_to_do(name, capsys):
    line = refusal(capsys, name)
    assert "nothing is downloaded" in line and "MODULE:CALLABLE" in line


def test_an_adapter_beside_a_configuration_is_said_to_be_left_out(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "adapter_config.json" in sources.read(saved(tmp_path, LLAMA)).assumed[0]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"model_type": "gpt2", "n": ' + 900 * "[" + 900 * "]" + "}",
        '{"model_type": "gpt2", "n_head": 1, "n_embd": 1' + 30 * "0" + "}",
        '{"model_type": "gpt2", "vocab_size": 4611686018427387904}',
    ],
    ids=["deep", "deep inside", "wide", "long"],
)
def test_deep_and_giant_configurations_end_in_one_line(text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    assert "cannot b" in refusal(capsys, tmp_path)  # be read, build


def test_float8_weights_keep_their_byte():
    module = torch.nn.Linear(4, 4, bias=False)
    module.scaled = torch.nn.Parameter(torch.empty(3, 4, dtype=torch.float8_e4m3fn), requires_grad=False)
    load = memory.Load(parameters.of_module(module, "model", "here"), torch.bfloat16)
    assert load.weight_bytes() == 2 * 16 + 12
