"""Commands and scripts that start Megatron-LM, in the style of those of three models."""

MIXTRAL = """#!/bin/bash
# Mixtral 8x7B on four nodes
NODES=${SLURM_NNODES:-4}
BATCH="256"
DISTRIBUTED_ARGS=(
    --nproc_per_node 8
    --nnodes $NODES
    --master_addr $MASTER_ADDR
)
MODEL_ARGS=(
    --use-mcore-models --disable-bias-linear
    --seq-length 4096 --max-position-embeddings 32768
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336
    --num-attention-heads 32 --group-query-attention --num-query-groups 8
    --init-method-std 0.01 --attention-dropout 0.0 --hidden-dropout 0.0
    --normalization RMSNorm --position-embedding-type rope --rotary-base 1000000
    --swiglu --untie-embeddings-and-output-weights
)
MOE_ARGS=(
    --num-experts 8 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
    --moe-grouped-gemm --moe-token-dispatcher-type alltoall --overlap-param-gather --overlap-grad-reduce)
torchrun ${DISTRIBUTED_ARGS[@]} pretrain_gpt.py \\
    ${MODEL_ARGS[@]} ${MOE_ARGS[@]} \\
    --micro-batch-size 1 --global-batch-size $BATCH --lr 1e-4 --min-lr 1.0e-5 --train-iters 500000 \\
    --lr-decay-iters 320000 --lr-decay-style cosine --lr-warmup-iters 500 --weight-decay 0.1 --clip-grad 1.0 --bf16 \\
    --tensor-model-parallel-size 1 --pipeline-model-parallel-size 4 --expert-model-parallel-size 8 \\
    --use-distributed-optimizer --sequence-parallel --save "$CHECKPOINTS" --load "$CHECKPOINTS" --save-interval 1000 \\
    --data-path "$DATA" --tokenizer-type Llama2Tokenizer --tokenizer-model $TOKENIZER --split 99990,8,2
"""

QWEN = """GPT_ARGS="--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --ffn-hidden-size 5632 \\
  --moe-ffn-hidden-size 1408 --moe-shared-expert-intermediate-size 5632 --moe-shared-expert-gate \\
  --num-experts 60 --moe-router-topk 4 --moe-router-pre-softmax --moe-layer-freq 1"
python -m torch.distributed.run --nproc-per-node=8 pretrain_gpt.py $GPT_ARGS --swiglu --add-qkv-bias \\
  --disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-6 --use-rotary-position-embeddings \\
  --rotary-base 1000000 --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 \\
  --moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 0.001 --moe-z-loss-coeff 1e-3 \\
  --moe-token-dispatcher-type alltoall --expert-model-parallel-size 4 --seq-length 4096 \\
  --max-position-embeddings 4096 --vocab-size 151646 --make-vocab-size-divisible-by 128 \\
  --train-samples 1_000_000 --global-batch-size 512 --micro-batch-size 2 --lr 3e-4 --min-lr 3e-5 \\
  --lr-decay-style WSD --lr-wsd-decay-style linear --lr-wsd-decay-samples 200000 --lr-warmup-samples 20480 \\
  --adam-beta2 0.95 --bf16 --recompute-granularity selective --recompute-modules moe core_attn
"""

DEEPSEEK = """torchrun --nnodes 2 --nproc-per-node 8 pretrain_gpt.py \\
  --num-layers 27 --hidden-size 2048 --num-attention-heads 16 --ffn-hidden-size 10944 --seq-length 4096 \\
  --multi-latent-attention --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128 \\
  --qk-layernorm --rotary-scaling-factor 40 --mscale 0.707 --mscale-all-dim 0.707 \\
  --num-experts 64 --moe-layer-freq '([0]*1+[1]*26)' --moe-ffn-hidden-size 1408 \\
  --moe-shared-expert-intermediate-size 2816 --moe-router-topk 6 --moe-router-pre-softmax \\
  --moe-router-num-groups 8 --moe-router-group-topk 3 --moe-router-topk-scaling-factor 1.0 \\
  --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-3 --moe-router-dtype fp32 \\
  --moe-token-dispatcher-type flex --moe-enable-deepep --mtp-num-layers 1 \\
  --swiglu --normalization RMSNorm --norm-epsilon 1e-6 --disable-bias-linear --position-embedding-type rope \\
  --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 --init-method-std 0.006 \\
  --tensor-model-parallel-size 1 --expert-model-parallel-size 8 --context-parallel-size 2 \\
  --micro-batch-size 1 --global-batch-size 512 --train-iters 10000 --lr 4.2e-4 --lr-decay-style constant \\
  --adam-beta2 0.95 --weight-decay 0.1 --bf16 --coe-iterations 2 --coe-norm-placement iteration_norm
"""
