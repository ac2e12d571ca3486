"""Load on a server, as its worst day would bring it; `python -m compare.load --help`.

exchange.py     one request over one connection, byte by byte, and what became of it
crowd.py        who asks for what: streams, whole answers, those who leave, who don't read, who send nonsense
drive.py        many of them at once, closed loop or open, and what they found
server.py       the server as a process of its own, its memory, its gauges
__main__.py     the experiments: mixed, overload, offline
"""
