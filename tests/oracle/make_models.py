#!/usr/bin/env python3
"""Oracle logits for the model tests, made by transformers in float32.

Writes, next to this script:

    models/<name>/config.json, *.safetensors     a small random qwen3_next model as a HuggingFace directory
    models/<name>/ids_N.bin                      int32 LE [N], the prompt
    models/<name>/positions_N.txt                the positions kept, comma separated, ascending
    models/<name>/logits_N.bin                   float32 LE [n_positions, vocab_size]
    tiny/{ids,logits}_N.bin, positions_N.txt     the same for models/longreach-tiny on the start of data/kjv.txt
    tiny/argmax_N.bin                            int32 LE [N], the token with the largest logit at every position
    tiny/margin_N.bin                            float32 LE [N], how far that logit is above the next

Three properties keep models/ honest, and the script fails where one of them does not hold:
  * every tensor in the files is read by transformers, and none that it wants is missing (mtp.* is ignored by both);
  * no routing decision is a near tie, so float32 rounding cannot send a token to another expert (tiny/ only prints its gaps);
  * each change named in `contrast` moves the logits. It can name only changes that keep the shapes of the tensors; a
    loader that misreads the other fields meets tensors of the wrong shape or name.
"""

import argparse
import json
import math
import pathlib
import shutil
import sys

import numpy as np
import safetensors.torch
import tokenizers
import torch
import transformers
from transformers import Qwen3NextForCausalLM

HERE = pathlib.Path(__file__).resolve().parent
REPO = HERE.parent.parent
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
DTYPE_NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}

PROMPT_LENGTHS = (1, 65, 200)
MIN_ROUTER_GAP = 1e-3  # between the logits of the last expert taken and the first one left out
MIN_CONTRAST = 2e-2  # how far a field under test must move some logit

BASE = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
    "attention_bias": False,
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def rope(kind="default", theta=1000.0, partial=0.5, **scaling):
    return {"rope_type": kind, "rope_theta": theta, "partial_rotary_factor": partial, **scaling}


