"""A small causal language model around Chain-of-Experts, plain torch on one device: the method learning by itself.

Embedding, L x [RMSNorm + attention with rotary positions + ChainOfExperts], final norm, untied output layer. It serves
tests and examples; models for training are Megatron-Core's.

Letters at the end of a name: B batch, S sequence, D hidden, V vocabulary, H heads, E dimensions of a head.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from coe_megatron.chain.method import Activation, ChainOfExperts, ChainOutput
from coe_megatron.chain.routing import RouterSettings
from coe_megatron.chain.settings import ChainSettings
from coe_megatron.errors import ConfigError


@dataclass(frozen=True)
class ModelSettings:
    """Sizes of the model.

    Attributes:
        vocab: V.
        hidden: D.
        layers: L.
        heads: H; hidden / heads must be even, for rotary positions.
        ffn: width of one routed expert.
        router: N, K and how to balance.
        chain: how to iterate.
        shared_ffn: width of all shared experts together; 0 for none.
        activation: of the experts, `swiglu` or `gelu`.
        norm_eps: epsilon of every RMSNorm.
        rope_theta: base of the rotary frequencies.

    Raises:
        ConfigError: hidden is no even multiple of heads, or the chain is to be in some layers only.
    """

    vocab: int
    hidden: int
    layers: int
    heads: int
    ffn: int
    router: RouterSettings
    chain: ChainSettings
    shared_ffn: int = 0
    activation: Activation = "swiglu"
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        if self.hidden % (2 * self.heads):
            raise ConfigError(f"model.hidden is {self.hidden!r}: it must be an even multiple of heads, {self.heads}")
        if self.chain.layers is not None:
            raise ConfigError(
                f"chain.layers is {list(self.chain.layers)}: every layer of this model is one, so it must be null"
            )


@dataclass(frozen=True)
class ModelOutput:
    """What the model gives: logits [B, S, V], and what each layer's chain gave, from the first layer on."""

    logits: Tensor
    chains: list[ChainOutput]

    @property
    def balance_loss(self) -> Tensor:
        """Sum of the losses of all routers, a scalar: to be added to the language model's loss."""
        return torch.stack([chain.total_loss for chain in self.chains]).sum()


def rotate(x_BHSE: Tensor, theta: float) -> Tensor:
    """Rotary positions (arXiv 2104.09864): turn the pairs (j, j + E/2) by position · theta^(-2j/E); same shape."""
    length, half = x_BHSE.shape[2], x_BHSE.shape[3] // 2
    frequency = theta ** (-torch.arange(half).to(x_BHSE) / half)
    angle = torch.arange(length).to(x_BHSE)[:, None] * frequency
    first, second = x_BHSE.chunk(2, dim=3)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=3)


class Attention(nn.Module):
    """Causal multi-head attention with its pre-norm, from residual stream to residual stream [B, S, D]."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.heads, self.theta = settings.heads, settings.rope_theta
        self.norm = nn.RMSNorm(settings.hidden, settings.norm_eps)
        self.qkv = nn.Linear(settings.hidden, 3 * settings.hidden, bias=False)
        self.out = nn.Linear(settings.hidden, settings.hidden, bias=False)

    def forward(self, h_BSD: Tensor) -> Tensor:
        """Each position looks at itself and those before it."""
        qkv = self.qkv(self.norm(h_BSD)).unflatten(2, (3, self.heads, -1))
        q_BHSE, k_BHSE, v_BHSE = qkv.permute(2, 0, 3, 1, 4)
        q_BHSE, k_BHSE = rotate(q_BHSE, self.theta), rotate(k_BHSE, self.theta)
        scores_BHSS = q_BHSE @ k_BHSE.transpose(2, 3) / math.sqrt(q_BHSE.shape[3])
        later_SS = torch.ones_like(scores_BHSS[0, 0], dtype=torch.bool).triu(1)
        weights_BHSS = scores_BHSS.masked_fill(later_SS, -math.inf).softmax(dim=3)
        return h_BSD + self.out((weights_BHSS @ v_BHSE).transpose(1, 2).flatten(2))


class ChainLanguageModel(nn.Module):
    """The language model; initialised like the authors': normal 0.02, routers as ChainOfExperts does."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings = settings
        self.embedding = nn.Embedding(settings.vocab, settings.hidden)
        self.attentions = nn.ModuleList(Attention(settings) for _ in range(settings.layers))
        self.chains = nn.ModuleList(self._chain() for _ in range(settings.layers))
        self.norm = nn.RMSNorm(settings.hidden, settings.norm_eps)
        self.output = nn.Linear(settings.hidden, settings.vocab, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def _chain(self) -> ChainOfExperts:
        s = self.settings
        return ChainOfExperts(
            s.hidden,
            s.ffn,
            s.router,
            s.chain,
            shared_ffn=s.shared_ffn,
            activation=s.activation,
            norm_eps=s.norm_eps,
        )

    def forward(self, tokens_BS: Tensor, padding_mask_BS: Tensor | None = None) -> ModelOutput:
        """Logits for the token after each position.

        Args:
            tokens_BS: int64 token numbers.
            padding_mask_BS: bool, True for padding, which must stand at the end of a sequence: there it reaches no
                other token, attention being causal, and the mask keeps it out of the routers' losses and loads.
        """
        h_BSD = self.embedding(tokens_BS)
        outputs = []
        for attention, chain in zip(self.attentions, self.chains, strict=True):
            outputs.append(chain(attention(h_BSD), padding_mask_BS))
            h_BSD = outputs[-1].stream
        return ModelOutput(self.output(self.norm(h_BSD)), outputs)


def next_token_loss(logits_BSV: Tensor, tokens_BS: Tensor, counted_BS: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of each token given those before it, a scalar.

    Args:
        logits_BSV: from the model, for the tokens below.
        tokens_BS: int64 token numbers.
        counted_BS: bool, which tokens count as targets (the first of a sequence never does); None for all.
    """
    targets_BS = tokens_BS[:, 1:]
    if counted_BS is not None:
        targets_BS = targets_BS.masked_fill(~counted_BS[:, 1:], -100)  # -100: cross_entropy's ignore_index
    return functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), targets_BS.flatten())
