"""Structured output: the sampler may only pick tokens after which the text can still become what the request asked for.

grammars.py   a request's form (JSON schema, regex, choices, grammar) -> the grammar library's own text
compiler.py   GrammarCompiler: compiles that, with limits, off the engine's thread, and remembers the last ones
masks.py      GrammarMasks: the logits processor that follows each request through its grammar

The parsing is done by llguidance (extra `guided`): it never accepted an invalid instance where others ignore parts of a schema, and
it compiles in milliseconds. A schema that it can't honour completely is refused, not approximated.

Left out so far: tokens that the grammar forces are sampled one at a time like any other, and masks are filled between the model
and the sampler, not while the model runs.
"""

from minfer.guided.compiler import Grammar, GrammarCompiler
from minfer.guided.masks import GrammarMasks

__all__ = ["Grammar", "GrammarCompiler", "GrammarMasks"]