# config: changes to BASE, where ... takes the field out. contrast: changes that must move the logits.
MODELS = {
    "moe": {
        "dtype": "bf16",
        "mtp": True,
        "config": {"num_hidden_layers": 4, "full_attention_interval": 4},
        "contrast": [{"num_experts_per_tok": 1}, {"norm_topk_prob": False}],
    },
    "layer_types": {
        "dtype": "f32",
        "config": {
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "linear_attention", "full_attention"],
            "full_attention_interval": 3,  # the list wins
            "num_key_value_heads": 1,
            "mlp_only_layers": [1],
            "tie_word_embeddings": True,
            "eos_token_id": [2, 7],
        },
        "contrast": [],
    },
    "attention_bias": {
        "dtype": "f16",
        "config": {
            "attention_bias": True,
            "hidden_size": 40,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 20,
            "hidden_act": "gelu",
            "rope_parameters": rope(partial=1.0),
        },
        "contrast": [
            {"attention_bias": False},
            {"hidden_act": "gelu_pytorch_tanh", "at_least": 1e-4},
            {"hidden_act": "silu"},
            {"rope_parameters": rope(partial=0.5)},
        ],
    },
    "dense": {
        "dtype": "bf16",
        "config": {
            "num_experts": 0,
            "intermediate_size": 72,
            "hidden_act": "relu",
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "linear_conv_kernel_dim": 2,
            "rms_norm_eps": 1e-2,
        },
        "contrast": [{"hidden_act": "silu"}, {"rms_norm_eps": 1e-6}],
    },
    "sparse_step": {
        "dtype": "bf16",
        "config": {
            "num_hidden_layers": 4,
            "full_attention_interval": 3,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "num_experts_per_tok": 1,
            "norm_topk_prob": False,
            "hidden_act": "gelu_pytorch_tanh",
            "num_key_value_heads": 4,
        },
        "contrast": [{"norm_topk_prob": True}, {"hidden_act": "gelu", "at_least": 1e-4}],
    },
    "sharded": {
        "dtype": "bf16",
        "shards": 3,
        "config": {
            "hidden_size": 64,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "shared_expert_intermediate_size": 40,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 12,
            "linear_value_head_dim": 20,
        },
        "contrast": [{"norm_topk_prob": True}, {"num_experts_per_tok": 2}],
    },
    "all_full": {
        "dtype": "f16",
        "config": {"full_attention_interval": 1, "rope_parameters": rope(partial=0.35), "vocab_size": 257},
        "contrast": [{"rope_parameters": rope(partial=0.25)}],
    },
    "all_linear": {
        "dtype": "f32",
        "config": {
            "layer_types": ["linear_attention", "linear_attention"],
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "tie_word_embeddings": True,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 32,
        },
        "contrast": [],
    },
    # Only what has no usable default is spelled out; theta is 10000, head_dim 256, a quarter of it rotated.
    "defaults": {
        "dtype": "bf16",
        "config": {
            "num_hidden_layers": 4,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            **{
                field: ...
                for field in (
                    "head_dim hidden_act rms_norm_eps tie_word_embeddings rope_parameters attention_bias "
                    "full_attention_interval linear_conv_kernel_dim norm_topk_prob decoder_sparse_step mlp_only_layers "
                    "max_position_embeddings bos_token_id eos_token_id"
                ).split()
            },
        },
        "contrast": [{"rope_parameters": rope(theta=10000.0, partial=0.5)}, {"rope_theta": 1000.0}],
    },
    # The old spelling with the nulls that real files carry.
    "nulls": {
        "dtype": "bf16",
        "config": {
            "rope_parameters": ...,
            "rope_scaling": None,
            "rope_theta": 500.0,
            "partial_rotary_factor": 0.75,
            "layer_types": None,
            "full_attention_interval": ...,
            "num_hidden_layers": 4,
            "mlp_only_layers": None,
            "eos_token_id": None,
        },
        "contrast": [{"rope_theta": 10000.0}, {"partial_rotary_factor": 0.25}],
    },
    # rope_parameters wins over the same fields at the top level.
    "both_spellings": {
        "dtype": "bf16",
        "config": {"rope_parameters": rope(theta=300.0, partial=0.5), "rope_theta": 1e6, "partial_rotary_factor": 1.0},
        "contrast": [{"rope_parameters": rope(theta=1e6)}, {"rope_parameters": rope(theta=300.0, partial=1.0)}],
    },
    "rope_linear": {
        "dtype": "bf16",
        "config": {"rope_parameters": rope("linear", factor=4.0)},
        "contrast": [{"rope_parameters": rope()}],
    },
    "rope_linear_old": {
        "dtype": "bf16",
        "config": {
            "rope_parameters": ...,
            "rope_scaling": {"type": "linear", "factor": 2.5},
            "rope_theta": 1000.0,
            "partial_rotary_factor": 0.5,
        },
        "contrast": [{"rope_scaling": None}],
    },
    "rope_yarn": {
        "dtype": "bf16",
        "config": {
            "rope_parameters": rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=64,
                beta_fast=8.0,
                beta_slow=0.5,
                attention_factor=1.3,
                truncate=False,
            )
        },
        "contrast": [
            {"rope_parameters": rope()},
            {
                "rope_parameters": rope(
                    "yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=8.0, beta_slow=0.5, truncate=False
                )
            },
            {
                "rope_parameters": rope(
                    "yarn",
                    factor=4.0,
                    original_max_position_embeddings=64,
                    beta_fast=8.0,
                    beta_slow=0.5,
                    attention_factor=1.3,
                )
            },
            {
                "rope_parameters": rope(
                    "yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.3, truncate=False
                )
            },
        ],
    },
    # The pretrained length is max_position_embeddings where the file does not say; the betas are 32 and 1.
    "rope_yarn_old": {
        "dtype": "bf16",
        "config": {
            "rope_parameters": ...,
            "rope_scaling": {"type": "yarn", "factor": 8.0},
            "rope_theta": 1000.0,
            "partial_rotary_factor": 0.75,
        },
        "contrast": [{"rope_scaling": None}, {"max_position_embeddings": 2048}],
    },
    "rope_yarn_mscale": {
        "dtype": "bf16",
        "config": {
            "rope_parameters": rope(
                "yarn", factor=16.0, original_max_position_embeddings=128, mscale=1.0, mscale_all_dim=0.4
            )
        },
        "contrast": [{"rope_parameters": rope("yarn", factor=16.0, original_max_position_embeddings=128)}],
    },
    "rope_llama3": {
        "dtype": "bf16",
        "config": {
            "rope_parameters": rope(
                "llama3",
                partial=1.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=128,
            )
        },
        "contrast": [
            {"rope_parameters": rope(partial=1.0)},
            {"rope_parameters": rope("linear", partial=1.0, factor=8.0)},
        ],
    },
    "rope_llama3_old": {
        "dtype": "bf16",
        "config": {
            "rope_parameters": ...,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 0.5,
                "high_freq_factor": 6.0,
                "original_max_position_embeddings": 200,
            },
            "rope_theta": 2000.0,
            "partial_rotary_factor": 0.5,
        },
        "contrast": [{"rope_scaling": None}],
    },
}


