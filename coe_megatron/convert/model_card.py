"""The README.md of an exported model."""

from coe_megatron.config.describe import notation
from coe_megatron.convert.architecture import Architecture
from coe_megatron.convert.source import Source

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
{tags}
---

# {title}

{about}

| | |
|---|---|
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER"{remote})
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
inputs = tokenizer("TEXT", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```

{code}
"""
_CHAIN = (
    "A language model whose feed-forward layers are chains of experts "
    "([arXiv 2506.18945](https://arxiv.org/abs/2506.18945)): tokens go through {iterations} iterations over the same "
    "experts, each with a router of its own."
)
_MOE = "A mixture-of-experts language model."
_REMOTE = "Its code is in this folder; transformers runs it only with `trust_remote_code=True`."
_NATIVE = "transformers has the code of this architecture ({name}); none is in this folder."


def card(source: Source, architecture: Architecture, parameters: int) -> str:
    """The text of the model card, with the numbers of the run."""
    config, state = source.config, source.metadata.state
    facts = {
        "parameters": f"{parameters:,}",
        "trained on": f"{state.get('tokens', 0):,} tokens in {state.get('step', 0):,} steps",
        "data": config.data.path if config.data.blend is None else ", ".join(part.path for part in config.data.blend),
        **{name.replace("_", " "): f"{value:.4f}" for name, value in source.losses().items()},
        "chain": ", ".join((config.chain.gating, config.chain.residual, config.chain.norm_placement)),
        "length in training": f"{config.model.seq_length:,} tokens",
    }
    is_chain = config.chain.iterations > 1
    if not is_chain:
        del facts["chain"]
    is_remote = architecture.name == "coe"
    return _CARD.format(
        tags="\n".join(f"- {tag}" for tag in ("mixture-of-experts", *(["chain-of-experts"] if is_chain else []))),
        title=f"{notation(config)}, {config.model.num_layers} layers",
        about=_CHAIN.format(iterations=config.chain.iterations) if is_chain else _MOE,
        rows="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        remote=", trust_remote_code=True" if is_remote else "",
        code=_REMOTE if is_remote else _NATIVE.format(name=architecture.name),
    )
