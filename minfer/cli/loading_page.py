"""`python -m minfer.cli.loading_page > docs/loading.md`: what can be read and how, made from the tables that the readers go by."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import numpy as np

from minfer.config import CALIBRATED
from minfer.loader.gguf import PLAIN
from minfer.loader.quantize_on_load import RECIPES
from minfer.quant.gguf import unpack_gguf
from minfer.quant.readers import INSTEAD, METHODS

INTRO = """# What minfer loads, and how

This page is made from the code: `python -m minfer.cli.loading_page > docs/loading.md`.

Weights come from safetensors folders in Hugging Face's layout and from GGUF files; pickled weights are never loaded. A quantised
matrix stays as the file packs it, nothing is rounded again. A backend without a kernel for its element and group dequantises it once,
at load, to the model's type; the log line `kernels: linear[...]=dequantised to ...` says so, and `--quant none` asks for that everywhere.
Whatever is damaged is refused with a sentence that names the file and the tensor, numbers that are not finite among it.

## Quantised safetensors folders

The method is read from `quantization_config` in config.json, or from the file that older tools wrote beside it; no flag is needed.
Scales may be of the matrix, a row, a group, or a block of rows and inputs. A measured scale of the inputs (`input_scale`) is accepted and
not used: inputs meet the weights as they are, or rounded to int8 under a scale found on the spot.
"""
GGUF_INTRO = """
## GGUF

"packed" types keep their codes and scales exactly (an element wider than the file's holds the same codes); the others are dequantised
by the gguf package while they are read.
"""
QUANT_INTRO = f"""
## `--quant`

`auto` (the default) runs a checkpoint as it is, `none` dequantises it. A name below runs a checkpoint that is so already as it is, refuses
one that is quantised otherwise (a GGUF file is rounded again, and the log says so), and quantises an unquantised one: matrix by matrix
while it loads, or for {", ".join(CALIBRATED)} once beforehand, calibrated on texts the model writes itself. The result is kept under
`$MINFER_CACHE` (else `$XDG_CACHE_HOME/minfer`, else `~/.cache/minfer`), keyed by the weight files and the settings; a damaged entry is
noticed and made again. The folder may be deleted at any time; `minfer env` says how large it is.

The embedding and the output head are left as they are: rounding them shows most, and in a large model they are a few percent of
the weights. With `--load-format dummy` the packed weights are random.
"""


def page() -> str:
    return "\n".join([INTRO, *_methods(), GGUF_INTRO, *_gguf_types(), QUANT_INTRO, *_recipes()]) + "\n"


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows)]


def _methods() -> list[str]:
    names: dict[object, list[str]] = {}
    for name, reader in METHODS.items():
        names.setdefault(reader, []).append(f"`{name}`")
    read = [(", ".join(found), (sys.modules[str(reader.__module__)].__doc__ or "").partition("\n")[0]) for reader, found in names.items()]
    refused = [(f"`{name}`", f"not read: {instead}") for name, instead in INSTEAD.items()]
    return _table(("`quant_method`", "What is read"), [*sorted(read), *sorted(refused)])


def _gguf_types() -> list[str]:
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    rows = []
    for kind, (block, size) in GGML_QUANT_SIZES.items():
        data = np.zeros((1, size), np.uint8)
        packed = unpack_gguf(kind.name, data)
        if packed is not None:
            how = f"packed: {packed.scheme.element}, groups of {packed.scheme.group_size}" + (", minima" if packed.mins is not None else "")
        elif kind.name in PLAIN:
            how = "plain"
        else:
            try:
                dequantize(data, kind)
                how = "dequantised"
            except NotImplementedError:
                how = "refused by name"
        rows.append((kind.name, f"{8 * size / block:.4g}", how))
    return _table(("Type", "Bits a weight", "In memory"), rows)


def _recipes() -> list[str]:
    rows: list[tuple[str, str, str, str]] = []
    for name, recipe in RECIPES.items():
        groups = f"groups of {', else '.join(map(str, recipe.groups))}" if recipe.groups else "one scale a row"
        rows.append((f"`{name}`", recipe.element, groups, "symmetric" if recipe.symmetric else "minima"))
    rows += [(f"`{name}`", "int8, inputs int8" if name == "smoothquant" else "int4", "see `minfer quantize`", "") for name in CALIBRATED]
    return _table(("`--quant`", "Element", "Scales", ""), rows)


if __name__ == "__main__":
    print(page(), end="")
