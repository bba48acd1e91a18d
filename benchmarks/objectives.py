"""What a step of each objective costs, relative to MILAN's: counted, and measured.

    python -m benchmarks.objectives [--batch 16] [--rounds 5] [--device cpu] [--precision auto]

ViT-B/16 at 224 pixels with features 512 wide. Target, masks and kind of decoder are the recipe's; the decoder has the
published 512 / 8 / 16. Operations are those of forward and backward of one image. Steps, AdamW included, take turns
with MILAN's on one drawn batch; the median counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.pretraining import BASE, DECODER, in_turns, step_of
from benchmarks.reading import _header
from milan_pipe.config.params import Params, load_params
from milan_pipe.devices import resolve_device
from milan_pipe.loader.stream import Batch
from milan_pipe.planning.speed import student_flops
from milan_pipe.pretraining.objective import build_objective

MILAN, OTHERS = "scenes", ("mae", "maskfeat", "unmasked-teacher", "mr-mae", "maskdistill", "dense")


def _batch(size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    attention_BL = torch.rand(size, 196, generator=generator)
    return Batch(
        keys=tuple(map(str, range(size))),
        pixels_BHWC=torch.randint(0, 256, (size, 224, 224, 3), generator=generator, dtype=torch.uint8),
        code_BST=torch.randint(-127, 128, (size, 197, 512), generator=generator, dtype=torch.int8),
        scale_BS=torch.rand(size, 197, generator=generator).half(),
        attention_BL=(attention_BL / attention_BL.sum(dim=1, keepdim=True)).half(),
    )


def with_objective_of(recipe: str, params: Params) -> Params:
    """Settings with the target, the masks and the kind of decoder of a recipe."""
    of = load_params(recipe)
    decoder = params.decoder.model_copy(update={"kind": of.decoder.kind})
    return params.model_copy(update={"decoder": decoder, "masking": of.masking, "target": of.target})


def params_of(recipe: str) -> Params:
    return with_objective_of(recipe, Params(student=BASE, decoder=DECODER))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    arguments = parser.parse_args()
    device, header, batch = resolve_device(arguments.device), _header("zarr", 0, 1), _batch(arguments.batch)

    def step(recipe: str) -> Callable[[], object]:
        return partial(step_of(build_objective(header, params_of(recipe), device), device, arguments.precision), batch)

    milan, counted = step(MILAN), student_flops(params_of(MILAN), [header], batch)
    print(
        "| recipe | GFLOP an image | ÷ MILAN | images/s | MILAN, images/s | time ÷ MILAN |\n|---|---|---|---|---|---|"
    )
    print(f"| `{MILAN}` | {counted / 1e9:.1f} | 1.00 | | | 1.00 |")
    for recipe in OTHERS:
        flops = student_flops(params_of(recipe), [header], batch)
        taken = in_turns({"milan": milan, "other": step(recipe)}, arguments.rounds)
        rate = {name: arguments.batch / seconds for name, seconds in taken.items()}
        print(
            f"| `{recipe}` | {flops / 1e9:.1f} | {flops / counted:.2f} | {rate['other']:.1f} | {rate['milan']:.1f} | "
            f"{taken['other'] / taken['milan']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
