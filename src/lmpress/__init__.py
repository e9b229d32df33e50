"""lmpress: SVD, structured pruning, sparsity and quantization of language models in one recipe.

`import lmpress` registers the checkpoint format with transformers, so that
`AutoModelForCausalLM.from_pretrained` loads what `lmpress.compress` wrote.
"""

from lmpress.api import Comparison, Compressed, compare, compress, evaluate, load, plan
from lmpress.checkpoint import register
from lmpress.errors import LmpressError, RequestError
from lmpress.recipes import Recipe, load_recipe
from lmpress.version import __version__

register()

__all__ = [
    "Comparison",
    "Compressed",
    "LmpressError",
    "Recipe",
    "RequestError",
    "__version__",
    "compare",
    "compress",
    "evaluate",
    "load",
    "load_recipe",
    "plan",
]
