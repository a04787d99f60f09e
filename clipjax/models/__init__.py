"""Models: what joins towers."""

from clipjax.models.base import Encoders as Encoders
from clipjax.models.base import Model as Model
from clipjax.models.coca import CaptionDecoder as CaptionDecoder
from clipjax.models.coca import CoCa as CoCa
from clipjax.models.coca import Poolers as Poolers
from clipjax.models.dual_encoder import DualEncoder as DualEncoder
from clipjax.models.dual_encoder import Encoder as Encoder
from clipjax.models.dual_encoder import MultiEncoder as MultiEncoder
from clipjax.models.fusion import FusionEncoder as FusionEncoder
from clipjax.models.heads import Head as Head
from clipjax.models.heads import Headed as Headed
from clipjax.models.heads import MlpHead as MlpHead
from clipjax.models.lora import Lora as Lora
