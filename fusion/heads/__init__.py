"""What can be trained from a cache: the fusion head, simpler heads to compare it with, and anybody's own.

A head is a torch module that maps the regions of a batch of images to vectors in the text encoder's space:

    head = MyHead(token_dim=C, width=D, text_dim=E, **options)
    vectors = head(tokens, region_mask, feature_map, boxes)

    tokens       (B, R, C)  location tokens, any float dtype; padding is 0
    region_mask  (B, R)     bool, False for padding; None: no padding
    feature_map  (B, T, D)  any float dtype; class token first, then the patches of the whole image, which the encoder
                            resized to a square, in row-major order
    boxes        (B, R, 4)  float32 x1, y1, x2, y2, divided by the width and height of the image: 0 to 1, padding 0. In
                            patches a box is boxes * sqrt(T - 1)
    vectors      (B, R, E)  any float dtype, not normalised; those of padding are ignored, but must be finite

Training and evaluation compare the vectors with the text embeddings of class names, so that every head names regions
of classes which it has never seen. The vectors of an image must not depend on the other images of its batch. In
training mode a head may return `(vectors, loss)`: a scalar that is added to the loss of the batch, which is a sum over
its images.

B images, R regions (padded), C location token, T feature map tokens, D width, E text embedding
"""

from regionspot.fusion.heads.spec import HEAD_TYPES, HeadSpec

__all__ = ["HEAD_TYPES", "HeadSpec"]
