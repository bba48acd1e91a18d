"""MILAN's student as its formulas say it, one image and one token at a time, in float64 and without milan_pipe.

Weights go by the names of a student's state dict. Sources: arXiv 2208.06049, sections 3.1 to 3.3, and `docs/method.md`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def visible_patches(importance: list[float] | None, noise: list[float], ratio: float) -> list[int]:
    """The V = floor(L (1 - ratio)) patches of largest log(importance) + Gumbel noise."""
    patches = len(noise)
    scores = [noise[i] + (math.log(importance[i]) if importance else 0.0) for i in range(patches)]
    ranked = sorted(range(patches), key=lambda i: scores[i], reverse=True)
    return sorted(ranked[: math.floor(patches * (1 - ratio))])


def positions(width: int, rows: int, columns: int) -> list[Tensor]:
    """Of CLS, then of each patch: sines and cosines of the column, then of the row."""
    found = [torch.zeros(width, dtype=torch.float64)]
    for row in range(rows):
        for column in range(columns):
            values = []
            for place in (column, row):
                angles = [place / 10000 ** (i / (width // 4)) for i in range(width // 4)]
                values += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            found.append(torch.tensor(values, dtype=torch.float64))
    return found


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return weights[f"{name}.weight"].flatten(1) @ x + weights[f"{name}.bias"]


def norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean()
    scaled = centred / torch.sqrt((centred**2).mean() + 1e-6)
    return weights[f"{name}.weight"] * scaled + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def mlp(weights: Weights, name: str, x: Tensor) -> Tensor:
    return linear(weights, f"{name}.fc2", gelu(linear(weights, f"{name}.fc1", x)))


def attend(query: Tensor, keys: list[Tensor], values: list[Tensor], heads: int) -> Tensor:
    """One query's mixture of the values, head by head."""
    size = len(query) // heads
    mixed = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        logits = torch.stack([query[part] @ key[part] for key in keys]) / math.sqrt(size)
        shares = torch.exp(logits - logits.max())
        shares = shares / shares.sum()
        mixed.append(sum(share * value[part] for share, value in zip(shares, values, strict=True)))
    return torch.cat(mixed)


def vit_block(weights: Weights, name: str, tokens: list[Tensor], heads: int) -> list[Tensor]:
    """The plain block: every token asks every token."""
    normed = [linear(weights, f"{name}.attn.qkv", norm(weights, f"{name}.norm1", x)).chunk(3) for x in tokens]
    keys, values = [k for _, k, _ in normed], [v for _, _, v in normed]
    mixed = [linear(weights, f"{name}.attn.proj", attend(q, keys, values, heads)) for q, _, _ in normed]
    tokens = [x + more for x, more in zip(tokens, mixed, strict=True)]
    return [x + mlp(weights, f"{name}.mlp", norm(weights, f"{name}.norm2", x)) for x in tokens]


def prompt_block(weights: Weights, name: str, prompt: list[Tensor], masked: list[Tensor], heads: int) -> list[Tensor]:
    """The prompting block: masked tokens alone are normalised, ask and change."""
    normed = [norm(weights, f"{name}.norm1", x) for x in masked]
    pairs = [linear(weights, f"{name}.attn.kv", x).chunk(2) for x in [*prompt, *normed]]
    keys, values = [k for k, _ in pairs], [v for _, v in pairs]
    asked = [linear(weights, f"{name}.attn.q", x) for x in normed]
    mixed = [linear(weights, f"{name}.attn.proj", attend(q, keys, values, heads)) for q in asked]
    masked = [x + more for x, more in zip(masked, mixed, strict=True)]
    return [x + mlp(weights, f"{name}.mlp", norm(weights, f"{name}.norm2", x)) for x in masked]


def depth(weights: Weights, blocks: str) -> int:
    return len({name.split(".")[2] for name in weights if name.startswith(f"{blocks}.")})


def encode(weights: Weights, image_CHW: Tensor, visible: list[int], patch: int, heads: int) -> list[Tensor]:
    """CLS and the visible patches through the encoder."""
    rows, columns = (size // patch for size in image_CHW.shape[1:])
    place = positions(weights["encoder.cls_token"].numel(), rows, columns)
    tokens = [weights["encoder.cls_token"].flatten() + place[0]]
    for index in visible:
        top, left = index // columns * patch, index % columns * patch
        pixels = image_CHW[:, top : top + patch, left : left + patch].flatten()
        tokens.append(linear(weights, "encoder.patch_embed.proj", pixels) + place[index + 1])
    for number in range(depth(weights, "encoder.blocks")):
        tokens = vit_block(weights, f"encoder.blocks.{number}", tokens, heads)
    return [norm(weights, "encoder.norm", x) for x in tokens]


def decode(
    weights: Weights, latent: list[Tensor], visible: list[int], grid: tuple[int, int], heads: int, kind: str
) -> Tensor:
    """(S, T), CLS first, patches in raster order."""
    mask_token = weights["decoder.mask_token"].flatten()
    place = positions(len(mask_token), *grid)
    masked = [index for index in range(grid[0] * grid[1]) if index not in visible]
    embedded = [linear(weights, "decoder.decoder_embed", x) for x in latent]
    prompt = [x + place[at] for x, at in zip(embedded, [0, *(i + 1 for i in visible)], strict=True)]
    queries = [mask_token + place[index + 1] for index in masked]
    for number in range(depth(weights, "decoder.decoder_blocks")):
        name = f"decoder.decoder_blocks.{number}"
        if kind == "prompting":
            queries = prompt_block(weights, name, prompt, queries, heads)
        else:
            tokens = vit_block(weights, name, [*prompt, *queries], heads)
            prompt, queries = tokens[: len(prompt)], tokens[len(prompt) :]
    of_patch = dict(zip([*visible, *masked], [*prompt[1:], *queries], strict=True))
    tokens = [prompt[0], *(of_patch[index] for index in sorted(of_patch))]
    return torch.stack(
        [linear(weights, "decoder.decoder_pred", norm(weights, "decoder.decoder_norm", x)) for x in tokens]
    )


def loss(predictions: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Mean over all tokens of the squared distance of two unit vectors: 2 - 2 cos."""
    terms = [
        ((p / torch.sqrt(p @ p) - t / torch.sqrt(t @ t)) ** 2).sum()
        for prediction, target in zip(predictions, targets, strict=True)
        for p, t in zip(prediction, target, strict=True)
    ]
    return sum(terms[1:], terms[0]) / len(terms)
