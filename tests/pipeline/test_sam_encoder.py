"""The image encoder equals SAM's official one: windows that need padding, global attention, interpolated tables."""

import functools

import pytest
import torch
from segment_anything.modeling.image_encoder import ImageEncoderViT

from regionspot.pipeline.backbones import sam_image_encoder as sam_encoder
from regionspot.pipeline.backbones.sam_image_encoder import SamEncoder


def drawn(window_size, pixels=160):
    """A small official encoder of 10 x 10 places, whose second block attends globally, with random weights."""
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


def error(found, expected):
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("window_size", [4, 5, 7, 0])  # 10 places: 2 of padding, none, 4, no windows at all
def test_embeddings_equal_the_official_encoders(window_size):
    encoder = drawn(window_size)
    assert error(SamEncoder(encoder, "float32")(images()), encoder(images())) < 1e-5


def test_they_do_not_depend_on_how_many_queries_attend_at_a_time(monkeypatch):
    encoder = drawn(4)
    monkeypatch.setattr(sam_encoder, "_QUERIES", 30)  # 3 rows of the grid's 10: the last run is shorter
    monkeypatch.setattr(sam_encoder, "_MLP_ROWS", 33)
    assert error(SamEncoder(encoder, "float32")(images()), encoder(images())) < 1e-5


def test_the_kernel_of_a_gpu_gives_the_same_on_a_cpu():
    block = SamEncoder(drawn(0), "float32")._blocks[1]
    queries, keys, values = torch.randn(3, 2, 2, 100, 16, generator=torch.Generator().manual_seed(2))
    one_kernel = block._attend(queries, keys, values)
    assert error(block._attend_by_rows(queries, keys, values), one_kernel) < 1e-5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flexible_attention_gives_the_same():
    encoder = drawn(4)
    assert error(SamEncoder(encoder, "float32", flex=True)(images()), encoder(images())) < 1e-5


def test_tables_of_another_grid_are_interpolated_as_the_official_encoder_does():
    encoder = drawn(4)
    for block in encoder.blocks:
        attention = block.attn
        attention.rel_pos_h, attention.rel_pos_w = (
            torch.nn.Parameter(torch.randn(13, 16, generator=torch.Generator().manual_seed(3)), requires_grad=False)
            for _ in range(2)
        )
    assert error(SamEncoder(encoder, "float32")(images()), encoder(images())) < 1e-5


def test_bfloat16_rounds_the_products_and_nothing_else():
    encoder = drawn(4)
    found, exact = SamEncoder(encoder, "bfloat16")(images()), encoder(images())
    assert 1e-4 < error(found, exact) < 0.05


def test_images_do_not_see_each_other():
    encoder = SamEncoder(drawn(4), "float32")
    together = encoder(images())
    assert error(torch.cat([encoder(image[None]) for image in images()]), together) < 1e-6


def test_it_compiles_as_one_graph_that_computes_the_same(monkeypatch):
    # The tracing is what may fail; turning the graph into machine code takes a minute and a C++ compiler.
    traced = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", traced)
    encoder = drawn(4)
    assert error(SamEncoder(encoder, "float32", compile=True)(images()), encoder(images())) < 1e-5
