"""Write docs/images/scenes.png: built-in scenes, their classes, and what the bundled teacher makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.drawing.patches import FeatureColours, on_pixels, overlaid
from milan_pipe.drawing.sheet import Panel, Row, Segmentation, Sheet, draw_sheet, segmentation_sheet
from milan_pipe.images.scenes import MASK_CLASSES, SCENE_SIZE, render_scene
from milan_pipe.teacher.clip import load_teacher

SEED, COUNT = 4_242_424, 6


def main() -> None:
    """Render, look, draw."""
    scenes = [render_scene(SEED, index) for index in range(COUNT)]
    teacher = load_teacher(TeacherSettings())
    output = teacher(torch.from_numpy(np.stack([scene.image for scene in scenes])))
    features_NLT = output.features_BST[:, 1:].numpy()
    colours = FeatureColours(features_NLT.reshape(-1, features_NLT.shape[-1]))
    rows = []
    for scene, row_L, features_LT in zip(scenes, output.importance_BL.numpy(), features_NLT, strict=True):
        share_L, grid = row_L / row_L.sum(), teacher.info.grid
        truth = Segmentation("", scene.image, scene.segmentation.astype(np.int64), scene.segmentation.astype(np.int64))
        classes = segmentation_sheet("", [truth], len(MASK_CLASSES)).rows[0].panels[1]
        attention = overlaid(scene.image, (share_L / share_L.max()).reshape(grid))
        painted = on_pixels(colours(features_LT).reshape(*grid, 3), SCENE_SIZE, SCENE_SIZE)
        rows.append(
            Row(
                scene.captions[-1],
                [
                    Panel(scene.image, "scene"),
                    Panel(classes.pixels, "classes"),
                    Panel(attention, f"attention, largest {share_L.max() * len(share_L):.1f} x the mean"),
                    Panel(painted, "features of the patches"),
                ],
            )
        )
    (Path(__file__).parent / "images" / "scenes.png").write_bytes(draw_sheet(Sheet("", rows)))


if __name__ == "__main__":
    main()
