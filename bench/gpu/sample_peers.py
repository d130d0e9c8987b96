"""PyTorch's times for the lines of sample_bench.cu, in the same run on the same GPU, and the ratios.
usage: sample_peers.py FILE     FILE: the output of sample_bench"""
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
for line in open(sys.argv[1]):
    if not line.startswith("sample_"):
        continue
    name, time, size = line.split()
    time = float(time)
    _, rows, way = name.split("_", 2)
    logits = torch.randn(int(rows), VOCAB, device="cuda") * 3
    peer = do_bench(lambda: draw(logits, *WAYS[way]), warmup=10, rep=40, return_mode="median")
    print(f"{name:28s} {time * 1e3:8.1f} us   torch {peer * 1e3:8.1f} us   ratio {peer / time:6.2f}", flush=True)
