"""Parameter lists of well-known models, by name, derived from their architectures: name -> shape, in the order in which
the models' own code registers them."""

from __future__ import annotations

from collections.abc import Callable

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


def gpt2() -> Shapes:
    """The 148 parameters of GPT-2 124M (head tied to the token embedding), weights as its code lays them out."""
    d, vocabulary, context, layers = 768, 50257, 1024, 12
    found: Shapes = {"transformer.wte.weight": (vocabulary, d), "transformer.wpe.weight": (context, d)}
    for i in range(layers):
        block = f"transformer.h.{i}"
        found |= _norm(f"{block}.ln_1", d)
        found |= _affine(f"{block}.attn.c_attn", (d, 3 * d), 3 * d) | _affine(f"{block}.attn.c_proj", (d, d), d)
        found |= _norm(f"{block}.ln_2", d)
        found |= _affine(f"{block}.mlp.c_fc", (d, 4 * d), 4 * d) | _affine(f"{block}.mlp.c_proj", (4 * d, d), d)
    return found | _norm("transformer.ln_f", d)


def llama3_8b(layers: int = 32) -> Shapes:
    """The 291 parameters of Llama-3-8B, 8.03e9 elements (with fewer ``layers``: embedding, head and those)."""
    return _llama3(4096, 14336, layers)


def llama3_70b(layers: int = 80) -> Shapes:
    """The 723 parameters of Llama-3-70B, 70.6e9 elements (with fewer ``layers``: embedding, head and those)."""
    return _llama3(8192, 28672, layers)


def _llama3(d: int, hidden: int, layers: int) -> Shapes:
    kv, vocabulary = 1024, 128256
    found: Shapes = {"model.embed_tokens.weight": (vocabulary, d)}
    for i in range(layers):
        layer: Shapes = {
            "self_attn.q_proj": (d, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, d),
            "mlp.gate_proj": (hidden, d),
            "mlp.up_proj": (hidden, d),
            "mlp.down_proj": (d, hidden),
            "input_layernorm": (d,),
            "post_attention_layernorm": (d,),
        }
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found | {"model.norm.weight": (d,), "lm_head.weight": (vocabulary, d)}


