#!/usr/bin/env python3
"""Writes a random checkpoint of Qwen3-Next's shape: 12 layers, width 2048, 64 experts with top 8, the real head shapes
(16 and 2 attention heads of 256; 16 and 32 delta heads of 128), bf16, one file a layer. The vocabulary and the tokenizer
are those of longreach-tiny, so that its documents can be read.

usage: bench/gpu/make_model.py DIR [--layers N] [--experts N]     needs PyTorch; about 5 GB for the defaults
"""
import argparse
import json
import os
import shutil
import struct

import torch


def config_of(layers, experts):
    return {
        "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "vocab_size": 8192, "hidden_size": 2048,
        "intermediate_size": 5120, "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 2,
        "head_dim": 256, "hidden_act": "silu", "max_position_embeddings": 1048576, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "rope_theta": 10000000.0, "partial_rotary_factor": 0.25, "attention_bias": False,
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "decoder_sparse_step": 1,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "num_experts_per_tok": 8,
        "num_experts": experts, "norm_topk_prob": True, "mlp_only_layers": [], "full_attention_interval": 4,
        "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 0,
    }


def write_safetensors(path, tensors):
    header, at = {}, 0
    for name, tensor in tensors:
        size = tensor.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in tensors:
            file.write(tensor.view(torch.int16).cpu().numpy().tobytes())
    return at


class Maker:
    def __init__(self, device):
        self.device = device
        self.generator = torch.Generator(device).manual_seed(1)

    def normal(self, *shape, scale=None):
        scale = shape[-1] ** -0.5 if scale is None else scale
        x = torch.randn(*shape, device=self.device, generator=self.generator) * scale
        return x.to(torch.bfloat16)

    def constant(self, value, *shape):
        return torch.full(shape, value, device=self.device, dtype=torch.bfloat16)


def mixer(make, c, prefix, attention):
    d = c["hidden_size"]
    if attention:
        q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
        p = prefix + "self_attn."
        return [(p + "q_proj.weight", make.normal(2 * q, d)), (p + "k_proj.weight", make.normal(kv, d)),
                (p + "v_proj.weight", make.normal(kv, d)), (p + "o_proj.weight", make.normal(d, q)),
                (p + "q_norm.weight", make.constant(0, c["head_dim"])),
                (p + "k_norm.weight", make.constant(0, c["head_dim"]))]
    k = c["linear_num_key_heads"] * c["linear_key_head_dim"]
    heads, v = c["linear_num_value_heads"], c["linear_num_value_heads"] * c["linear_value_head_dim"]
    p = prefix + "linear_attn."
    return [(p + "in_proj_qkvz.weight", make.normal(2 * k + 2 * v, d)),
            (p + "in_proj_ba.weight", make.normal(2 * heads, d)),
            (p + "conv1d.weight", make.normal(2 * k + v, 1, c["linear_conv_kernel_dim"], scale=0.5)),
            (p + "norm.weight", make.constant(1, c["linear_value_head_dim"])),
            (p + "A_log", make.normal(heads, scale=1.0)), (p + "dt_bias", make.constant(-3, heads)),
            (p + "out_proj.weight", make.normal(d, v))]


def experts(make, c, prefix):
    d, ffn, shared = c["hidden_size"], c["moe_intermediate_size"], c["shared_expert_intermediate_size"]
    tensors = [(prefix + "mlp.gate.weight", make.normal(c["num_experts"], d)),
               (prefix + "mlp.shared_expert_gate.weight", make.normal(1, d))]
    mlps = [("mlp.shared_expert.", shared)] + [(f"mlp.experts.{e}.", ffn) for e in range(c["num_experts"])]
    for name, width in mlps:
        tensors += [(prefix + name + "gate_proj.weight", make.normal(width, d)),
                    (prefix + name + "up_proj.weight", make.normal(width, d)),
                    (prefix + name + "down_proj.weight", make.normal(d, width))]
    return tensors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--experts", type=int, default=64)
    args = parser.parse_args()
    os.makedirs(args.dir, exist_ok=True)
    c = config_of(args.layers, args.experts)
    make = Maker("cuda" if torch.cuda.is_available() else "cpu")
    index, total = {}, 0

    def put(name, tensors):
        nonlocal total
        total += write_safetensors(os.path.join(args.dir, name), tensors)
        index.update({tensor: name for tensor, _ in tensors})

    d, vocab = c["hidden_size"], c["vocab_size"]
    put("model-ends.safetensors", [("model.embed_tokens.weight", make.normal(vocab, d, scale=1.0)),
                                   ("lm_head.weight", make.normal(vocab, d)),
                                   ("model.norm.weight", make.constant(0, d))])
    for i in range(args.layers):
        prefix = f"model.layers.{i}."
        put(f"model-{i:03d}.safetensors",
            [(prefix + "input_layernorm.weight", make.constant(0, d)),
             (prefix + "post_attention_layernorm.weight", make.constant(0, d))]
            + mixer(make, c, prefix, (i + 1) % c["full_attention_interval"] == 0) + experts(make, c, prefix))
    with open(os.path.join(args.dir, "config.json"), "w") as file:
        json.dump(c, file, indent=1)
    with open(os.path.join(args.dir, "model.safetensors.index.json"), "w") as file:
        json.dump({"metadata": {"total_size": total}, "weight_map": index}, file)
    tiny = os.path.join(os.path.dirname(__file__), "..", "..", "models", "longreach-tiny")
    shutil.copy(os.path.join(tiny, "tokenizer.json"), args.dir)
    print(f"{args.dir}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
