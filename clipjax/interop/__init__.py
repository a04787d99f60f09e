"""Other people's weights in, ours out."""

from clipjax.interop.convert import import_weights as import_weights
from clipjax.interop.exports import export_weights as export_weights
