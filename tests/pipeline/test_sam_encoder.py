"""The image encoder equals SAM's official one: padded windows, global attention, interpolated tables."""

import functools

import pytest
import torch
from segment_anything.modeling.image_encoder import ImageEncoderViT

from regionspot.pipeline.backbones import sam_image_encoder
from regionspot.pipeline.backbones.sam_image_encoder import SamEncoder


def random_encoder(window_size, pixels=160):
    """A small official encoder with 10 x 10 positions, global attention in its second block, and random weights."""
    encoder = ImageEncoderViT(
        img_size=pixels,
        embed_dim=32,
        depth=3,
        num_heads=2,
        out_chans=16,
        use_rel_pos=True,
        window_size=window_size,
        global_attn_indexes=(1,),
    )
    random = torch.Generator().manual_seed(0)
    for name, weight in encoder.state_dict().items():
        noise = torch.randn(weight.shape, generator=random)
        weight.copy_(1 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise)
    return encoder.eval().requires_grad_(False)


def images(count=2, pixels=160):
    return torch.randn(count, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))


def error(actual, expected):
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("window_size", [4, 5, 7, 0])  # padding of 2, 0 and 4; no windows
def test_embeddings_equal_the_official_encoder(window_size):
    encoder = random_encoder(window_size)
    assert error(SamEncoder(encoder, "float32")(images()), encoder(images())) < 1e-5


def test_embeddings_do_not_depend_on_the_number_of_queries_at_a_time(monkeypatch):
    encoder = random_encoder(4)
    monkeypatch.setattr(sam_image_encoder, "_QUERIES", 30)  # 3 of 10 rows: the last chunk is shorter
    monkeypatch.setattr(sam_image_encoder, "_MLP_ROWS", 33)
    assert error(SamEncoder(encoder, "float32")(images()), encoder(images())) < 1e-5


def test_the_gpu_kernel_equals_the_cpu_kernel():
    block = SamEncoder(random_encoder(0), "float32")._blocks[1]
    queries, keys, values = torch.randn(3, 2, 2, 100, 16, generator=torch.Generator().manual_seed(2))
    one_kernel = block._attend(queries, keys, values)
    assert error(block._attend_by_rows(queries, keys, values), one_kernel) < 1e-5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_equals_the_official_encoder():
    encoder = random_encoder(4)
    assert error(SamEncoder(encoder, "float32", flex=True)(images()), encoder(images())) < 1e-5


def test_tables_of_another_grid_are_interpolated_as_in_the_official_encoder():
    encoder = random_encoder(4)
    for block in encoder.blocks:
        attention = block.attn
        attention.rel_pos_h, attention.rel_pos_w = (
            torch.nn.Parameter(torch.randn(13, 16, generator=torch.Generator().manual_seed(3)), requires_grad=False)
            for _ in range(2)
        )
    assert error(SamEncoder(encoder, "float32")(images()), encoder(images())) < 1e-5


def test_bfloat16_rounds_the_products_only():
    encoder = random_encoder(4)
    rounded, exact = SamEncoder(encoder, "bfloat16")(images()), encoder(images())
    assert 1e-4 < error(rounded, exact) < 0.05


def test_images_do_not_influence_each_other():
    encoder = SamEncoder(random_encoder(4), "float32")
    together = encoder(images())
    assert error(torch.cat([encoder(image[None]) for image in images()]), together) < 1e-6


def test_it_compiles_as_one_graph(monkeypatch):
    # Only traced: generating machine code takes a minute and a C++ compiler.
    traced = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", traced)
    encoder = random_encoder(4)
    assert error(SamEncoder(encoder, "float32", compile=True)(images()), encoder(images())) < 1e-5