class Bad(Exception):
    """A fixture that would not test what it says."""


def config_of(spec):
    config = {**BASE, "torch_dtype": DTYPE_NAMES[spec["dtype"]], **spec["config"]}
    return {field: value for field, value in config.items() if value is not ...}


def layer_is_full(config, i):
    types = config.get("layer_types")
    if types:
        return types[i] == "full_attention"
    return (i + 1) % config.get("full_attention_interval", 4) == 0


def layer_is_moe(config, i):
    return (
        i not in (config.get("mlp_only_layers") or [])
        and config["num_experts"] > 0
        and (i + 1) % config.get("decoder_sparse_step", 1) == 0
    )


class Weights:
    """Random tensors under the names that public checkpoints use."""

    def __init__(self, config, seed, dtype):
        self.rng = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.tensors = {}
        self.config = config

    def normal(self, name, shape, std, mean=0.0, dtype=None):
        values = torch.randn(shape, generator=self.rng, dtype=torch.float64) * std + mean
        self.tensors[name] = values.to(dtype or self.dtype).contiguous()

    def linear(self, name, n_out, n_in, gain=1.0, bias=False):
        self.normal(f"{name}.weight", (n_out, n_in), gain / math.sqrt(n_in))
        if bias:
            self.normal(f"{name}.bias", (n_out,), 0.3)

    def swiglu(self, name, hidden, ffn):
        self.linear(f"{name}.gate_proj", ffn, hidden, gain=1.5)
        self.linear(f"{name}.up_proj", ffn, hidden, gain=1.5)
        self.linear(f"{name}.down_proj", hidden, ffn)

    def full_attention(self, name):
        c = self.config
        hidden, head_dim, bias = c["hidden_size"], c.get("head_dim", 256), c.get("attention_bias", False)
        n_heads, n_kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        self.linear(f"{name}.q_proj", n_heads * 2 * head_dim, hidden, bias=bias)
        self.linear(f"{name}.k_proj", n_kv_heads * head_dim, hidden, bias=bias)
        self.linear(f"{name}.v_proj", n_kv_heads * head_dim, hidden, bias=bias)
        self.linear(f"{name}.o_proj", hidden, n_heads * head_dim, gain=2.0, bias=bias)
        self.normal(f"{name}.q_norm.weight", (head_dim,), 0.3, mean=0.2)
        self.normal(f"{name}.k_norm.weight", (head_dim,), 0.3, mean=0.2)

    def linear_attention(self, name):
        c = self.config
        hidden, n_keys, n_values = c["hidden_size"], c["linear_num_key_heads"], c["linear_num_value_heads"]
        keys, values = n_keys * c["linear_key_head_dim"], n_values * c["linear_value_head_dim"]
        self.linear(f"{name}.in_proj_qkvz", 2 * keys + 2 * values, hidden)
        self.linear(f"{name}.in_proj_ba", 2 * n_values, hidden)
        self.normal(f"{name}.conv1d.weight", (2 * keys + values, 1, c.get("linear_conv_kernel_dim", 4)), 0.6)
        self.linear(f"{name}.out_proj", hidden, values)
        self.normal(f"{name}.norm.weight", (c["linear_value_head_dim"],), 0.3, mean=1.0)
        # Heads that forget within a token and heads that remember for hundreds.
        self.normal(f"{name}.dt_bias", (n_values,), 1.0, dtype=torch.float32)
        self.normal(f"{name}.A_log", (n_values,), 1.8, mean=-2.5, dtype=torch.float32)

    def moe(self, name):
        c = self.config
        hidden = c["hidden_size"]
        self.linear(f"{name}.gate", c["num_experts"], hidden, gain=1.5)
        for e in range(c["num_experts"]):
            self.swiglu(f"{name}.experts.{e}", hidden, c["moe_intermediate_size"])
        self.swiglu(f"{name}.shared_expert", hidden, c["shared_expert_intermediate_size"])
        self.linear(f"{name}.shared_expert_gate", 1, hidden, gain=1.5)

    def fill(self, with_mtp):
        c = self.config
        hidden = c["hidden_size"]
        tied = c.get("tie_word_embeddings", False)
        self.normal("model.embed_tokens.weight", (c["vocab_size"], hidden), 0.4)
        for i in range(c["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            self.normal(f"{layer}.input_layernorm.weight", (hidden,), 0.3)
            if layer_is_full(c, i):
                self.full_attention(f"{layer}.self_attn")
            else:
                self.linear_attention(f"{layer}.linear_attn")
            self.normal(f"{layer}.post_attention_layernorm.weight", (hidden,), 0.3)
            if layer_is_moe(c, i):
                self.moe(f"{layer}.mlp")
            else:
                self.swiglu(f"{layer}.mlp", hidden, c["intermediate_size"])
        self.normal("model.norm.weight", (hidden,), 0.3)
        if not tied:
            self.linear("lm_head", c["vocab_size"], hidden, gain=1.5)
        if with_mtp:
            self.linear("mtp.fc", hidden, 2 * hidden)
            self.normal("mtp.norm.weight", (hidden,), 0.3)
        return self.tensors


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n")


def write_weights(out, tensors, n_shards):
    """One file, or shards filled in the order of the tensors, so that a cut falls inside a layer."""
    if n_shards == 1:
        safetensors.torch.save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return
    total = sum(t.nbytes for t in tensors.values())
    shards, seen = [{} for _ in range(n_shards)], 0
    for name, tensor in tensors.items():
        shards[min(n_shards - 1, seen * n_shards // total)][name] = tensor
        seen += tensor.nbytes
    weight_map = {}
    for s, shard in enumerate(shards):
        file = f"model-{s + 1:05d}-of-{n_shards:05d}.safetensors"
        safetensors.torch.save_file(shard, out / file, metadata={"format": "pt"})
        weight_map.update({name: file for name in shard})
    write_json(
        out / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )


def load(path, changes=None):
    """transformers' model in float32; `changes` are config fields laid over the file's."""
    kwargs = {}
    if changes is not None:
        config = {**json.loads((path / "config.json").read_text()), **changes}
        kwargs["config"] = transformers.Qwen3NextConfig.from_dict(config)
    model, info = Qwen3NextForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
        **kwargs,
    )
    if changes is None:
        bad = {k: v for k, v in info.items() if v and k != "unexpected_keys"}
        bad.update({k: k for k in info["unexpected_keys"] if not k.startswith("mtp.")})
        if bad:
            raise Bad(f"{path.name}: loading: {bad}")
    return model.eval()


def run(model, ids, positions):
    """Logits float32 [n_positions, vocab] and, per position, the smallest gap of its routing decisions."""
    gaps = torch.full((len(ids),), math.inf)
    hooks = []
    for layer in model.model.layers:
        gate = getattr(layer.mlp, "gate", None)
        if gate is None or gate.top_k >= gate.num_experts:
            continue

        def note(module, _inputs, outputs):
            ordered = outputs[0].sort(dim=-1, descending=True).values
            torch.minimum(gaps, ordered[:, module.top_k - 1] - ordered[:, module.top_k], out=gaps)

        hooks.append(gate.register_forward_hook(note))
    with torch.no_grad():
        logits = model(
            torch.tensor([ids], dtype=torch.long), use_cache=False, logits_to_keep=torch.tensor(positions)
        ).logits[0]
    for hook in hooks:
        hook.remove()
    if not torch.isfinite(logits).all():
        raise Bad("logits that are not finite")
    return logits, gaps


def write_prompt(out, ids, positions, logits):
    n = len(ids)
    np.asarray(ids, dtype="<i4").tofile(out / f"ids_{n}.bin")
    (out / f"positions_{n}.txt").write_text(",".join(map(str, positions)) + "\n")
    logits.numpy().astype("<f4").tofile(out / f"logits_{n}.bin")


def positions_of(n):
    return list(range(n)) if n < 200 else sorted({*range(0, n, 7), n - 1})


def draw_prompt(model, n, vocab_size, seed):
    """The first of a row of random prompts that routes without a near tie."""
    positions = positions_of(n)
    for attempt in range(200):
        ids = np.random.default_rng([seed, n, attempt]).integers(0, vocab_size, n).tolist()
        logits, gaps = run(model, ids, positions)
        if gaps.min() >= MIN_ROUTER_GAP:
            return ids, positions, logits
    raise Bad(f"no prompt of {n} tokens without a near tie")


def check_contrast(name, path, spec, ids, positions, logits):
    for changes in spec["contrast"]:
        changes = dict(changes)
        at_least = changes.pop("at_least", MIN_CONTRAST)
        other, _ = run(load(path, changes), ids, positions)
        moved = (other - logits).abs().max().item()
        if moved < at_least:
            raise Bad(f"{name}: {changes} moves the logits by {moved:.2g} only")
        print(f"  {moved:8.2g}  {json.dumps(changes)[:110]}")


def make_model(name, spec, seed):
    out = HERE / "models" / name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    config = config_of(spec)
    write_json(out / "config.json", config)
    weights = Weights(config, seed, DTYPES[spec["dtype"]])
    write_weights(out, weights.fill(spec.get("mtp", False)), spec.get("shards", 1))
    model = load(out)
    for n in PROMPT_LENGTHS:
        ids, positions, logits = draw_prompt(model, n, config["vocab_size"], seed)
        write_prompt(out, ids, positions, logits)
    print(f"{name}: |logit| up to {logits.abs().max():.1f}, std {logits.std():.2f}")
    check_contrast(name, out, spec, ids, positions, logits)


TINY_POSITIONS = {
    1: [0],
    2: [0, 1],
    63: [0, 31, 61, 62],
    64: [0, 31, 62, 63],
    65: [0, 31, 62, 63, 64],
    1000: [0, 1, 2, 3, 7, 15, 31, 62, 63, 64, 65, 126, 127, 128, 191, 192, 255, 256, 511, 512, 513, 767, 998, 999],
    6000: [
        *(0, 3, 63, 64, 127, 128, 511, 512, 1023, 1024, 1025, 2047, 2048, 3071, 3072),
        *(4031, 4032, 4095, 4096, 4097, 5119, 5120, 5998, 5999),
    ],
}


def write_argmax(out, logits):
    """What a backend with rounded activations is held against: it may choose otherwise where the margin is small."""
    n = len(logits)
    top = logits.topk(2, dim=-1)
    top.indices[:, 0].numpy().astype("<i4").tofile(out / f"argmax_{n}.bin")
    (top.values[:, 0] - top.values[:, 1]).numpy().astype("<f4").tofile(out / f"margin_{n}.bin")


def make_tiny():
    """The model that the repository carries, on the start of the book that it was not trained on."""
    path, out = REPO / "models" / "longreach-tiny", HERE / "tiny"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    book = (REPO / "data" / "kjv.txt").read_text(encoding="utf-8")[:100_000]
    ids = tokenizer.encode(book, add_special_tokens=False).ids
    model = load(path)
    for n, positions in TINY_POSITIONS.items():
        logits, gaps = run(model, ids[:n], positions)
        write_prompt(out, ids[:n], positions, logits)
        print(f"tiny {n}: routing gap {gaps.min():.1e}, {gaps[positions].min():.1e} at the positions kept")
    write_argmax(out, run(model, ids[:n], list(range(n)))[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models to make, or tiny; all of them where none is named")
    args = parser.parse_args()
    torch.set_num_threads(2)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print("torch", torch.__version__, "transformers", transformers.__version__)
    try:
        for index, (name, spec) in enumerate(MODELS.items()):
            if not args.names or name in args.names:
                make_model(name, spec, seed=1000 + index)
        if not args.names or "tiny" in args.names:
            make_tiny()
    except Bad as bad:
        sys.exit(f"make_models: {bad}")


if __name__ == "__main__":
    main()
