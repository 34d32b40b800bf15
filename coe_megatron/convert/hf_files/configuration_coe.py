"""Configuration of Chain-of-Experts language models (arXiv 2506.18945) for Hugging Face transformers."""

from typing import Any

from transformers import PretrainedConfig


class CoEConfig(PretrainedConfig):
    """Sizes and choices of a Chain-of-Experts model.

    Args:
        vocab_size: V, rows of the embedding.
        hidden_size: D.
        num_hidden_layers: L.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads (MHA, GQA); as many as query heads when None.
        head_dim: width of a head (MHA, GQA); hidden_size / num_attention_heads when None.
        kv_lora_rank: width of compressed keys and values; a number selects multi-latent attention (MLA).
        q_lora_rank: MLA: width of compressed queries; None for none.
        qk_nope_head_dim, qk_rope_head_dim, v_head_dim: MLA: widths of a head.
        qk_layernorm: normalise each head's queries and keys (MHA, GQA).
        qk_norm_over_heads: with `qk_layernorm`, normalise all heads of the queries, and of the keys, together.
        qkv_bias: queries, keys and values have biases (MHA, GQA).
        intermediate_size: width of dense layers.
        hidden_act: `silu` with a gate (SwiGLU), or `gelu` without.
        norm: `rms_norm` or `layer_norm`.
        norm_eps: of every norm.
        rope_theta: base of rotary positions.
        yarn: MLA: `factor`, `original_max_position_embeddings`, `mscale`, `mscale_all_dim`; None for none.
        max_position_embeddings: length of the samples in training.
        num_experts: N, routed experts of a layer.
        num_experts_per_tok: K, experts per token in an iteration of a chain.
        moe_intermediate_size: F, width of an expert.
        shared_expert_intermediate_size: width of all shared experts together; 0 for none.
        shared_expert_gate: whether the shared experts' output is multiplied by a learned gate.
        moe_layers: for each layer 1 if it has experts, else 0; None for all.
        scoring_func: `softmax` or `sigmoid`.
        norm_topk_prob: divide a token's gates by their sum (softmax scores).
        routed_scaling_factor: factor on all gates.
        n_group, topk_group: group-limited routing; None for none.
        use_expert_bias: whether a bias is added to the scores for the choice of experts.
        chain_iterations: C.
        chain_gating: `independent`, `shared_router` or `fixed`.
        chain_residual: `inner`, `init` or `outer`.
        chain_norm_placement: `prenorm`, `reference` or `iteration_norm`.
        chain_learned_scale: whether increments have a learned gain for each iteration.
        chain_conditioned: whether inputs of iterations have a learned gain.
        chain_no_return: whether an expert serves a token at most once.
        chain_modulation_rank: rank of the modulation of an iteration's input by its token; None for none.
        chain_streams: number of streams between iterations; None for one without mixing.
        chain_latent: dimensions in which the chain iterates; None for the hidden size.
        chain_layers: for each layer 1 if its experts form a chain, else 0; None for all. A layer with experts that is
            no chain has C times K experts per token.
        output_router_logits: return the logits of all routers.
    """

    model_type = "coe"
    keys_to_ignore_at_inference = ("cache", "past_key_values")

    def __init__(
        self,
        vocab_size: int = 2048,
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        kv_lora_rank: int | None = None,
        q_lora_rank: int | None = None,
        qk_nope_head_dim: int = 128,
        qk_rope_head_dim: int = 64,
        v_head_dim: int = 128,
        qk_layernorm: bool = False,
        qk_norm_over_heads: bool = False,
        qkv_bias: bool = False,
        intermediate_size: int = 512,
        hidden_act: str = "silu",
        norm: str = "rms_norm",
        norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        yarn: dict[str, float] | None = None,
        max_position_embeddings: int = 128,
        num_experts: int = 64,
        num_experts_per_tok: int = 4,
        moe_intermediate_size: int = 88,
        shared_expert_intermediate_size: int = 88,
        shared_expert_gate: bool = False,
        moe_layers: list[int] | None = None,
        scoring_func: str = "softmax",
        norm_topk_prob: bool = False,
        routed_scaling_factor: float = 1.0,
        n_group: int | None = None,
        topk_group: int | None = None,
        use_expert_bias: bool = False,
        chain_iterations: int = 2,
        chain_gating: str = "independent",
        chain_residual: str = "inner",
        chain_norm_placement: str = "prenorm",
        chain_learned_scale: bool = False,
        chain_conditioned: bool = False,
        chain_no_return: bool = False,
        chain_modulation_rank: int | None = None,
        chain_streams: int | None = None,
        chain_latent: int | None = None,
        chain_layers: list[int] | None = None,
        output_router_logits: bool = False,
        use_cache: bool = True,
        **more: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.kv_lora_rank = kv_lora_rank
        self.q_lora_rank = q_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.qk_layernorm = qk_layernorm
        self.qk_norm_over_heads = qk_norm_over_heads
        self.qkv_bias = qkv_bias
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.norm = norm
        self.norm_eps = norm_eps
        self.rope_theta = rope_theta
        self.yarn = yarn
        self.max_position_embeddings = max_position_embeddings
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.shared_expert_gate = shared_expert_gate
        self.moe_layers = moe_layers or [1] * num_hidden_layers
        self.scoring_func = scoring_func
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.n_group = n_group
        self.topk_group = topk_group
        self.use_expert_bias = use_expert_bias
        self.chain_iterations = chain_iterations
        self.chain_gating = chain_gating
        self.chain_residual = chain_residual
        self.chain_norm_placement = chain_norm_placement
        self.chain_learned_scale = chain_learned_scale
        self.chain_conditioned = chain_conditioned
        self.chain_no_return = chain_no_return
        self.chain_modulation_rank = chain_modulation_rank
        self.chain_streams = chain_streams
        self.chain_latent = chain_latent
        self.chain_layers = chain_layers or [1] * num_hidden_layers
        self.output_router_logits = output_router_logits
        self.use_cache = use_cache
        super().__init__(**more)