def deepseek_v3(layers: int = 61) -> Shapes:
    """The parameters of DeepSeek-V3, 671e9 elements, without its layer for multi-token prediction (with fewer
    ``layers``: embedding, head and those). The experts of a layer are three stacks of 256 matrices, as torchtitan
    keeps them."""
    d, vocabulary, query, key, experts, expert = 7168, 129280, 1536, 512, 256, 2048

    def gated(name: str, hidden: int) -> Shapes:
        sizes = {"gate_proj": (hidden, d), "up_proj": (hidden, d), "down_proj": (d, hidden)}
        return {f"{name}.{part}.weight": size for part, size in sizes.items()}

    found: Shapes = {"model.embed_tokens.weight": (vocabulary, d)}
    for i in range(layers):
        block = f"model.layers.{i}"
        attention: Shapes = {
            "q_a_proj": (query, d),
            "q_a_layernorm": (query,),
            "q_b_proj": (128 * 192, query),
            "kv_a_proj_with_mqa": (key + 64, d),
            "kv_a_layernorm": (key,),
            "kv_b_proj": (128 * 256, key),
            "o_proj": (d, 128 * 128),
        }
        found |= {f"{block}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        if i < 3:
            found |= gated(f"{block}.mlp", 18432)
        else:
            stacks = {"w1": (experts, expert, d), "w2": (experts, d, expert), "w3": (experts, expert, d)}
            found |= {f"{block}.mlp.gate.weight": (experts, d)}
            found |= {f"{block}.mlp.experts.{name}": shape for name, shape in stacks.items()}
            found |= gated(f"{block}.mlp.shared_experts", expert)
        found |= {f"{block}.{name}.weight": (d,) for name in ("input_layernorm", "post_attention_layernorm")}
    return found | {"model.norm.weight": (d,), "lm_head.weight": (vocabulary, d)}


def resnet50() -> Shapes:
    """The 161 parameters of ResNet-50 for 1000 classes: convolutions without bias, two vectors per batch norm."""

    def convolution(name: str, norm: str, out: int, into: int, size: int) -> Shapes:
        return {f"{name}.weight": (out, into, size, size)} | _norm(norm, out)

    found = convolution("conv1", "bn1", 64, 3, 7)
    into = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
        for i in range(blocks):
            block = f"layer{stage}.{i}"
            for k, (out, of, size) in enumerate(((width, into, 1), (width, width, 3), (4 * width, width, 1)), 1):
                found |= convolution(f"{block}.conv{k}", f"{block}.bn{k}", out, of, size)
            if i == 0:
                found |= convolution(f"{block}.downsample.0", f"{block}.downsample.1", 4 * width, into, 1)
            into = 4 * width
    return found | _affine("fc", (1000, into), 1000)


def sdxl_unet() -> Shapes:
    """The 1680 parameters of Stable Diffusion XL's U-Net, under diffusers' names."""
    widths, depths, text, time = (320, 640, 1280), (0, 2, 10), 2048, 1280

    def convolution(name: str, out: int, into: int, size: int) -> Shapes:
        return _affine(name, (out, into, size, size), out)

    def residual(name: str, out: int, into: int) -> Shapes:
        found = _norm(f"{name}.norm1", into) | convolution(f"{name}.conv1", out, into, 3)
        found |= _affine(f"{name}.time_emb_proj", (out, time), out)
        found |= _norm(f"{name}.norm2", out) | convolution(f"{name}.conv2", out, out, 3)
        return found | (convolution(f"{name}.conv_shortcut", out, into, 1) if out != into else {})

    def attention(name: str, c: int, context: int) -> Shapes:
        found = {
            f"{name}.to_q.weight": (c, c),
            f"{name}.to_k.weight": (c, context),
            f"{name}.to_v.weight": (c, context),
        }
        return found | _affine(f"{name}.to_out.0", (c, c), c)

    def transformer(name: str, c: int, depth: int) -> Shapes:
        found = _norm(f"{name}.norm", c) | _affine(f"{name}.proj_in", (c, c), c)
        for i in range(depth):
            block = f"{name}.transformer_blocks.{i}"
            found |= _norm(f"{block}.norm1", c) | attention(f"{block}.attn1", c, c)
            found |= _norm(f"{block}.norm2", c) | attention(f"{block}.attn2", c, text)
            found |= _norm(f"{block}.norm3", c) | _affine(
                f"{block}.ff.net.0.proj", (8 * c, c), 8 * c
            )  # gated: twice 4 c
            found |= _affine(f"{block}.ff.net.2", (c, 4 * c), c)
        return found | _affine(f"{name}.proj_out", (c, c), c)

    found = convolution("conv_in", widths[0], 4, 3)
    for name, into in (("time_embedding", widths[0]), ("add_embedding", 2816)):
        found |= _affine(f"{name}.linear_1", (time, into), time) | _affine(f"{name}.linear_2", (time, time), time)
    into = widths[0]
    skips = [into]  # channels of what the way down hands to the way up
    for i, (c, depth) in enumerate(zip(widths, depths, strict=True)):
        for k in range(2 if depth else 0):
            found |= transformer(f"down_blocks.{i}.attentions.{k}", c, depth)
        for k in range(2):
            found |= residual(f"down_blocks.{i}.resnets.{k}", c, into)
            into = c
            skips.append(c)
        if c != widths[-1]:
            found |= convolution(f"down_blocks.{i}.downsamplers.0.conv", c, c, 3)
            skips.append(c)
    for i, (c, depth) in enumerate(zip(widths[::-1], depths[::-1], strict=True)):
        for k in range(3 if depth else 0):
            found |= transformer(f"up_blocks.{i}.attentions.{k}", c, depth)
        for k in range(3):
            found |= residual(f"up_blocks.{i}.resnets.{k}", c, into + skips.pop())
            into = c
        if c != widths[0]:
            found |= convolution(f"up_blocks.{i}.upsamplers.0.conv", c, c, 3)
    found |= transformer("mid_block.attentions.0", widths[-1], depths[-1])
    for k in range(2):
        found |= residual(f"mid_block.resnets.{k}", widths[-1], widths[-1])
    return found | _norm("conv_norm_out", widths[0]) | convolution("conv_out", 4, widths[0], 3)


def _affine(name: str, weight: Shape, bias: int) -> Shapes:
    return {f"{name}.weight": weight, f"{name}.bias": (bias,)}


def _norm(name: str, width: int) -> Shapes:
    return _affine(name, (width,), width)


#: name on the command line -> (title, the list)
NAMED: dict[str, tuple[str, Callable[[], Shapes]]] = {
    "llama-3-8b": ("Llama-3-8B", llama3_8b),
    "llama-3-70b": ("Llama-3-70B", llama3_70b),
    "deepseek-v3": ("DeepSeek-V3", deepseek_v3),
    "gpt2": ("GPT-2 124M", gpt2),
    "resnet50": ("ResNet-50", resnet50),
    "sdxl-unet": ("Stable Diffusion XL's U-Net", sdxl_unet),
}
#: other names for the same lists, used by other tools and earlier by bench
ALIASES = {"llama3-8b": "llama-3-8b"}
