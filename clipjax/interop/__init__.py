"""Other people's weights in, ours out."""

from clipjax.interop.convert import export_weights as export_weights
from clipjax.interop.convert import import_weights as import_weights
