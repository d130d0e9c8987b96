"""What attention is raced against, on attention_bench's shapes: cuDNN, and FlexAttention with block masks.
usage: attention_peers.py [FILE] [causal] [sparse] [tiny] [wide]
FILE: the output of attention_bench in the same run on the same GPU; adds ours and the ratios"""
import re
import sys
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

NAMES = ["causal", "sparse", "tiny", "wide"]
FILES = [argument for argument in sys.argv[1:] if argument not in NAMES]
SECTIONS = [argument for argument in sys.argv[1:] if argument in NAMES] or NAMES
OURS = {m[1]: float(m[2]) for f in FILES for line in open(f) if (m := re.match(r"(\S.*?)\s+([\d.]+) ms", line))}


def row(peer, name, run, flops):
    try:
        with torch.no_grad():
            ms = do_bench(run, warmup=50, rep=600, return_mode="median")
        text = f"{peer:6s} {name:52s} {ms:10.3f} ms  {flops / ms * 1e-9:7.1f} TFLOP/s"
        print(text + (f"   ours {OURS[name]:10.3f} ms   ratio {ms / OURS[name]:5.2f}" if name in OURS else ""), flush=True)
    except Exception as error:
        print(f"{peer:6s} {name:52s} failed: {type(error).__name__} {str(error)[:100]}", flush=True)


def take(heads, tokens, dim):
    return torch.randn(1, heads, tokens, dim, device="cuda", dtype=torch.bfloat16)


def causal(heads, kv_heads, dim, tokens):
    q, k, v = take(heads, tokens, dim), take(kv_heads, tokens, dim), take(kv_heads, tokens, dim)

    def run():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    row("cuDNN", f"causal T={tokens} H={heads}/{kv_heads} D={dim}", run, 2 * heads * dim * tokens * tokens)


def listed(blocks):
    """[n_query_blocks, n_key_blocks] of booleans as BlockMask wants them: how many a row, and which first."""
    order = torch.argsort(blocks.int(), dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


def sparse(tokens=65536, heads=32, kv_heads=8, dim=128, window=4096):
    """The masks are written down as lists of blocks: those that are seen whole, and those whose keys are looked at."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    q, k, v = take(heads, tokens, dim), take(kv_heads, tokens, dim), take(kv_heads, tokens, dim)

    def race(name, part, whole, size, sees, flops):
        mask = BlockMask.from_kv_blocks(*listed(part), *listed(whole), BLOCK_SIZE=(128, size), mask_mod=sees)
        flex = torch.compile(flex_attention)
        row("Flex", name, lambda: flex(q, k, v, block_mask=mask, enable_gqa=True), flops)

    rows = torch.arange(tokens // 128, device="cuda")[:, None]
    behind = rows - torch.arange(tokens // 128, device="cuda")
    race(f"window {window} T={tokens} H={heads}/{kv_heads} D={dim}", (behind == 0) | (behind == window // 128),
         (behind > 0) & (behind < window // 128), 128, lambda b, h, i, j: (i >= j) & (i - j < window),
         4 * heads * dim * tokens * window)
    for size in (128, 64):
        own = torch.arange(tokens // size, device="cuda") * size // 128  # the query block that a key block lies in
        kept = (torch.rand(tokens // 128, tokens // size, device="cuda") < 0.1) & (own < rows)
        race(f"random 10 % of 128 x {size} blocks T={tokens} H={heads}/{kv_heads} D={dim}", own == rows, kept, size,
             lambda b, h, i, j: i >= j, 4 * heads * dim * (kept | (own == rows)).sum().item() * 128 * size)


print(torch.cuda.get_device_name(), torch.__version__, "cuDNN", torch.backends.cudnn.version())
a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
row("cuBLAS", "ceiling: bf16 product 8192^3", lambda: a @ b, 2 * 8192**3)
if "causal" in SECTIONS:
    for n in (16384, 65536, 131072):
        causal(32, 8, 128, n)
if "sparse" in SECTIONS:
    sparse()
if "tiny" in SECTIONS:
    causal(4, 2, 64, 65536)
if "wide" in SECTIONS:
    causal(16, 2, 256, 32768)
