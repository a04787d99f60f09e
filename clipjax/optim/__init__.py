"""Optimizers, schedules, per-path groups, averaging of the weights."""

from clipjax.optim.duration import Duration as Duration
from clipjax.optim.duration import Every as Every
from clipjax.optim.duration import Scale as Scale
from clipjax.optim.ema import Ema as Ema
from clipjax.optim.guard import SpikeGuard as SpikeGuard
from clipjax.optim.optimizers import SGD as SGD
from clipjax.optim.optimizers import Adafactor as Adafactor
from clipjax.optim.optimizers import AdamW as AdamW
from clipjax.optim.optimizers import Group as Group
from clipjax.optim.optimizers import Lion as Lion
from clipjax.optim.optimizers import Muon as Muon
from clipjax.optim.optimizers import Optimizer as Optimizer
from clipjax.optim.schedules import Constant as Constant
from clipjax.optim.schedules import Cosine as Cosine
from clipjax.optim.schedules import Linear as Linear
from clipjax.optim.schedules import ReciprocalSqrt as ReciprocalSqrt
from clipjax.optim.schedules import Schedule as Schedule
from clipjax.optim.schedules import WarmupStableDecay as WarmupStableDecay
