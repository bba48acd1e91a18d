"""Attention by torch's fused kernel and by products with a softmax, forward and backward, side by side.

    python -m benchmarks.attention [--device cpu] [--rounds 5]

Milliseconds of one call with its gradients, the best of some rounds, the two ways taken in turns.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.nn import functional as F

from milan_pipe.attention import attend_by_products, fused_is_faster

SHAPES = {
    "small encoder, 17 x 17": (128, 4, 17, 17, 32),
    "small decoder, 48 x 65": (128, 4, 48, 65, 16),
    "ViT-B encoder, 50 x 50": (16, 12, 50, 50, 64),
    "ViT-B decoder, 147 x 197": (16, 16, 147, 197, 32),
}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = torch.device(options.device)
    print("| | type | fused, ms | products, ms | taken |\n|---|---|---|---|---|")
    for title, (batch, heads, queries, keys, width) in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            inputs = [
                torch.randn(batch, heads, tokens, width, device=device, dtype=dtype, requires_grad=True)
                for tokens in (queries, keys, keys)
            ]
            best = {F.scaled_dot_product_attention: float("inf"), attend_by_products: float("inf")}
            for _ in range(options.rounds + 1):
                for way in best:
                    began = time.perf_counter()
                    way(*inputs).sum().backward()
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                    best[way] = min(best[way], time.perf_counter() - began)
            fused, plain = (f"{1000 * seconds:.1f}" for seconds in best.values())
            taken = "fused" if fused_is_faster(device, dtype) else "products"
            print(f"| {title} | {str(dtype).removeprefix('torch.')} | {fused} | {plain} | {taken} |", flush=True)


if __name__ == "__main__":
    main()
