"""InfoNCE against a bank on a GPU: loss and query gradient, beside the peers, the floor and float64.

Each implementation's gradient is held to a float64 one of some rows before its time is shown. Times are medians by CUDA
events with the L2 cache flushed in between; memory is what a step allocates beyond its inputs. Writes similarity.csv, .json and .md.
"""

import argparse
import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_measure import about, attempt, median_ms, peak_mib, write

import kdfast.functional as kd

TEMPERATURE = 0.07
SHAPES = "256,65536,128 4096,65536,128 8192,65536,256 4096,65536,64 4096,65536,1024 32768,1048576,128"
CHECKED_ROWS = 64


def kdfast_loss(q, k, bank):
    return kd.info_nce(q, k, bank, temperature=TEMPERATURE)


def kdfast_portable(q, k, bank):
    return kd.info_nce(q, k, bank, temperature=TEMPERATURE, impl="torch")


def eager(q, k, bank):
    logits = torch.cat([(q * k).sum(-1, keepdim=True), q @ bank.T], 1).float() / TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def attention(q, k, bank):
    """SDPA with K = V, forward and backward: the same products and exponentials, though not the loss."""
    rows, keys = q[None, None], bank[None, None]
    return F.scaled_dot_product_attention(rows, keys, keys, scale=1 / TEMPERATURE).float().mean()


def implementations(peers: str) -> dict:
    ours = {"kdfast": kdfast_loss}
    if peers == "none":
        return ours
    return {**ours, "kdfast, torch": kdfast_portable, "eager": eager, "torch.compile": torch.compile(eager), "SDPA, K = V": attention}


def exact_gradient(q, k, bank):
    """The query gradient of the first rows in float64, [CHECKED_ROWS, D], a row at a time so that it fits."""
    rows = []
    for i in range(min(CHECKED_ROWS, len(q))):
        x = q[i : i + 1].detach().double().requires_grad_()
        candidates = torch.cat([k[i : i + 1].double(), bank.double()])
        (g,) = torch.autograd.grad(F.cross_entropy(x @ candidates.T / TEMPERATURE, torch.zeros(1, dtype=torch.long, device=q.device)), x)
        rows.append(g / len(q))
    return torch.cat(rows)


def measure(name, loss, tensors, truth, repeats, device) -> dict:
    q, k, bank = tensors

    def step():
        return torch.autograd.grad(loss(q, k, bank), q)[0]

    gradient = step()
    error = None
    if name != "SDPA, K = V":
        error = ((gradient[: len(truth)].double() - truth).norm() / truth.norm()).item()
        if not error < 0.02:  # bf16 formulas land near 0.005
            return {"problem": f"wrong gradient: relative error {error:.2g}"}
    return {"MiB": peak_mib(step, device), "ms": median_ms(step, repeats, device), "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="N,M,D separated by spaces")
    parser.add_argument("--dtypes", default="bfloat16 float32")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--peers", choices=("all", "none"), default="all")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()

    results = []
    for shape in args.shapes.split():
        n, m, d = map(int, shape.split(","))
        for dtype in (getattr(torch, name) for name in args.dtypes.split()):
            torch.manual_seed(0)
            q, k, bank = (F.normalize(torch.randn(rows, d, device=args.device), dim=-1).to(dtype) for rows in (n, n, m))
            q.requires_grad_()
            truth = exact_gradient(q, k, bank)
            for name, loss in implementations(args.peers).items():
                found = attempt(functools.partial(measure, name, loss, (q, k, bank), truth, args.repeats, args.device))
                row = {"N": n, "M": m, "D": d, "dtype": str(dtype)[6:], "name": name, **found}
                if "ms" in found:
                    row["TFLOP/s on 4NMD"] = 4 * n * m * d / found["ms"] / 1e9
                results.append(row)
                print(row, flush=True)
                if args.device == "cuda":
                    torch.cuda.empty_cache()
    if args.output:
        columns = ["N", "M", "D", "dtype", "name", "ms", "TFLOP/s on 4NMD", "MiB", "error", "problem"]
        write(args.output, "similarity", columns, about(args.device, args.commit), results)


if __name__ == "__main__":
    main()
