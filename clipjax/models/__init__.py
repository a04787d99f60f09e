"""Models: what joins towers."""

from clipjax.models.base import Model as Model
from clipjax.models.dual_encoder import DualEncoder as DualEncoder
from clipjax.models.lora import Lora as Lora
