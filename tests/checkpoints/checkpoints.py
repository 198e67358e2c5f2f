"""Small LLaMA-shaped checkpoints in every layout."""

import json

import torch
from safetensors.torch import save_file

HIDDEN, VOCABULARY, HEADS = 8, 20, 2


def llama(seed, *, vocabulary=VOCABULARY, dtype=torch.float16, scale=1.0, projector=False):
    """Random tensors under LLaMA's names; norm weights are near one, as in real models."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    tensors = {"model.embed_tokens.weight": normal(vocabulary, HIDDEN)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "self_attn.q_proj.weight"] = normal(HIDDEN, HIDDEN)
        tensors[prefix + "mlp.up_proj.weight"] = normal(3 * HIDDEN, HIDDEN)
        tensors[prefix + "input_layernorm.weight"] = (1 + normal(HIDDEN)).to(dtype)
    tensors["model.norm.weight"] = (1 + normal(HIDDEN)).to(dtype)
    tensors["lm_head.weight"] = normal(vocabulary, HIDDEN)
    if projector:
        tensors["model.mm_projector.weight"] = normal(HIDDEN, 16)
        tensors["model.mm_projector.bias"] = normal(HIDDEN)
    return tensors


def bits(tensor):
    """The tensor's bits as integers, so that comparing is bit for bit."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(-1).view(kinds[tensor.dtype.itemsize])


class Maker:
    """Writes checkpoint folders."""

    llama = staticmethod(llama)

    def __init__(self, root):
        self.root = root

    def __call__(self, name, tensors, layout="safetensors", shards=1, config=None):
        folder = self.root / name
        folder.mkdir(parents=True)
        settings = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, **(config or {})}
        (folder / "config.json").write_text(json.dumps(settings))
        names = list(tensors)
        groups = [names[i::shards] for i in range(shards)]
        stem = "model" if layout == "safetensors" else "pytorch_model"
        suffix = "safetensors" if layout == "safetensors" else "bin"
        weight_map = {}
        for number, group in enumerate(groups, 1):
            file = f"{stem}-{number:05d}-of-{shards:05d}.{suffix}"
            if shards == 1:
                file = f"{stem}.{suffix}"
            part = {key: tensors[key] for key in group}
            weight_map |= dict.fromkeys(group, file)
            if layout == "safetensors":
                save_file({key: t.contiguous() for key, t in part.items()}, folder / file)
            else:
                torch.save(part, folder / file, _use_new_zipfile_serialization=layout == "bin")
        if shards > 1:
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
        return folder
