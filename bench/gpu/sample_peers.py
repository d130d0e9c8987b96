"""PyTorch's times for the lines of sample_bench.cu.
usage: sample_peers.py [FILE]     FILE: the output of sample_bench in the same run on the same GPU; adds ours and the ratios"""
import sys
import torch
from triton.testing import do_bench

VOCAB = 151936
torch.manual_seed(0)


def draw(logits, temperature, top_k, top_p):
    if temperature == 0.0:
        return logits.argmax(-1)
    if top_k == 0 and top_p >= 1.0:
        return torch.multinomial(torch.softmax(logits / temperature, -1), 1)
    if top_k > 0:
        logits, ids = logits.topk(top_k)
    else:
        logits, ids = logits.sort(-1, descending=True)
    p = torch.softmax(logits / temperature, -1)
    if top_p < 1.0:
        p = torch.where(p.cumsum(-1) - p < top_p, p, 0.0)
    return ids.gather(-1, torch.multinomial(p, 1))


WAYS = {
    "greedy": (0.0, 0, 1.0),
    "all": (1.0, 0, 1.0),
    "top_k_50": (1.0, 50, 1.0),
    "top_p_0.9": (1.0, 0, 0.9),
    "both": (0.7, 20, 0.8),
    "hot_top_p_0.9": (10.0, 0, 0.9),
    "all_alike": (1e6, 50000, 0.9),
}

print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
lines = open(sys.argv[1]).readlines() if len(sys.argv) > 1 else []
ours = {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("sample_")}
for rows in (1, 32, 64):
    logits = torch.randn(rows, VOCAB, device="cuda") * 3
    for way, arguments in WAYS.items():
        name = f"sample_{rows}_{way}"
        peer = do_bench(lambda: draw(logits, *arguments), warmup=10, rep=40, return_mode="median")
        text = f"{name:28s} torch {peer * 1e3:8.1f} us"
        print(text + (f"   ours {ours[name] * 1e3:8.1f} us   ratio {peer / ours[name]:6.2f}" if name in ours else ""), flush=True)
