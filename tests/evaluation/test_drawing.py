import numpy as np
import pytest
from PIL import Image, ImageDraw

from regionspot.evaluation.report import drawing
from regionspot.evaluation.report.drawing import LabelledRegion, colours_of, draw_regions
from regionspot.evaluation.report.sheet import CaptionedImage, contact_sheet


def grey(width=640, height=480):
    return Image.new("RGB", (width, height), (128, 128, 128))


def box(*corners):
    return np.array(corners, np.float32)


@pytest.fixture
def labels(monkeypatch):
    """Positions of the labels, in pixels of the canvas, in drawing order."""
    positions = []
    original = drawing._label_position

    def record(*arguments):
        positions.append(original(*arguments))
        return positions[-1]

    monkeypatch.setattr(drawing, "_label_position", record)
    return positions


def overlap(one, other):
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0, width) * max(0, height)


def test_labels_of_crowded_boxes_do_not_overlap(labels):
    crowd = [
        LabelledRegion(box(200 + 9 * k, 200 + 7 * k, 260 + 9 * k, 250 + 7 * k), f"thing number {k}") for k in range(8)
    ]
    draw_regions(grey(), crowd)
    pairs = [(i, j) for i in range(8) for j in range(i)]
    assert sum(overlap(labels[i], labels[j]) for i, j in pairs) == 0


def test_labels_do_not_cover_masks(labels):
    y, x = np.mgrid[:480, :640]
    discs = [(110, 120, 100), (330, 120, 100), (540, 130, 90), (120, 360, 105), (350, 350, 110), (560, 360, 70)]
    masks = [(x - cx) ** 2 + (y - cy) ** 2 < r * r for cx, cy, r in discs]
    crowd = [
        LabelledRegion(box(cx - r, cy - r, cx + r, cy + r), f"checkered purple disc 0.9{k}", mask)
        for k, ((cx, cy, r), mask) in enumerate(zip(discs, masks, strict=True))
    ]
    draw_regions(grey(), crowd)
    for number, (left, top, right, bottom) in enumerate(labels):
        assert not any(mask[int(top) : int(bottom) + 1, int(left) : int(right) + 1].any() for mask in masks)
        assert not any(overlap(labels[number], other) for other in labels[:number])


def test_a_label_away_from_its_box_is_connected_by_a_line(labels):
    everywhere = np.ones((480, 640), bool)
    everywhere[:, 440:] = False
    drawn = draw_regions(grey(), [LabelledRegion(box(10, 200, 60, 250), "far", everywhere, (255, 0, 0))])
    assert labels[0][0] >= 440
    row = np.asarray(drawn)[200:260, 300]
    assert (row == (255, 0, 0)).all(axis=-1).any()


def test_labels_stay_inside_the_image(labels):
    corners = [box(0, 0, 30, 20), box(610, 0, 640, 20), box(0, 470, 20, 480), box(600, 440, 640, 480)]
    draw_regions(grey(), [LabelledRegion(corner, "a name that is rather long") for corner in corners])
    for left, top, right, bottom in labels:
        assert left >= 0
        assert top >= 0
        assert right <= 639
        assert bottom <= 479


def test_a_label_does_not_cover_a_small_box_next_to_it(labels):
    draw_regions(
        grey(), [LabelledRegion(box(100, 100, 300, 300), "plate"), LabelledRegion(box(100, 85, 130, 98), "pea")]
    )
    pea = (100, 85, 130, 98)
    assert max(overlap(label, pea) for label in labels) < 0.5 * 30 * 13


def test_the_font_grows_with_the_image(labels):
    draw_regions(grey(640, 480), [LabelledRegion(box(10, 60, 60, 90), "dog")])
    draw_regions(grey(2560, 1920), [LabelledRegion(box(10, 60, 60, 90), "dog")])
    small, large = (position[3] - position[1] for position in labels)
    assert large > 3 * small


def test_a_small_image_is_enlarged():
    assert draw_regions(grey(160, 120), []).size == (640, 480)
    assert draw_regions(grey(700, 500), []).size == (700, 500)


def test_a_name_wider_than_the_image_is_shortened():
    pen, font = ImageDraw.Draw(grey()), drawing.font_for((640, 480))
    shortened = drawing._shortened(pen, "word " * 80, font, 300)
    assert shortened.endswith("...")
    assert pen.textlength(shortened, font=font) <= 300


def test_masks_tint_only_their_pixels():
    mask = np.zeros((480, 640), bool)
    mask[100:200, 100:200] = True
    drawn = np.asarray(draw_regions(grey(), [LabelledRegion(box(300, 300, 400, 400), "red thing", mask, (255, 0, 0))]))
    assert drawn[150, 150, 0] > 150
    assert drawn[150, 150, 1] < 110
    assert drawn[250, 250].tolist() == [128, 128, 128]


def test_every_name_has_its_own_colour():
    palette = colours_of(["cup", "bowl", "cup", *(f"class {k}" for k in range(10))])
    assert len(set(palette.values())) == len(palette) == 12
    colours = np.array(list(palette.values()), float)
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + 1000 * np.eye(12)
    assert distances.min() > 40


def test_boxes_at_the_edge_and_smaller_than_a_pixel_can_be_drawn():
    draw_regions(
        grey(), [LabelledRegion(box(639.5, 479.5, 640, 480), "dust"), LabelledRegion(box(0, 0, 0.2, 0.2), "speck")]
    )


def test_a_sheet_contains_every_image():
    cells = [CaptionedImage(Image.new("RGB", (100, 50 + 10 * k), (40 * k, 0, 200)), f"image {k}") for k in range(5)]
    sheet = contact_sheet(cells, columns=2, cell=200, title="all of them")
    pixels = np.asarray(sheet).reshape(-1, 3)
    for k in range(5):
        assert (pixels == (40 * k, 0, 200)).all(axis=1).sum() >= 200 * (100 + 20 * k)


def test_labels_of_a_large_image_neither_overlap_nor_leave_it(labels):
    crowd = [LabelledRegion(box(3600 + 9 * k, 2800 + 7 * k, 3990, 2990), f"thing number {k}") for k in range(8)]
    draw_regions(grey(4001, 3001), crowd)
    assert all(0 <= left < right <= 4000 and 0 <= top < bottom <= 3000 for left, top, right, bottom in labels)
    assert sum(overlap(labels[i], labels[j]) for i in range(8) for j in range(i)) == 0
