"""What a compressed weight is: a small expression over tensors."""

from lmpress.forms.base import Form, form_from_description
from lmpress.forms.dense import Dense
from lmpress.forms.linear import CompressedEmbedding, CompressedLinear
from lmpress.forms.low_rank import LowRank
from lmpress.forms.packing import pack_codes, packed_width, unpack_codes
from lmpress.forms.quantized import Quantized
from lmpress.forms.sum import Sum

__all__ = [
    "CompressedEmbedding",
    "CompressedLinear",
    "Dense",
    "Form",
    "LowRank",
    "Quantized",
    "Sum",
    "form_from_description",
    "pack_codes",
    "packed_width",
    "unpack_codes",
]
