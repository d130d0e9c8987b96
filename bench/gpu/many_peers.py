"""What several GPUs are raced against: torch's all-to-all on links_bench's sizes, its context-parallel ring attention, and
flash-linear-attention's context-parallel gated delta rule. Medians of the slowest GPU, forward only, bf16.
usage: torchrun --nproc-per-node N many_peers.py [all-to-all] [ring] [delta]     default: all
needs PyTorch; delta needs Triton and fla, whose first run compiles for minutes (keep TRITON_CACHE_DIR)"""
import os
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F

PARTS = sys.argv[1:] or ["all-to-all", "ring", "delta"]
RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.cuda.set_device(RANK)
dist.init_process_group("nccl", device_id=torch.device("cuda", RANK))


def say(text):
    if RANK == 0:
        print(text, flush=True)


def seconds(run, n_repeats=15, in_row=8):
    """Of one of `in_row`, as links_bench counts them."""
    for _ in range(3):
        run()
    times = []
    for _ in range(n_repeats):
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(in_row):
            run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / in_row)
    slowest = torch.tensor([sorted(times)[n_repeats // 2]], device="cuda", dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def attempt(name, make):
    try:
        with torch.no_grad():
            say(f"{name:58s} {make()}")
    except Exception as error:
        say(f"{name:58s} failed: {type(error).__name__} {str(error)[:160]}")


def all_to_all(size, to_one):
    """`size` bytes from each to each other, or to GPU 0 alone; nothing stays at home."""
    sends = [0 if r == RANK or (to_one and r > 0) else size for r in range(SIZE)]
    receives = [0 if r == RANK or (to_one and RANK > 0) else size for r in range(SIZE)]
    data = torch.zeros(max(sum(sends), 1), dtype=torch.uint8, device="cuda")[: sum(sends)]
    received = torch.zeros(max(sum(receives), 1), dtype=torch.uint8, device="cuda")[: sum(receives)]
    spent = seconds(lambda: dist.all_to_all_single(received, data, receives, sends), in_row=32 if size <= 64 else 8)
    moved = size * (SIZE - 1)
    return f"{size:11d} {spent * 1e6:10.1f} us {moved / spent * 1e-9:8.2f} GB/s"


def ring(heads, dim, tokens):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    mesh = init_device_mesh("cuda", (SIZE,), mesh_dim_names=("cp",))
    flops = 2 * heads * dim * tokens * tokens

    def whole():
        torch.manual_seed(0)
        return [torch.randn(1, heads, tokens, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)]

    def attend(q, k, v):
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    alone = seconds(lambda q=whole(): attend(*q), n_repeats=5, in_row=1)
    q = whole()
    with context_parallel(mesh, buffers=q, buffer_seq_dims=[2, 2, 2]):
        spent = seconds(lambda: attend(*q), n_repeats=5, in_row=1)
    return (f"{spent * 1e3:8.2f} ms {flops / spent / SIZE * 1e-12:6.1f} TFLOP/s a GPU; one GPU {alone * 1e3:8.2f} ms: "
            f"{alone / spent:.2f}x, {alone / spent / SIZE:.3f}")


def delta(heads, dim, tokens):
    from fla.ops.cp import build_cp_context
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def inputs(n):
        shape = (1, n, heads, dim)
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        g, beta = -0.1 * torch.rand(shape[:3], device="cuda"), torch.rand(shape[:3], device="cuda").to(torch.bfloat16)
        return dict(q=F.normalize(q, dim=-1), k=F.normalize(k, dim=-1), v=v, g=g, beta=beta)

    one = inputs(tokens)
    alone = seconds(lambda: chunk_gated_delta_rule(**one), n_repeats=7, in_row=1)
    del one
    part = inputs(tokens // SIZE)
    context = build_cp_context(torch.tensor([0, tokens], device="cuda", dtype=torch.int32), dist.group.WORLD)
    spent = seconds(lambda: chunk_gated_delta_rule(**part, cp_context=context), n_repeats=7, in_row=1)
    return f"{spent * 1e3:8.2f} ms; one GPU {alone * 1e3:8.2f} ms: {alone / spent:.2f}x, {alone / spent / SIZE:.3f}"


say(f"{SIZE} of {torch.cuda.get_device_name()}, torch {torch.__version__}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
if "all-to-all" in PARTS:
    for n_bytes in (64, 4096, 65536, 1 << 20, 16 << 20, 256 << 20):
        attempt("torch all_to_all_single", lambda: all_to_all(n_bytes, False))
    for n_bytes in (1 << 20, 256 << 20):
        attempt("torch all_to_all_single to one", lambda: all_to_all(n_bytes, True))
if "ring" in PARTS:
    for heads, dim, tokens in ((8, 64, 131072), (32, 128, 131072)):
        attempt(f"torch ring attention, causal, H={heads} D={dim} T={tokens}", lambda: ring(heads, dim, tokens))
if "delta" in PARTS:
    for heads, dim, tokens in ((16, 128, 131072), (4, 64, 1048576)):
        attempt(f"fla context-parallel delta rule, H={heads} D={dim} T={tokens}", lambda: delta(heads, dim, tokens))
dist.destroy_process_group()
