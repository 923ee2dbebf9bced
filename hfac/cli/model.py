"""A small byte-level GPT: the language model that `hfac compare` trains."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY = 256  # one token per byte value, so any text at all can be trained on


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, causal by default, then an MLP four times as wide."""

    def __init__(self, d_model: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.attention_norm = nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.attention_out = nn.Linear(d_model, d_model, bias=False)
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp_in = nn.Linear(d_model, 4 * d_model, bias=False)
        self.mlp_out = nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map activations `[batch, time, d_model]` to the same shape."""
        batch, time, d_model = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, time, 3, self.heads, d_model // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, time, d_model / heads]
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, time, d_model))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh"))


def initialize(model: nn.Module, d_model: int, layers: int) -> None:
    """Draw all matrices of a transformer of so many `Block`s, with a standard deviation of d_model^-0.5."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            # GPT-2 shrinks what is added to the residual stream, which has two additions per layer.
            residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
            nn.init.normal_(parameter, std=(d_model * 2 * layers if residual else d_model) ** -0.5)


class ByteGPT(nn.Module):
    """GPT over bytes with learned positions and tied input and output embeddings.

    Matrices start with a standard deviation of d_model^-0.5. GPT-2's constant 0.02 suits widths of a thousand and more;
    at the width trained here every optimizer spends its first hundreds of steps on making such small weights larger.
    """

    def __init__(self, d_model: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.byte_embedding = nn.Embedding(VOCABULARY, d_model)
        self.position_embedding = nn.Embedding(context, d_model)
        self.blocks = nn.ModuleList(Block(d_model, heads) for _ in range(layers))
        self.final_norm = nn.LayerNorm(d_model)
        initialize(self, d_model, layers)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map bytes `[batch, time]` (int64) to the logits of each next byte, `[batch, time, 256]`."""
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.byte_embedding(inputs) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.final_norm(x), self.byte_embedding.weight)

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats per byte of `targets` `[batch, time]`; a float32 scalar in any dtype."""
        logits = self(inputs).float()  # a bfloat16 softmax would be too coarse to compare optimizers with
        return F.cross_entropy(logits.view(-1, VOCABULARY), targets.reshape(-1))
