"""The student against its formulas, written out plainly, and against the published reference's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support import plain_milan
from torch.testing import assert_close

from milan_pipe.config.student import DecoderSettings, StudentSettings
from milan_pipe.errors import MismatchError, SettingError
from milan_pipe.student.encoder import encode_visible
from milan_pipe.student.loss import feature_loss
from milan_pipe.student.masking import MaskSplit, draw_split, mask_noise, visible_count
from milan_pipe.student.model import build_student
from milan_pipe.student.published import published_state_dict, student_from_published

SHARED = Path(__file__).parents[2].parent / "shared" / "oracle"
ORACLES = sorted(SHARED.glob("milan_oracle_*.safetensors"))
NO_ORACLE = f"no milan_oracle_*.safetensors under {SHARED}"
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("masking", ["semantic", "random"])
@pytest.mark.parametrize("kind", ["prompting", "plain"])
def test_masks_prediction_loss_and_gradients_are_those_of_the_formulas(kind: str, masking: str) -> None:
    draw = torch.Generator().manual_seed(7)
    student = build_student(
        StudentSettings(image_size=16, patch_size=4, width=16, depth=2, heads=2),
        DecoderSettings(kind=kind, width=12, depth=2, heads=3),
        output_width=6,
    )
    with torch.no_grad():
        # As built, biases are 0 and norms 1, which hides what is forgotten.
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    images_BCHW = torch.randn(3, 3, 16, 16, generator=draw)
    target_BST = 5 * torch.randn(3, 17, 6, generator=draw)
    importance_BL = torch.rand(3, 16, generator=draw) ** 3 if masking == "semantic" else None
    noise_BL = mask_noise(1, 2, ["a", "b", "c"], 16)

    split = draw_split(importance_BL, noise_BL, visible_count(16, 0.75))
    prediction_BST = student(images_BCHW, split)
    loss = feature_loss(prediction_BST, target_BST)
    loss.backward()

    weights = {name: value.detach().double() for name, value in student.named_parameters() if value.requires_grad}
    for value in weights.values():
        value.requires_grad_()
    chances = importance_BL.tolist() if importance_BL is not None else [None] * 3
    visible = [plain_milan.visible_patches(*row, 0.75) for row in zip(chances, noise_BL.tolist(), strict=True)]
    assert split.keep_BV.tolist() == visible
    plain_predictions = [
        plain_milan.decode(weights, plain_milan.encode(weights, image, seen, 4, 2), seen, (4, 4), 3, kind)
        for image, seen in zip(images_BCHW.double(), visible, strict=True)
    ]
    plain_loss = plain_milan.loss(plain_predictions, list(target_BST.double()))
    plain_loss.backward()

    assert_close(prediction_BST.double(), torch.stack(plain_predictions), **TOLERANCE)
    assert_close(loss.double(), plain_loss, **TOLERANCE)
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert weights[name].grad.abs().max() > 0
            assert_close(
                parameter.grad.double(), weights[name].grad, **TOLERANCE, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.fixture(
    params=ORACLES or [pytest.param(None, marks=pytest.mark.skip(reason=NO_ORACLE))],
    ids=lambda path: path.stem if path else "none",
)
def oracle(request):
    with safe_open(request.param, "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def loaded(meta, tensors):
    return student_from_published(
        tensors,
        encoder_heads=int(meta["student_heads"]),
        decoder_heads=int(meta["decoder_heads"]),
        prefix="student/",
    )


def test_forward_loss_and_gradients_agree(oracle):
    meta, tensors = oracle
    student = loaded(meta, tensors)
    visible = tensors["io/latent"].shape[1] - 1
    split = MaskSplit(*tensors["io/ids_shuffle"].tensor_split([visible], dim=1))
    assert_close(split.restore_index(), tensors["io/ids_restore"])
    assert_close(split.masked_map().float(), tensors["io/mask"])

    latent = encode_visible(student.encoder, tensors["io/images"], split)
    prediction = student(tensors["io/images"], split)
    loss = feature_loss(prediction, tensors["io/teacher_features"])
    loss.backward()

    assert_close(latent, tensors["io/latent"], **TOLERANCE)
    assert_close(prediction, tensors["io/prediction"], **TOLERANCE)
    assert_close(loss.reshape(1), tensors["io/loss"], **TOLERANCE)
    found = {name.split(".", 1)[1]: p.grad for name, p in student.named_parameters() if p.requires_grad}
    expected = {key.removeprefix("grad_norm/"): value for key, value in tensors.items() if key.startswith("grad_norm/")}
    assert found.keys() == expected.keys()
    for name, norm in expected.items():
        assert_close(found[name].norm().reshape(1), norm, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def test_order_inside_the_split_does_not_matter(oracle):
    meta, tensors = oracle
    student = loaded(meta, tensors)
    given = MaskSplit(*tensors["io/ids_shuffle"].tensor_split([tensors["io/latent"].shape[1] - 1], dim=1))
    ascending = MaskSplit(given.keep_BV.sort(dim=1).values, given.masked_BM.sort(dim=1).values)
    with torch.no_grad():
        assert_close(student(tensors["io/images"], ascending), tensors["io/prediction"], **TOLERANCE)


def tiny(kind="prompting", **student):
    sizes = {"image_size": 16, "patch_size": 4, "width": 64, "depth": 3, "heads": 1, **student}
    decoder = DecoderSettings(kind=kind, width=24, depth=3, heads=3)
    return build_student(StudentSettings(**sizes), decoder, output_width=10)


@pytest.mark.parametrize("kind", ["prompting", "plain"])
def test_round_trip_through_the_published_names(kind):
    student = tiny(kind)
    state = {f"module.{key}": value for key, value in published_state_dict(student).items()}
    state["other.weight"] = torch.zeros(1)
    again = student_from_published(state, decoder_heads=3, prefix="module.")
    assert type(again.decoder) is type(student.decoder)
    images, split = torch.randn(2, 3, 16, 16), MaskSplit(*torch.arange(16).expand(2, 16).tensor_split([4], dim=1))
    assert_close(again(images, split), student(images, split), rtol=0, atol=0)
    assert not again.encoder.pos_embed.requires_grad
    assert not again.decoder.decoder_pos_embed.requires_grad


def test_odd_sizes_are_read_from_the_tensors():
    from timm.models.vision_transformer import VisionTransformer

    from milan_pipe.student.decoder import PromptingDecoder
    from milan_pipe.student.model import MaskedStudent

    encoder = VisionTransformer(
        img_size=(6, 20),
        patch_size=(2, 5),
        in_chans=4,
        num_classes=0,
        embed_dim=20,
        depth=1,
        num_heads=5,
        mlp_ratio=1.7,
    )
    decoder = PromptingDecoder(encoder_width=20, width=12, depth=2, heads=2, grid=(3, 4), output_width=7, mlp_width=11)
    student = MaskedStudent(encoder, decoder)
    state = published_state_dict(student)
    with pytest.raises(MismatchError, match="12 patches"):
        student_from_published(state, encoder_heads=5, decoder_heads=2)
    with pytest.raises(MismatchError, match="image_size 20 x 6"):
        student_from_published(state, encoder_heads=5, decoder_heads=2, image_size=(20, 6))
    again = student_from_published(state, encoder_heads=5, decoder_heads=2, image_size=(6, 20))
    images, split = torch.randn(2, 4, 6, 20), MaskSplit(*torch.arange(12).expand(2, 12).tensor_split([3], dim=1))
    assert_close(again(images, split), student(images, split))
    assert again(images, split).shape == (2, 13, 7)


def test_faults_are_named():
    state = published_state_dict(tiny())
    missing = {key: value for key, value in state.items() if key != "blocks.1.norm1.weight"}
    with pytest.raises(MismatchError, match=r"lacks blocks\.1\.norm1\.weight"):
        student_from_published(missing, decoder_heads=3)
    with pytest.raises(MismatchError, match=r"also has head\.weight"):
        student_from_published({**state, "head.weight": torch.zeros(1)}, decoder_heads=3)
    with pytest.raises(MismatchError, match=r"decoder_pos_embed is \(1, 5, 24\), expected \(1, 17, 24\)"):
        student_from_published({**state, "decoder_pos_embed": torch.zeros(1, 5, 24)}, decoder_heads=3)
    with pytest.raises(MismatchError, match=r"'patch_embed\.proj\.weight' is missing.*prefix"):
        student_from_published({f"module.{key}": value for key, value in state.items()}, decoder_heads=3)
    with pytest.raises(MismatchError, match="expected 3 dimensions"):
        student_from_published({**state, "pos_embed": torch.zeros(17, 64)}, decoder_heads=3)
    with pytest.raises(MismatchError, match=r"no key decoder_blocks\.0"):
        student_from_published({k: v for k, v in state.items() if "decoder_blocks" not in k}, decoder_heads=3)


def test_heads_that_cannot_be_told_or_do_not_fit():
    state = published_state_dict(tiny())
    with pytest.raises(SettingError, match="give decoder_heads"):
        student_from_published(state)
    with pytest.raises(SettingError, match="encoder_heads 5"):
        student_from_published(state, encoder_heads=5, decoder_heads=3)
    with pytest.raises(SettingError, match="no multiple of heads 5"):
        student_from_published(state, decoder_heads=5)
    narrow = published_state_dict(tiny(width=32))
    with pytest.raises(SettingError, match="give encoder_heads"):
        student_from_published(narrow, decoder_heads=3)
