"""flash-linear-attention on the shapes of recurrence_bench: median milliseconds, forward only, bf16.
usage: recurrence_peers.py [FILE]     FILE: the output of recurrence_bench in the same run; adds ours and the ratios
needs PyTorch, Triton and fla; the first run compiles for minutes (keep TRITON_CACHE_DIR)."""
import sys
import time

import torch
import torch.nn.functional as F
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from fla.ops.simple_gla import chunk_simple_gla

DEVICE = "cuda"
SHAPES = [("delta", 16, 128, 65536), ("decay", 16, 128, 65536), ("delta", 64, 128, 32768), ("delta", 4, 64, 65536),
          ("delta", 4, 64, 1000000)]


def milliseconds(run, n_repeats=30):
    for _ in range(3):
        run()
    times = []
    for _ in range(n_repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def peer(rule, heads, dim, tokens):
    shape = (1, tokens, heads, dim)
    q, k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    g = -0.1 * torch.rand(shape[:3], device=DEVICE)
    if rule == "decay":
        return lambda: chunk_simple_gla(q, k, v, g=g, output_final_state=True)
    beta = torch.rand(shape[:3], device=DEVICE).to(torch.bfloat16)
    return lambda: chunk_gated_delta_rule(q, k, v, g=g, beta=beta, output_final_state=True)


def ours():
    """{(rule, value heads, dim, tokens): milliseconds of both passes}"""
    lines = [line.split() for line in open(sys.argv[1])] if len(sys.argv) > 1 else []
    return {(w[0], int(w[1].split("/")[1]), int(w[2]), int(w[3])): float(w[7]) for w in lines if len(w) > 7 and "/" in w[1]}


print(torch.cuda.get_device_name())
torch.manual_seed(0)
OURS = ours()
for rule, heads, dim, tokens in SHAPES:
    started = time.time()
    with torch.no_grad():
        ms = milliseconds(peer(rule, heads, dim, tokens))
    mine = OURS.get((rule, heads, dim, tokens))
    print(f"fla {rule} {heads:3d} heads {dim:4d} dim {tokens:9d} tokens {ms:8.3f} ms"
          + (f"   ours {mine:8.3f} ms   ratio {ms / mine:5.2f}" if mine else "") + f"   (all {time.time() - started:.0f} s)",
          flush=True)
