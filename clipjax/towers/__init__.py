"""Towers: modules that turn images or texts into tokens and one pooled vector."""

from clipjax.towers.base import Tower as Tower
from clipjax.towers.base import describe as describe
from clipjax.towers.base import with_fields as with_fields
from clipjax.towers.quantized import Quantize as Quantize
from clipjax.towers.resnet import ResNet as ResNet
from clipjax.towers.text import TextTransformer as TextTransformer
from clipjax.towers.vit import ViT as ViT
