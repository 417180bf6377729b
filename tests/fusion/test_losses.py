"""The loss in detail: repeated regions as the authors', classes that count, classes that are ignored."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from regionspot.fusion.head import FusionHead, HeadConfig, similarity_logits
from regionspot.fusion.losses import focal_loss, region_loss
from regionspot.fusion.training.batches import repeated_regions

CLASSES = 9


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TEXT = F.normalize(rand(CLASSES, 8, seed=1), dim=-1)


def padded_batch(counts):
    """Tokens, mask, maps and categories of images with that many regions; padding is 0 and -1."""
    slots = torch.arange(max(counts))
    mask = slots < torch.tensor(counts)[:, None]
    tokens = rand(*mask.shape, 6, seed=2) * mask[..., None]
    categories = torch.where(mask, (slots * 5 + torch.tensor(counts)[:, None]) % CLASSES, -1)
    return tokens, mask, rand(len(counts), 4, 16, seed=3), categories


@pytest.fixture
def head():
    torch.manual_seed(0)
    return FusionHead(HeadConfig(token_dim=6, width=16, text_dim=8, layers=2, heads=2, ffn=32, dropout=0.0))


def loss_and_gradients(head, loss):
    gradients = torch.autograd.grad(loss, list(head.parameters()))
    return loss.item(), dict(zip(dict(head.named_parameters()), gradients, strict=True))


def authors_loss(head, counts):
    """util/preprocessing.py and modeling/regionspot.py of Surrey-UP-Lab/RegionSpot, image by image."""
    tokens, mask, maps, categories = padded_batch(counts)
    repeated_tokens, repeated_labels = [], []
    for image, number in enumerate(counts):
        times, more = divmod(max(counts), number)
        repeats = torch.tensor([times] * (number - more) + [times + 1] * more)
        repeated_tokens.append(torch.repeat_interleave(tokens[image, mask[image]], repeats, dim=0))
        repeated_labels.append(torch.repeat_interleave(categories[image, mask[image]], repeats, dim=0))
    logits = similarity_logits(head(torch.stack(repeated_tokens), None, maps), TEXT)
    targets = F.one_hot(torch.stack(repeated_labels), CLASSES).float()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probability = logits.sigmoid()
    probability_of_target = probability * targets + (1 - probability) * (1 - targets)
    loss = cross_entropy * (1 - probability_of_target) ** 2 * (0.25 * targets + 0.75 * (1 - targets))
    regions = logits.shape[1]
    return loss_and_gradients(head, loss.mean(1).sum() / regions * regions)


def our_loss(head, counts, *, repeat):
    tokens, mask, maps, categories = padded_batch(counts)
    if repeat:
        images, regions = torch.arange(len(mask))[:, None], torch.from_numpy(repeated_regions(mask.numpy()))
        tokens, mask, categories = tokens[images, regions], mask[images, regions], categories[images, regions]
        assert mask.all()
    return loss_and_gradients(head, region_loss(head(tokens, mask, maps), TEXT, categories))


@pytest.mark.parametrize("counts", [(3, 7), (1, 5, 2), (4, 4), (10, 1, 9, 3)])
def test_repeated_regions_give_the_loss_and_the_gradients_of_the_authors(head, counts):
    loss, gradients = our_loss(head, counts, repeat=True)
    authors, of_authors = authors_loss(head, counts)
    assert loss == pytest.approx(authors, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, of_authors[name], rtol=1e-4, atol=1e-4, msg=name)


def test_masks_give_another_loss_than_repeated_regions_unless_all_counts_are_equal(head):
    """By 0.6 % for these 3 and 7 regions: 7 slots cannot hold 3 regions equally often."""
    masked, repeated = (our_loss(head, (3, 7), repeat=repeat)[0] for repeat in (False, True))
    assert 0.001 < abs(masked / repeated - 1) < 0.03
    masked, repeated = (our_loss(head, (4, 4), repeat=repeat)[0] for repeat in (False, True))
    assert masked == pytest.approx(repeated, rel=1e-6)


def test_every_region_is_repeated_in_a_row_and_the_last_ones_once_more():
    mask = np.arange(7) < np.array([3, 7, 5, 1])[:, None]
    assert repeated_regions(mask).tolist() == [
        [0, 0, 1, 1, 2, 2, 2],
        [0, 1, 2, 3, 4, 5, 6],
        [0, 1, 2, 3, 3, 4, 4],
        [0, 0, 0, 0, 0, 0, 0],
    ]
    assert not np.take_along_axis(
        np.zeros((1, 7), np.bool_), repeated_regions(np.zeros((1, 7), np.bool_)), axis=1
    ).any()


def test_values_where_no_region_is_known_change_neither_the_loss_nor_its_gradient():
    """A head may give NaN for padding, whose box has no area."""
    categories = torch.tensor([[0, 3, -1], [2, -1, -1]])
    results = []
    for value in (0.0, float("nan")):
        semantic = torch.where(categories[..., None] >= 0, rand(2, 3, 8), value).requires_grad_()
        loss = region_loss(semantic, TEXT, categories)
        results.append((loss, *torch.autograd.grad(loss, semantic)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][1].isfinite().all()


def test_only_the_given_classes_count_in_any_order():
    semantic, categories = rand(2, 3, 8), torch.tensor([[7, 3, -1], [5, 7, 7]])
    class_ids = torch.tensor([5, 7, 1, 3])
    loss = region_loss(semantic, TEXT, categories, class_ids=class_ids)
    expected = region_loss(semantic, TEXT[class_ids], torch.tensor([[1, 3, -1], [0, 1, 1]]))
    assert torch.equal(loss, expected)
    assert loss < region_loss(semantic, TEXT, categories)


def test_a_class_of_the_batch_that_is_not_among_the_given_ones_is_an_error():
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        region_loss(rand(1, 1, 8), TEXT, torch.tensor([[4]]), class_ids=torch.tensor([5, 7]))


def test_an_ignored_class_is_no_negative_for_its_image_but_counts_for_its_own_regions():
    semantic, categories = rand(2, 2, 8), torch.tensor([[0, 1], [0, 1]])
    ignored = torch.zeros(2, CLASSES, dtype=torch.bool)
    ignored[0, 1:] = True  # of image 0: all classes except 0
    logits = similarity_logits(semantic, TEXT)
    only_positive = focal_loss(logits[0, :, :1], torch.zeros(2, dtype=torch.long))  # class 0 is the only one
    as_negative = focal_loss(logits[0, 1:, :2], torch.ones(1, dtype=torch.long))  # class 1, with class 0 as negative
    whole = focal_loss(logits[1], categories[1])
    loss = region_loss(semantic, TEXT, categories, ignored=ignored)
    torch.testing.assert_close(loss, (only_positive[0] + as_negative[0] + whole.sum()) / 2)


def test_the_classes_that_are_ignored_are_in_the_order_of_the_given_ones():
    semantic, categories = rand(1, 2, 8), torch.tensor([[7, 7]])
    class_ids, ignored = torch.tensor([2, 7, 4]), torch.tensor([[False, False, True]])
    loss = region_loss(semantic, TEXT, categories, class_ids=class_ids, ignored=ignored)
    torch.testing.assert_close(loss, region_loss(semantic, TEXT, categories, class_ids=torch.tensor([2, 7])))
