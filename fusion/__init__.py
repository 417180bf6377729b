"""The fusion head, its loss, vocabularies, and training from a cache. Never opens an image."""

from regionspot.fusion.checkpoint import Checkpoint, HeadInfo, load_checkpoint, save_checkpoint
from regionspot.fusion.head import HEADS, FusionHead, HeadConfig, similarity_logits
from regionspot.fusion.heads import HEAD_TYPES, HeadSpec
from regionspot.fusion.losses import focal_loss, region_loss
from regionspot.fusion.templates import TEMPLATES, template_set
from regionspot.fusion.training.config import TRAIN_PRESETS, TrainConfig
from regionspot.fusion.training.train import TrainResult, train
from regionspot.fusion.vocabulary import Vocabulary, build_vocabulary

__all__ = [
    "HEADS",
    "HEAD_TYPES",
    "TEMPLATES",
    "TRAIN_PRESETS",
    "Checkpoint",
    "FusionHead",
    "HeadConfig",
    "HeadInfo",
    "HeadSpec",
    "TrainConfig",
    "TrainResult",
    "Vocabulary",
    "build_vocabulary",
    "focal_loss",
    "load_checkpoint",
    "region_loss",
    "save_checkpoint",
    "similarity_logits",
    "template_set",
    "train",
]
