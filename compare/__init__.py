"""compare: the same workloads through minfer and its peers, in one run, on one machine, honestly.

`python -m compare --against vllm,llamacpp` is the front door; `PROTOCOL.md` beside this file states the rules that the code
enforces. This package stands beside minfer and uses only its public API, as any user would.
"""
