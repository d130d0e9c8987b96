"""PyTorch's times on the shapes of experts_bench.cu, in the same run on the same GPU, and the ratios.
usage: experts_peers.py FILE     FILE: the output of experts_bench"""
import sys
import torch, torch.nn.functional as F
from triton.testing import do_bench

bf = torch.bfloat16
torch.manual_seed(0)


def ms(run):
    return do_bench(run, warmup=10, rep=40, return_mode="median")


def experts(tokens, top_k, n_experts, d, ffn):
    m = tokens * top_k
    x = torch.randn(m, d, device="cuda", dtype=bf)
    w1 = torch.randn(n_experts, d, 2 * ffn, device="cuda", dtype=bf)
    w2 = torch.randn(n_experts, ffn, d, device="cuda", dtype=bf)
    counts = torch.bincount(torch.randint(0, n_experts, (m,), device="cuda"), minlength=n_experts)
    offsets = counts.cumsum(0).int()

    def run():
        h = torch._grouped_mm(x, w1, offs=offsets)
        return torch._grouped_mm((F.silu(h[:, :ffn]) * h[:, ffn:]).contiguous(), w2, offs=offsets)

    h0 = torch.randn(m, ffn, device="cuda", dtype=bf)

    def products():
        torch._grouped_mm(x, w1, offs=offsets)
        torch._grouped_mm(h0, w2, offs=offsets)

    print(f"  grouped_mm twice, without the activation: {ms(products):.4f} ms")
    return ms(run)


def dense(m, n, k, wide):
    a = torch.randn(m, k, device="cuda", dtype=bf)
    w = torch.randn(n, k, device="cuda", dtype=bf)
    if wide:
        y = torch.empty(m, n, device="cuda")
        try:
            return ms(lambda: torch.mm(a, w.t(), out_dtype=torch.float32, out=y))
        except (RuntimeError, TypeError):
            return ms(lambda: F.linear(a, w))
    return ms(lambda: F.linear(a, w))


print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
for line in open(sys.argv[1]):
    if len(line.split()) != 4 or not line[0].isalpha():
        continue
    name, (time, flops, size) = line.split()[0], map(float, line.split()[1:])
    parts = name.removeprefix("mma_").split("_")
    peer = None
    if parts[0] == "experts":
        peer = experts(int(parts[1]), int(parts[2][3:]), int(parts[4]), int(parts[5][1:]), int(parts[6][1:]))
    elif parts[0] == "gemm":
        peer = dense(int(parts[1]), int(parts[2]), int(parts[3]), parts[4] == "f32")
    text = f"{name:44s} {time:9.4f} ms {flops / time / 1e9:7.1f} TFLOP/s {size / time / 1e9:6.3f} TB/s"
    print(text + (f"   torch {peer:9.4f} ms  ratio {peer / time:5.2f}" if peer else ""), flush=True)
    torch.cuda.empty_cache()
