#!/usr/bin/env python3
"""The prompts of `longreach needle --prompts` answered by transformers on PyTorch: greedy, exact match of the first word.
usage: needles_peer.py PROMPTS [--model DIR] [--device cuda|cpu] [--ours FILE]
The model is in float32 and attends to everything, its attention itself in bf16; rotary angles are made in float64. The
document is read in one forward; each question is asked of a copy of the cache behind it, a token at a time. --ours is what
`longreach needle --json` printed of the same run: exits 1 where PyTorch found over one fact more. A million tokens take 30 to
40 GB of memory (estimated from shorter documents). Ran with transformers 5.17 and 5.24, PyTorch 2.11 and 2.15."""
import argparse
import copy
import json
import re
import sys
import time

import tokenizers
import torch

sys.modules["fla"] = sys.modules["causal_conv1d"] = None  # transformers would take their kernels; PyTorch's are in float32
import transformers  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

MAX_NEW_TOKENS = 8


def attend(module, query, key, value, attention_mask, scaling, **_):
    """Query [1, 4, T, 64] at the end of key and value [1, 2, S, 64]: T = S in a document, T = 1 in a question. No mask."""
    assert attention_mask is None and query.shape[2] in (1, key.shape[2])
    n_groups = query.shape[1] // key.shape[1]
    query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
    key, value = (x.repeat_interleave(n_groups, dim=1) for x in (key, value))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # the others would make [T, S]
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, scale=scaling, is_causal=query.shape[2] > 1)
    return out.transpose(1, 2).contiguous().to(torch.float32), None


def rotary_in_float64(rotary):
    """Position times frequency in float32 is off by 0.03 at a million tokens."""
    parameters = rotary.config.rope_parameters
    n = int(rotary.config.head_dim * parameters["partial_rotary_factor"])
    frequencies = parameters["rope_theta"] ** (-torch.arange(0, n, 2, dtype=torch.float64) / n)

    def forward(x, position_ids):
        angles = position_ids[..., None].to(torch.float64) * frequencies.to(x.device)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    rotary.forward = forward


def load(path, device):
    transformers.AttentionInterface.register("bf16_without_mask", attend)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="bf16_without_mask", experts_implementation="eager")
    rotary_in_float64(model.model.rotary_emb)
    return model.to(device).eval()


def forward(model, ids, cache):
    """The likeliest token behind the ids, which the cache takes in."""
    ids = torch.tensor([ids], device=model.device)
    return int(model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())


def ask(model, tokenizer, prompt, cache):
    """What follows the prompt, up to a full stop."""
    generated, cache = [], copy.deepcopy(cache)
    for token in tokenizer.encode(prompt, add_special_tokens=False).ids:
        best = forward(model, [token], cache)
    while len(generated) < MAX_NEW_TOKENS and "." not in tokenizer.decode(generated):
        generated.append(best)
        best = forward(model, [best], cache)
    return tokenizer.decode(generated)


def first_word(text):
    return re.match(r"\s*([0-9A-Za-z]*)", text)[1]


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts")
    parser.add_argument("--model", default="models/longreach-tiny")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--ours")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with open(given.prompts, encoding="utf-8") as file:
        prompts = json.load(file)
    tokenizer = tokenizers.Tokenizer.from_file(f"{given.model}/tokenizer.json")
    model = load(given.model, given.device)
    ids = tokenizer.encode(prompts["document"], add_special_tokens=False).ids
    assert len(ids) == prompts["tokens"], f"{len(ids)} tokens, longreach counted {prompts['tokens']}"

    forward(model, ids[:1000], transformers.DynamicCache(config=model.config))  # the first call prepares things
    cache = transformers.DynamicCache(config=model.config)
    begin = time.perf_counter()
    forward(model, ids, cache)
    read = time.perf_counter() - begin
    n_found, questions = 0, prompts["questions"]
    for question in questions:
        got = first_word(ask(model, tokenizer, question["prompt"], cache))
        found = got == str(question["expected"])
        n_found += found
        subject = re.search(r"What is the (.*)\?", question["prompt"])[1]
        print(f"{100 * question['depth']:7.2f}%  {subject:40s} {question['expected']:8d}  {got:10s} "
              f"{'found' if found else 'MISSED'}", flush=True)
    asked = time.perf_counter() - begin - read
    on = torch.cuda.get_device_name() if given.device == "cuda" else "the CPU"
    memory = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB at most" if given.device == "cuda" else ""
    print(f"PyTorch: {n_found} of {len(questions)} found in {len(ids):,} tokens, full attention; read in {read:.1f} s, "
          f"asked in {asked:.1f} s{memory} (transformers {transformers.__version__}, torch {torch.__version__}, {on})")
    if given.ours:
        with open(given.ours, encoding="utf-8") as file:
            ours = json.loads(file.readlines()[-1])["summary"]
        assert (ours["document_tokens"], ours["needles"]) == (len(ids), len(questions)), "--ours is of other prompts"
        print(f"longreach: {ours['found']} of {ours['needles']} found, {ours['attention']} attention; "
              f"read in {ours['prefill_seconds']:.1f} s, asked in {ours['decode_seconds']:.1f} s")
        sys.exit(ours["found"] < n_found - 1)


main()
