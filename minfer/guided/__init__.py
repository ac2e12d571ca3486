"""Structured output: the sampler may only pick tokens after which the text can still become what the request asked for.

library.py    Library, Matcher: what is asked of a grammar library; llguidance_library.py, xgrammar_library.py: the two there are
grammars.py   a request's form (JSON schema, regex, choices, grammar) -> llguidance's own text
compiler.py   GrammarCompiler: compiles that, with limits, off the engine's thread, and remembers the last ones
masks.py      GrammarMasks: the logits processor that follows each request through its grammar

The parsing is done by llguidance (extra `guided`), if nothing else is asked for: it never accepted an invalid instance where others ignore
parts of a schema, and it compiles in milliseconds. A schema that it can't honour completely is refused, not approximated.

Tokens that a grammar forces enter the next step as drafts (`speculative/forced.py`). On a GPU masks are filled while the device
computes, because kernels are launched ahead; on a CPU the model and the masks want the same cores.
"""

from minfer.guided.compiler import Grammar, GrammarCompiler
from minfer.guided.masks import GrammarMasks

__all__ = ["Grammar", "GrammarCompiler", "GrammarMasks"]
