"""Published formats of quantised weights: which tensors a matrix is stored as, and what they mean.

`read_quantisation` takes the `quantization_config` of a `config.json`, and says of each module how
it is stored: a `Format`, or None where it is dense.
"""

from checkpoints.formats.choose import Quantisation, read_quantisation
from checkpoints.formats.common import Field, Format

__all__ = ["Field", "Format", "Quantisation", "read_quantisation"]
