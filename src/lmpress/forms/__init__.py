"""What a compressed weight is: a small expression over tensors."""

from lmpress.forms.base import Form, Part, form_from_description
from lmpress.forms.dense import Dense, in_storage
from lmpress.forms.entropy_coded import EntropyCoded, coded_bits, decode_all
from lmpress.forms.linear import CompressedEmbedding, CompressedLinear
from lmpress.forms.low_rank import LowRank
from lmpress.forms.packing import pack_codes, packed_width, unpack_codes
from lmpress.forms.pattern import Bitmap, NofM, Pattern
from lmpress.forms.pivoted import Pivoted
from lmpress.forms.quantized import Quantized
from lmpress.forms.scaled_codes import ScaledCodes
from lmpress.forms.sparse import Sparse
from lmpress.forms.sum import Sum

__all__ = [
    "Bitmap",
    "CompressedEmbedding",
    "CompressedLinear",
    "Dense",
    "EntropyCoded",
    "Form",
    "LowRank",
    "NofM",
    "Part",
    "Pattern",
    "Pivoted",
    "Quantized",
    "ScaledCodes",
    "Sparse",
    "Sum",
    "coded_bits",
    "decode_all",
    "form_from_description",
    "in_storage",
    "pack_codes",
    "packed_width",
    "unpack_codes",
]
