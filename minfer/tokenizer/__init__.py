"""Tokenizers: text to ids and back, chat templates, streamed text and stop strings.

tokenizer.py      Tokenizer, the class that everything above uses
folder.py gguf_vocab.py spm.py   readers: a Hugging Face folder, GGUF metadata, SentencePiece's tokenizer.model
pretokenizers.py  GGUF's names for splitting rules
token_bytes.py detokenizer.py   ids to bytes to text, never half a character
stop.py           stop strings across pieces of text
chat.py chat_worker.py text_only.py   chat templates, in a process of their own; special tokens in messages stay text
"""

from minfer.tokenizer.detokenizer import IncrementalDetokenizer
from minfer.tokenizer.stop import StopMatcher
from minfer.tokenizer.tokenizer import Tokenizer

__all__ = ["IncrementalDetokenizer", "StopMatcher", "Tokenizer"]
