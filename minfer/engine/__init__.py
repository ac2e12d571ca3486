"""The engine: `EngineCore` is the loop (ids in, ids out), `Engine` adds text around it, `LLM` and `AsyncLLM` drive it."""
