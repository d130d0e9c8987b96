"""What attention is raced against, on attention_bench's shapes: cuDNN, and FlexAttention with block masks.
usage: attention_peers.py [causal] [sparse] [tiny] [wide]       one line a shape: name, ms, TFLOP/s"""
import sys
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

SECTIONS = sys.argv[1:] or ["causal", "sparse", "tiny", "wide"]


def row(name, run, flops):
    try:
        with torch.no_grad():
            ms = do_bench(run, warmup=50, rep=600, return_mode="median")
        print(f"{name:52s} {ms:10.3f} ms  {flops / ms * 1e-9:7.1f} TFLOP/s", flush=True)
    except Exception as error:
        print(f"{name:52s} failed: {type(error).__name__} {str(error)[:100]}", flush=True)


def take(heads, tokens, dim):
    return torch.randn(1, heads, tokens, dim, device="cuda", dtype=torch.bfloat16)


def causal(heads, kv_heads, dim, tokens):
    q, k, v = take(heads, tokens, dim), take(kv_heads, tokens, dim), take(kv_heads, tokens, dim)

    def run():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    row(f"cuDNN causal T={tokens} H={heads}/{kv_heads} D={dim}", run, 2 * heads * dim * tokens * tokens)


def sparse(tokens=65536, heads=32, kv_heads=8, dim=128):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    flex = torch.compile(flex_attention)
    q, k, v = take(heads, tokens, dim), take(kv_heads, tokens, dim), take(kv_heads, tokens, dim)
    mask = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < 4096), None, None, tokens, tokens, device="cuda",
                             _compile=True)
    row("Flex window 4096 T=65536 H=32/8 D=128", lambda: flex(q, k, v, block_mask=mask, enable_gqa=True),
        4 * heads * dim * tokens * 4096)
    rows = torch.arange(tokens // 128, device="cuda")[:, None]
    for size in (128, 64):
        own = torch.arange(tokens // size, device="cuda") * size // 128  # the query block that a key block lies in
        keep = (torch.rand(tokens // 128, tokens // size, device="cuda") < 0.1) | (own == rows)
        mask = create_block_mask(lambda b, h, i, j: (i >= j) & keep[i // 128, j // size], None, None, tokens, tokens,
                                 device="cuda", BLOCK_SIZE=(128, size), _compile=True)
        row(f"Flex random 10 % of 128 x {size} blocks T=65536", lambda: flex(q, k, v, block_mask=mask, enable_gqa=True),
            4 * heads * dim * (keep & (own <= rows)).sum().item() * 128 * size)


print(torch.cuda.get_device_name(), torch.__version__, "cuDNN", torch.backends.cudnn.version())
a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
row("ceiling: bf16 product 8192^3", lambda: a @ b, 2 * 8192**3)
if "causal" in SECTIONS:
    for n in (16384, 65536, 131072):
        causal(32, 8, 128, n)
if "sparse" in SECTIONS:
    sparse()
if "tiny" in SECTIONS:
    causal(4, 2, 64, 65536)
if "wide" in SECTIONS:
    causal(16, 2, 256, 32768)
