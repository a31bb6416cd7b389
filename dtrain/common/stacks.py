"""How a worker asks a trainer where it stands: the signal, and the file that it answers in.

A rank that is stuck runs no code of ours any more, so the answer is written by a handler in C (faulthandler), which
needs neither the interpreter's lock nor the main thread. The trainer makes the file first and then listens; whoever
finds no file sends no signal, because a process that does not listen would be ended by it.
"""

STACKS_FILE = "stacks"  # in the rank's folder; each answer is added at its end
STACKS_SIGNAL = 57  # SIGRTMAX - 7: libraries take real-time signals from either end
STACK_MAX_CHARS = 1500  # of one rank's stack as it is reported: its newest frames
